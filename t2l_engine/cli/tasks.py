"""``t2l tasks``: import, generate, select and check task folders."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated, Any

import typer

from t2l_engine.cli.common import Json, console, named, print_json, say, split_names

app = typer.Typer(no_args_is_help=True, help="Import, generate, select and check task folders.")

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Task folder: NAME.jsonl files and descriptions.json.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Task folder to write.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the tasks of a folder, those of other names too.")]
Manifest = Annotated[str, typer.Option(help="Name of a packaged manifest, or a manifest file.")]


class Suite(str, enum.Enum):
    """Suites of generated tasks."""

    words = "words"
    specs = "specs"


class Tier(str, enum.Enum):
    """Tiers of a manifest."""

    train = "train"
    sibling = "sibling"
    novel = "novel"


@app.command("import-sni")
def import_sni(
    source: Annotated[Path, typer.Argument(help="Folder of Super-NaturalInstructions files (task*.json), or one file.")],
    output: Output,
    descriptions: Annotated[
        Path | None, typer.Option(help="JSON {task name or number: [description, ...]}, added to the definitions.")
    ] = None,
    tasks: Annotated[str, typer.Option(help="Comma-separated names or numbers of tasks; default: all.")] = "",
    licence: Annotated[
        list[str] | None,
        typer.Option(help="Allowed licence, such as 'CC BY'; may be repeated; default: any, or none stated."),
    ] = None,
    category: Annotated[list[str] | None, typer.Option(help="Category to import; may be repeated; default: all.")] = None,
    max_instances: Annotated[
        int | None, typer.Option(min=1, help="Examples per task, chosen by hash; default: 200, or the manifest's.")
    ] = None,
    manifest: Annotated[
        str, typer.Option(help="Use the examples and splits of this manifest: name of a packaged one, or a file.")
    ] = "",
    force: Force = False,
) -> None:
    """Import tasks of Super-NaturalInstructions, without those made from T2L's ten benchmarks."""
    from t2l_engine.research.tasks import manifest as manifests
    from t2l_engine.research.tasks import sni
    from t2l_engine.research.tasks.examples import MAX_EXAMPLES
    from t2l_engine.research.tasks.folder import write_tasks

    if manifest and max_instances is not None:
        raise ValueError("--max-instances: expected none with --manifest, which says what examples a task has")
    imported = sni.import_sni(
        source,
        split_names(tasks) or None,
        descriptions=sni.further_descriptions(descriptions) if descriptions else None,
        max_instances=max_instances or MAX_EXAMPLES,
        manifest=manifests.read(manifest) if manifest else None,
        licences=licence or (),
        categories=category or (),
    )
    for name, reason in imported.left_out.items():
        say(f"left out: {name}: {reason}")
    for name, count in imported.missing.items():
        say(f"{name}: {count} examples of the manifest not found")
    found = imported.tasks
    if not found:
        raise ValueError(f"{source}: no task to write, {len(imported.left_out)} left out")
    write_tasks(output, found, overwrite=force)
    _wrote(output, found)
    if imported.left_out:
        say(f"{len(imported.left_out)} tasks left out")


@app.command("import-benchmarks")
def import_benchmarks(
    source: Annotated[Path, typer.Argument(help="Folder of BENCHMARK.jsonl files, one row of the data set per line.")],
    output: Output,
    names: Annotated[str, typer.Option(help="Comma-separated benchmarks; default: all that SOURCE has.")] = "",
    max_examples: Annotated[int | None, typer.Option(min=1, help="Limit of examples per split; default: all.")] = None,
    force: Force = False,
) -> None:
    """Import T2L's ten benchmarks with their metrics."""
    from t2l_engine.research.tasks import benchmarks
    from t2l_engine.research.tasks.folder import write_tasks

    if source.exists() and output.exists() and output.samefile(source):
        raise ValueError(f"--output: expected another folder than SOURCE, whose files it would replace, got {output}")
    imported = benchmarks.import_benchmarks(source, split_names(names) or None, max_examples)
    for name, reasons in imported.left_out.items():
        for reason, count in reasons.items():
            say(f"left out: {count} rows of {name}: {reason}")
    if not imported.tasks:
        raise ValueError(f"{source}: no task to write, all rows are left out")
    write_tasks(output, imported.tasks, overwrite=force)
    _wrote(output, imported.tasks)


