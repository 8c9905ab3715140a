"""What a task costs once and a question of it each time: read by the hypernetwork, or shown in every prompt.

``python -m bench costs``
"""

from __future__ import annotations

import functools
import itertools
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator

import torch
from transformers import DynamicCache

import t2l_engine as t2l
from bench.harness import Record, record
from bench.icl.questions import Speaker, task_prefix
from bench.models import shared
from bench.source import SPECS, bundled
from bench.specs.plan import HELD_OUT, SHOTS, drawn
from bench.specs.runs import Specifications
from bench.timing import elapsed_us
from t2l_engine.research.evaluation.methods import shots_of
from t2l_engine.research.tasks.folder import Task
from t2l_engine.research.tasks.specs import suite
from t2l_engine.text import packaged
from t2l_engine.text.llm_encoder import LLMEncoder
from t2l_engine.text.prompts import prompt_ids, raw_prompt

TASKS, ROUNDS = 20, 3


def records(specifications: Specifications) -> Iterator[Record]:
    """The bundled checkpoint, on unseen siblings of ``specifications``, beside the same model that reads them in its prompt.

    A ``cost`` record for each number of worked examples: medians over tasks and rounds, in which all numbers and ways take
    turns.

    Once a task: ``make_us``, text read, adapter generated and put in its slot; ``fill_us``, what the prompts of a task have
    in common put in a cache.  A question, to its first token: ``adapted_us``; with all of the prompt ``prompt_us``, and with
    what is not in that cache ``warm_us``.
    """
    yield record("plan", checkpoint=bundled(SPECS), rounds=ROUNDS)
    siblings = {placed.spec.name: placed.spec for placed in specifications.held_out if placed.tier == HELD_OUT[0]}
    tasks = [suite.task(siblings[name], suite.EXAMPLES, 0) for name in drawn(siblings, TASKS, "costs")]
    served = _Served()
    counts = (0, *SHOTS)
    us, tokens = ({count: defaultdict(list) for count in counts} for _ in range(2))
    for turn in range(1 + ROUNDS):  # the first is not counted: first calls are slower
        for task, count in itertools.product(tasks, counts):
            lengths, ways = served.ways(task, count)
            for name, value in lengths.items():
                tokens[count][name].append(value)
            for i in range(len(ways)):  # each way comes first in turn
                for name, call in ways[(turn + i) % len(ways)].items():
                    took = elapsed_us(call)
                    if turn:
                        us[count][name].append(took)
    for count in counts:
        medians = {way: round(statistics.median(values), 1) for way, values in us[count].items()}
        means = {name: round(statistics.fmean(values), 1) for name, values in tokens[count].items()}
        yield record("cost", examples=count, tasks=len(tasks), tokens=means, **medians)


class _Served:
    """The bundled checkpoint, its base model, and the same weights with a slot for an adapter; in bfloat16."""

    def __init__(self) -> None:
        self.engine = t2l.TextToLoRA.from_pretrained(SPECS)
        read = self.engine.encoder
        assert isinstance(read, LLMEncoder)
        # For which every text is new.
        self.encoder = LLMEncoder(read.model, read.tokenizer, read.config, read.pooling, cache_size=0)
        self.engine.encoder = self.encoder
        model, self.tokenizer = packaged.load(torch.bfloat16)
        adapted = shared(model)
        self.slot = t2l.attach(adapted, slots=1, max_rank=self.engine.hypernetwork.config.rank)
        self.engine.generate_into(self.slot, 0, ["Anything."])  # a slot that is used must be filled
        self.slot.set(0)
        self.plain, self.adapted = Speaker(model, self.tokenizer), Speaker(adapted, self.tokenizer)

    def ids(self, prompt: str) -> list[int]:
        return prompt_ids(self.tokenizer, [prompt])[0]

    def ways(self, task: Task, count: int) -> tuple[dict[str, int], list[dict[str, Callable[[], None]]]]:
        """Tokens of what is read and asked of ``task`` with ``count`` worked examples; of every way what is timed, in order,
        from text on."""
        text, asked = task.descriptions[-1], next(e.input for e in task.examples if e.split == "test")
        shots = shots_of(task, [e for e in task.examples if e.split == "train"], 0, count, asked)
        asked_alone, whole, cache = self.engine.prompt(self.tokenizer, asked), raw_prompt(text, asked, shots), DynamicCache()
        question, prompt = self.ids(asked_alone), self.ids(whole)
        prefix = task_prefix(self.ids, text, shots, [prompt])
        (read,) = self.encoder.lengths(self.encoder.prepare([text], [shots]))
        tokens = {"read": read, "question": len(question), "prompt": len(prompt), "prefix": prefix}
        make = torch.inference_mode()(lambda: self.engine.generate_into(self.slot, 0, [text], [shots]))
        return tokens, [
            {"make_us": make, "adapted_us": self._reading(self.adapted, asked_alone)},
            {"prompt_us": self._reading(self.plain, whole)},
            {
                "fill_us": self._reading(self.plain, whole, slice(prefix), cache),
                "warm_us": self._reading(self.plain, whole, slice(prefix, None), cache),
            },
        ]

    @torch.inference_mode()
    def _read(self, speaker: Speaker, prompt: str, part: slice, cache: DynamicCache) -> None:
        speaker.read(self.ids(prompt)[part], cache)

    def _reading(
        self, speaker: Speaker, prompt: str, part: slice = slice(None), cache: DynamicCache | None = None
    ) -> Callable[[], None]:
        """A call that reads this part of the tokens of ``prompt``."""
        return functools.partial(self._read, speaker, prompt, part, DynamicCache() if cache is None else cache)
