"""``t2l tasks``: import, generate, select and check task folders."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from t2l_engine.cli.common import Json, choices, console, named, print_json, printable, say, split_names
from t2l_engine.research.tasks import benchmarks, sni
from t2l_engine.research.tasks import decontaminate as overlap
from t2l_engine.research.tasks import manifest as manifests
from t2l_engine.research.tasks import needle as needles
from t2l_engine.research.tasks.examples import MAX_EXAMPLES, SHARES, check_splits
from t2l_engine.research.tasks.folder import Task, load_tasks, read_descriptions, write_tasks

app = typer.Typer(no_args_is_help=True, help="Import, generate, select and check task folders.")

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Task folder: NAME.jsonl files and descriptions.json.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Task folder to write.")]
Manifest = Annotated[str, typer.Option(help="Packaged manifest, or a file of one.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the tasks of a folder, including those of other names.")]

Suite = choices("Suite", ("words", "specs"))
#: Task splits of a manifest.
TaskSplit = choices("TaskSplit", ("train", "in-family", "out-of-family"))


@app.command("import-sni")
def import_sni(
    source: Annotated[Path, typer.Argument(help="Folder of Super-NaturalInstructions files (task*.json), or one file.")],
    output: Output,
    descriptions: Annotated[Path | None, typer.Option(help="JSON {task name or number: [description, ...]}.")] = None,
    tasks: Annotated[str, typer.Option(help="Comma-separated names or numbers of tasks; default: all.")] = "",
    licence: Annotated[list[str], typer.Option(help="Allowed one ('CC BY'); may be repeated; default: any or none.")] = (),
    max_instances: Annotated[int | None, typer.Option(min=1, help="Examples per task, by hash; default: 200.")] = None,
    manifest: Manifest = "",
    force: Force = False,
) -> None:
    """Import tasks of Super-NaturalInstructions, without those made from T2L's ten benchmarks; with --manifest, its tasks
    with its examples and splits."""
    if manifest and max_instances is not None:
        raise ValueError("--max-instances: expected none with --manifest, which fixes the examples of a task")
    imported = sni.import_sni(
        source,
        split_names(tasks) or None,
        descriptions=sni.further_descriptions(descriptions) if descriptions else None,
        max_instances=max_instances or MAX_EXAMPLES,
        manifest=manifests.read(manifest) if manifest else None,
        licences=licence,
    )
    for name, reason in imported.left_out.items():
        say(f"left out: {name}: {reason}")
    for name, count in imported.missing.items():
        say(f"{name}: {count} examples of the manifest not found")
    _write(output, imported.tasks, force)


@app.command("import-benchmarks")
def import_benchmarks(
    source: Annotated[Path, typer.Argument(help="Folder of BENCHMARK.jsonl files, one row of the data set per line.")],
    output: Output,
    names: Annotated[str, typer.Option(help="Comma-separated benchmarks; default: all that SOURCE has.")] = "",
    max_examples: Annotated[int | None, typer.Option(min=1, help="Limit of examples per split; default: all.")] = None,
    force: Force = False,
) -> None:
    """Import T2L's ten benchmarks with their metrics."""
    if source.exists() and output.exists() and output.samefile(source):
        raise ValueError(f"--output: expected another folder than SOURCE, whose files it would replace, got {output}")
    imported = benchmarks.import_benchmarks(source, split_names(names) or None, max_examples)
    for name, reasons in imported.left_out.items():
        for reason, count in reasons.items():
            say(f"left out: {count} rows of {name}: {reason}")
    _write(output, imported.tasks, force)


@app.command()
def synthetic(
    output: Output,
    suite: Annotated[Suite, typer.Option(help="Twelve small tasks, or thousands of specifications.")] = Suite.words,
    examples: Annotated[int | None, typer.Option(help="Examples per task; words: 20 to 120; specs: default 60.")] = None,
    seed: Annotated[int, typer.Option(help="Random seed; the packaged manifest specs fixes seed 0.")] = 0,
    specifications: Annotated[int | None, typer.Option(help="Number of tasks of specs; default: the manifest's.")] = None,
    task_split: Annotated[list[TaskSplit], typer.Option(help="Of specs; may be repeated; default: all.")] = (),
    further_descriptions: Annotated[int, typer.Option(min=0, help="Further ones per task; needs --task-split train.")] = 0,
    force: Force = False,
) -> None:
    """Write generated tasks: twelve small ones on lists, letters and words, or the suite of specifications."""
    from t2l_specs import suite as specs
    from t2l_specs import synthetic as words

    if suite is Suite.words:
        if specifications is not None or task_split or further_descriptions:
            raise ValueError("--specifications, --task-split, --further-descriptions: expected none without --suite specs")
        made = words.suite(words.MAX_EXAMPLES if examples is None else examples, seed)
    else:
        wanted = {split.value for split in task_split or TaskSplit}
        if further_descriptions and wanted != {"train"}:
            raise ValueError("--further-descriptions: expected --task-split train alone, since others are not trained on")
        count = specs.EXAMPLES if examples is None else examples
        placed = specs.suite(specs.SPECIFICATIONS if specifications is None else specifications, seed)
        made = [specs.task(p.spec, count, seed, further_descriptions) for p in placed if p.task_split in wanted]
    _write(output, made, force)


