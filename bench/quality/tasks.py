"""Task folders of the study: specifications made by code, and natural tasks."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.harness import BenchError
from bench.quality.plan import DEVELOPMENT, NATURAL, PLAN, TRAINED, drawn
from t2l_engine.files.errors import ConfigError
from t2l_engine.research.tasks import manifest
from t2l_engine.research.tasks.folder import DESCRIPTIONS_NAME, Task, load_tasks, write_tasks
from t2l_specs import suite

#: Natural tasks: most characters of an input, of an answer and of a description, and least training examples.
INPUT, ANSWER, DESCRIPTION, LEAST = 200, 80, 600, 24
#: A natural task with fewer descriptions gets them again behind these openings; one with MANY shares them among its parts.
FEW, MANY, OPENINGS = 10, 60, ("Task: ", "Please do this: ", "Instructions: ", "What to do: ")


def write(work: Path, natural: Path) -> None:
    """Write the task folders of all parts; ``natural``: a task folder with the plan's natural tasks and those held out.

    Raises BenchError if a held-out description is trained on, ConfigError where other tasks are.
    """
    placed = suite.suite(PLAN["specifications"])
    known = {
        of.spec.name: suite.task(of.spec, PLAN["examples"], 0, PLAN["further"]) for of in placed if of.task_split == "train"
    }
    development = drawn(known, PLAN["development"]["tasks"], PLAN["development"]["seed"])
    made: dict[str, list[Task]] = {DEVELOPMENT: [known.pop(name) for name in sorted(development)]}
    made[TRAINED] = [*known.values(), *natural_tasks(natural)]
    for of in placed[: suite.SPECIFICATIONS]:
        if of.task_split != "train":
            made.setdefault(of.new or of.task_split, []).append(suite.task(of.spec, PLAN["examples"], 0))
    skills = manifest.read("skills")
    made[NATURAL] = load_tasks(natural, None, names=[*skills.names("in-family"), *skills.names("out-of-family")])
    held = [(part, task) for part, of in made.items() if part not in (TRAINED, NATURAL) for task in of]
    if leaks := suite.leaks([*(("train", task) for task in known.values()), *held]):
        raise BenchError(f"tasks: expected no held-out description among those trained on, got {leaks[0]}")
    for part, of in made.items():
        _write(folder_of(work, part), of)


def folder_of(work: Path, part: str) -> Path:
    return work / "tasks" / part


def _write(folder: Path, tasks: Sequence[Task]) -> None:
    if not (folder / DESCRIPTIONS_NAME).is_file():
        write_tasks(folder, tasks)
    elif load_tasks(folder, None) != sorted(tasks, key=lambda task: task.name):
        raise ConfigError(f"{folder}: expected the tasks of the study, got others; --work: choose a new folder")


def natural_tasks(folder: Path) -> Iterator[Task]:
    """The parts of the plan's natural tasks: short examples alone; ConfigError for a task with too few."""
    for task in load_tasks(folder, None, names=PLAN["natural"]):
        examples = tuple(of for of in task.examples if len(of.input) < INPUT and len(of.outputs[0]) < ANSWER)
        if sum(of.split == "train" for of in examples) < LEAST:
            raise ConfigError(f"{folder}: {task.name}: expected {LEAST} short examples of split train or more")
        texts = [text for text in task.descriptions if len(text) < DESCRIPTION]
        if len(texts) < FEW:
            texts += [opening + text for opening in OPENINGS for text in texts][: max(8, len(texts))]
        parts = PLAN["parts"] if len(texts) >= MANY else 1
        if parts > 1:
            random.Random(0).shuffle(texts)
        for i in range(PLAN["parts"]):
            yield Task(f"{task.name}-nat{i}", tuple(texts[i % parts :: parts]), examples)
