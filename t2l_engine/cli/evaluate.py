"""``t2l evaluate``: compares methods on a task folder."""

from __future__ import annotations

import dataclasses
import enum
import math
import time
import warnings
from pathlib import Path
from typing import Annotated, Any

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

NAME = "t2l"


class Measure(str, enum.Enum):
    """Measure in the printed table."""

    score = "score"
    containment = "containment"
    rouge_l = "rouge_l"


#: Kinds of files that --plot writes.
PLOTS = (".png", ".svg", ".pdf")


def evaluate(
    tasks: Annotated[Path, typer.Option(help="Task folder: NAME.jsonl files and descriptions.json.")],
    checkpoint: Checkpoint = DEFAULT_CHECKPOINT,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here as JSON.")] = None,
    methods: Annotated[str, typer.Option(help="Comma-separated compared methods; default: all that are possible.")] = "",
    also: Annotated[
        list[str] | None, typer.Option(metavar="NAME=DIR", help="Another checkpoint with its controls; may be repeated.")
    ] = None,
    oracle: Annotated[
        list[Path] | None, typer.Option(help="Folder of PEFT adapters named as tasks: method oracle; may be repeated.")
    ] = None,
    library: Annotated[
        Path | None,
        typer.Option(
            help="Folder of PEFT adapters: methods average, arrow (routing over all of them) and nearest (by description)."
        ),
    ] = None,
    multi_task: Annotated[
        list[Path] | None, typer.Option(help="Run folder of t2l train lora with mode=multi-task; may be repeated.")
    ] = None,
    manifest: Annotated[str, typer.Option(help="Name or file of a manifest; adds means by tier.")] = "",
    names: Annotated[str, typer.Option(help="Comma-separated tasks; default: all of the folder.")] = "",
    split: Annotated[str, typer.Option(help="Split of the evaluated examples.")] = "test",
    max_items: Annotated[int, typer.Option(min=0, help="Limit of examples per task; 0: all.")] = 0,
    held_out_descriptions: Annotated[
        int, typer.Option(min=0, help="Only so many last descriptions of each task, which training holds out; 0: all.")
    ] = 0,
    shots: Annotated[
        str,
        typer.Option(
            help="Comma-separated numbers of worked examples: adds icl and t2l-examples (3), icl-6 and t2l-examples-6, ..."
        ),
    ] = "3",
    repeats: Annotated[int, typer.Option(min=1, help="Draws of description, few-shot examples and controls.")] = 3,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 16,
    max_long_tokens: Annotated[int, typer.Option(min=1, help="Longest answer of code, or with reasoning.")] = 256,
    max_prompt_tokens: Annotated[
        int, typer.Option(min=1, help="An item with a longer prompt in any method is left out of all.")
    ] = 1024,
    validation_items: Annotated[
        int, typer.Option(min=1, help="Examples of split val per task for choosing a method's prompt template.")
    ] = 8,
    base_model: BaseModel = "",
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts per batch.")] = 32,
    dtype: BaseDType = DType.float32,
    device: Annotated[str, typer.Option(help="cpu or cuda: of the base model and of what generates.")] = "cpu",
    scaling: Scaling = "",
    encoder: Encoder = "",
    trust_remote_code: TrustRemoteCode = False,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Check in one pass whether greedy decoding gives an accepted answer; scores only."),
    ] = False,
    precision: Annotated[
        float,
        typer.Option(
            min=0,
            help="Percentage points: ask tasks in a drawn order, and no more of a tier once the intervals of all "
            "differences reach at most so far; 0: ask all.",
        ),
    ] = 0,
    run_code: Annotated[
        bool, typer.Option("--run-code", help="Run model-written Python in a sandbox (HumanEval, MBPP).")
    ] = False,
    resume: Annotated[
        Path | None,
        typer.Option(
            help="File of answers, added to as they come and kept: a run that was stopped goes on.  Default: one beside "
            "--json, until the result is written."
        ),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw means and intervals here (.png, .svg or .pdf).")] = None,
    measure: Annotated[Measure, typer.Option(help="What the table shows; all are in the JSON.")] = Measure.score,
) -> None:
    """Evaluate a checkpoint's adapters, its controls, the base model and further adapters on a task folder."""
    keep_freed_memory()
    need_packages()
    from tqdm import tqdm

    from t2l_engine.files.weights import write_text
    from t2l_engine.hypernetwork import checkpoint as checkpoints
    from t2l_engine.research.evaluation import run
    from t2l_engine.research.evaluation.answers import Answerer, Store
    from t2l_engine.research.evaluation.methods import digest, without_chat
    from t2l_engine.research.tasks.folder import load_tasks
    from t2l_engine.research.tasks.manifest import TIERS
    from t2l_engine.text import base_model as models
    from t2l_engine.text.prompts import has_chat, prompt_ids

    for option, file in (("--json", json_file), ("--plot", plot), ("--resume", resume)):  # before the answers are computed
        if file is not None and not file.parent.is_dir():
            raise FileNotFoundError(f"{option}: {file.parent}: no such folder")
        if file is not None and file.is_dir():
            raise IsADirectoryError(f"{option}: {file}: expected a file, got a folder")
    if plot is not None and plot.suffix not in PLOTS:
        raise ValueError(f"--plot: expected a name that ends in {', '.join(PLOTS)}, got {plot}")
    models.check_device(device)
    if not math.isfinite(precision):
        raise ValueError(f"--precision: expected a finite number, got {precision}")
    if verify and measure is not Measure.score:
        raise ValueError(f"--measure: expected score with --verify, which generates no text, got {measure.value}")
    loaded = load_tasks(tasks, split, names=split_names(names) or None)
    if held_out_descriptions:
        loaded = [_last_descriptions(task, held_out_descriptions) for task in loaded]
    if max_items:
        loaded = [dataclasses.replace(t, examples=t.examples[:max_items]) for t in loaded]
    everything = load_tasks(tasks, None, names=[t.name for t in loaded])
    pools, validation = ({t.name: [e for e in t.examples if e.split == s] for t in everything} for s in ("train", "val"))
    journal = None
    if json_file is not None and resume is None:
        journal = json_file.with_name(f"{json_file.name}.unfinished.jsonl")  # removed at the end, unlike that of --resume
    if journal is not None and journal.exists():
        say(f"resuming with the answers in {journal}; remove it to start anew")
    store = Store(resume or journal)
    engine, folder = load_engine(checkpoint, scaling, encoder, trust_remote_code, base_model, device)
    counts = _counts(shots)
    loaded_engines = [(NAME, engine, folder), *(_also(text, base_model, device) for text in also or [])]
    stored = oracle or [], library, multi_task or []
    found, left_out = _methods(loaded, pools, counts, loaded_engines, *stored, held_out_descriptions, split)
    chosen = split_names(methods)
    for name in chosen:
        if name not in {method.name for method in found}:
            why = f": {left_out[name]}" if name in left_out else ""
            raise ValueError(f"--methods: expected some of {[method.name for method in found]}, got {name!r}{why}")
    found = [method for method in found if method.name in chosen or not chosen]
    for name, reason in left_out.items() if not chosen else ():
        say(f"{name} left out: {reason}")
    trained = sorted(checkpoints.trained_tasks(checkpoints.describe(folder)))
    groups = _groups([task.name for task in loaded], set(trained), manifest)
    if precision:  # groups end apart, so that one across others would be an uneven sample
        apart = TIERS if manifest else ("trained", "not trained")
        groups = {group: members for group, members in groups.items() if group in apart} or groups
    model_name = base_model_of(folder, base_model)
    with named({"base_model": "--base-model"}):
        model, tokenizer = models.load(model_name, dtype.torch)
    model.to(device)
    bases = {folder: checkpoints.describe(folder).get("base_model") for _, _, folder in loaded_engines}
    bases |= {path: stored_base(path) for path in [*stored[0], *filter(None, [stored[1]]), *stored[2]]}
    for path, other in bases.items():
        if differ(bases[folder], other):
            say(f"{path} is of {other}, and is evaluated on {model_name}")
    if not has_chat(tokenizer):
        found = without_chat(found)
        say("the tokenizer has no chat template: methods without adapter use the template 'raw'")
    settings = run.Settings(
        repeats, max_new_tokens, max_long_tokens, max_prompt_tokens, validation_items if split != "val" else 0, run_code,
        verify, precision,
    )  # fmt: skip
    begins = [str(i) for i in prompt_ids(tokenizer, [""])[0]]
    rounds = [device] if device != "cpu" else []  # as no CPU does
    identity = digest(model.parameters(), model_name, model.config.to_json_string(), *begins, *rounds)
    answerer = Answerer(model, tokenizer, identity=identity, store=store, batch_size=batch_size, clock=time.perf_counter)

    def progress(method: str, count: int) -> None:
        bar.set_postfix(method=method)
        bar.update(count)

    options = {"methods": "--methods", "precision": "--precision", "run_code": "--run-code"}
    with named(options | {"max_prompt_tokens": "--max-prompt-tokens"}):
        evaluation = run.Evaluation(
            answerer, tokenizer, loaded, found, settings,
            pools=pools, validation=validation, groups=groups, progress=progress,
        )  # fmt: skip
        with tqdm(total=evaluation.answers, unit="answer") as bar:
            result = evaluation.run()
    groups = {group: [name for name in members if name in result["tasks"]] for group, members in groups.items()}
    summary = run.summary(result["tasks"], groups, found[0].name)
    if precision:
        say(f"asked {len(result['tasks'])} of {len(loaded)} tasks, for intervals of at most +-{precision:g} points")
        for group, of in summary.items():
            if (widest := max(map(run.reach, of["difference"].values()), default=0)) > precision:
                say(f"{group}: its {of['tasks']} tasks are all asked, and intervals reach {widest:.1f} points")
    result = {
        "checkpoint": str(checkpoint),
        "base_model": model_name,
        "dtype": dtype.value,
        "device": device,
        "split": split,
        "scaling": engine.hypernetwork.scaling,
        "settings": dataclasses.asdict(settings)
        | {"batch_size": batch_size, "held_out_descriptions": held_out_descriptions},
        "trained_tasks": trained,
        "groups": groups,
        "summary": summary,
        **result,
    }
    if json_file is not None:  # before what a closed pipe would end
        text = json_text(result) + "\n"
        if json_file.exists() and not json_file.is_file():  # a device or a pipe
            json_file.write_text(text, encoding="utf-8")
        else:
            write_text(json_file.resolve(), text)  # a link stays one
    console().print(_table(result, measure.value))
    if plot is not None:
        from t2l_engine.research.evaluation.plots import means

        means(result, plot)
    if journal is not None:
        journal.unlink(missing_ok=True)


