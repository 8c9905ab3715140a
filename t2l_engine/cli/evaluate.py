"""``t2l evaluate``: compares methods on a task folder."""

from __future__ import annotations

import dataclasses
import enum
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from t2l_engine.cli.common import (
    DEFAULT_CHECKPOINT,
    BaseDType,
    BaseModel,
    Checkpoint,
    DType,
    Encoder,
    Scaling,
    TrustRemoteCode,
    base_model_of,
    console,
    differ,
    json_text,
    keep_freed_memory,
    load_engine,
    named,
    need_packages,
    say,
    split_names,
    stored_base,
)
from t2l_engine.cli.options import takes
from t2l_engine.research.evaluation.settings import Settings

if TYPE_CHECKING:
    from t2l_engine.research.evaluation.methods import Method
    from t2l_engine.research.tasks.folder import Task

NAME = "t2l"
#: Kinds of files that --plot writes.
PLOTS = (".png", ".svg", ".pdf")
#: Parameters that errors of the evaluation begin with.
NAMED = {name: f"--{name.replace('_', '-')}" for name in (
    "methods", "oracle", "library", "precision", "run_code", "max_prompt_tokens", "base_model", "held_out_descriptions",
)} | {"also": "--also, --multi-task"}  # fmt: skip


TITLES = {"score": "score, %", "containment": "containment, %", "rouge_l": "ROUGE-L, %"}
#: Of the printed table.
Measure = enum.Enum("Measure", {name: name for name in TITLES}, type=str)


@dataclasses.dataclass(frozen=True)
class Options:
    """What is compared, on which examples, and what is written."""

    tasks: Annotated[Path, typer.Option(help="Task folder: NAME.jsonl files and descriptions.json.")]
    checkpoint: Checkpoint = DEFAULT_CHECKPOINT
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here as JSON.")] = None
    methods: Annotated[str, typer.Option(help="Comma-separated methods to compare; default: all that are possible.")] = ""
    also: Annotated[
        list[str] | None, typer.Option(metavar="NAME=DIR", help="Another checkpoint, with its baselines; may be repeated.")
    ] = None
    oracle: Annotated[
        list[Path] | None, typer.Option(help="Folder of per-task LoRAs, named as tasks: method oracle; may be repeated.")
    ] = None
    library: Annotated[
        Path | None,
        typer.Option(help="Folder of PEFT adapters: methods average, arrow (routing) and nearest (retrieval)."),
    ] = None
    multi_task: Annotated[
        list[Path] | None, typer.Option(help="Run folder of t2l train lora with mode=multi-task; may be repeated.")
    ] = None
    manifest: Annotated[str, typer.Option(help="Name or file of a manifest; adds means over its splits of tasks.")] = ""
    names: Annotated[str, typer.Option(help="Comma-separated tasks; default: all of the folder.")] = ""
    split: Annotated[str, typer.Option(help="Split of the evaluated examples.")] = "test"
    max_items: Annotated[int, typer.Option(min=0, help="Most examples per task; 0: all.")] = 0
    held_out_descriptions: Annotated[
        int, typer.Option(min=0, help="Use only the last N descriptions, which training held out; 0: all.")
    ] = 0
    shots: Annotated[
        str,
        typer.Option(help="Comma-separated numbers of worked examples: 3 adds icl and t2l-examples, 6 adds icl-6, ..."),
    ] = "3"
    base_model: BaseModel = ""
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts per batch.")] = 32
    dtype: BaseDType = DType.float32
    device: Annotated[str, typer.Option(help="cpu or cuda, for the base model and the hypernetwork.")] = "cpu"
    scaling: Scaling = ""
    encoder: Encoder = ""
    trust_remote_code: TrustRemoteCode = False
    resume: Annotated[
        Path | None,
        typer.Option(
            help="File of answers, appended to while the command runs, and kept.  Default: a file beside --json, "
            "removed when the result is written."
        ),
    ] = None
    plot: Annotated[Path | None, typer.Option(help="Draw means and intervals here (.png, .svg or .pdf).")] = None
    measure: Annotated[Measure, typer.Option(help="Measure of the printed table; the JSON has all.")] = Measure.score

    def check(self, settings: Settings) -> None:
        """Errors that need no file of the task folder: before answers are computed."""
        for option, file in (("--json", self.json_file), ("--plot", self.plot), ("--resume", self.resume)):
            if file is not None and not file.parent.is_dir():
                raise FileNotFoundError(f"{option}: {file.parent}: no such folder")
            if file is not None and file.is_dir():
                raise IsADirectoryError(f"{option}: {file}: expected a file, got a folder")
        if self.plot is not None and self.plot.suffix not in PLOTS:
            raise ValueError(f"--plot: expected a name that ends in {', '.join(PLOTS)}, got {self.plot}")
        if not math.isfinite(settings.precision):
            raise ValueError(f"--precision: expected a finite number, got {settings.precision}")
        if settings.verify and self.measure is not Measure.score:
            raise ValueError(f"--measure: expected score with --verify, which generates no text, got {self.measure.value}")

    @property
    def journal(self) -> Path | None:
        """The file of answers beside the result, removed at the end, unlike that of --resume."""
        if self.json_file is None or self.resume is not None:
            return None
        return self.json_file.with_name(f"{self.json_file.name}.unfinished.jsonl")

    @property
    def counts(self) -> list[int]:
        """Numbers of worked examples."""
        texts = split_names(self.shots)
        counts = [int(text) for text in texts if text.isdecimal()]
        if not counts or 0 in counts or len(set(counts)) < len(texts):
            raise ValueError(f"--shots: expected different numbers from 1, comma-separated, got {self.shots!r}")
        return counts


