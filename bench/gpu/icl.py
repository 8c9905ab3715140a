"""The first question of a user: a description and an adapter made of it, or three examples in the prompt.

A 7B-shaped decoder, random weights, one user.  What is timed ends with the logits of the question's last token: a prefill of
the question alone, of examples and question (in-context learning, ICL), of the question behind cached examples, and ours.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import t2l_engine as t2l
from bench.gpu import energy, generation, gte, llama, model, nvml, results
from bench.gpu.ceilings import Ceilings, begin
from bench.gpu.context import Context
from bench.gpu.lora import need_kernels
from bench.gpu.model import layer_error, shared, verified
from bench.gpu.tables import AS_IT_COMES, ENCODER, PER_REQUEST, THREE_SHOT, first_question
from bench.gpu.timing import Candidate, measure
from bench.harness import OURS, Error, admit, logits_error, worst
from bench.icl.words import KEPT, MERGED, WARM
from bench.rows import BASE
from t2l_engine.research import costs
from t2l_engine.research.costs.known import PAPER

#: A call of ours -> its name, and what it is among flops.WAYS: the first question of a task or a later one.
FORMS = {
    OURS: (PER_REQUEST, "t2l-request", "first"),
    KEPT: (KEPT, "t2l-task", "later"),
    MERGED: (MERGED, "t2l-merged", "later"),
}
RIVALS = (THREE_SHOT, WARM)
MODULES, DTYPE = "q,v", torch.bfloat16


@dataclasses.dataclass(frozen=True)
class Sizes:
    """``rows``: of the decode step, each with ``answered`` tokens of its answer."""

    setup: costs.Setup
    load: costs.Workload
    rows: int
    answered: int

    @staticmethod
    def of(context: Context) -> Sizes:
        return FULL if context.on_card else TINY

    @property
    def in_context(self) -> int:
        """Tokens of examples and question."""
        return self.load.prefix + self.load.question


FULL = Sizes(costs.known_setup("mistral-7b"), PAPER, rows=64, answered=16)
_TINY = costs.Setup(model.TINY, costs.Encoder("new", 24, 32, 1, 2, gated=True, embeddings=61), generation.TINY.config())
TINY = Sizes(_TINY, costs.Workload(question=5, answer=1, shots=3, shot=2, description=4), rows=3, answered=2)


def run(context: Context) -> None:
    need_kernels(context, *generation.KERNELS, "lora_add_")
    ceilings = begin(context)
    made = functools.cache(functools.partial(First, context))  # by the first case that needs it
    context.attempt("first question", lambda: questions(context, ceilings, made()), needs=12.0)
    if context.part.data.get("rows"):  # else nothing is verified
        for call, name in ((OURS, PER_REQUEST), (THREE_SHOT, THREE_SHOT)):
            spent = functools.partial(joules, context, made, call, first_question(name))
            context.attempt(f"joules, {name}", spent, needs=energy.SECONDS + 5)
    made.cache_clear()  # the next case has a model of its own
    context.attempt("decode step", functools.partial(decoding, context, ceilings), needs=10.0)


# --- the first question ----------------------------------------------------------------------------------------------


class First:
    """What answers a first question: models around the same weights, verified.

    ``errors``: of the calls, but for the base model and the encoder, of which nothing is claimed; ``absent``: rivals that
    are wrong, and how.
    """

    @torch.inference_mode()
    def __init__(self, context: Context):
        self.sizes = s = Sizes.of(context)
        names, question, device = model.SETS[MODULES], s.load.question, context.device.torch
        draw = functools.partial(torch.randint, device=device, generator=torch.Generator(device).manual_seed(3))
        self.examples = draw(s.setup.decoder.vocabulary, (1, s.in_context))
        self.description = draw(s.setup.encoder.embeddings, (1, s.load.description))
        self.question = self.examples[:, -question:].clone()
        self.base = llama.make(s.setup.decoder, 1, question, device, DTYPE, new=question)
        self.whole = shared(self.base).reserve(1, s.in_context, new=s.in_context)
        self.behind = shared(self.base).reserve(1, s.in_context, new=question)
        # These keep the cache of the base model, too: whichever runs writes all of it.
        self.adapted, self.merged = shared(self.base), shared(self.base, own=names)
        self.encoder = gte.make(s.setup.encoder, s.load.description, device, DTYPE)
        _, self.net = generation.one_net(context, "mistral-7b", str(DTYPE).removeprefix("torch."))
        self.stack = self.net.generate(self.encoder(self.description))
        handle = t2l.attach(self.adapted, self.stack)
        handle.set([0])
        self.slots = slots_of(handle, self.stack)
        t2l.attach(self.merged, self.stack).merge(0)
        self.errors = errors_of(self)
        for call, (name, *_) in FORMS.items():
            verified(first_question(name), self.errors[call])
        _, self.absent = admit("first question", {name: self.calls()[name] for name in RIVALS}, self.errors)

    def calls(self) -> dict[str, Callable[[], Tensor]]:
        """By name; all but the encoder's give logits ``[1, vocabulary]``."""
        return {
            OURS: self.per_request,
            BASE: lambda: self.base(self.question),
            THREE_SHOT: lambda: self.whole(self.examples),
            WARM: lambda: self.behind(self.question),
            KEPT: lambda: self.adapted(self.question),
            MERGED: lambda: self.merged(self.question),
            ENCODER: lambda: self.encoder(self.description),
        }

    def per_request(self) -> Tensor:
        """From description and question to logits, with nothing kept of an earlier request."""
        self.net.generate(self.encoder(self.description), out=self.slots)
        return self.adapted(self.question)