def _counts(shots: str) -> list[int]:
    texts = split_names(shots)
    counts = [int(text) for text in texts if text.isdecimal()]
    if not counts or 0 in counts or len(set(counts)) < len(texts):
        raise ValueError(f"--shots: expected different numbers from 1, comma-separated, got {shots!r}")
    return counts


def _last_descriptions(task: Any, count: int) -> Any:
    if len(task.descriptions) <= count:
        expected = f"fewer than the {len(task.descriptions)} descriptions of task {task.name}"
        raise ValueError(f"--held-out-descriptions: expected {expected}, got {count}")
    return dataclasses.replace(task, descriptions=task.descriptions[-count:])


def _also(text: str, base_model: str, device: str) -> tuple:
    """(name, engine, checkpoint folder) of ``--also``."""
    name, _, path = text.partition("=")
    if not name or not path:
        raise ValueError(f"--also: expected NAME=DIR, got {text!r}")
    return name, *load_engine(path, "", "", False, base_model, device)


def _methods(
    tasks: list,
    pools: dict,
    shots: list[int],
    engines: list[tuple],
    oracle: list[Path],
    library: Path | None,
    multi: list[Path],
    held_out: int,
    split: str,
) -> tuple[list, dict[str, str]]:
    """(possible methods, method -> reason why it is left out)."""
    from t2l_engine.adapters.stack import AdapterStack
    from t2l_engine.research.evaluation import methods as kinds
    from t2l_engine.research.evaluation.library import average
    from t2l_engine.research.tasks.folder import DESCRIPTIONS_NAME
    from t2l_engine.research.training.runs import descriptions_of, in_prompt_of, prompt_form_of

    left_out: dict[str, str] = {}
    needed = {n: n + (split == "train") for n in shots}  # the one that is asked is never shown
    short = {n: next((task.name for task in tasks if len(pools.get(task.name, ())) < needed[n]), None) for n in shots}
    few = {n: f"fewer than {needed[n]} examples of split 'train' of task {name}" for n, name in short.items() if name}
    possible = [n for n in shots if n not in few]
    found = [method for engine in engines for method in _generated(*engine, tasks, pools, possible, few, left_out, held_out)]
    if oracle:
        wanted = {task.name for task in tasks}
        paths = {p.name: p for folder in oracle for p in _adapters("--oracle", folder) if p.name in wanted}
        if not paths:
            raise ValueError(f"--oracle: none of the adapters in {', '.join(map(str, oracle))} is named as a task")
        prompts = {path.parent: (prompt_form_of(path.parent), in_prompt_of(path.parent)) for path in paths.values()}
        if len(set(prompts.values())) > 1:
            stated = ", ".join(f"{path} {form}{' with description' * has}" for path, (form, has) in prompts.items())
            raise ValueError(f"--oracle: expected adapters trained with one prompt_form and prompt, got {stated}")
        stack = AdapterStack.from_peft(list(paths.values()))
        found.append(kinds.per_task_method(stack, list(paths), *next(iter(prompts.values()))))
    if library is not None:
        stored = _adapters("--library", library)
        stack = AdapterStack.from_peft(stored)
        prompt = (prompt_form_of(library), in_prompt_of(library))
        found += kinds.library_methods(average(stack), stack, *prompt)
        if (library / DESCRIPTIONS_NAME).is_file():
            described = descriptions_of(library, held_out)
            found.append(kinds.nearest_method(stack, [path.name for path in stored], described, *prompt))
        else:
            left_out["nearest"] = f"no {DESCRIPTIONS_NAME} in {library}"
    found += [kinds.multi_task_method(folder) for folder in multi]
    found += kinds.base_methods(possible)
    left_out |= {f"icl{kinds.counted(n)}": reason for n, reason in few.items()}
    names = [method.name for method in found]
    if twice := [name for name in names if names.count(name) > 1]:
        expected = "--also, --multi-task: expected methods with names of their own"
        raise ValueError(f"{expected}, got two called {twice[0]!r}")
    return found, left_out


