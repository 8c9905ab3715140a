"""A small real model at given lengths: the first answer token of a new task by each way, and over the number of examples.

Token ids are drawn at random: what they say does not change what a forward pass costs.  What they are worth is measured in
:mod:`bench.icl.questions`.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

import t2l_engine as t2l
from bench.decode import exact_logits, load, merged, shared
from bench.harness import Bar, Context, Error, admit, floor, logits_error, row
from bench.icl.costs import Entries
from bench.icl.words import ALONE, DESCRIBE, GENERATE, ICL, KEPT, MERGED, OURS, PUT, WARM
from bench.timing import Timing
from t2l_engine.research import costs
from t2l_engine.research.costs import Setup, Workload
from t2l_engine.research.costs.known import PAPER, hypernetwork_for
from t2l_engine.testing.models import cache_argument

TINY = Workload(question=12, answer=1, shots=3, shot=8, description=12)
#: Three shots without a prefix cache take at least so many times what a new task by description does.
BAR = 3
SHOTS, TINY_SHOTS = (0, 1, 2, 3, 4, 8, 16), (0, 3)
RIVALS = (ICL, WARM, KEPT, MERGED, ALONE)
WAYS = {OURS: "t2l-task", ICL: "icl", WARM: "icl-warm", KEPT: "t2l-task", MERGED: "t2l-merged"}


class Served:
    """A model with a slot for one adapter, an encoder that knows no text yet, and prompts of fixed lengths."""

    def __init__(self, context: Context, dtype: torch.dtype):
        self.name, self.model = load(context, dtype)
        self.wide = load(context, torch.float64)[1]
        self.load = PAPER if context.full else TINY
        self.encoder, self.net = self._generator(context)
        self.text = text_of(self.encoder, self.load.description)
        self.adapted = shared(self.model)
        self.stack = self.net.generate(self.describe())
        self.handle = t2l.attach(self.adapted, self.stack)
        self.handle.set(0)
        # What the slot holds: rounded to the model's dtype.
        self.merged = merged(self.model, self.stack.to(dtype=dtype), 0)
        size = self.load.question + self.load.shot * max(SHOTS if context.full else TINY_SHOTS)
        drawn = torch.Generator().manual_seed(3)
        self.tokens = torch.randint(self.model.config.vocab_size, (1, size + 1), generator=drawn)
        item = dtype.itemsize
        self.setup = Setup(
            costs.Decoder.from_config(self.model.config), costs.Encoder.from_config(self.encoder.model.config),
            self.net.config, item, item, self.net.dtype.itemsize, self.encoder.model.dtype.itemsize,
        )  # fmt: skip

    def _generator(self, context: Context) -> tuple[t2l.TextEncoder, t2l.HyperNetwork]:
        if context.full:
            engine = t2l.TextToLoRA.from_pretrained("smollm2-135m")
            return engine.encoder, engine.hypernetwork.requires_grad_(False)
        torch.manual_seed(4)
        encoder = t2l.TextEncoder.from_pretrained("minilm")
        sizes = costs.Decoder.from_config(self.model.config), costs.Encoder.from_config(encoder.model.config)
        return encoder, t2l.HyperNetwork(hypernetwork_for(*sizes, latent_size=32, head_in_size=40)).requires_grad_(False)

    # --- the steps of a request ---------------------------------------------------------------------------------------

    def describe(self) -> Tensor:
        """The embedding of a text that is not in the encoder's cache."""
        return embed_anew(self.encoder, self.text)

    def new_task(self, prompt: Tensor) -> Tensor:
        self.handle.put(0, self.net.generate(self.describe()))
        return first_token(self.adapted, prompt)

    def prompt(self, shots: int) -> Tensor:
        """The last tokens are the question, whatever the number of shots before it."""
        count = self.load.question + shots * self.load.shot
        return self.tokens[:, -1 - count : -1]


def embed_anew(encoder: t2l.TextEncoder, text: str) -> Tensor:
    """``task_emb [1, embed_dim]`` of a text as if it was never embedded before."""
    return t2l.TextEncoder(encoder.model, encoder.tokenizer, encoder.config).encode([text])


def tokens_of(encoder: t2l.TextEncoder, text: str) -> int:
    """Tokens that ``encoder`` reads of a description, special ones included."""
    return len(encoder.tokenizer(encoder.prepare([text])[0])["input_ids"])


def text_of(encoder: t2l.TextEncoder, count: int) -> str:
    """A description that ``encoder`` reads as ``count`` tokens."""
    text = "list"
    while (length := tokens_of(encoder, text)) < count:
        text += " word"
    if length != count:
        raise ValueError(f"count: expected at least the {length} tokens of {text!r}, got {count}")
    return text


