"""``t2l evaluate``: compares methods on a task folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.table import Table
from tqdm import tqdm

from t2l_engine.cli import common
from t2l_engine.cli.common import BaseDType, EngineOptions, console, say, split_names
from t2l_engine.engine import TextToLoRA
from t2l_engine.files.weights import write_text
from t2l_engine.hypernetwork.checkpoint import describe, trained_tasks
from t2l_engine.research.evaluation.settings import Settings
from t2l_engine.research.tasks import manifest as manifests
from t2l_engine.research.tasks.folder import Task, load_tasks
from t2l_engine.text import base_model
from t2l_engine.text.prompts import has_chat, prompt_ids

if TYPE_CHECKING:
    from t2l_engine.research.evaluation.methods import Method


@dataclasses.dataclass(frozen=True)
class Options:
    """What is compared, on which examples, and what is written."""

    tasks: Annotated[Path, typer.Option(help="Task folder: NAME.jsonl files and descriptions.json.")]
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here as JSON.")] = None
    methods: Annotated[str, typer.Option(help="Comma-separated methods to compare; default: all that are possible.")] = ""
    also: Annotated[list[str], typer.Option(metavar="NAME=DIR", help="Another checkpoint; may be repeated.")] = ()
    oracle: Annotated[list[Path], typer.Option(help="Folder of per-task LoRAs, named as tasks; may be repeated.")] = ()
    library: Annotated[Path | None, typer.Option(help="Folder of PEFT adapters: methods average, arrow, nearest.")] = None
    multi_task: Annotated[list[Path], typer.Option(help="Run of t2l train lora, mode=multi-task; may be repeated.")] = ()
    manifest: Annotated[str, typer.Option(help="Name or file of a manifest; adds means over its splits of tasks.")] = ""
    names: Annotated[str, typer.Option(help="Comma-separated tasks; default: all of the folder.")] = ""
    split: Annotated[str, typer.Option(help="Split of the evaluated examples.")] = "test"
    max_items: Annotated[int, typer.Option(min=0, help="Most examples per task; 0: all.")] = 0
    held_out_descriptions: Annotated[
        int, typer.Option(min=0, help="Use only the last N descriptions, which training held out; 0: all.")
    ] = 0
    shots: Annotated[str, typer.Option(help="Numbers of worked examples: 3,6 adds icl and icl-6, t2l-examples, ...")] = "3"
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts per batch.")] = 32
    dtype: BaseDType = None
    device: Annotated[str, typer.Option(help="cpu or cuda, for the base model and the hypernetwork.")] = "cpu"
    resume: Annotated[Path | None, typer.Option(help="File that keeps the answers; default: one beside --json.")] = None

    def check(self) -> None:
        """Errors that need no file of the task folder: before answers are computed."""
        for option, file in (("--json", self.json_file), ("--resume", self.resume)):
            if file is not None and (file.is_dir() or not file.parent.is_dir()):
                raise ValueError(f"{option}: expected a file in a folder that exists, got {file}")

    @property
    def journal(self) -> Path | None:
        """The file of answers beside the result, removed at the end, unlike that of --resume."""
        beside = self.json_file is not None and self.resume is None
        return self.json_file.with_name(f"{self.json_file.name}.unfinished.jsonl") if beside else None

    @property
    def counts(self) -> list[int]:
        """Numbers of worked examples."""
        texts = split_names(self.shots)
        counts = dict.fromkeys(int(text) for text in texts if text.isdecimal() and int(text))
        if not counts or len(counts) < len(texts):
            raise ValueError(f"--shots: expected different numbers from 1, comma-separated, got {self.shots!r}")
        return [*counts]


def evaluate(options: Options, engine_options: EngineOptions, settings: Settings) -> None:
    """Evaluate a checkpoint's adapters, their baselines, the base model and further adapters on a task folder."""
    common.keep_freed_memory()
    common.need_packages()
    from t2l_engine.research.evaluation import run
    from t2l_engine.research.evaluation.methods import without_chat

    options.check()
    base_model.check_device(options.device)
    tasks, by_split = _load_tasks(options)
    checkpoints = _checkpoints(options, engine_options)
    methods = _methods(options, tasks, by_split["train"], checkpoints)
    _, engine, folder = checkpoints[0]
    trained = sorted(trained_tasks(describe(folder)))
    groups = _groups([task.name for task in tasks], set(trained), options.manifest)
    model_name = common.base_model_of(folder, engine_options.base_model)
    dtype = common.base_dtype(options.dtype, options.device)
    answerer, tokenizer = _answerer(options, model_name, dtype)
    _say_other_bases(options, [folder for _, _, folder in checkpoints], model_name)
    if not has_chat(tokenizer):
        methods = without_chat(methods)
        say("the tokenizer has no chat template: methods without adapter use the template 'raw'")
    if options.split == "val":  # or templates would be chosen on the evaluated examples
        settings = dataclasses.replace(settings, validation_items=0)

    def progress(method: str, count: int) -> None:
        bar.set_postfix(method=method)
        bar.update(count)

    evaluation = run.Evaluation(
        answerer, tokenizer, tasks, methods, settings,
        pools=by_split["train"], validation=by_split["val"], progress=progress,
    )  # fmt: skip
    with tqdm(total=evaluation.answers, unit="answer") as bar:
        result = evaluation.run()
    own = {"batch_size": options.batch_size, "held_out_descriptions": options.held_out_descriptions}
    _write(options, {
        "checkpoint": engine_options.checkpoint, "base_model": model_name, "dtype": str(dtype).removeprefix("torch."),
        "device": options.device, "split": options.split, "scaling": engine.hypernetwork.config.scaling_value,
        "settings": dataclasses.asdict(settings) | own, "trained_tasks": trained, "groups": groups,
        "summary": run.summary(result["tasks"], groups, methods[0].name), **result,
    })  # fmt: skip