@app.command()
def needle(
    output: Output,
    texts: Annotated[int, typer.Option(min=1, help="Number of texts, each a task with its text as the description.")] = 200,
    shortest: Annotated[int, typer.Option(min=1, help="Tokens of the shortest text, about.")] = 30,
    longest: Annotated[int, typer.Option(min=1, help="Tokens of the longest text, about.")] = 200,
    fewest_facts: Annotated[int, typer.Option(min=1, max=3, help="Fewest facts of a text, of three.")] = 3,
    split: Annotated[str, typer.Option(help="Split of the questions: train or test.")] = "test",
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    force: Force = False,
) -> None:
    """Write needle-in-a-haystack tasks: texts that hold a number, a name and a code, and questions for them."""
    _write(output, needles.texts(texts, shortest, longest, (fewest_facts, 3), seed, split), force)


@app.command()
def select(
    folder: Folder,
    task_split: Annotated[TaskSplit, typer.Option(help="Task split to copy.")],
    output: Output,
    manifest: Manifest = "skills",
    permissive: Annotated[bool, typer.Option("--permissive", help="Only tasks under permissive licences.")] = False,
    force: Force = False,
) -> None:
    """Copy the tasks of one task split of a manifest to another folder, with unchanged examples and splits."""
    present = read_descriptions(folder)
    names = manifests.select(present, manifests.read(manifest), task_split.value, permissive=permissive)
    if not names:
        kind = f"{'permissive and ' if permissive else ''}of task split {task_split.value}"
        raise ValueError(f"{folder}: none of its {len(present)} tasks is {kind} in manifest {manifest}")
    _write(output, load_tasks(folder, None, names=names), force)


@app.command()
def check(
    folder: Folder,
    manifest: Manifest = "",
    task_split: Annotated[TaskSplit | None, typer.Option(help="Only this task split of the manifest; default: all.")] = None,
    examples: Annotated[int | None, typer.Option(help="Examples per task of manifest specs; default: 60.")] = None,
    as_json: Json = False,
) -> None:
    """Check a folder; exit status 1 if a file is invalid, if splits of a task share an input, or with --manifest if tasks,
    examples or splits differ from it."""
    if manifest:
        listed, split = manifests.read(manifest, examples), task_split and task_split.value
        names, differences = listed.names(split), manifests.check(folder, listed, split)
        for difference in () if as_json else differences:
            typer.echo(str(difference))
        if differences:
            raise ValueError(f"{folder}: differs from manifest {manifest} {len(differences)} times, first: {differences[0]}")
        about = f"{folder}: {len(names)} tasks as in manifest {manifest}"
    elif task_split is not None or examples is not None:
        raise ValueError("--task-split, --examples: expected --manifest beside them")
    else:
        tasks = load_tasks(folder, None)
        check_splits(tasks, str(folder))
        if others := {example.split for task in tasks for example in task.examples} - SHARES.keys():
            shown = ", ".join(printable(name, 40) for name in sorted(others))
            say(f"training reads no splits other than {', '.join(SHARES)}: {shown}")
        names, about = [task.name for task in tasks], _summary(folder, tasks)
    if as_json:
        print_json({"manifest": manifest or None, "tasks": names})
    else:
        typer.echo(about)


@app.command()
def decontaminate(
    folder: Folder,
    benchmarks: Annotated[Path, typer.Option(help="Task folder of the benchmarks.")],
    output: Output,
    words: Annotated[int, typer.Option(help="Consecutive words that count as an overlap.")] = 13,
    force: Force = False,
) -> None:
    """Copy a folder without examples that overlap with a benchmark."""
    with named({"n": "--words"}):
        kept, found = overlap.decontaminate(load_tasks(folder, None), load_tasks(benchmarks, None), words)
    for (task, benchmark), count in sorted(collections.Counter((o.task, o.benchmark) for o in found).items()):
        say(f"{task}: {count} examples share text with {benchmark}")
    _write(output, kept, force)


@app.command()
def show(folder: Folder, as_json: Json = False) -> None:
    """Describe a task folder: descriptions, examples by split, mean characters of input and answer."""
    about = []
    for task in load_tasks(folder, None):
        splits = dict.fromkeys(SHARES, 0) | collections.Counter(example.split for example in task.examples)
        chars = sum(len(e.input) + len(e.outputs[0]) for e in task.examples) / len(task.examples)
        about.append({"task": task.name, "descriptions": len(task.descriptions), "splits": splits, "mean_chars": chars})
    if as_json:
        print_json(about)
        return
    splits = list(dict.fromkeys(name for row in about for name in row["splits"]))
    table = Table("task", title=f"{len(about)} tasks")
    for column in ("descriptions", *(printable(name, 40) for name in splits), "mean characters"):
        table.add_column(column, justify="right")
    for row in about:
        counts = (str(row["splits"].get(name, 0)) for name in splits)
        table.add_row(row["task"], str(row["descriptions"]), *counts, f"{row['mean_chars']:.0f}")
    console().print(table)


def _write(folder: Path, tasks: Sequence[Task], force: bool) -> None:
    write_tasks(folder, tasks, overwrite=force)
    typer.echo(_summary(folder, tasks))


def _summary(folder: Path, tasks: Sequence[Task]) -> str:
    return f"{folder}: {len(tasks)} tasks, {sum(len(task.examples) for task in tasks)} examples"
