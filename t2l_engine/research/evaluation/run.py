"""An evaluation: all methods answer the same items; answers are scored and compared."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from t2l_engine.files.errors import ConfigError
from t2l_engine.research.evaluation import metrics, sandbox
from t2l_engine.research.evaluation.answers import Answer, Answerer, Query
from t2l_engine.research.evaluation.methods import Method, description_of, shots_of
from t2l_engine.research.evaluation.metrics import interval
from t2l_engine.research.evaluation.settings import Settings
from t2l_engine.research.tasks.folder import Example, Task
from t2l_engine.text.prompts import answer_in, answer_of, prompt_ids, prompt_of

#: Most different answers of a task that are chosen among.
FEW_ANSWERS = 8


class _Item(NamedTuple):
    """The arguments of :attr:`Method.key`."""

    task: Task
    example: Example
    repeat: int


class _Scored(NamedTuple):
    """``scores``: measures in [0, 1] by name."""

    item: _Item
    answer: Answer
    scores: dict[str, float]


@dataclasses.dataclass(eq=False)
class Evaluation:
    """Runs methods on tasks.

    Args:
        tasks: with the examples to answer.
        methods: with distinct names.
        pools: per task, the examples from which few-shot examples are drawn; not needed without few-shot methods.
        validation: per task, the examples on which a method's prompt template is selected; without any, a method uses its
            first template, and the result's "validation" is null.
        progress: called with (method, number of new answers).

    Raises ValueError for tasks of code without ``settings.run_code``.
    """

    answerer: Answerer
    tokenizer: Any
    tasks: Sequence[Task]
    methods: Sequence[Method]
    settings: Settings = dataclasses.field(default_factory=Settings)
    _: dataclasses.KW_ONLY
    pools: Mapping[str, Sequence[Example]] = dataclasses.field(default_factory=dict)
    validation: Mapping[str, Sequence[Example]] = dataclasses.field(default_factory=dict)
    progress: Callable[[str, int], None] = lambda method, count: None

    def __post_init__(self) -> None:
        if any(e.metric == "pass" for task in self.tasks for e in task.examples):
            if not self.settings.run_code:
                raise ValueError("run_code: expected to be set, since some answers are code that has to be run to be judged")
            try:
                sandbox.check_sandbox()
            except RuntimeError as error:
                raise ValueError(f"run_code: {error}") from None
        self._choices = {task.name: self._few_answers(task) for task in self.tasks if self.settings.choose}
        self._validated = {task.name: self._validation_items(task) for task in self.tasks}

    @property
    def answers(self) -> int:
        """Number of answers that :meth:`run` computes at most, including those for selecting prompt templates."""
        items, validated = sum(len(task.examples) for task in self.tasks), sum(map(len, self._validated.values()))
        tried = sum(len(method.templates) for method in self.methods if len(method.templates) > 1)
        return items * sum(map(self._repeats, self.methods)) + validated * tried

    def run(self) -> dict[str, Any]:
        """The result: ``tasks``: score in percent by task and method; other keys are described in docs/evaluation.md.

        Raises ConfigError if no item of a task is left.
        """
        kept = {task.name: self._fitting(task) for task in self.tasks}
        templates = {method.name: self._choose(method) for method in self.methods}
        details: dict[str, dict[str, Any]] = {}
        for method in self.methods:
            items = self._items(method, kept, self._repeats(method))
            scored = self._ask(method, templates[method.name]["form"], items)
            details[method.name] = _details(scored) | self._calibration(scored)
        scores = {name: {m: of["tasks"][name]["score"] for m, of in details.items() if name in of["tasks"]} for name in kept}
        short = {task.name: len(task.examples) - len(kept[task.name]) for task in self.tasks}
        return {
            "tasks": scores,
            "items": {name: len(examples) for name, examples in kept.items()},
            "left_out": {name: count for name, count in short.items() if count},
            "no_adapter": {m: count for m, of in details.items() if (count := len(scores) - len(of["tasks"]))},
            "forms": templates,
            "details": details,
        }

    # --- prompts ---------------------------------------------------------------------------------------------------

    def _repeats(self, method: Method) -> int:
        return self.settings.repeats if method.repeats else 1

    def _items(self, method: Method, examples: Mapping[str, Sequence[Example]], repeats: int = 1) -> list[_Item]:
        """The items of ``examples``, by task, for which ``method`` has an adapter."""
        items = (_Item(task, e, repeat) for repeat in range(repeats) for task in self.tasks for e in examples[task.name])
        return [item for item in items if method.key(*item) is not None]

    def _prompt(self, method: Method, template: str, item: _Item) -> str:
        task, example, repeat = item
        description = description_of(task, repeat) if method.description else ""
        shots = shots_of(task, self.pools[task.name], repeat, method.shots, example.input) if method.shots else []
        return prompt_of(template, self.tokenizer, example.input, description, shots)

    def _query(self, method: Method, template: str, item: _Item) -> Query:
        example = item.example
        long, exact = example.metric in ("number", "pass"), example.metric == "exact_match"
        lines = exact and any("\n" in output.strip() for output in example.outputs)
        return Query(
            self._prompt(method, template, item),
            method.key(*item),
            tuple(answer_of(template, option) for option in self._options(item)),
            self.settings.max_long_tokens if long else self.settings.max_new_tokens,
            not long and not lines,
            tuple(answer_of(template, output) for output in example.outputs) if self.settings.verify and exact else (),
        )

    def _few_answers(self, task: Task) -> tuple[str, ...]:
        """The different answers of a task that are compared by exact match, where they are few; else none."""
        examples = [*task.examples, *self.pools.get(task.name, ()), *self.validation.get(task.name, ())]
        answers = sorted({example.outputs[0] for example in examples})
        exact = all(example.metric == "exact_match" for example in examples)
        return tuple(answers) if exact and 2 <= len(answers) <= FEW_ANSWERS else ()

    def _options(self, item: _Item) -> Sequence[str]:
        return item.example.options or self._choices.get(item.task.name, ())

    def _right(self, item: _Item) -> list[bool]:
        return [option in item.example.outputs for option in self._options(item)]

    def _fitting(self, task: Task) -> tuple[Example, ...]:
        """The examples whose prompts fit in every method, template and repeat."""
        kept = tuple(e for e in task.examples if self._fits(task, e))
        if not kept:
            raise ConfigError(
                f"max_prompt_tokens: no item of task {task.name} has prompts of at most "
                f"{self.settings.max_prompt_tokens} tokens in every method"
            )
        return kept

    def _fits(self, task: Task, example: Example) -> bool:
        texts = {
            self._prompt(method, template, _Item(task, example, repeat))
            for method in self.methods
            for template in method.templates
            for repeat in range(self._repeats(method))
        }
        return max(map(len, prompt_ids(self.tokenizer, [*texts]))) <= self.settings.max_prompt_tokens

    # --- answers ---------------------------------------------------------------------------------------------------

    def _validation_items(self, task: Task) -> list[Example]:
        if all(len(method.templates) == 1 for method in self.methods):
            return []
        found = self.validation.get(task.name, ())
        fitting = (e for e in found if e.metric != "pass" and self._fits(task, e))  # no code is run for selecting a template
        return list(itertools.islice(fitting, self.settings.validation_items))

    def _choose(self, method: Method) -> dict[str, Any]:
        """The prompt template with the best score on validation items, and the scores in percent."""
        items = self._items(method, self._validated) if len(method.templates) > 1 else []
        means = {}
        for template in method.templates if items else ():
            by_task = _details(self._ask(method, template, items))["tasks"]
            means[template] = statistics.fmean(task["score"] for task in by_task.values())
        return {"form": max(method.templates, key=lambda template: means.get(template, 0)), "validation": means or None}

    def _ask(self, method: Method, template: str, items: Sequence[_Item]) -> list[_Scored]:
        queries = [self._query(method, template, item) for item in items]
        answers = self.answerer.ask(queries, method.adapters, lambda count: self.progress(method.name, count))
        answers = [dataclasses.replace(answer, text=answer_in(template, answer.text)) for answer in answers]
        return [_Scored(item, a, self._scores(item, a)) for item, a in zip(items, answers, strict=True)]

    def _calibration(self, scored: Sequence[_Scored]) -> dict[str, Any]:
        """{"calibration": of the answers that were chosen among given ones}; {} if there are none."""
        rows = [(answer.likelihoods, self._right(item)) for item, answer, _ in scored if self._options(item)]
        return {"calibration": metrics.calibration(rows)} if rows else {}

    def _scores(self, item: _Item, answer: Answer) -> dict[str, float]:
        """``score`` by the example's metric, and further measures; all in [0, 1]."""
        example = item.example
        if options := self._options(item):
            right = self._right(item)
            likeliest = float(right[max(range(len(right)), key=answer.likelihoods.__getitem__)])
            if example.metric != "options":
                return {"score": likeliest}
            per_byte = [v / len(o.encode()) for v, o in zip(answer.likelihoods, options, strict=True)]
            return {"score": float(right[max(range(len(right)), key=per_byte.__getitem__)]), "unnormalised": likeliest}
        if example.metric == "number":
            return {"score": float(metrics.number_match(answer.text, example.outputs))}
        if example.metric == "pass":
            program = sandbox.extract(answer.text, example.input)
            return {"score": float(sandbox.run_tests(program, example.tests) == "passed")}
        first, *_ = answer.text.strip().split("\n")
        score = float(metrics.exact_match(answer.text, example.outputs) or metrics.exact_match(first, example.outputs))
        if self.settings.verify:
            return {"score": score}
        return {
            "score": score,
            "containment": float(metrics.containment(answer.text, example.outputs)),
            "rouge_l": metrics.rouge_l(answer.text, example.outputs),
        }