def first_token(model: nn.Module, prompt: Tensor) -> Tensor:
    """The logits after ``prompt``, read into a new cache."""
    return _read(model, prompt, DynamicCache())


def _read(model: nn.Module, ids: Tensor, cache: DynamicCache) -> Tensor:
    """The logits after ``ids``, which follow what ``cache`` holds and are in it from now on."""
    return model(input_ids=ids, use_cache=True, logits_to_keep=1, **cache_argument(model, cache)).logits[:, -1]


def after_prefix(model: nn.Module, prompt: Tensor, question: int) -> Callable[[], Tensor]:
    """A call that reads the last ``question`` tokens of ``prompt``; those before are in a cache already."""
    cache, rest = DynamicCache(), prompt[:, -question:]
    if prompt.shape[1] > question:
        _read(model, prompt[:, :-question], cache)

    def call() -> Tensor:
        logits = _read(model, rest, cache)
        cache.crop(-question)
        return logits

    return call


# --- entries ---------------------------------------------------------------------------------------------------------


def entries(context: Context, dtype: torch.dtype) -> Entries:
    """The row that carries the claim, its parts, and the sweep over shots."""
    with torch.inference_mode():
        served = Served(context, dtype)
        shots = served.load.shots
        calls = functions(served, served.prompt(0), served.prompt(shots))
        found = errors(served, calls, served.prompt(0), served.prompt(shots))
        named = str(dtype).removeprefix("torch.")
        case = (
            f"first question of a new task, {served.load.question} against {served.prompt(shots).shape[1]} tokens, {named}"
        )
        admitted, absent = admit(case, calls, found)
        timings = context.time(admitted | _parts(served), context.threads, factor=30)
        yield "rows", _row(context, served, case, named, timings, found, absent)
        yield "first_question", _explained(context, served, case, named, timings)
        yield from _sweep(context, served, named)


def functions(served: Served, question: Tensor, examples: Tensor) -> dict[str, Callable[[], Tensor]]:
    return {
        OURS: functools.partial(served.new_task, question),
        ICL: functools.partial(first_token, served.model, examples),
        WARM: after_prefix(served.model, examples, question.shape[1]),
        KEPT: functools.partial(first_token, served.adapted, question),
        MERGED: functools.partial(first_token, served.merged, question),
        ALONE: functools.partial(first_token, served.model, question),
    }


def _parts(served: Served) -> dict[str, Callable[[], object]]:
    task_emb, stack = served.describe(), served.stack
    return {
        DESCRIBE: served.describe,
        GENERATE: functools.partial(served.net.generate, task_emb),
        PUT: functools.partial(served.handle.put, 0, stack),
    }


def errors(served: Served, calls: Mapping, question: Tensor, examples: Tensor) -> dict[str, Error]:
    """Every way against the float64 model: ours with the adapter that it made itself, in the dtype of its slot."""
    stack = served.stack.to(dtype=served.model.dtype)
    wide = stack.to(dtype=torch.float64)
    rights = {}
    for adapted, prompt in ((True, question), (False, question), (False, examples)):
        tokens = torch.cat([prompt, prompt[:, :1]], dim=1)
        both = (served.wide, wide), (served.model, stack)
        exact, other = (exact_logits(m, s if adapted else None, tokens, [0])["prefill"] for m, s in both)
        rights[adapted, prompt.shape[1]] = exact, other
    short, long = question.shape[1], examples.shape[1]
    which = {OURS: (True, short), KEPT: (True, short), MERGED: (True, short), ALONE: (False, short)}
    which |= {ICL: (False, long), WARM: (False, long)}
    return {name: logits_error(call(), *rights[which[name]]) for name, call in calls.items()}


def _row(
    context: Context, served: Served, case: str, dtype: str, timings: dict[str, Timing], found, absent
) -> dict[str, Any]:
    made = costs.ways(served.setup, served.load)
    ours = made["t2l-task"].first
    least = floor(ours.flops(first_token=True), sum(p.bytes.total for p in ours.to_first_token), *_rates(context, dtype))
    shape = {"model": served.name, "dtype": dtype, **_sizes(served.load)}
    ways = {name: t for name, t in timings.items() if not name.startswith("part")}
    bar = Bar(round(1 / BAR, 4), of=ICL) if context.full else None
    unit = timings[ICL].median_us
    return row(case, "icl", shape, context.threads, ways, found[OURS], absent=absent, least=least, bar=bar, unit_us=unit)


