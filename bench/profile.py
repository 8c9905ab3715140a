"""``python -m bench profile``: NVIDIA's Nsight Compute (``ncu``) over each CUDA kernel, with empty caches."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable

import torch

from bench import cases, kernels
from bench.cases import LAYERS, Case, Layer, even, rows
from bench.harness import OURS, BenchError, Context, device_of
from bench.records import ROOT
from bench.suites import apply, generate
from bench.timing import Call

SECTIONS = "SpeedOfLight MemoryWorkloadAnalysis ComputeWorkloadAnalysis WarpStateStats LaunchStats Occupancy".split()
KERNELS = "regex:^(lora_grad|lora|trunk|head)_kernel$"
OPTIONS = (
    *("--config-file", "off", "--target-processes", "all", "--profile-from-start", "off"),
    *("--kernel-name-base", "function", "--kernel-name", KERNELS),
    *("--replay-mode", "kernel", "--cache-control", "all", "--clock-control", "none"),
    *(word for section in SECTIONS for word in ("--section", section)),
)


def profiled(full: bool) -> dict[str, Callable[[Context], Call]]:
    """Name -> what makes the call, in order of worth."""
    generated = [("mistral-7b", n) for n in (1, 8, 64)] + [("llama-3.1-8b", 1)] if full else [("tiny", 2)]
    many = rows(*range(64))
    applied = [Case(LAYERS["tiny"], rows(0, 1)), Case(LAYERS["tiny"], even(32, 2))]
    if full:
        applied = [Case(LAYERS[name], of) for name in ("linear", "7b") for of in (many, rows(0))]
        applied += [Case(LAYERS["7b"], many, rank=16), Case(LAYERS["7b"], even(2048, 4))]
    trained = Case(LAYERS["linear"], even(512, 8)) if full else Case(Layer.linear(64), even(32, 2))
    found = {f"generate {of[0]} L bfloat16, {of[1]}": functools.partial(_generation, *of) for of in generated}
    operands = {f"apply {of.name}": lambda c, of=of: cases.operands(of, c.device.torch, seed=2).grouped() for of in applied}
    return found | operands | {f"gradients {trained.name}": functools.partial(_gradients, trained)}


def _generation(name: str, count: int, context: Context) -> Call:
    shape, net = generate.one_net(context, name, "bfloat16")
    return generate.preallocated(net, shape.task_embeddings(count, seed=3).to(context.device.torch))[0]


def _gradients(case: Case, context: Context) -> Call:
    (arguments,) = cases.operands(case, context.device.torch, seed=2).problems
    return apply.step(apply.DELTAS[OURS], arguments)


def command(only: str) -> None:
    """Run every case whose name contains ``only`` under ncu; BenchError where ncu fails or is not here."""
    ncu = kernels.find("ncu")
    for name in (name for name in profiled(full=True) if only in name):
        print(f"\n{name}", flush=True)
        done = subprocess.run([ncu, *OPTIONS, sys.executable, "-m", "bench.profile", name], cwd=ROOT)
        if done.returncode:
            raise BenchError(f"ncu: exit status {done.returncode}; its message is above")


def main(name: str) -> None:
    """The process that ncu watches: one call of a case, after one that it does not see."""
    context = Context.of("full", 1, device_of("cuda"))
    call = profiled(context.full)[name](context)
    call()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    call()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