@app.command()
def synthetic(
    output: Output,
    suite: Annotated[Suite, typer.Option(help="Twelve small tasks, or thousands of specifications in tiers.")] = Suite.words,
    examples: Annotated[
        int | None, typer.Option(help="Examples per task; words: 20 to 120, default 120; specs: default 60.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Random seed; the manifest of specs is that of seed 0.")] = 0,
    specifications: Annotated[int | None, typer.Option(help="Number of tasks of specs; default: the manifest's.")] = None,
    tier: Annotated[list[Tier] | None, typer.Option(help="Tier of specs to write; may be repeated; default: all.")] = None,
    further_descriptions: Annotated[
        int,
        typer.Option(
            min=0, help="So many more descriptions of each task of specs, in other words, for training: tier train."
        ),
    ] = 0,
    force: Force = False,
) -> None:
    """Write generated tasks: twelve small ones on lists, letters and words, or the suite of specifications."""
    from t2l_engine.research.tasks import synthetic as words
    from t2l_engine.research.tasks.folder import write_tasks
    from t2l_engine.research.tasks.specs import suite as specs

    if suite is Suite.words:
        if specifications is not None or tier or further_descriptions:
            raise ValueError("--specifications, --tier and --further-descriptions: expected none without --suite specs")
        made = words.suite(words.MAX_EXAMPLES if examples is None else examples, seed)
    else:
        wanted = {t.value for t in tier or Tier}
        if further_descriptions and wanted != {"train"}:
            raise ValueError("--further-descriptions: expected --tier train alone, for others are not trained on")
        count = specs.EXAMPLES if examples is None else examples
        placed = specs.suite(specs.SPECIFICATIONS if specifications is None else specifications, seed)
        made = [specs.task(p.spec, count, seed, further_descriptions) for p in placed if p.tier in wanted]
    write_tasks(output, made, overwrite=force)
    _wrote(output, made)


@app.command()
def select(
    folder: Folder,
    tier: Annotated[Tier, typer.Option(help="Tier of the tasks to copy.")],
    output: Output,
    manifest: Manifest = "skills",
    permissive: Annotated[bool, typer.Option("--permissive", help="Only tasks under permissive licences.")] = False,
    force: Force = False,
) -> None:
    """Copy the tasks of one tier of a manifest to another folder, with unchanged examples and splits."""
    from t2l_engine.research.tasks import manifest as manifests
    from t2l_engine.research.tasks.folder import load_tasks, read_descriptions, write_tasks

    present = read_descriptions(folder)
    names = manifests.select(present, manifests.read(manifest), tier.value, permissive=permissive)
    if not names:
        kind = f"{'permissive and ' if permissive else ''}of tier {tier.value}"
        raise ValueError(f"{folder}: none of its {len(present)} tasks is {kind} in manifest {manifest}")
    chosen = load_tasks(folder, None, names=names)
    write_tasks(output, chosen, overwrite=force)
    _wrote(output, chosen)