def _details(given: Sequence[_Scored]) -> dict[str, Any]:
    """Means of the measures over the answers of one method, by task."""
    by_task: dict[str, list[_Scored]] = {}
    for scored in given:
        by_task.setdefault(scored.item.task.name, []).append(scored)
    tasks = {}
    for name, rows in by_task.items():
        found = dict.fromkeys(m for _, _, s in rows for m in s)  # metrics may differ within a task
        measures = {m: 100 * statistics.fmean(s[m] for _, _, s in rows if m in s) for m in found}
        repeats = sorted({item.repeat for item, _, _ in rows})
        tasks[name] = measures | {
            "by_repeat": [100 * statistics.fmean(s["score"] for i, _, s in rows if i.repeat == r) for r in repeats],
            "prompt_tokens": statistics.fmean(a.prompt_tokens for _, a, _ in rows),
        }
    return {"tasks": tasks}


def summary(scores: Mapping[str, Mapping[str, float]], groups: Mapping[str, Sequence[str]], baseline: str) -> dict[str, Any]:
    """Means over the tasks of each group, and the difference of the method ``baseline`` to every other method.

    Args:
        scores: percent by task and method, from :meth:`Evaluation.run`; a method may lack tasks.
        groups: names of tasks by group.

    Returns ``{group: {"tasks": count, "mean": {method: percent}, "difference": {method: interval}}}``, an interval being
    ``{"tasks", "mean", "low", "high"}``.  Differences are ``baseline`` minus the method, in percentage points, over the
    tasks that both answered, with a 95 % bootstrap interval over tasks.  Where at least two families have several tasks,
    "over_families" has ``{"mean": {method: interval}, "difference": {method: interval}}``, with "families" for "tasks".
    """
    result = {}
    for group, names in groups.items():
        rows = {name: scores[name] for name in names}
        methods = dict.fromkeys(method for row in rows.values() for method in row)
        values = {method: {name: row[method] for name, row in rows.items() if method in row} for method in methods}
        paired = {
            method: {name: rows[name][baseline] - value for name, value in of.items() if baseline in rows[name]}
            for method, of in values.items()
            if method != baseline
        }
        result[group] = {
            "tasks": len(names),
            "mean": {method: statistics.fmean(of.values()) for method, of in values.items()},
            "difference": {
                m: {"tasks": len(of), **dataclasses.asdict(interval([*of.values()]))} for m, of in paired.items() if of
            },
        }
        if over := _over_families(values):
            result[group]["over_families"] = {"mean": over, "difference": _over_families(paired)}
    return result


def _over_families(values: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """By method, the mean of ``values`` with an interval over families, where two of these have several tasks."""
    found = {}
    for method, of in values.items():
        sums, counts = metrics.by_family(of)
        if sum(count > 1 for count in counts) > 1:
            found[method] = {"families": len(counts), **dataclasses.asdict(interval(sums, counts))}
    return found