def _generated(
    name: str,
    engine: Any,
    folder: Path,
    tasks: list,
    pools: dict,
    shots: list[int],
    few: dict[int, str],
    left_out: dict[str, str],
    held_out: int,
) -> list:
    from t2l_engine.hypernetwork import checkpoint as checkpoints
    from t2l_engine.research.evaluation import methods as kinds

    about = checkpoints.describe(folder)
    training = about.get("training", {})
    from_input = training.get("condition") == "input"
    kept = training.get("held_out_descriptions")
    if isinstance(kept, int) and held_out > kept:
        warnings.warn(
            f"--held-out-descriptions: {folder} held out {kept} descriptions of each task, so that some of the {held_out} "
            "were trained on",
            stacklevel=2,
        )
    made = kinds.generated_methods(
        name, engine, tasks, pools=pools, shots=shots, in_prompt=engine.description_in_prompt, from_input=from_input
    )
    if most := engine.encoder.max_examples:
        reason = f"the checkpoint reads at most {most} examples"
        reasons = few | {n: reason for n in shots if n > most}
        left_out.update({f"{name}-examples{kinds.counted(n)}": why for n, why in reasons.items()})
    known = getattr(engine.encoder.config, "tasks", None)
    answered = [task for task in tasks if known is None or task.name in known]
    if not answered:
        raise ValueError(f"{folder}: knows tasks by their names (one-hot), and none of those asked")
    shuffled = [method.name for method in made if method.name.endswith("-shuffled")] if len(answered) < 2 else []
    left_out.update(dict.fromkeys(shuffled, "it needs at least two tasks"))
    return [method for method in made if method.name not in shuffled]


