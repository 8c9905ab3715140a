"""The machine: card, driver, versions, and which ops have CUDA kernels."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from bench.gpu.context import Context, Skip
from bench.gpu.nvml import Nvml

PACKAGES = ("triton", "transformers", "peft", "nvidia-ml-py", "numpy")


def run(context: Context) -> None:
    context.attempt("machine", lambda: _machine(context))


def _machine(context: Context):
    machine = {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
    }
    versions = {"torch": str(torch.__version__), "python": platform.python_version(), "cuda": torch.version.cuda}
    if context.on_card:
        machine |= _card()
        versions |= {"driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")}
        versions |= {"nvcc": _nvcc()}
        print(_output("nvidia-smi"))
    versions |= {name: _installed(name) for name in PACKAGES}
    context.part.set(machine=machine, versions=versions, kernels=_kernels(), expected=_expected(context))
    for key, value in (machine | versions | context.part.data["kernels"]).items():
        print(f"{key}: {value}")
    return ()


def _card() -> dict[str, Any]:
    p = torch.cuda.get_device_properties(torch.cuda.current_device())
    card = {
        "gpu": p.name,
        "gpu_memory_gib": round(p.total_memory / 2**30, 1),
        "multiprocessors": p.multi_processor_count,
        "l2_mib": p.L2_cache_size / 2**20,
        "compute_capability": f"{p.major}.{p.minor}",
        "gpus": torch.cuda.device_count(),
    }
    try:
        return card | {"nvml": Nvml().state()}
    except Skip as why:
        return card | {"nvml": str(why)}


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _kernels() -> dict[str, bool | str]:
    """Op -> whether a CUDA kernel is registered for it; the error of a library that does not load costs nothing else."""
    try:
        from t2l_engine import ops
    except ImportError as error:
        return {"t2l_engine": str(error)}
    return {name: ops.has_kernel(name, "CUDA") for name in ops.SCHEMAS}


def _expected(context: Context) -> list[dict[str, Any]]:
    """The bars that a whole run on this card has rows for."""
    try:
        from bench.gpu import generation, lora, model
    except ImportError:  # as above
        return []
    return [*lora.barred(context.device.l2_bytes), *generation.barred(), *model.barred()] if context.on_card else []


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _nvcc() -> str | None:
    places = [os.environ.get("CUDACXX"), "nvcc", os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "nvcc")]
    said = next(filter(None, (_output(place, "--version") for place in places if place)), None)
    return said and said.splitlines()[-2].rpartition(" ")[2]


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
