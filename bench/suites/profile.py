"""Why kernels take as long as they do: counters of a card, read by NVIDIA's Nsight Compute (``ncu``), a kernel a record.

A case runs in a process of its own, under ncu, which replays each launch with empty caches until it has all counters.  It
waits for a launch before it begins the next, so nothing overlaps: these durations are not those of the other suites.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from bench import cases, kernels
from bench.cases import LAYERS, Case, even, rows
from bench.harness import OURS, BenchError, Context, Record, Task, device_of, record
from bench.source import ROOT
from bench.suites import apply, generate
from bench.timing import Call

#: Field of a record -> counter of ncu, times what.
COUNTERS = {
    "us": ("gpu__time_duration.sum", 1e-3),
    "dram_read_mb": ("dram__bytes_read.sum", 1e-6),
    "dram_written_mb": ("dram__bytes_write.sum", 1e-6),
    "dram_percent": ("dram__throughput.avg.pct_of_peak_sustained_elapsed", 1),
    "l2_mb": ("lts__t_bytes.sum", 1e-6),
    "l2_percent": ("lts__t_sectors.avg.pct_of_peak_sustained_elapsed", 1),
    "l2_hits_percent": ("lts__t_sector_hit_rate.pct", 1),
    "tensor_percent": ("sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active", 1),
    "issue_percent": ("smsp__issue_active.avg.pct_of_peak_sustained_active", 1),
    "warps_percent": ("sm__warps_active.avg.pct_of_peak_sustained_active", 1),
    "cycles": ("sm__cycles_elapsed.max", 1),
    "active_cycles": ("sm__cycles_active.avg", 1),
}
#: Warps that wait for each of these, for every instruction that is issued.
STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
REASONS = (
    *("barrier", "branch_resolving", "dispatch_stall", "drain", "imc_miss", "lg_throttle", "long_scoreboard"),
    *("math_pipe_throttle", "membar", "mio_throttle", "misc", "no_instruction", "not_selected", "short_scoreboard"),
    *("sleeping", "tex_throttle", "wait"),
)
SHOWN_REASONS = 3
UNITS = {"us": ("ns", "nsecond"), "dram_read_mb": ("byte",), "dram_written_mb": ("byte",), "l2_mb": ("byte",)}
_NAMES = "(lora_grad|lora|trunk|head)_kernel"
KERNEL = re.compile(rf"\b{_NAMES}\b")


@dataclasses.dataclass(frozen=True)
class Profiled:
    """``kernels``: those that a call launches, in order; ``make``: the call, after whose first nothing is allocated anew."""

    name: str
    kernels: tuple[str, ...]
    make: Callable[[Context], Call]


def profiled(full: bool) -> list[Profiled]:
    """In order of worth."""
    tiny = LAYERS["tiny"]
    descriptions = [("mistral-7b", n) for n in (1, 8, 64)] + [("llama-3.1-8b", 1)] if full else [("tiny", 2)]
    one, many = rows(0), rows(*range(64))
    decode = [(name, of) for name in ("linear", "7b") for of in (many, one)] if full else []
    applied = [Case(LAYERS[name], of) for name, of in decode] if full else [Case(tiny, rows(0, 1)), Case(tiny, even(32, 2))]
    applied += [Case(LAYERS["7b"], many, rank=16), Case(LAYERS["7b"], even(2048, 4))] if full else []
    trained = Case(LAYERS["linear"], even(512, 8)) if full else Case(cases.Layer.linear(64), even(32, 2))
    return [
        *(
            Profiled(
                f"generate {name} L bfloat16, {n}",
                ("trunk_kernel", "head_kernel"),
                functools.partial(_generation, name=name, count=n),
            )
            for name, n in descriptions
        ),
        *(
            Profiled(f"apply {c.name}", ("lora_kernel",) * len(c.layer.groups), functools.partial(_application, case=c))
            for c in applied
        ),
        Profiled(
            f"gradients {trained.name}",
            ("lora_kernel", "lora_kernel", "lora_grad_kernel"),
            functools.partial(_gradients, case=trained),
        ),
    ]


def _generation(context: Context, name: str, count: int) -> Call:
    shape, net = generate.one_net(context, name, "bfloat16")
    return generate.preallocated(net, shape.task_embeddings(count, seed=3).to(context.device.torch))[0]


def _application(context: Context, case: Case) -> Call:
    return cases.operands(case, context.device.torch, seed=2).grouped()


def _gradients(context: Context, case: Case) -> Call:
    (arguments,) = cases.operands(case, context.device.torch, seed=2).members
    return apply.step(apply.DELTAS[OURS], arguments, torch.randn_like(arguments["y"]))


def plan(context: Context) -> list[Task]:
    if context.on_cpu:
        raise BenchError("profile: expected --device cuda, or emulator for its cases alone")
    return [Task.of(case.name, measured, context, case, needs=30.0) for case in profiled(context.full)]


def measured(context: Context, case: Profiled) -> Iterator[Record]:
    """A record for each launch; in the emulator, which has no counters, the call alone."""
    if not context.device.timed:
        case.make(context)()
        return
    for kernel, launch in zip(case.kernels, _launches(case, context.size), strict=True):
        yield record("profile", case=case.name, kernel=kernel, **launch)


def _launches(case: Profiled, size: str) -> list[Record]:
    """What ncu tells of the launches of ``case``, in order."""
    ncu = kernels.find("ncu")
    with tempfile.TemporaryDirectory() as folder:
        report, log = Path(folder, "made.ncu-rep"), Path(folder, "log.txt")
        command = [ncu, "--config-file", "off", "--target-processes", "all", "--profile-from-start", "off"]
        command += ["--kernel-name-base", "function", "--kernel-name", f"regex:^{_NAMES}$"]
        command += ["--replay-mode", "kernel", "--cache-control", "all", "--clock-control", "none"]
        command += ["--metrics", ",".join([*(of for of, _ in COUNTERS.values()), *map(STALL.format, REASONS)])]
        command += ["--force-overwrite", "--export", str(report), "--log-file", str(log)]
        done = subprocess.run(
            [*command, sys.executable, "-m", __name__, case.name, size], cwd=ROOT, capture_output=True, text=True
        )
        said = log.read_text(encoding="utf-8") if log.exists() else ""
        if done.returncode or not report.exists():  # it may leave no report, and say in its log why, with exit status 0
            why = [line for line in said.splitlines() if line.startswith(("==ERROR==", "==WARNING=="))]
            raise BenchError(f"ncu: exit status {done.returncode}: {' '.join(why) or done.stderr.strip()[-500:]}")
        read = [ncu, "--import", str(report), "--csv", "--page", "raw", "--print-units", "base"]
        text = subprocess.run(read, capture_output=True, text=True, check=True).stdout
    return launches_of(text, case.kernels)


def launches_of(text: str, expected: tuple[str, ...]) -> list[Record]:
    """The launches in a raw page of ncu in CSV; BenchError where they are not of ``expected`` kernels, or lack counters."""
    lines = text.splitlines()
    first = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    units, *found = list(csv.DictReader(lines[first:])) or [{}]
    names = tuple(match[0] if (match := KERNEL.search(one["Kernel Name"])) else one["Kernel Name"] for one in found)
    if names != expected:
        raise BenchError(f"ncu: expected launches of {', '.join(expected)}, got {', '.join(names) or 'none'}")
    for field, allowed in UNITS.items():
        if (unit := units.get(COUNTERS[field][0])) not in allowed:
            raise BenchError(f"ncu: {COUNTERS[field][0]}: expected the unit {' or '.join(allowed)}, got {unit!r}")
    return [_launch(one) for one in found]


def _launch(values: dict[str, str]) -> Record:
    """``stalls``: the most common reasons first; ``active_percent``: of an SM's cycles, those with a block."""

    def value(counter: str) -> float:
        try:
            return float(values[counter].replace(",", ""))
        except (KeyError, ValueError):
            raise BenchError(f"ncu: {counter}: expected a number, got {values.get(counter)!r}") from None

    made = {field: value(counter) * factor for field, (counter, factor) in COUNTERS.items()}
    made["active_percent"] = 100 * made.pop("active_cycles") / made.pop("cycles")
    stalls = {reason: value(STALL.format(reason)) for reason in REASONS}
    most = sorted(stalls, key=stalls.get, reverse=True)[:SHOWN_REASONS]
    rounded = {field: round(number, 3) for field, number in made.items()}
    return rounded | {"stalls": {reason: round(stalls[reason], 2) for reason in most}}


def main(name: str, size: str) -> None:
    """The process that ncu watches: one call of a case, after one that nothing is read of."""
    context = Context.of(size, 1, device_of("cuda"))
    (case,) = (case for case in profiled(context.full) if case.name == name)
    call = case.make(context)
    call()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    call()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