def _adapters(option: str, folder: Path) -> list[Path]:
    """The PEFT folders in ``folder``, sorted by name."""
    found = sorted(path.parent for path in folder.glob("*/adapter_config.json"))
    if not found:
        raise FileNotFoundError(f"{option}: {folder}: expected folders of PEFT adapters, found none")
    return found


def _groups(names: list[str], trained: set[str], manifest: str) -> dict[str, list[str]]:
    """Non-empty groups of task names: all, trained and not trained, and the tiers of the manifest."""
    from t2l_engine.research.tasks import manifest as manifests

    groups = {"all": names}
    if trained:
        groups["trained"] = [n for n in names if n in trained]
        groups["not trained"] = [n for n in names if n not in trained]
    if manifest:
        read = manifests.read(manifest)
        for tier in manifests.TIERS:
            members = set(read.names(tier))
            groups[tier] = [n for n in names if n in members]
    return {group: members for group, members in groups.items() if members}


def _table(result: dict[str, Any], measure: str) -> Any:
    from rich.table import Table

    methods = list(result["details"])
    shown = {"score": "score, %", "containment": "containment, %", "rouge_l": "ROUGE-L, %"}[measure]
    table = Table("task", *methods, title=f"{shown}, split {result['split']}, scaling {result['scaling']:g}")
    for column in table.columns[1:]:
        column.justify = "right"

    def cells(values: dict[str, float | None]) -> list[str]:
        return ["" if values.get(method) is None else f"{values[method]:.1f}" for method in methods]

    for name in result["tasks"]:
        table.add_row(
            name, *cells({method: result["details"][method]["tasks"].get(name, {}).get(measure) for method in methods})
        )
    if measure == "score":
        for group, of in result["summary"].items():
            table.add_section()
            table.add_row(f"mean: {group} ({of['tasks']})", *cells(of["mean"]), style="bold")
            spans = {a: f"{d['mean']:+.1f} [{d['low']:+.1f}, {d['high']:+.1f}]" for a, d in of["difference"].items()}
            table.add_row(f"{methods[0]} minus this method", *(spans.get(method, "") for method in methods))
    return table
