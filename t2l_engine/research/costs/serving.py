"""Cost of answering questions of a task by each way of serving: few-shot examples in the prompt, or generated adapters.

A way has a cost for the first question of a task and one for each later question; totals are linear in the number of
questions and break-even points have closed forms.  Bytes: every weight once per pass, keys and values read and written,
adapters; activations are assumed to stay in cache.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
from collections.abc import Callable, Sequence

from t2l_engine.hypernetwork.config import HyperNetworkConfig
from t2l_engine.research.costs.model import Model, Parts


@functools.cache
def hypernet_flops(config: HyperNetworkConfig) -> Parts:
    """FLOPs of generating one adapter, by the formulas that are registered for this package's ops, as trunk and heads."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from t2l_engine.hypernetwork.network import HyperNetwork

    with torch.device("meta"), torch.no_grad():
        network, task_emb = HyperNetwork(config), torch.empty(1, config.embed_dim)
        network.generate(task_emb)  # folds what does not depend on the task
        with FlopCounterMode(display=False) as counter:
            network.generate(task_emb)
    heads = counter.get_flop_counts()["Global"][torch.ops.t2l_engine.hypernet_heads]
    return {"trunk": counter.get_total_flops() - heads, "heads": heads}


def adapter_values(config: HyperNetworkConfig) -> int:
    """Number of entries of A and B of one adapter; applying it to a token takes two FLOPs each."""
    return config.num_layers * config.rank * sum(config.in_features + config.out_features)


def merged_values(config: HyperNetworkConfig) -> int:
    """Number of weights that merging an adapter changes; the products B A take ``2 * rank`` FLOPs each."""
    products = (n_in * n_out for n_in, n_out in zip(config.in_features, config.out_features, strict=True))
    return config.num_layers * sum(products)


@dataclasses.dataclass(frozen=True)
class Setup:
    """A language model with its text encoder and hypernetwork.  Item sizes in bytes per value: 2 = bfloat16, 0.5 = int4.

    ``itemsize``: of the language model's weights; ``cache_itemsize``: of keys and values; ``adapter_itemsize``: of the
    hypernetwork and its adapters; ``encoder_itemsize``: of the text encoder, 0 if it is the language model itself.
    """

    model: Model
    encoder: Model
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
        encoder = round(self.encoder.parameters * self.encoder_itemsize)
        return encoder + round(self.hypernet.num_parameters * self.adapter_itemsize)

    def kv(self, tokens: int) -> int:
        """Bytes of the KV cache of a sequence."""
        return round(self.model.kept(tokens) * self.cache_itemsize)


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
        for name, value in vars(self).items():
            low = int(name in ("question", "answer", "description"))
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ValueError(f"{name}: expected a number of tokens of at least {low}, got {value!r}")

    @property
    def prefix(self) -> int:
        """Tokens of the in-context prompt that all questions of a task share, without ``system``."""
        return self.instruction + self.shots * self.shot


@dataclasses.dataclass(frozen=True)
class Phase:
    """One phase of a request: FLOPs and memory traffic by part."""

    name: str
    flops: Parts
    bytes: Parts

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """Roofline time: the larger of compute time and memory time at these rates."""
        return max(sum(self.flops.values()) / flops_per_second, sum(self.bytes.values()) / bytes_per_second)


@dataclasses.dataclass(frozen=True)
class Request:
    """One question, from its arrival to the last token of its answer; phases: describe, generate, merge, prompt, answer."""

    phases: tuple[Phase, ...]

    def until(self, first_token: bool) -> tuple[Phase, ...]:
        return tuple(phase for phase in self.phases if not (first_token and phase.name == "answer"))

    def flops(self, *, first_token: bool = False) -> int:
        return sum(sum(phase.flops.values()) for phase in self.until(first_token))

    def seconds(self, flops_per_second: float, bytes_per_second: float, *, first_token: bool = False) -> float:
        return sum(phase.seconds(flops_per_second, bytes_per_second) for phase in self.until(first_token))


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

    def total(self, questions: int, measure: Callable[[Request], float] = Request.flops) -> float:
        """Sum of ``measure`` over the first ``questions`` questions of a task."""
        return measure(self.first) + (questions - 1) * measure(self.later)

    def memory(self, users: int, tasks: int) -> int:
        """Bytes, without one copy of the base model, for ``users`` concurrent sequences of ``tasks`` tasks."""
        return self.fixed + users * self.per_user + tasks * self.per_task

    def step_bytes(self, setup: Setup, users: int, tasks: int) -> int:
        """Bytes that a decode step of ``users`` rows of ``tasks`` tasks reads: weights, keys and values, adapters."""
        weights = round(setup.model.weights(users) * setup.itemsize)
        return weights - self.not_read + users * self.read_per_user + tasks * self.read_per_task


#: Way -> (its label in tables, its description).
_WAYS = {
    "icl": ("ICL, no cache", "examples in every prompt, nothing cached"),
    "icl-cold": ("ICL, cold cache", "examples cached from a task's first question on"),
    "icl-warm": ("ICL, warm cache", "examples cached before the first question"),
    "t2l-request": ("T2L per request", "an adapter generated for every question"),
    "t2l-task": ("T2L per task", "an adapter generated at a task's first question, then kept"),
    "t2l-merged": ("T2L merged", "the same, added to the weights (one task at a time, or a copy of the weights for each)"),
}
LABELS = {name: label for name, (label, _) in _WAYS.items()}
WAYS = {name: text for name, (_, text) in _WAYS.items()}