def slots_of(handle: t2l.LoRAHandle, stack: t2l.AdapterStack) -> t2l.AdapterStack:
    """The handle's own slots, to be generated into: ``put`` copies, and reads ranks on the host, which no graph can hold."""
    slots = {name: handle._slots[handle._keys[path]] for name, path in stack.paths.items()}
    sides = {name: one.A for name, one in slots.items()}, {name: one.B.mT for name, one in slots.items()}
    return t2l.AdapterStack(*sides, handle._scaling, {name: one.ranks.T for name, one in slots.items()}, stack.paths)


@torch.inference_mode()
def questions(context: Context, ceilings: Ceilings, first: First) -> Iterator[tuple[str, dict[str, Any]]]:
    """A row for each form of ours, all beside the same rivals."""
    device, s, absent = context.device, first.sizes, dict(first.absent)
    candidates = {name: Candidate([call]) for name, call in first.calls().items() if name not in absent}
    seconds = max(2.0, min(10.0, context.left / 4)) if context.on_card else 0.1
    timings, ways = measure(device, candidates, seconds, absent), costs.ways(s.setup, s.load)
    for form, (name, way, which) in FORMS.items():
        case, beside = first_question(name), (BASE, *RIVALS, *((ENCODER,) if form == OURS else ()))
        if form not in timings:
            yield "failed", {"case": case, "error": absent[form]}
            continue
        request: costs.Request = getattr(ways[way], which)
        count, num_bytes = request.flops(first_token=True), sum(phase.bytes.total for phase in request.to_first_token)
        tokens = {"question": s.load.question, "in_context": s.in_context, "description": s.load.description}
        fields = tokens | _beside_icl(ways, way, ways["icl"].first.flops(first_token=True))
        mine = {OURS: timings[form]} | {other: timings[other] for other in beside if other in timings}
        gone = {other: why for other, why in absent.items() if other in beside}
        given = {"cache": AS_IT_COMES, "absent": gone, "least": results.floor(ceilings, count, num_bytes, DTYPE)}
        yield results.row(context, case, "icl", fields, mine, first.errors[form], **given)


def _beside_icl(ways: dict[str, costs.Way], way: str, count: int) -> dict[str, Any]:
    """Fields of a row's shape; the bytes are what a user holds in all.  ``count``: operations of ICL."""
    model_fields = {"model": "7B-shaped, random", "modules": MODULES, "rank": model.RANK}
    ours, theirs = (ways[name].per_user + ways[name].per_task for name in (way, "icl"))
    return model_fields | {"user_bytes": ours, "user_bytes_in_context": theirs, "flops_in_context": count}


