"""Measure (``python -m bench generate|apply|train|icl|learn|study|lengths|kernels``), compare two trees, make the pages."""

from __future__ import annotations

import functools
import importlib
import json
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench import compare as comparing
from bench import harness
from bench.harness import OURS, BenchError, Context, Record, record
from bench.records import ResultError
from bench.source import ROOT, source

app = typer.Typer(help=__doc__, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
DEFAULT_THREADS = torch.get_num_threads()
CONSOLE = Console(width=None if sys.stdout.isatty() else 160)
RESULTS = ROOT / "bench" / "results"
PLANS = {name: f"bench.suites.{name}" for name in ("generate", "apply", "train")} | {"icl": "bench.icl"}

Size = Annotated[Literal["tiny", "full"], typer.Option(help="tiny: small shapes and few rounds; not to be quoted")]
Device = Annotated[
    Literal["cpu", "cuda", "emulator"],
    typer.Option(help="emulator: the CUDA kernels on this CPU, verified and not timed; needs T2L_DISABLE_NATIVE=1"),
]
Threads = Annotated[int, typer.Option(min=1, help="threads of torch and of the kernels")]
Only = Annotated[str, typer.Option(help="only tasks whose name contains this")]
Out = Annotated[Path | None, typer.Option(help="result file; default at size full: bench/results/SUITE[-cuda].jsonl")]
Budget = Annotated[float | None, typer.Option(min=0, help="seconds after which no task is begun")]
Resume = Annotated[bool, typer.Option("--resume", help="go on with the result file: what it has is not run again")]
Tasks = Annotated[Path | None, typer.Option(help="of icl at size full: task folder with splits train, test; docs/icl.md")]
Work = Annotated[Path, typer.Option(help="folder of the runs; interrupted ones go on there, finished ones are read")]


# --- suites of times -------------------------------------------------------------------------------------------------


def suite(name: str, about: str) -> None:
    """Add the command that measures ``name``; a part of a suite is written only where ``--out`` says."""

    def command(
        size: Size = "full",
        device: Device = "cpu",
        threads: Threads = DEFAULT_THREADS,
        only: Only = "",
        out: Out = None,
        budget: Budget = None,
        resume: Resume = False,
        tasks: Tasks = None,
    ) -> None:
        if out is None and size == "full" and not only and device != "emulator":
            out = RESULTS / f"{name}{'-cuda' if device == 'cuda' else ''}.jsonl"
        # Modules of the other suites, and what they need, stay unread.
        plan = importlib.import_module(PLANS[name]).plan
        if name == "icl":
            plan = functools.partial(plan, folder=tasks)
        context = Context.of(size, threads, harness.device_of(device))
        given = {"only": only, "out": out, "resume": resume, "budget": budget, "progress": bar}
        line = spelled(name, size, device, threads, only, "TASKS" if tasks else "")
        CONSOLE.print(shown(harness.run(name, plan, context, command=line, **given)))

    app.command(name, help=about)(command)


def spelled(name: str, size: str, device: str, threads: int, only: str, tasks: str) -> str:
    """The command line of a run, without what is the default."""
    options = {"size": (size, "full"), "device": (device, "cpu"), "threads": (threads, DEFAULT_THREADS)}
    options |= {"only": (only, ""), "tasks": (tasks, "")}
    words = [f"--{option} {shlex.quote(str(value))}" for option, (value, usual) in options.items() if value != usual]
    return " ".join(["python -m bench", name, *words])


suite("generate", "Generating adapters: hypernetworks of released shapes, the parts of a request, memory.")
suite("apply", "Applying adapters: the op warm and cold, with gradients, around a linear, in a language model.")
suite("train", "Training through a frozen model: steps with an adapter a sample, memory, hypernetworks, a library.")
suite("icl", "Examples in the prompt against generated adapters: closed forms, the paper's table, a model measured.")


def bar(tasks: Sequence[harness.Task]) -> Iterator[harness.Task]:
    """The tasks one by one, with a progress bar."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        shown = progress.add_task("", total=len(tasks))
        for task in tasks:
            progress.update(shown, description=task.name)
            yield task
            progress.advance(shown)


def shown(records: Sequence[Record]) -> Table:
    """The rows of a run for the terminal."""
    made = Table("case", "ours, us", "roofline, us", "times ours", "error / bound", title=records[0]["command"])
    for row in harness.rows_of(records):
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
    return made


# --- studies ---------------------------------------------------------------------------------------------------------


def write(out: Path, name: str, command: str, threads: int, records: Iterable[Record]) -> None:
    """A file of records that are no rows of times."""
    of = {"suite": name, "size": "full", "device": "cpu", "command": f"python -m bench {command}", **source()}
    head = record("run", **of, machine=harness.machine(Context.of("full", threads)), versions=harness.versions())
    lines = [json.dumps(one, ensure_ascii=False) + "\n" for one in (head, *records)]
    out.write_text("".join(lines), encoding="utf-8")


@app.command()
def learn(
    work: Work,
    library: Annotated[Path | None, typer.Option(help="a larger run of t2l train lora, to report its time")] = None,
    out: Annotated[Path, typer.Option(help="result file")] = RESULTS / "learn.jsonl",
) -> None:
    """Adapters for eight tasks made by code, and what reconstruction keeps of their gain (some ten minutes)."""
    from bench.suites.learn import records

    words = "learn --work WORK" + (" --library LIBRARY" if library else "")
    write(out, "learn", words, DEFAULT_THREADS, records(work, library))


@app.command()
def study(
    tasks: Annotated[Path, typer.Option(help="task folder that holds the tasks of the manifest skills")],
    work: Work,
    benchmarks: Annotated[Path | None, typer.Option(help="task folder of t2l tasks import-benchmarks")] = None,
    runs: Annotated[
        str, typer.Option(help="comma-separated: train these alone, judge nothing; see bench/study/plan.yaml")
    ] = "",
    threads: Threads = DEFAULT_THREADS,
    out: Annotated[Path, typer.Option(help="result file")] = RESULTS / "study.jsonl",
) -> None:
    """T2L beside its rivals and its controls on SmolLM2: trains, evaluates, analyses (some ten hours on two cores)."""
    from bench.study import judge, plan, records
    from bench.study import runs as training

    torch.set_num_threads(threads)
    training.tasks(tasks, work, benchmarks)
    for name in runs.split(",") if runs else plan.RUNS:
        training.train(name, work)
        if name == "t2l" and not runs:  # before hours are spent on tasks that oracles do not learn here
            list(judge.headroom(work))
    if not runs:
        words = "study --tasks TASKS --work WORK" + (" --benchmarks BENCHMARKS" if benchmarks else "")
        write(out, "study", words, threads, records(work))


@app.command()
def lengths(
    benchmarks: Annotated[Path, typer.Option(help="folder with a .jsonl file per benchmark")],
    descriptions: Annotated[Path, typer.Option(help="file with eval_ds_info")],
    examples: Annotated[Path, typer.Option(help="JSON file: name of a benchmark -> its worked examples")],
    tokenizer: Annotated[list[str], typer.Option(help="NAME=PLACE; repeat it")],
) -> None:
    """Token counts of T2L's benchmarks; see bench/lengths.py."""
    from bench.lengths import command

    typer.echo(command(benchmarks, descriptions, examples, tokenizer))


@app.command()
def kernels(
    check: Annotated[bool, typer.Option("--check", help="compare with the committed table, write nothing")] = False,
    jobs: Annotated[int, typer.Option(min=1, help="compilers at a time")] = 2,
) -> None:
    """What the compiler makes of the CUDA kernels: registers, blocks, instructions; needs nvcc."""
    from bench.kernels import command

    typer.echo(command(check, jobs))


# --- comparing, and what is made of results --------------------------------------------------------------------------


@app.command()
def compare(
    old: Annotated[str, typer.Argument(help="a built checkout, or a git revision, which is exported and built")],
    new: Annotated[str, typer.Argument(help="likewise")] = str(ROOT),
    limit: Annotated[float, typer.Option(min=1, help="how many times its old time a case may take")] = comparing.LIMIT,
    only: Annotated[str, typer.Option(help="only cases whose name contains this")] = "",
    rounds: Annotated[
        int, typer.Option(min=1, help="rounds of old, new, new, old, in each of several pairs of processes")
    ] = comparing.ROUNDS,
    threads: Threads = DEFAULT_THREADS,
) -> None:
    """Two trees, their samples interleaved: fails where the median ratio of a case is beyond the limit."""
    found = comparing.trees(old, new, threads, only, rounds)
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
def table(name: Annotated[str, typer.Argument(help="one of docs/results/tables")]) -> None:
    """Print a table of the committed results."""
    from bench.report.pages import show

    show(name)


@app.command()
def report(check: Annotated[bool, typer.Option("--check", help="say what is stale, write nothing")] = False) -> None:
    """Pages, tables and figures from bench/results."""
    from bench.report.pages import Report

    problems = Report().check() if check else Report().write()
    if problems:
        raise BenchError("\n".join(problems))


def main(run: Callable[[], None] = app) -> None:
    try:
        run()
    except (BenchError, ResultError) as error:
        sys.exit(f"python -m bench: {error}")


if __name__ == "__main__":
    main()
