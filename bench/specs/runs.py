"""Task folders, training runs and evaluations of the study of unseen sentences."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

import t2l_engine as t2l
from bench import judging, training
from bench.harness import BenchError
from bench.plans import Run
from bench.source import SPECS
from bench.specs.plan import (
    ARMS,
    DESCRIBED,
    DEVELOPMENT,
    FURTHER,
    HELD_OUT,
    LIBRARY,
    MORE,
    OTHER,
    PLAN,
    RIVAL,
    RUNS,
    SHOTS,
    STORED,
    T2L,
    TRAINED,
    WORDINGS,
    drawn,
    ordered,
)
from bench.study import plan as skills_plan
from bench.study.runs import asked, checked
from t2l_engine.hypernetwork import checkpoint
from t2l_engine.hypernetwork.folder import WEIGHTS_NAME
from t2l_engine.research.tasks import manifest as manifests
from t2l_engine.research.tasks.folder import load_tasks, read_descriptions
from t2l_engine.research.tasks.specs import suite
from t2l_engine.research.training import lora
from t2l_engine.research.training import runs as lora_runs
from t2l_engine.research.training.runs import MULTI_TASK
from t2l_engine.research.training.settings import LoRASettings, differences
from t2l_engine.text.llm_encoder import LLMEncoder


def folder_of(work: Path, part: str) -> Path:
    """The tasks of a part; training reads those of "trained" and "more"."""
    return work / "tasks" / part


@dataclasses.dataclass(frozen=True)
class Specifications:
    """Those of the study by what they are for.

    ``trained``, ``development``: of tier train; ``more``: of that tier, too, for the runs that have them.  ``held_out``: the
    third set of tiers sibling and novel.  ``tuned``: others of these tiers, for tuning on a user's examples alone.
    """

    trained: Sequence[suite.Placed]
    development: Sequence[suite.Placed]
    more: Sequence[suite.Placed]
    held_out: Sequence[suite.Placed]
    tuned: Sequence[suite.Placed]


def specifications() -> Specifications:
    """Those of the plan, drawn from the suite."""
    found = suite.suite(PLAN["more"])
    first, later = found[: PLAN["specifications"]], found[PLAN["specifications"] :]
    known = {placed.spec.name: placed for placed in first if placed.tier == "train"}
    development = set(drawn(known, PLAN["development"], DEVELOPMENT))
    second = held_out_set("second", first[suite.SPECIFICATIONS :], first)
    siblings = {placed.spec.name: placed for placed in later if placed.tier == "sibling"}
    tuned = [siblings.pop(name) for name in ordered(siblings, "adapted")[: PLAN["adapted"]["siblings"]]]
    for seed in PLAN["adapted"]["novel_seeds"]:
        tuned += suite.more_novel([*found, *second, *tuned], seed)
    return Specifications(
        trained=[placed for name, placed in known.items() if name not in development],
        development=[known[name] for name in sorted(development)],
        more=suite.more_trained(later, second, 0),
        held_out=held_out_set("third", siblings.values(), [*found, *second, *tuned]),
        tuned=tuned,
    )


def tasks(work: Path, found: Specifications, skills: Path | None = None, *, later: bool = True) -> None:
    """Write the task folders of all parts.

    ``skills``: a folder with the tasks of the manifest of that name, for the part of tasks of other origin.  ``later``: also
    the parts that only later runs of T2L are trained on.

    Raises BenchError if a description that is held out is trained on, ConfigError if tasks are not the manifest's.
    """
    parts = {part: [placed for placed in found.held_out if placed.tier == part] for part in HELD_OUT}
    parts |= {TRAINED: found.trained, DEVELOPMENT: found.development} | ({MORE: found.more} if later else {})
    made = {part: [suite.task(placed.spec, suite.EXAMPLES, 0) for placed in of] for part, of in parts.items()}
    of_train = (MORE, FURTHER) if later else (TRAINED,)
    if later:
        made[MORE] = made[TRAINED] + made[MORE]
        made[FURTHER] = [suite.task(p.spec, suite.EXAMPLES, 0, PLAN["further"]) for p in (*found.trained, *found.more)]
    tiers = [("train", task) for part in of_train for task in made[part]]
    tiers += [(part, task) for part in (DEVELOPMENT, *HELD_OUT) for task in made[part]]
    tiers += [(placed.tier, suite.task(placed.spec, 1, 0)) for placed in found.tuned]
    if leaks := suite.leaks(tiers):
        raise BenchError(f"tasks: expected no held-out description among those trained on, got {leaks[0]}")
    if skills is not None:
        manifest = manifests.read(skills_plan.MANIFEST)
        names = [name for tier in HELD_OUT for name in manifest.names(tier)]
        made[OTHER] = [asked(task) for task in checked(skills, names)]
    for part, of in made.items():
        training.write(folder_of(work, part), of)


def write_trained(work: Path, found: Specifications) -> None:
    """Write the task folder of part TRAINED alone."""
    training.write(folder_of(work, TRAINED), [suite.task(placed.spec, suite.EXAMPLES, 0) for placed in found.trained])


def held_out_set(name: str, of: Iterable[suite.Placed], known: Sequence[suite.Placed]) -> list[suite.Placed]:
    """Set ``name`` of the plan: a sample of the siblings ``of``, and what its seeds draw of tier novel beside ``known``."""
    wanted, by_name = PLAN[name], {placed.spec.name: placed for placed in of if placed.tier == "sibling"}
    held_out = [by_name[sibling] for sibling in drawn(by_name, wanted["siblings"], name)]
    for seed in wanted["novel_seeds"]:
        held_out += suite.more_novel([*known, *held_out], seed)
    return held_out


def with_two_answers(folder: Path, names: Sequence[str]) -> list[str]:
    """Those of the tasks ``names`` whose examples have two different answers, between which a guess is often right."""
    tasks = load_tasks(folder, None, names=names)
    return [task.name for task in tasks if len({example.outputs[0] for example in task.examples}) == 2]


def train(name: str, work: Path) -> None:
    """Train run ``name`` of the plan below ``work``, after the one that it starts from; a reconstruction, of the library."""
    run = RUNS[name]
    if run.initial:
        train(run.initial, work)
    if run.kind == "reconstruction":
        train(LIBRARY, work)
    source, names = learnt(run, work)
    training.train(run, source, work / name, names)


def learnt(run: Run, work: Path) -> tuple[Path, list[str]]:
    """The folder that ``run`` is trained on, and the names of its tasks or, for a reconstruction, adapters."""
    source = folder_of(work, FURTHER if run.other.get("further") else MORE if run.other.get("more") else TRAINED)
    if run.kind == "reconstruction":
        source = work / LIBRARY / lora.ADAPTERS
    names = drawn(read_descriptions(source), run.other.get("tasks"), TRAINED)
    return source, with_two_answers(source, names) if run.other.get("two_answers") else names


def lacking(work: Path) -> list[str]:
    """The runs of the plan that have not been trained to their end below ``work``."""
    return [name for name, run in RUNS.items() if not _is_there(work / name, run)]


def _is_there(folder: Path, run: Run) -> bool:
    made = training.settings_of(run, folder)
    if isinstance(made, LoRASettings):
        theirs = lora_runs.settings_of(folder)
        if theirs is None or differences(made, theirs):
            return False
        wanted = {MULTI_TASK} if made.mode == MULTI_TASK else {*learnt(run, folder.parent)[1]}
        return wanted <= lora_runs.adapters_of(folder)
    return training.is_made(folder) and training.is_finished(folder, made, learnt(run, folder.parent)[1])


def rounded(name: str, work: Path) -> Path:
    """The checkpoint of run ``name`` with its matrices in bfloat16, as it is published and judged."""
    weights = hashlib.sha256((work / name / WEIGHTS_NAME).read_bytes()).hexdigest()
    folder = work / f"{name}-{weights[:12]}-bfloat16"  # the run may have gone on since the last call
    if not (folder / WEIGHTS_NAME).is_file():
        engine = t2l.TextToLoRA.from_pretrained(work / name)
        assert isinstance(engine.encoder, LLMEncoder)
        network, pooling = engine.hypernetwork.set_dtype(torch.bfloat16), engine.encoder.pooling.bfloat16()
        network.save_pretrained(folder, checkpoint.describe(work / name), pooling)
    return folder


def judged(part: str, work: Path, name: str = T2L, arms: Sequence[str] = ARMS) -> dict[str, Any]:
    """The result of the evaluation of one part; answers of an earlier call are read.

    ``name``: a run of T2L, or of the multi-task LoRA, which is arm RIVAL then.
    """
    source, multi_task = folder_of(work, part), RUNS[name].kind == "lora"
    own = {"checkpoint": SPECS, "multi_task": work / name} if multi_task else {"checkpoint": rounded(name, work)}
    names = drawn(read_descriptions(source), PLAN["trained_tasks"] if part == TRAINED else None, "judged")
    return _evaluated(
        work,
        f"{name}-{part}",
        names,
        arms,
        tasks=source,
        held_out_descriptions=0 if part == OTHER else suite.HELD_OUT,  # those tasks have no others
        shots=",".join(map(str, SHOTS)),
        max_items=PLAN["items"][part],
        **own,
        **({"manifest": skills_plan.MANIFEST} if part == OTHER else {}),
    )


def stored(work: Path, split: str, wordings: str, arms: Sequence[str]) -> dict[str, Any]:
    """The result of an evaluation on the tasks of the library, whose adapters are the oracles.

    ``split``, ``wordings``: of plan.SPLITS and plan.WORDINGS; trained wordings: the first descriptions of a task.
    """
    source = folder_of(work, TRAINED)
    return _evaluated(
        work,
        f"{T2L}-{STORED}-{split}-{wordings.replace(' ', '-')}",
        drawn(read_descriptions(source), RUNS[LIBRARY].other["tasks"], TRAINED),
        arms,
        tasks=source,
        checkpoint=rounded(T2L, work),
        held_out_descriptions=suite.HELD_OUT if wordings == WORDINGS[-1] else 0,
        split=split,
        max_items=PLAN["items"][TRAINED],
    )


def _evaluated(work: Path, name: str, names: Sequence[str], arms: Sequence[str], **options: Any) -> dict[str, Any]:
    """What is the same in every evaluation, and the folders that its arms need."""
    library = work / LIBRARY / lora.ADAPTERS
    needed = {RIVAL: ("multi_task", work / RIVAL), "nearest": ("library", library), "oracle": ("oracle", library)}
    options = dict(needed[arm] for arm in arms if arm in needed) | options
    if DESCRIBED in arms:
        options["also"] = f"{DESCRIBED}={rounded(DESCRIBED, work)}"
    # One validation item of each task, for choosing the base model's prompt template.
    options |= {"repeats": PLAN["repeats"], "validation_items": 1, "verify": True}
    return judging.evaluate(work / "judged", name, names, arms, **options)