def ways(setup: Setup, load: Workload) -> dict[str, Way]:
    """Every way of :data:`WAYS`, for one model and workload.

    A prefix cache holds the keys and values of what precedes the question: of system prompt and examples for in-context
    learning; of the system prompt for adapters, where they depend on the adapter and are computed per task.
    """
    head, before = load.system, load.system + load.prefix
    plain, adapted = (functools.partial(_ask, setup, load, with_adapter) for with_adapter in (False, True))
    describe = _describe(setup, load)
    # Bytes of keys and values: of a whole sequence (with and without examples), and of its parts.  Parts are no differences:
    # a shared prefix stays in memory for other sequences even when the sliding window of this one has passed it.
    own = load.question + load.answer
    whole, whole_t2l = setup.kv(before + own), setup.kv(head + own)
    rest, examples, system = setup.kv(own), setup.kv(load.prefix), setup.kv(head)
    adapter, generator = setup.adapter_bytes, setup.generator_bytes
    weights = round(merged_values(setup.hypernet) * setup.itemsize)
    merge = Phase(
        "merge",
        {"products": 2 * setup.hypernet.rank * merged_values(setup.hypernet)},
        {"merged weights, read and written": 2 * weights, "adapter": adapter},
    )
    every, cold, warm = plain(0, before), plain(head, before), plain(before, before)
    new, kept, bare = adapted(0, head, describe), adapted(head, head), plain(head, head)
    merged = plain(0, head, (*describe, merge))
    made = [
        Way("icl", every, every, whole, 0, 0, whole, 0),
        Way("icl-cold", cold, warm, rest, examples, system, whole, 0),
        Way("icl-warm", warm, warm, rest, examples, system, whole, 0),
        Way("t2l-request", new, new, whole_t2l + adapter, 0, generator, whole_t2l + adapter, 0),
        Way("t2l-task", new, kept, rest, system + adapter, generator, whole_t2l, adapter),
        Way("t2l-merged", merged, bare, rest, system + weights, generator, whole_t2l, weights, not_read=weights),
    ]
    return {way.name: way for way in made}


def _ask(setup: Setup, load: Workload, adapted: bool, cached: int, before: int, extra: Sequence[Phase] = ()) -> Request:
    """The request of a question after ``before`` tokens, of which ``cached`` are in the KV cache."""
    model, context = setup.model, before + load.question
    read, steps = context - cached, load.answer - 1  # the prompt gives the first token

    def phase(name: str, flops: Parts, tokens: int, passes: int, weights: int, cache_read: int, cache_written: int) -> Phase:
        cache = {"KV cache read": cache_read, "KV cache written": cache_written}
        moved = {"weights": round(weights * setup.itemsize)}
        moved |= {name: round(values * setup.cache_itemsize) for name, values in cache.items()}
        if adapted:
            flops = flops | {"LoRA": 2 * tokens * adapter_values(setup.hypernet)}
            moved["adapter"] = passes * setup.adapter_bytes
        return Phase(name, flops, moved)

    prompt = model.weights(read), model.kept(cached), model.kept(read)
    answer = steps * model.weights(1), model.read_by_steps(steps, context), steps * model.kept(1)
    prompt_flops, answer_flops = model.flops(read, cached), model.flops(steps, context, logits=steps)
    phases = phase("prompt", prompt_flops, read, 1, *prompt), phase("answer", answer_flops, steps, steps, *answer)
    return Request((*extra, *phases))


def _describe(setup: Setup, load: Workload) -> tuple[Phase, Phase]:
    tokens, encoder = load.description, setup.encoder
    weights = round(encoder.weights(tokens, logits=False) * (setup.encoder_itemsize or setup.itemsize))
    network = round(setup.hypernet.num_parameters * setup.adapter_itemsize)
    return (
        Phase("describe", encoder.flops(tokens, logits=0), {"encoder weights": weights}),
        Phase(
            "generate",
            hypernet_flops(setup.hypernet),
            {"hypernetwork weights": network, "adapter, written": setup.adapter_bytes},
        ),
    )


# --- break-even points -----------------------------------------------------------------------------------------------


def questions_won(
    way: Way, rival: Way, measure: Callable[[Request], float] = Request.flops
) -> tuple[int, int | None] | None:
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


def shots_to_win(setup: Setup, load: Workload, way: str, rival: str, *, questions: int = 1, limit: int = 1024) -> int | None:
    """The fewest shots with which ``rival`` costs more than ``way`` over ``questions`` questions; None: over ``limit``."""

    def wins(shots: int) -> bool:
        both = ways(setup, dataclasses.replace(load, shots=shots))
        return both[way].total(questions) < both[rival].total(questions)

    # The rival's cost grows with every shot, that of way does not change.
    found = bisect.bisect_left(range(limit + 1), True, key=wins)
    return found if found <= limit else None


def tasks_to_win(way: Way, rival: Way, users_per_task: float = 1) -> int | None:
    """The fewest concurrent tasks, each with ``users_per_task`` users, from which ``way`` needs less memory; None: never."""
    saved = users_per_task * (rival.per_user - way.per_user) + rival.per_task - way.per_task
    if saved == 0:
        return 1 if way.fixed < rival.fixed else None
    return None if saved < 0 else max(1, int((way.fixed - rival.fixed) // saved) + 1)


def tokens_of_adapter(setup: Setup) -> int:
    """The fewest cached tokens whose keys and values take more bytes than one adapter (all within the window)."""
    return setup.adapter_bytes // setup.kv(1) + 1