@takes(Options, Settings)
def evaluate(options: Options, settings: Settings) -> None:
    """Evaluate a checkpoint's adapters, their baselines, the base model and further adapters on a task folder."""
    keep_freed_memory()
    need_packages()
    from tqdm import tqdm

    from t2l_engine.hypernetwork.checkpoint import describe, trained_tasks
    from t2l_engine.research.evaluation import run
    from t2l_engine.research.evaluation.methods import without_chat
    from t2l_engine.text.base_model import check_device
    from t2l_engine.text.prompts import has_chat

    options.check(settings)
    check_device(options.device)
    with named(NAMED):
        tasks, by_split = _load_tasks(options)
        checkpoints = _checkpoints(options)
        methods = _methods(options, tasks, by_split["train"], checkpoints)
        _, engine, folder = checkpoints[0]
        trained = sorted(trained_tasks(describe(folder)))
        groups = _groups([task.name for task in tasks], set(trained), options.manifest, apart=bool(settings.precision))
        model_name = base_model_of(folder, options.base_model)
        answerer, tokenizer = _answerer(options, model_name)
    _say_other_bases(options, checkpoints, model_name)
    if not has_chat(tokenizer):
        methods = without_chat(methods)
        say("the tokenizer has no chat template: methods without adapter use the template 'raw'")
    if options.split == "val":  # or templates would be chosen on the evaluated examples
        settings = dataclasses.replace(settings, validation_items=0)

    def progress(method: str, count: int) -> None:
        bar.set_postfix(method=method)
        bar.update(count)

    with named(NAMED):
        evaluation = run.Evaluation(
            answerer, tokenizer, tasks, methods, settings,
            pools=by_split["train"], validation=by_split["val"], groups=groups, progress=progress,
        )  # fmt: skip
        with tqdm(total=evaluation.answers, unit="answer") as bar:
            result = evaluation.run()
    groups = {group: [name for name in of if name in result["tasks"]] for group, of in groups.items()}
    own = {"batch_size": options.batch_size, "held_out_descriptions": options.held_out_descriptions}
    _write(options, {
        "checkpoint": str(options.checkpoint), "base_model": model_name, "dtype": options.dtype.value,
        "device": options.device, "split": options.split, "scaling": engine.hypernetwork.scaling,
        "settings": dataclasses.asdict(settings) | own, "trained_tasks": trained, "groups": groups,
        "summary": run.summary(result["tasks"], groups, methods[0].name), **result,
    })  # fmt: skip


def _answerer(options: Options, model_name: str) -> tuple[Any, Any]:
    """(what asks the base model, with the answers of an earlier run; its tokenizer)."""
    from t2l_engine.research.evaluation.answers import Answerer, Store
    from t2l_engine.research.evaluation.methods import digest
    from t2l_engine.text import base_model
    from t2l_engine.text.prompts import prompt_ids

    if options.journal is not None and options.journal.exists():
        say(f"resuming with the answers in {options.journal}; remove it to start anew")
    store = Store(options.resume or options.journal)
    model, tokenizer = base_model.load(model_name, options.dtype.torch)
    model.to(options.device)
    begins = [str(i) for i in prompt_ids(tokenizer, [""])[0]]
    rounds = [options.device] if options.device != "cpu" else []  # another device rounds differently
    identity = digest(model.parameters(), model_name, model.config.to_json_string(), *begins, *rounds)
    size, clock = options.batch_size, time.perf_counter
    return Answerer(model, tokenizer, identity=identity, store=store, batch_size=size, clock=clock), tokenizer


def _load_tasks(options: Options) -> tuple[list[Task], dict[str, dict[str, list]]]:
    """(tasks with the examples to answer, split -> task -> all examples of it)."""
    from t2l_engine.research.tasks.folder import load_tasks

    tasks = load_tasks(options.tasks, options.split, names=split_names(options.names) or None)
    count = options.held_out_descriptions
    for i, task in enumerate(tasks):
        if count and len(task.descriptions) <= count:
            expected = f"fewer than the {len(task.descriptions)} descriptions of task {task.name}"
            raise ValueError(f"held_out_descriptions: expected {expected}, got {count}")
        examples = task.examples[: options.max_items or None]
        tasks[i] = dataclasses.replace(task, descriptions=task.descriptions[-count:], examples=examples)
    every = load_tasks(options.tasks, None, names=[task.name for task in tasks])
    return tasks, {s: {t.name: [e for e in t.examples if e.split == s] for t in every} for s in ("train", "val")}