def _answerer(options: Options, model_name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """(what asks the base model, with the answers of an earlier run; its tokenizer)."""
    from t2l_engine.research.evaluation.answers import Answerer, Store
    from t2l_engine.research.evaluation.methods import digest

    if options.journal is not None and options.journal.exists():
        say(f"resuming with the answers in {options.journal}; remove it to start anew")
    store = Store(options.resume or options.journal)
    model, tokenizer = base_model.load(model_name, dtype)
    model.to(options.device)
    begins = [str(i) for i in prompt_ids(tokenizer, [""])[0]]
    rounds = [options.device] if options.device != "cpu" else []  # another device rounds differently
    identity = digest(model.parameters(), model_name, model.config.to_json_string(), *begins, *rounds)
    return Answerer(model, tokenizer, identity=identity, store=store, batch_size=options.batch_size), tokenizer


def _load_tasks(options: Options) -> tuple[list[Task], dict[str, dict[str, list]]]:
    """(tasks with the examples to answer, split -> task -> all examples of it)."""
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


def _checkpoints(options: Options, engine_options: EngineOptions) -> list[tuple[str, TextToLoRA, Path]]:
    """(name, engine, folder) of --checkpoint and of each --also."""
    found = [("t2l", *engine_options.load(options.device))]
    for text in options.also:
        name, _, path = text.partition("=")
        if not name or not path:
            raise ValueError(f"--also: expected NAME=DIR, got {text!r}")
        found.append((name, *EngineOptions(path, base_model=engine_options.base_model).load(options.device)))
    return found


def _methods(options: Options, tasks: list[Task], pools: dict[str, list], checkpoints: list) -> list[Method]:
    """The methods to compare; says which possible ones are left out, and why."""
    from t2l_engine.research.evaluation.methods import Candidates

    pool_asked, held_out = options.split == "train", options.held_out_descriptions
    made = Candidates(tasks, pools, options.counts, pool_asked=pool_asked, held_out=held_out)
    for checkpoint in checkpoints:
        made.add_checkpoint(*checkpoint)
    if options.oracle:
        made.add_per_task(options.oracle)
    if options.library is not None:
        made.add_library(options.library)
    for folder in options.multi_task:
        made.add_multi_task(folder)
    made.add_base()
    names = split_names(options.methods)
    chosen = made.chosen(names)
    for name, reason in made.left_out.items() if not names else ():
        if not name.endswith("-same-family"):  # most tasks have no families
            say(f"{name} left out: {reason}")
    return chosen


def _say_other_bases(options: Options, checkpoints: list[Path], model_name: str) -> None:
    """Say which checkpoints and adapters were trained for another base model."""
    bases = {folder: describe(folder).get("base_model") for folder in checkpoints}
    adapters = [*options.oracle, *options.multi_task, *([options.library] if options.library else [])]
    for path, other in (bases | {folder: common.stored_base(folder) for folder in adapters}).items():
        if common.differ(bases[checkpoints[0]], other):
            say(f"{path} is of {other}, and is evaluated on {model_name}")


def _groups(names: list[str], trained: set[str], manifest: str) -> dict[str, list[str]]:
    """Non-empty groups of task names: all, trained and not trained, and the manifest's splits of tasks."""
    members = {"all": {*names}} | ({"trained": trained, "not trained": {*names} - trained} if trained else {})
    if manifest:
        read = manifests.read(manifest)
        members |= {split: {*read.names(split)} for split in manifests.TASK_SPLITS}
    return {group: [name for name in names if name in of] for group, of in members.items() if not of.isdisjoint(names)}


def _write(options: Options, result: dict[str, Any]) -> None:
    """Write and print the result; remove the file of answers."""
    for method, count in result["no_adapter"].items():
        say(f"{method} has no adapter for {count} of {len(result['tasks'])} tasks, which are not compared with it")
    if options.json_file is not None:  # before the table, whose pipe may be closed
        text = common.json_text(result) + "\n"
        if options.json_file.exists() and not options.json_file.is_file():  # a device or a pipe
            options.json_file.write_text(text, encoding="utf-8")
        else:
            write_text(options.json_file.resolve(), text)  # a link stays one
    console().print(_table(result))
    if options.journal is not None:
        options.journal.unlink(missing_ok=True)


def _table(result: dict[str, Any]) -> Any:
    methods = list(result["details"])
    table = Table("task", title=f"score, %, split {result['split']}, scaling {result['scaling']:g}")
    for method in methods:
        table.add_column(method, justify="right")

    def cells(values: dict[str, float]) -> list[str]:
        return [f"{values[method]:.1f}" if method in values else "" for method in methods]

    def add_over_families(of: dict[str, Any], statistic: str, form: str) -> None:
        if found := of.get("over_families", {}).get(statistic):
            spans = {m: f"[{d['low']:{form}}, {d['high']:{form}}]" for m, d in found.items()}
            most = max(d["families"] for d in found.values())
            table.add_row(f"95 % CI over families ({most})", *(spans.get(method, "") for method in methods))

    for name, scores in result["tasks"].items():
        table.add_row(name, *cells(scores))
    for group, of in result["summary"].items():
        table.add_section()
        table.add_row(f"mean: {group} ({of['tasks']})", *cells(of["mean"]), style="bold")
        add_over_families(of, "mean", ".1f")
        spans = {
            m: f"{d['mean']:+.1f} [{d['low']:+.1f}, {d['high']:+.1f}]" + f" ({d['tasks']})" * (d["tasks"] < of["tasks"])
            for m, d in of["difference"].items()
        }
        table.add_row(f"{methods[0]} minus this method", *(spans.get(method, "") for method in methods))
        add_over_families(of, "difference", "+.1f")
    fits = {method: of["calibration"] for method, of in result["details"].items() if "calibration" in of}
    for name, form in (("items", ".0f"), ("calibration_error", ".3f"), ("brier", ".3f")) if fits else ():
        table.add_row(f"given answers: {name}", *(f"{fits[m][name]:{form}}" if m in fits else "" for m in methods))
    return table
