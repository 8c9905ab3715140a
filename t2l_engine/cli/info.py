"""``t2l info``: this build and machine."""

from __future__ import annotations

import sys
from typing import Any

import typer

from t2l_engine.cli.common import Json, print_json


def info(as_json: Json = False) -> None:
    """This build and machine: versions, kernels, instruction set, threads, bundled checkpoints."""
    about = _collect()
    if as_json:
        print_json(about)
        return
    typer.echo(f"t2l_engine {about['t2l_engine']}, torch {about['torch']}, Python {about['python']}")
    native = "loaded" if about["native_library"] else "not in use: every op runs its plain-torch reference"
    typer.echo(f"native library: {native}")
    build = about["build"]
    if build is None:
        typer.echo("build details: unknown (_core was not built: pybind11 was absent)")
    else:
        typer.echo(f"build: {build['version']}, {build['build_type']}, compiler {build['compiler']}")
        typer.echo(f"CUDA kernels: {build['cuda']}")
        isas = about["instruction_sets"]
        typer.echo(f"instruction set: {isas['chosen']} (this CPU has {', '.join(isas['available'])})")
    typer.echo(f"threads: {about['threads']}")
    typer.echo("ops (native: float32 and bfloat16, on CUDA float16 too; other dtypes run the reference):")
    for name, runs in about["ops"].items():
        typer.echo(f"  {name:24} CPU {runs['CPU']:9}  CUDA {runs['CUDA']}")
    typer.echo(f"bundled checkpoints: {', '.join(about['bundled_checkpoints']) or 'none'}")


def _collect() -> dict[str, Any]:
    import torch

    import t2l_engine
    from t2l_engine import ops
    from t2l_engine.checkpoint_folder import bundled_checkpoints

    try:
        from t2l_engine import _core
    except ImportError:
        build, isas = None, None
    else:
        build = dict(_core.build_info())
        isas = {"chosen": _core.chosen_isa(), "available": list(_core.available_isas())}
    return {
        "t2l_engine": t2l_engine.__version__,
        "torch": str(torch.__version__),
        "python": sys.version.split()[0],
        "native_library": ops.NATIVE,
        "build": build,
        "instruction_sets": isas,
        "threads": torch.get_num_threads(),
        "ops": {
            name: {backend: "native" if ops.has_kernel(name, backend) else "reference" for backend in ("CPU", "CUDA")}
            for name in ops.SCHEMAS
        },
        "bundled_checkpoints": bundled_checkpoints(),
    }