def _explained(context: Context, served: Served, case: str, dtype: str, timings: dict[str, Timing]) -> dict[str, Any]:
    """Where time and operations go, and every way's ratio to ours: measured with its spread, and predicted."""
    rates = _rates(context, dtype)
    others = [name for name in RIVALS if name in timings]
    return {
        "case": case,
        "dtype": dtype,
        "threads": context.threads,
        "rates": {"gflops": round(rates[0], 3), "gbps": round(rates[1], 3)},
        "parts": {name: _part(served, name, timing) for name, timing in timings.items()},
        "measured": {name: spread(timings[name], timings[OURS]) for name in others},
        "predicted": {name: _predicted(served, name, rates) for name in others},
    }


def _rates(context: Context, dtype: str) -> tuple[float, float]:
    """GFLOP/s of products in ``dtype`` and GB/s from main memory."""
    return context.ceilings.gemm_at(dtype, context.threads), context.ceilings.bandwidth_at(1 << 28, context.threads)


def _sizes(load: Workload) -> dict[str, int]:
    fields = ("question", "shots", "shot", "description")
    return {field: getattr(load, field) for field in fields}


def spread(of: Timing, over: Timing) -> dict[str, float]:
    """Ratio of two timings that took turns, round by round: its median, and where nine tenths of the rounds lie."""
    ratios = sorted(a / b for a, b in zip(of.samples, over.samples, strict=True))
    cut = statistics.quantiles(ratios, n=20, method="inclusive")
    return {"median": round(statistics.median(ratios), 4), "low": round(cut[0], 4), "high": round(cut[-1], 4)}


def _request(served: Served, name: str) -> costs.Request:
    """What ``name`` does."""
    if name == ALONE:
        return costs.ways(served.setup, dataclasses.replace(served.load, shots=0))["icl"].first
    way = costs.ways(served.setup, served.load)[WAYS[name]]
    return way.later if name in (KEPT, MERGED) else way.first


def _predicted(served: Served, name: str, rates: tuple[float, float]) -> dict[str, float]:
    """Its cost over ours by operations alone, and by the least times at the rates of this machine."""
    gflops, gbps = rates
    both = [_request(served, name), _request(served, OURS)]
    operations = [request.flops(first_token=True) for request in both]
    seconds = [request.seconds(1e9 * gflops, 1e9 * gbps, first_token=True) for request in both]
    return {"flops": round(operations[0] / operations[1], 4), "roofline": round(seconds[0] / seconds[1], 4)}


def _part(served: Served, name: str, timing: Timing) -> dict[str, Any]:
    phases = {phase.name: phase for phase in _request(served, OURS).phases}
    known = {DESCRIBE: "describe", GENERATE: "generate"}
    if name == PUT:
        operations = 0
    elif name in known:
        operations = phases[known[name]].flops.total
    else:
        operations = _request(served, name).flops(first_token=True)
    rate = operations / timing.median_us / 1e3
    return {**timing.to_json(), "flops": operations, "gflops": round(rate, 3)}


def _sweep(context: Context, served: Served, dtype: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """First answer tokens over the number of examples, every length in the same rounds."""
    counts = SHOTS if context.full else TINY_SHOTS
    question = served.prompt(0)
    calls: dict[tuple[str, int], Callable] = {
        (OURS, 0): functools.partial(served.new_task, question),
        (KEPT, 0): functools.partial(first_token, served.adapted, question),
    }
    for shots in counts:
        prompt = served.prompt(shots)
        calls[ICL, shots] = functools.partial(first_token, served.model, prompt)
        if shots:
            calls[WARM, shots] = after_prefix(served.model, prompt, question.shape[1])
    timings = context.time(calls, context.threads, factor=40)
    ours, kept = timings[OURS, 0], timings[KEPT, 0]
    for shots in counts:
        load = dataclasses.replace(served.load, shots=shots)
        made = costs.ways(served.setup, load)
        warm = timings.get((WARM, shots), timings[ICL, shots])  # without examples there is nothing to cache
        predicted = {
            rival: made[rival].first.flops(first_token=True) / made["t2l-task"].first.flops(first_token=True)
            for rival in ("icl", "icl-warm")
        }
        yield "by_examples", {
            "model": served.name, "dtype": dtype, "threads": context.threads, "shots": shots,
            "tokens": load.question + load.prefix, "new_task_us": ours.median_us, "kept_us": kept.median_us,
            "icl_us": timings[ICL, shots].median_us, "icl_warm_us": warm.median_us,
            "ratio": {"icl": spread(timings[ICL, shots], ours), "icl-warm": spread(warm, ours)},
            "predicted": {rival: round(value, 4) for rival, value in predicted.items()},
        }  # fmt: skip