@app.command()
def check(
    folder: Folder,
    manifest: Annotated[str, typer.Option(help="Name of a packaged manifest, or a manifest file, to compare with.")] = "",
    tier: Annotated[Tier | None, typer.Option(help="Only the tasks of this tier of the manifest; default: all.")] = None,
    examples: Annotated[int | None, typer.Option(help="Examples per task of manifest specs; default: 60.")] = None,
    as_json: Json = False,
) -> None:
    """Check a folder; exit status 1 if a file is invalid, if splits of a task share an input, or with --manifest if tasks,
    examples or splits differ from it."""
    from rich.table import Table

    from t2l_engine.files.errors import ConfigError
    from t2l_engine.research.tasks import manifest as manifests
    from t2l_engine.research.tasks.examples import SHARES, shared_inputs
    from t2l_engine.research.tasks.folder import load_tasks

    if not manifest:
        if tier is not None or examples is not None:
            raise ValueError("--tier, --examples: expected --manifest beside them, whose tasks they are about")
        tasks = load_tasks(folder, None)
        shared = {task.name: count for task in tasks if (count := shared_inputs(task.examples))}
        if shared:
            first = next(iter(shared))
            raise ConfigError(
                f"{folder}: {len(shared)} tasks have inputs in more than one split, first: {first}: {shared[first]} inputs"
            )
        if others := {example.split for task in tasks for example in task.examples} - SHARES.keys():
            say(f"nothing reads examples of other splits than {', '.join(SHARES)}: {', '.join(map(_plain, sorted(others)))}")
        if as_json:
            print_json({"manifest": None, "tasks": [task.name for task in tasks], "differences": []})
        else:
            _wrote(folder, tasks)
        return
    wanted = manifests.read(manifest, examples)
    differences = manifests.check(folder, wanted, tier.value if tier else None)
    if differences:
        if not as_json:
            table = Table("task", "split", "examples", "what")
            for row in differences:
                table.add_row(row.task, _plain(row.split or "all"), str(row.count), row.kind)
            console().print(table)
        raise ConfigError(f"{folder}: differs from manifest {manifest} {len(differences)} times, first: {differences[0]}")
    names = wanted.names(tier.value if tier else None)
    if as_json:
        print_json({"manifest": manifest, "tasks": names, "differences": []})
    else:
        typer.echo(f"{folder}: {len(names)} tasks as in manifest {manifest}")


@app.command()
def decontaminate(
    folder: Folder,
    benchmarks: Annotated[Path, typer.Option(help="Task folder of the benchmarks.")],
    output: Output,
    words: Annotated[int, typer.Option(help="Consecutive words that count as an overlap.")] = 13,
    force: Force = False,
) -> None:
    """Copy a folder without examples that overlap with a benchmark."""
    import collections

    from t2l_engine.research.tasks import decontaminate as overlap
    from t2l_engine.research.tasks.folder import load_tasks, write_tasks

    with named({"n": "--words"}):
        kept, found = overlap.decontaminate(load_tasks(folder, None), load_tasks(benchmarks, None), words)
    for (task, benchmark), count in sorted(collections.Counter((o.task, o.benchmark) for o in found).items()):
        say(f"{task}: {count} examples share text with {benchmark}")
    if not kept:
        raise ValueError(f"{folder}: no example is left, all share text with a benchmark")
    write_tasks(output, kept, overwrite=force)
    _wrote(output, kept)


@app.command()
def show(folder: Folder, as_json: Json = False) -> None:
    """Describe a task folder: descriptions, examples by split, mean characters of input and answer."""
    from rich.table import Table

    from t2l_engine.research.tasks.examples import SHARES
    from t2l_engine.research.tasks.folder import Task, load_tasks

    def describe(task: Task) -> dict[str, Any]:
        counts = dict.fromkeys(SHARES, 0)
        for example in task.examples:
            counts[example.split] = counts.get(example.split, 0) + 1
        chars = sum(len(e.input) + len(e.outputs[0]) for e in task.examples) / len(task.examples)
        return {"task": task.name, "descriptions": len(task.descriptions), "splits": counts, "mean_chars": chars}

    about = [describe(task) for task in load_tasks(folder, None)]
    if as_json:
        print_json(about)
        return
    splits = list(dict.fromkeys(name for row in about for name in row["splits"]))
    numbers = ("descriptions", *map(_plain, splits), "mean characters")
    table = Table("task", *numbers, title=f"{len(about)} tasks")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in about:
        counts = (str(row["splits"].get(name, 0)) for name in splits)
        table.add_row(row["task"], str(row["descriptions"]), *counts, f"{row['mean_chars']:.0f}")
    console().print(table)


def _wrote(folder: Path, tasks: list) -> None:
    typer.echo(f"{folder}: {len(tasks)} tasks, {sum(len(task.examples) for task in tasks)} examples")


def _plain(text: str) -> str:
    """``text`` from a file, escaped and bounded for a terminal."""
    from t2l_engine.files.errors import short_repr

    return text if text.isprintable() and len(text) <= 40 else short_repr(text)
