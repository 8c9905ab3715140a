"""``python -m bench generate|apply|icl|train|learn|study``: measure, write a result file; ``gate``: a small run beside it.

Tables and figures are made from the result files by ``python -m bench.report``.
"""

from __future__ import annotations

import enum
import functools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench import gate as gates
from bench import harness
from bench.source import ROOT

app = typer.Typer(help=__doc__, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
DEFAULT_THREADS = torch.get_num_threads()


class Sizes(str, enum.Enum):
    tiny = "tiny"
    full = "full"


Size = Annotated[Sizes, typer.Option(help="tiny: small shapes and few rounds, for the gate; not to be quoted")]
Threads = Annotated[int, typer.Option(min=1, help="threads of torch and of the kernels")]
Only = Annotated[str, typer.Option(help="only tasks whose name contains this")]
Out = Annotated[Path | None, typer.Option(help="result file; default: bench/results/<suite>.json, at size tiny none")]


@app.command()
def generate(size: Size = Sizes.full, threads: Threads = DEFAULT_THREADS, only: Only = "", out: Out = None) -> None:
    """Generating adapters: hypernetworks of released shapes, the parts of a request, memory."""
    suite("generate", size.value, threads, only, out)


@app.command()
def apply(size: Size = Sizes.full, threads: Threads = DEFAULT_THREADS, only: Only = "", out: Out = None) -> None:
    """Applying adapters: the op hot and cold, with gradients, around a linear, in a language model."""
    suite("apply", size.value, threads, only, out)


@app.command()
def icl(
    tasks: Annotated[
        Path | None, typer.Option(help="task folder with splits train and test; needed at size full, see docs/icl.md")
    ] = None,
    size: Size = Sizes.full,
    threads: Threads = DEFAULT_THREADS,
    only: Only = "",
    out: Out = None,
) -> None:
    """Examples in the prompt against generated adapters: closed forms, the paper's table, and a small model measured."""
    suite("icl", size.value, threads, only, out, tasks)


@app.command()
def train(size: Size = Sizes.full, threads: Threads = DEFAULT_THREADS, only: Only = "", out: Out = None) -> None:
    """Training through a frozen model: steps with an adapter a sample, memory, hypernetworks, a library of adapters."""
    suite("train", size.value, threads, only, out)


@app.command()
def learn(
    work: Annotated[Path, typer.Option(help="folder of the runs; interrupted ones go on there, finished ones are read")],
    library: Annotated[Path | None, typer.Option(help="a larger run of t2l train lora, to report its time")] = None,
    out: Annotated[Path, typer.Option(help="result file")] = ROOT / "bench" / "results" / "learn.json",
) -> None:
    """Adapters for eight tasks made by code, and what reconstruction keeps of their gain (some ten minutes)."""
    from bench.learn import measure

    out.write_text(json.dumps(measure(work, library), indent=1) + "\n", encoding="utf-8")


@app.command()
def study(
    tasks: Annotated[Path, typer.Option(help="task folder that holds the tasks of the manifest skills")],
    work: Annotated[Path, typer.Option(help="folder of the runs; interrupted ones go on there, finished ones are read")],
    benchmarks: Annotated[Path | None, typer.Option(help="task folder of t2l tasks import-benchmarks")] = None,
    runs: Annotated[
        str, typer.Option(help="comma-separated: train these alone, judge nothing; see bench/study/plan.py")
    ] = "",
    threads: Threads = DEFAULT_THREADS,
    out: Annotated[Path, typer.Option(help="result file")] = ROOT / "bench" / "results" / "study.json",
) -> None:
    """T2L beside its rivals and its controls on SmolLM2: trains, evaluates, analyses (some ten hours on two cores)."""
    from bench.study import collect, plan
    from bench.study import runs as training

    torch.set_num_threads(threads)
    training.tasks(tasks, work, benchmarks)
    for name in runs.split(",") if runs else plan.RUNS:
        training.train(name, work)
        if name == "t2l" and not runs:  # before hours are spent on tasks that oracles do not learn here
            collect.checked_headroom(work)
    if not runs:
        out.write_text(json.dumps(collect.measure(work), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@app.command()
def gate(
    threads: Threads = 2,
    slack: Annotated[float, typer.Option(min=1, help="how many times its committed value a ratio may be")] = gates.SLACK,
    update: Annotated[bool, typer.Option("--update", help="commit to the ratios of this run instead")] = False,
) -> None:
    """All suites at size tiny: fail where a ratio, never a time, is far beyond the committed one."""
    results = [measured(name, "tiny", threads, "") for name in gates.SUITES]
    ratios = gates.ratios(results)
    if update:
        gates.FILE.write_text(json.dumps(ratios, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        typer.echo(f"{gates.FILE.relative_to(ROOT)}: {len(ratios)} rows")
        return
    faults = gates.compare(ratios, gates.committed(), slack)
    for fault in faults:
        typer.echo(fault, err=True)
    typer.echo(f"{len(ratios)} rows, {len(faults)} beyond {slack:g} x the committed ratios")
    raise typer.Exit(1 if faults else 0)


def suite(name: str, size: str, threads: int, only: str, out: Path | None, tasks: Path | None = None) -> None:
    """Measure, write where a file is due, show the table; a part of a suite is written only where ``--out`` says."""
    result = measured(name, size, threads, only, tasks)
    if out is None and size == "full" and not only:
        out = ROOT / "bench" / "results" / f"{name}.json"
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    Console().print(table(result))


def measured(name: str, size: str, threads: int, only: str, tasks: Path | None = None) -> dict[str, Any]:
    """The result of a suite, with a progress bar on stderr."""
    options = {"--size": size if size != "full" else "", "--only": only}
    words = [f"{option} {value!r}" if " " in value else f"{option} {value}" for option, value in options.items() if value]
    if threads != DEFAULT_THREADS:
        words.append(f"--threads {threads}")
    if tasks is not None:
        words.append("--tasks TASKS")
    command = " ".join(["python -m bench", name, *words])
    return harness.run(name, plan(name, tasks), size=size, count=threads, command=command, only=only, progress=bar)


def plan(name: str, tasks: Path | None) -> Callable[[harness.Context], Sequence[harness.Task]]:
    """The tasks of a suite; the others, and the packages they need, are not imported."""
    if name == "icl":
        from bench.icl import plan

        return functools.partial(plan, folder=tasks)
    if name == "generate":
        from bench.generate import plan
    elif name == "train":
        from bench.train import plan
    else:
        from bench.apply import plan
    return plan


def bar(tasks: Sequence[harness.Task]) -> Iterator[harness.Task]:
    """The tasks one by one, with a progress bar."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        shown = progress.add_task("", total=len(tasks))
        for task in tasks:
            progress.update(shown, description=task.name)
            yield task
            progress.advance(shown)


def table(result: dict[str, Any]) -> Table:
    """The rows of a result for the terminal."""
    made = Table(title=f"{result['suite']}, {result['size']}, {result['machine']['cpu']}, {result['machine']['isa']}")
    for head in ("case", "ours us (IQR)", "floor us", "ratio", "bar", "ours beats", "error / bound"):
        made.add_column(head, justify="left" if head in ("case", "ours beats") else "right")
    for row in result["rows"]:
        ours, error = row["ours"], row["error"]
        made.add_row(
            gates.name(row, all_threads=False),
            f"{ours['median_us']:,.1f} ({ours['iqr_us']:,.1f})",
            "" if row["floor"] is None else f"{row['floor']['us']:,.1f} {row['floor']['by']}",
            "" if row["ratio"] is None else f"{row['ratio']:.2f}",
            "" if row["bar"] is None else ("met" if row["bar"]["met"] else "[bold]NOT met[/bold]"),
            "; ".join(_speedup(name, baseline) for name, baseline in row["baselines"].items()),
            f"{error['value']:.1e} / {error['bound']:.1e}",
        )
    for entry in result.get("memory", ()):
        made.add_row(f"memory: {entry['what']}", f"{entry['peak_mib']:,.0f} MiB", "", f"{entry['ratio']:.2f}")
    for entry in result.get("train_memory", ()):
        for way, found in entry["ways"].items():
            ratio = found["peak_mib"] / entry["ways"][harness.OURS]["peak_mib"]
            made.add_row(f"memory: {entry['case']}, {way}", f"{found['peak_mib']:,.0f} MiB", "", f"{ratio:.2f}")
    return made


def _speedup(name: str, baseline: dict[str, Any]) -> str:
    if "absent" in baseline:
        return f"{name} absent"
    text = f"{name} {baseline['speedup']:.2f}x"
    return text if baseline["speedup"] >= 1 else f"[bold]{text}[/bold]"


if __name__ == "__main__":
    try:
        app()
    except harness.BenchError as error:
        sys.exit(f"python -m bench: {error}")
