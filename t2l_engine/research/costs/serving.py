"""Cost of answering questions of a task by each way of serving: few-shot examples in the prompt, or generated adapters.

A way has a cost for the first question of a task and one for each later question; totals are linear in the number of
questions and break-even points have closed forms.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from t2l_engine.hypernetwork.config import HyperNetworkConfig
from t2l_engine.research.costs.counts import (
    adapter_values,
    cache_bytes,
    decoder_flops,
    encoder_flops,
    hypernet_flops,
    lora_flops,
    merge_flops,
    merged_values,
    pass_bytes,
    steps_bytes,
)
from t2l_engine.research.costs.decoder import Decoder
from t2l_engine.research.costs.encoder import Encoder
from t2l_engine.research.costs.terms import Cost, byte


@dataclasses.dataclass(frozen=True)
class Setup:
    """A language model with its text encoder and hypernetwork.  Item sizes in bytes per value: 2 = bfloat16, 0.5 = int4.

    ``itemsize``: of the language model's weights; ``cache_itemsize``: of keys and values; ``adapter_itemsize``: of the
    hypernetwork and its adapters; ``encoder_itemsize``: of the text encoder, 0 if it is the language model itself.
    """

    decoder: Decoder
    encoder: Encoder | Decoder
    hypernet: HyperNetworkConfig
    itemsize: float = 2
    cache_itemsize: float = 2
    adapter_itemsize: float = 2
    encoder_itemsize: float = 2

    @property
    def adapter_bytes(self) -> int:
        return round(adapter_values(self.hypernet) * self.adapter_itemsize)

    @property
    def generator_bytes(self) -> int:
        """Bytes of text encoder and hypernetwork."""
        encoder = round(self.encoder.num_parameters * self.encoder_itemsize)
        return encoder + round(self.hypernet.num_parameters * self.adapter_itemsize)

    def kv(self, tokens: int) -> int:
        return cache_bytes(self.decoder, tokens, self.cache_itemsize)


@dataclasses.dataclass(frozen=True)
class Workload:
    """Lengths in tokens.

    ``question``: one question with its chat template; ``answer``: generated tokens; ``shot``: one few-shot example in the
    prompt; ``description``: in tokens of the text encoder; ``instruction``: a description in the prompt, with or without
    shots; ``system``: prefix of every prompt of every task.
    """

    question: int
    answer: int
    shots: int
    shot: int
    description: int
    instruction: int = 0
    system: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, low = getattr(self, field.name), 1 if field.name in ("question", "answer", "description") else 0
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ValueError(f"{field.name}: expected a number of tokens of at least {low}, got {value!r}")

    @property
    def prefix(self) -> int:
        """Tokens of the in-context prompt that all questions of a task share, without ``system``."""
        return self.instruction + self.shots * self.shot


@dataclasses.dataclass(frozen=True)
class Phase:
    """One phase of a request: FLOPs and memory traffic."""

    name: str
    flops: Cost
    bytes: Cost

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """Roofline time: the larger of compute time and memory time at these rates."""
        return max(self.flops.total / flops_per_second, self.bytes.total / bytes_per_second)


@dataclasses.dataclass(frozen=True)
class Request:
    """One question, from its arrival to the last token of its answer; phases: describe, generate, merge, prompt, answer."""

    phases: tuple[Phase, ...]

    @property
    def to_first_token(self) -> tuple[Phase, ...]:
        return tuple(phase for phase in self.phases if phase.name != "answer")

    def flops(self, *, first_token: bool = False) -> int:
        return sum(p.flops.total for p in (self.to_first_token if first_token else self.phases))

    def seconds(self, flops_per_second: float, bytes_per_second: float, *, first_token: bool = False) -> float:
        phases = self.to_first_token if first_token else self.phases
        return sum(p.seconds(flops_per_second, bytes_per_second) for p in phases)


#: A measure of a request that is summed over questions, such as FLOPs or seconds.
Measure = Callable[[Request], float]


def all_flops(request: Request) -> float:
    return request.flops()


@dataclasses.dataclass(frozen=True)
class Way:
    """A way to serve a task.

    ``first``, ``later``: requests of the first and of each later question.
    ``per_user``, ``per_task``, ``fixed``: bytes held per active sequence, per task, and once, without the base model.
    ``read_per_user``, ``read_per_task``: bytes that a decode step reads per row, and per task among the rows.
    ``not_read``: bytes of the base model's weights that a decode step does not read, since every task has merged ones.
    """

    name: str
    first: Request
    later: Request
    per_user: int
    per_task: int
    fixed: int
    read_per_user: int
    read_per_task: int
    not_read: int = 0

    def total(self, questions: int, measure: Measure = all_flops) -> float:
        """Sum of ``measure`` over the first ``questions`` questions of a task."""
        return measure(self.first) + (questions - 1) * measure(self.later)

    def memory(self, users: int, tasks: int) -> int:
        """Bytes, without one copy of the base model, for ``users`` concurrent sequences of ``tasks`` tasks."""
        return self.fixed + users * self.per_user + tasks * self.per_task

    def step_bytes(self, setup: Setup, users: int, tasks: int) -> int:
        """Bytes that a decode step of ``users`` rows of ``tasks`` tasks reads: weights, keys and values, adapters."""
        weights = pass_bytes(setup.decoder, [0], users, itemsize=setup.itemsize)["weights"]
        return weights - self.not_read + users * self.read_per_user + tasks * self.read_per_task


#: Way -> its label in tables (LABELS) and its description (WAYS).
LABELS = {
    "icl": "ICL, no cache",
    "icl-cold": "ICL, cold cache",
    "icl-warm": "ICL, warm cache",
    "t2l-request": "T2L per request",
    "t2l-task": "T2L per task",
    "t2l-merged": "T2L merged",
}
WAYS = {
    "icl": "examples in every prompt, nothing cached",
    "icl-cold": "examples cached from a task's first question on",
    "icl-warm": "examples cached before the first question",
    "t2l-request": "an adapter generated for every question",
    "t2l-task": "an adapter generated at a task's first question, then kept",
    "t2l-merged": "the same, added to the weights (one task at a time, or a copy of the weights for each)",
}


def ways(setup: Setup, load: Workload) -> dict[str, Way]:
    """Every way of :data:`WAYS`, for one model and workload.

    A prefix cache holds the keys and values of what precedes the question: of system prompt and examples for in-context
    learning; of the system prompt for adapters, where they depend on the adapter and are computed per task.
    """
    head, before = load.system, load.system + load.prefix
    plain, adapted = (_Requests(setup, load, adapted) for adapted in (False, True))
    describe = _describe(setup, load)
    # Bytes of keys and values: of a whole sequence (with and without examples), and of its parts.  Parts are no differences:
    # a shared prefix stays in memory for other sequences even when the sliding window of this one has passed it.
    own = load.question + load.answer
    whole, whole_t2l = setup.kv(before + own), setup.kv(head + own)
    rest, examples, system = setup.kv(own), setup.kv(load.prefix), setup.kv(head)
    adapter, generator = setup.adapter_bytes, setup.generator_bytes
    weights = round(merged_values(setup.hypernet) * setup.itemsize)
    every, cold, warm = plain.ask(0, before), plain.ask(head, before), plain.ask(before, before)
    new, kept, bare = adapted.ask(0, head, describe), adapted.ask(head, head), plain.ask(head, head)
    merged = plain.ask(0, head, (*describe, _merge(setup)))
    made = [
        Way("icl", every, every, whole, 0, 0, whole, 0),
        Way("icl-cold", cold, warm, rest, examples, system, whole, 0),
        Way("icl-warm", warm, warm, rest, examples, system, whole, 0),
        Way("t2l-request", new, new, whole_t2l + adapter, 0, generator, whole_t2l + adapter, 0),
        Way("t2l-task", new, kept, rest, system + adapter, generator, whole_t2l, adapter),
        Way("t2l-merged", merged, bare, rest, system + weights, generator, whole_t2l, weights, not_read=weights),
    ]
    return {way.name: way for way in made}


class _Requests:
    """Requests of one model and workload, with or without an unmerged adapter."""

    def __init__(self, setup: Setup, load: Workload, adapted: bool):
        self.setup, self.load, self.adapted = setup, load, adapted

    def ask(self, cached: int, before: int, extra: Sequence[Phase] = ()) -> Request:
        """The request of a question after ``before`` tokens, of which ``cached`` are in the KV cache."""
        decoder, context = self.setup.decoder, before + self.load.question
        sizes = {"itemsize": self.setup.itemsize, "cache_itemsize": self.setup.cache_itemsize}
        read, steps = context - cached, self.load.answer - 1  # the prompt gives the first token
        prompt = decoder_flops(decoder, read, cached=cached), pass_bytes(decoder, [cached], read, **sizes)
        answer = decoder_flops(decoder, steps, cached=context, logits=steps), steps_bytes(decoder, steps, context, **sizes)
        return Request((*extra, self._phase("prompt", read, 1, *prompt), self._phase("answer", steps, steps, *answer)))

    def _phase(self, name: str, tokens: int, passes: int, flops: Cost, moved: Cost) -> Phase:
        if self.adapted:
            flops += lora_flops(self.setup.hypernet, tokens)
            moved += byte("adapter", self.setup.adapter_bytes * passes, "A and B once per pass")
        return Phase(name, flops, moved)


def _describe(setup: Setup, load: Workload) -> tuple[Phase, Phase]:
    model = setup.encoder
    if isinstance(model, Decoder):
        itemsize = setup.encoder_itemsize or setup.itemsize
        encoder = pass_bytes(model, [0], load.description, itemsize=itemsize, cache_itemsize=0, logits=False)
    else:  # embedding tables are read by rows, which are not counted
        read = model.num_parameters - model.embeddings * model.hidden
        encoder = byte("encoder weights", round(read * setup.encoder_itemsize), "every weight once per text")
    weights = byte("hypernetwork weights", round(setup.hypernet.num_parameters * setup.adapter_itemsize), "read once")
    written = byte("adapter", setup.adapter_bytes, "A and B written once")
    return (
        Phase("describe", encoder_flops(setup.encoder, load.description), encoder),
        Phase("generate", hypernet_flops(setup.hypernet), weights + written),
    )


def _merge(setup: Setup) -> Phase:
    changed = byte("merged weights", 2 * round(merged_values(setup.hypernet) * setup.itemsize), "read and written once")
    return Phase("merge", merge_flops(setup.hypernet), changed + byte("adapter", setup.adapter_bytes, "A and B read once"))


# --- break-even points -----------------------------------------------------------------------------------------------


def questions_won(way: Way, rival: Way, measure: Measure = all_flops) -> tuple[int, int | None] | None:
    """The range (first, last) of numbers of questions of one task for which ``way`` costs less in total than ``rival``.

    last None: unbounded.  None: never.  Both totals are linear, so the range has no gaps.
    """
    ahead = measure(rival.first) - measure(way.first)
    saved = measure(rival.later) - measure(way.later)  # per later question
    if saved > 0:
        return (1 if ahead > 0 else int(-ahead // saved) + 2), None
    if ahead <= 0:
        return None
    return 1, None if saved == 0 else -int(-ahead // -saved)


def shots_to_win(
    setup: Setup,
    load: Workload,
    way: str,
    rival: str,
    *,
    questions: int = 1,
    limit: int = 1024,
) -> int | None:
    """The fewest shots with which ``rival`` costs more than ``way`` over ``questions`` questions; None: over ``limit``."""

    def wins(shots: int) -> bool:
        both = ways(setup, dataclasses.replace(load, shots=shots))
        return both[way].total(questions) < both[rival].total(questions)

    low, high = 0, limit  # the rival's cost grows with every shot, that of way does not change
    if not wins(high):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if wins(middle) else (middle + 1, high)
    return low


def tasks_to_win(way: Way, rival: Way, users_per_task: int = 1) -> int | None:
    """The fewest concurrent tasks, each with ``users_per_task`` users, from which ``way`` needs less memory; None: never."""
    saved = users_per_task * (rival.per_user - way.per_user) + rival.per_task - way.per_task
    if saved == 0:
        return 1 if way.fixed < rival.fixed else None
    return None if saved < 0 else max(1, (way.fixed - rival.fixed) // saved + 1)


def tokens_of_adapter(setup: Setup) -> int:
    """The fewest cached tokens whose keys and values take more bytes than one adapter (all within the window)."""
    return setup.adapter_bytes // setup.kv(1) + 1
