"""Measure (``python -m bench SUITE``: generate, apply, documents, train, serving, icl, energy), compare, make pages."""

from __future__ import annotations

import functools
import importlib
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench import compare as comparing
from bench import harness
from bench.harness import OURS, BenchError, Context, Record
from bench.records import ROOT, ResultError, stem

app = typer.Typer(help=__doc__, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
DEFAULT_THREADS = torch.get_num_threads()
CONSOLE = Console(width=None if sys.stdout.isatty() else 160)
RESULTS = ROOT / "bench" / "results"
ABOUT = {
    "generate": "Generating adapters: hypernetworks of released shapes, the parts of a request, memory.",
    "apply": "Applying adapters: the op warm and cold, with gradients, in a language model.",
    "documents": "Documents: Doc-to-LoRA's hypernetwork, and adapters of higher rank for rows of many tokens.",
    "train": "Training through a frozen model: steps with an adapter a sample, memory, a library.",
    "serving": "Many adapters in one batch of vLLM on a CPU: its LoRA kernels and ours; needs vLLM in the environment.",
    "icl": "Examples in the prompt against generated adapters: closed forms, the paper's table, a model measured.",
    "energy": "Millijoules of a generated adapter and of a decoded token on a GPU; needs nvidia-ml-py.",
}
Threads = Annotated[int, typer.Option(min=1, help="threads of torch and of the kernels")]
Out = Annotated[Path | None, typer.Option(help="result file; default of a whole run: bench/results/SUITE[.CPU|-cuda].jsonl")]
Work = Annotated[Path, typer.Option(help="folder of the runs; interrupted ones go on there, finished ones are read")]


def measure(
    ctx: typer.Context,
    size: Annotated[Literal["tiny", "full"], typer.Option(help="tiny: small shapes, few rounds; not to be quoted")] = "full",
    device: Annotated[
        Literal["cpu", "cuda", "emulator"],
        typer.Option(help="emulator: the CUDA kernels on this CPU, verified and not timed; needs T2L_DISABLE_NATIVE=1"),
    ] = "cpu",
    threads: Threads = DEFAULT_THREADS,
    only: Annotated[str, typer.Option(help="only tasks whose name contains this")] = "",
    out: Out = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="go on with the result file; what it has is not run again")
    ] = False,
    tasks: Annotated[
        Path | None, typer.Option(help="of icl at size full: task folder with splits train, test; docs/icl.md")
    ] = None,
) -> None:
    """The command of every suite in ABOUT; a part of a suite is written only where ``--out`` says."""
    name, context = ctx.info_name, Context.of(size, threads, harness.device_of(device))
    if out is None and size == "full" and not only and device != "emulator":
        out = RESULTS / f"{stem(name, harness.machine(context))}.jsonl"
    plan = importlib.import_module("bench.icl" if name == "icl" else f"bench.suites.{name}").plan  # others stay unread
    if name == "icl":
        plan = functools.partial(plan, folder=tasks)
    bar = functools.partial(track, description=name, console=Console(stderr=True), transient=True)
    given = {"only": only, "out": out, "resume": resume, "progress": bar}
    CONSOLE.print(shown(harness.run(name, plan, context, command=spelled(ctx), **given)))


for suite, about in ABOUT.items():
    app.command(suite, help=about)(measure)


def spelled(ctx: typer.Context) -> str:
    """The command line of a run: no defaults, no places, nothing of how it was run."""
    words = ["python -m bench", ctx.info_name]
    for option in ctx.command.params:
        value = ctx.params.get(option.name)
        if option.name not in ("out", "resume") and value != option.default:
            words.append(option.opts[0])
            if not option.is_flag:
                words.append(option.name.upper() if isinstance(value, Path) else shlex.quote(str(value)))
    return " ".join(words)


def shown(records: Sequence[Record]) -> Table:
    """The rows of a run for the terminal."""
    made = Table("case", "ours, us", "roofline, us", "times ours", "error / bound", title=records[0]["command"])
    for row in (one for one in records if one["record"] == "row"):
        ours, least = row["times"][OURS].get("median_us"), row["roofline"] or {}
        others = [f"{n} {t['median_us'] / ours:.2f}" for n, t in row["times"].items() if ours and n != OURS]
        made.add_row(
            ", ".join(filter(None, [row["case"], row["cache"], f"{row['threads']} threads"])),
            f"{ours:,.1f}" if ours else "",
            f"{least['us']:,.1f}" if "us" in least else "",
            "; ".join([*others, *(f"{name} skipped" for name in row["skipped"])]),
            f"{row['error']['value']:.1e} / {row['error']['bound']:.1e}",
        )
    for one in records:
        if one["record"] == "failed":
            made.add_row(f"FAILED {one['case']}: {one['error']}")
        if one["record"] == "energy":
            made.add_row(f"{one['case']}: {one['mj_each']:.3g} mJ per {one['unit']} at {one['watts']:.3g} W")
    return made


