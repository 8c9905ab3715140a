"""``t2l info``: build and machine, and a self-check of the kernels."""

from __future__ import annotations

import dataclasses
import math
import sys
from typing import Annotated, Any

import torch
import typer

import t2l_engine
from t2l_engine import ops
from t2l_engine.cli.common import Json, print_json, say
from t2l_engine.hypernetwork.folder import bundled_checkpoints
from t2l_engine.ops import native
from t2l_engine.text import dtypes


def info(
    as_json: Json = False,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Compare every op with its float64 reference, on each instruction set of this CPU and on CUDA, and an "
            "adapter of smollm2-135m-paper with recorded values; exit status 1 on any difference.",
        ),
    ] = False,
) -> None:
    """Show build and machine: versions, kernels, instruction set, threads, bundled checkpoints."""
    about = _collect()
    if not as_json:
        _print(about)
    if check:
        about["check"] = _check(quiet=as_json)
    if as_json:
        print_json(about)
    wrong = [f"{r['what']} ({r['where']})" for r in about.get("check", ()) if r["failed"]]
    if wrong:
        say(f"check: {', '.join(wrong)}: beyond the allowed error")
        raise typer.Exit(1)


def _print(about: dict[str, Any]) -> None:
    typer.echo(f"t2l_engine {about['t2l_engine']}, torch {about['torch']}, Python {about['python']}")
    native = "loaded" if about["native_library"] else "not in use: every op runs its plain-torch reference"
    typer.echo(f"native library: {native}")
    if build := about["build"]:
        isas = about["instruction_sets"]
        typer.echo(
            f"build: {build['version']}, {build['build_type']}, compiler {build['compiler']}\n"
            f"CUDA kernels: {build['cuda']}\n"
            f"instruction set: {isas['chosen']} ({isas['why']})\n"
            f"available: {', '.join(isas['available'])}"
        )
    rates, dtype = about["matrix_products"], about["dtype"]
    typer.echo(
        f"threads: {about['threads']}\n"
        f"language models run in {dtype} unless --dtype says otherwise: torch's products reach {rates['bfloat16']:,.0f} "
        f"GFLOP/s in bfloat16, {rates['float32']:,.0f} in float32"
    )
    typer.echo("ops (native: float32 and bfloat16, on CUDA float16 too; other dtypes run the reference):")
    for name, runs in about["ops"].items():
        typer.echo(f"  {name:24} CPU {runs['CPU']:9}  CUDA {runs['CUDA']}")
    typer.echo(f"bundled checkpoints: {', '.join(about['bundled_checkpoints']) or 'none'}")


def _check(quiet: bool) -> list[dict[str, Any]]:
    """Results of all checks, printed one by one unless ``quiet``; ``worst`` is None if it is not finite."""
    from t2l_engine.testing import selfcheck

    if not quiet:
        typer.echo("check (error: the largest, as a fraction of the allowed one):")
    found = []
    for result in selfcheck.check_machine():
        if not quiet:
            typer.echo(f"  {result.what:24} {result.where:16} {result.cases:3} cases  error {result.worst:5.3f}  "
                       f"{'WRONG' if result.failed else 'ok'}")  # fmt: skip
            for text in result.failed:
                typer.echo(f"    {text}")
        entry = dataclasses.asdict(result)
        found.append(entry | {"worst": result.worst if math.isfinite(result.worst) else None})
    return found


def _collect() -> dict[str, Any]:
    about = native.about() or {"build": None, "instruction_sets": None}
    isas = about["instruction_sets"]
    if isas and (error := isas.pop("error")):
        raise ValueError(error)
    return {
        "t2l_engine": t2l_engine.__version__,
        "torch": str(torch.__version__),
        "python": sys.version.split()[0],
        "native_library": ops.NATIVE,
        "build": about["build"],
        "instruction_sets": isas,
        "threads": torch.get_num_threads(),
        "matrix_products": {name: round(rate, 1) for name, rate in dtypes.gflops().items()},
        "dtype": str(dtypes.preferred()).removeprefix("torch."),
        "ops": {
            name: {backend: "native" if ops.has_kernel(name, backend) else "reference" for backend in ("CPU", "CUDA")}
            for name in ops.SCHEMAS
        },
        "bundled_checkpoints": bundled_checkpoints(),
    }