def joules(context: Context, made: Callable[[], First], call: str, case: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Of one question."""
    return energy.measured(context, nvml.meter(context), lambda: energy.Work(case, "question", 1, [made().calls()[call]]))


# --- verification ----------------------------------------------------------------------------------------------------


def errors_of(first: First) -> dict[str, Error]:
    """Of the adapters, of the adapted linears where they are, and of logits, against the whole model in float64.

    ICL reads examples and question at once, or the question behind the keys and values of that: each is the other
    implementation that the bound of both wants.  So are an adapter that is applied and one that is merged.
    """
    calls, wide = first.calls(), copy.deepcopy(first.net).set_dtype(torch.float64)
    adapters = generation.adapter_errors(first.net, wide, first.encoder(first.description), {}, {})[OURS]
    layers = layer_error(first.adapted, first.question)
    got = {name: calls[name]() for name in (THREE_SHOT, KEPT, MERGED)}
    first.behind.follow(first.whole)
    for tensor in (*first.slots.lora_A.values(), *first.slots.lora_B.values()):
        tensor.fill_(float("nan"))  # a request writes all of it
    got |= {name: calls[name]() for name in (WARM, OURS)}
    alone, behind = exact_logits(first.base, first.question, first.stack), exact_logits(first.whole, first.examples)
    return {
        OURS: worst([adapters, layers, logits_error(got[OURS], alone, got[MERGED])]),
        KEPT: worst([layers, logits_error(got[KEPT], alone, got[MERGED])]),
        MERGED: logits_error(got[MERGED], alone, got[KEPT]),
        THREE_SHOT: logits_error(got[THREE_SHOT], behind, got[WARM]),
        WARM: logits_error(got[WARM], behind, got[THREE_SHOT]),
    }


def exact_logits(base: llama.Llama, tokens: Tensor, stack: t2l.AdapterStack | None = None) -> Tensor:
    """In float64, with adapter 0 of ``stack`` merged; one layer at a time, since the whole would be four times the model."""
    x, cos, sin = base.model.embed_tokens(tokens).double(), base.cos.double(), base.sin.double()
    for i, block in enumerate(base.model.layers):
        wide = copy.deepcopy(block).double()
        for name, a in stack.lora_A.items() if stack else ():
            delta = stack.lora_B[name][0, i].double() @ a[0, i].double()
            getattr(wide.self_attn, name).weight.add_(stack.scaling[0].double() * delta)
        x = wide(x, cos, sin)
    return F.linear(copy.deepcopy(base.model.norm).double()(x[:, -1]), base.lm_head.weight.double())


# --- later tokens ----------------------------------------------------------------------------------------------------


@torch.inference_mode()
def decoding(context: Context, ceilings: Ceilings) -> Iterator[tuple[str, dict[str, Any]]]:
    """A step of many rows in the middle of their answers: an adapter each, or the examples in the cache of each."""
    device, s = context.device, Sizes.of(context)
    rows, tokens, in_context, decoder = s.rows, s.load.question + s.answered, s.in_context + s.answered, s.setup.decoder
    base = llama.make(decoder, rows, tokens, device.torch, DTYPE)
    longer, adapted = shared(base).reserve(rows, in_context), shared(base)
    stack = model.random_adapters(base, model.SETS[MODULES], rows, seed=9)
    t2l.attach(adapted, stack).set(list(range(rows)))
    token = torch.randint(decoder.vocabulary, (rows, 1), device=device.torch)
    case = f"decode step, {rows} rows, an adapter or three examples each"
    error, absent = verified(case, layer_error(adapted, token)), {}
    models = {OURS: adapted, BASE: base, THREE_SHOT: longer}
    candidates = {name: Candidate([functools.partial(one, token)]) for name, one in models.items()}
    timings = measure(device, candidates, min(6.0, context.left / 3) if context.on_card else 0.05, absent)
    ours, theirs = (costs.decoder_flops(decoder, 1, cached=n - 1).total for n in (tokens, in_context))
    ours += costs.lora_flops(s.setup.hypernet, 1).total
    ways = costs.ways(s.setup, dataclasses.replace(s.load, answer=s.answered))
    least = results.floor(ceilings, rows * ours, ways["t2l-task"].step_bytes(s.setup, rows, rows), DTYPE)
    fields = {"rows": rows, "tokens": tokens, "in_context": in_context} | _beside_icl(ways, "t2l-task", rows * theirs)
    given = {"cache": AS_IT_COMES, "absent": absent, "least": least}
    yield results.row(context, case, "icl", fields, timings, error, **given)