@app.command()
def quality(
    ctx: typer.Context,
    work: Work,
    natural: Annotated[Path, typer.Option(help="task folder with the natural tasks of bench/quality/plan.yaml")],
    runs: Annotated[str, typer.Option(help="comma-separated: train these runs of the plan, judge nothing")] = "",
    parts: Annotated[str, typer.Option(help="comma-separated: judge these parts, by the runs that have finished")] = "",
    methods: Annotated[str, typer.Option(help="comma-separated: only these methods of the plan")] = "",
    threads: Threads = DEFAULT_THREADS,
    out: Out = None,
) -> None:
    """The training study of the bundled checkpoints: trains and judges the runs of its plan; many hours on two cores."""
    from bench.quality import runs as training
    from bench.quality import tasks
    from bench.quality.plan import METHODS, PARTS
    from t2l_engine.cli.common import keep_freed_memory

    torch.set_num_threads(threads)
    keep_freed_memory()
    tasks.write(work, natural)
    for name in runs.split(",") if runs else () if parts else training.RUNS:
        training.train(name, work)
    if not runs:
        head = harness.head("quality", Context.of("full", threads), spelled(ctx))
        harness.Log(out or RESULTS / "quality.jsonl").add(
            head, *training.records(work, parts.split(",") if parts else PARTS, methods.split(",") if methods else METHODS)
        )


@app.command()
def kernels(
    check: Annotated[bool, typer.Option("--check", help="compare with the committed table, write nothing")] = False,
    jobs: Annotated[int, typer.Option(min=1, help="compilers at a time")] = 2,
) -> None:
    """What the compiler makes of the CUDA kernels: registers, blocks, instructions; needs nvcc."""
    from bench.kernels import command

    typer.echo(command(check, jobs))


@app.command()
def profile(only: Annotated[str, typer.Option(help="only cases whose name contains this")] = "") -> None:
    """What bounds each CUDA kernel, by the counters of a card: runs NVIDIA's Nsight Compute (ncu), which prints them."""
    from bench.profile import command

    command(only)


@app.command()
def compare(
    old: Annotated[str, typer.Argument(help="a built checkout, or a git revision, which is exported and built")],
    new: Annotated[str, typer.Argument(help="likewise")] = str(ROOT),
    limit: Annotated[float, typer.Option(min=1, help="how many times its old time a case may take")] = comparing.LIMIT,
    only: Annotated[str, typer.Option(help="only cases whose name contains this")] = "",
    threads: Threads = DEFAULT_THREADS,
    old_isa: Annotated[str, typer.Option(help="T2L_ISA of the old side: compares instruction sets of one tree")] = "",
    new_isa: Annotated[str, typer.Option(help="T2L_ISA of the new side")] = "",
) -> None:
    """Two trees, their samples interleaved: fails where the median ratio of a case is beyond the limit, twice."""
    found = comparing.trees((old, old_isa), (new, new_isa), threads, only, limit)
    failed = comparing.slower(found, limit)
    made = Table(title=f"new over old on {threads} threads, at most {limit:g}")
    for name in ("case", "old, us", "new, us", "ratio", "quartiles"):
        made.add_column(name, justify="left" if name == "case" else "right", no_wrap=True)
    for case, one in found.items():
        ratio = f"[bold]{one.ratio:.3f}[/bold]" if case in failed else f"{one.ratio:.3f}"
        made.add_row(case, f"{one.old_us:,.1f}", f"{one.new_us:,.1f}", ratio, f"{one.low:.3f} to {one.high:.3f}")
    CONSOLE.print(made)
    typer.echo(f"{len(found)} cases, {len(failed)} slower than {limit:g} x")
    raise typer.Exit(1 if failed else 0)


@app.command()
def table(name: Annotated[str | None, typer.Argument(help="default: print the names of all")] = None) -> None:
    """Print a long table of the committed results, such as apply.lora."""
    from bench.report.pages import show

    show(name)


@app.command()
def report(check: Annotated[bool, typer.Option("--check", help="compare, write nothing")] = False) -> None:
    """Write the pages, figures and README blocks from bench/results."""
    from bench.report.pages import Report

    problems = Report().check() if check else Report().write()
    if problems:
        raise BenchError("\n".join(problems))


def main() -> None:
    try:
        app()
    except (BenchError, ResultError) as error:
        sys.exit(f"python -m bench: {error}")


if __name__ == "__main__":
    main()