def _checkpoints(options: Options) -> list[tuple[str, Any, Path]]:
    """(name, engine, folder) of --checkpoint and of each --also."""
    o = options
    found = [(NAME, *load_engine(o.checkpoint, o.scaling, o.encoder, o.trust_remote_code, o.base_model, o.device))]
    for text in o.also or []:
        name, _, path = text.partition("=")
        if not name or not path:
            raise ValueError(f"--also: expected NAME=DIR, got {text!r}")
        found.append((name, *load_engine(path, "", "", False, o.base_model, o.device)))
    return found


def _methods(options: Options, tasks: Sequence[Task], pools: dict, checkpoints: Sequence[Any]) -> list[Method]:
    """The methods to compare; says which possible ones are left out, and why."""
    from t2l_engine.research.evaluation.methods import Candidates

    made = Candidates(
        tasks, pools, options.counts, pool_asked=options.split == "train", held_out=options.held_out_descriptions
    )
    for checkpoint in checkpoints:
        made.add_checkpoint(*checkpoint)
    if options.oracle:
        made.add_per_task(options.oracle)
    if options.library is not None:
        made.add_library(options.library)
    for folder in options.multi_task or []:
        made.add_multi_task(folder)
    made.add_base()
    names = split_names(options.methods)
    chosen = made.chosen(names)
    for name, reason in made.left_out.items() if not names else ():
        say(f"{name} left out: {reason}")
    return chosen


def _say_other_bases(options: Options, checkpoints: Sequence[Any], model_name: str) -> None:
    """Say which checkpoints and adapters were trained for another base model."""
    from t2l_engine.hypernetwork.checkpoint import describe

    bases = {folder: describe(folder).get("base_model") for _, _, folder in checkpoints}
    own = next(iter(bases.values()))
    folders = [*(options.oracle or []), *filter(None, [options.library]), *(options.multi_task or [])]
    for path, other in (bases | {folder: stored_base(folder) for folder in folders}).items():
        if differ(own, other):
            say(f"{path} is of {other}, and is evaluated on {model_name}")


def _groups(names: list[str], trained: set[str], manifest: str, *, apart: bool) -> dict[str, list[str]]:
    """Non-empty groups of task names: all, trained and not trained, and the manifest's splits of tasks.

    ``apart``: only groups that share no task, each of which ends by itself: a mean across them would be of an uneven sample.
    """
    from t2l_engine.research.tasks import manifest as manifests

    members = {"trained": trained, "not trained": {*names} - trained} if trained else {}
    if manifest:
        read = manifests.read(manifest)
        of_manifest = {split: {*read.names(split)} for split in manifests.TASK_SPLITS}
        members = of_manifest if apart else members | of_manifest
    groups = {group: [n for n in names if n in of] for group, of in members.items()}
    groups = {group: of for group, of in groups.items() if of}
    return groups if apart and groups else {"all": names} | groups


def _write(options: Options, result: dict[str, Any]) -> None:
    """Write and print the result; remove the file of answers."""
    from t2l_engine.files.weights import write_text
    from t2l_engine.research.evaluation.run import reach

    if precision := result["settings"]["precision"]:
        asked, left = len(result["tasks"]), len(result["not_asked"])
        say(f"asked {asked} of {asked + left} tasks, for intervals of at most +-{precision:g} points")
        for group, of in result["summary"].items():
            if (widest := max(map(reach, of["difference"].values()), default=0)) > precision:
                say(f"{group}: its {of['tasks']} tasks are all asked, and intervals reach {widest:.1f} points")
    if options.json_file is not None:  # before the table, whose pipe may be closed
        text = json_text(result) + "\n"
        if options.json_file.exists() and not options.json_file.is_file():  # a device or a pipe
            options.json_file.write_text(text, encoding="utf-8")
        else:
            write_text(options.json_file.resolve(), text)  # a link stays one
    console().print(_table(result, options.measure.value))
    if options.plot is not None:
        from t2l_engine.research.evaluation.plots import means

        means(result, options.plot)
    if options.journal is not None:
        options.journal.unlink(missing_ok=True)


def _table(result: dict[str, Any], measure: str) -> Any:
    from rich.table import Table

    methods = list(result["details"])
    table = Table("task", title=f"{TITLES[measure]}, split {result['split']}, scaling {result['scaling']:g}")
    for method in methods:
        table.add_column(method, justify="right")

    def cells(values: dict[str, float | None]) -> list[str]:
        return ["" if values.get(method) is None else f"{values[method]:.1f}" for method in methods]

    for name in result["tasks"]:
        table.add_row(name, *cells({m: result["details"][m]["tasks"].get(name, {}).get(measure) for m in methods}))
    for group, of in result["summary"].items() if measure == "score" else ():
        table.add_section()
        table.add_row(f"mean: {group} ({of['tasks']})", *cells(of["mean"]), style="bold")
        spans = {m: f"{d['mean']:+.1f} [{d['low']:+.1f}, {d['high']:+.1f}]" for m, d in of["difference"].items()}
        table.add_row(f"{methods[0]} minus this method", *(spans.get(method, "") for method in methods))
    return table
