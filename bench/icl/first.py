"""The first answer token of a new task, of random tokens, by each way: a real small model on a CPU, a 7B shape on a card."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import t2l_engine as t2l
from bench import models
from bench.harness import OURS, Context, Error, Record, Target, logits_error, record, row, verify, worst
from bench.icl.names import ALONE, ICL, KEPT, MERGED, WARM
from bench.models import MODULES, Step, layer_error, shared
from bench.suites.generate import CUDA_TINY, cuda_errors, one_net
from t2l_engine.research import costs
from t2l_engine.research.costs import PAPER, Request, Setup, Workload, hypernetwork_for

TINY = Workload(question=12, answer=1, shots=3, shot=8, description=12)
#: Three shots without a prefix cache take at least three times what a new task by description does; stated for a CPU.
TARGET = Target(round(1 / 3, 4), of=ICL)


class Served:
    """A model as it is, with a slot for an adapter, and with one merged, on the same weights; and what makes adapters."""

    @torch.inference_mode()
    def __init__(self, context: Context, dtype: torch.dtype):
        self.load, device = PAPER if context.full else TINY, context.device.torch
        (self._small if context.on_cpu else self._large)(context, dtype)
        self.setup = dataclasses.replace(self.setup, itemsize=dtype.itemsize, cache_itemsize=dtype.itemsize)
        most = self.load.question + self.load.prefix
        self.tokens = _random(self.setup.model.vocabulary, most, device, seed=3)
        self.question = self.tokens[:, -self.load.question :]
        self.stack = self.net.generate(self.describe()).to(dtype=dtype)
        self.net.generate(self.describe(), out=self.stack)  # rounded once, as in the slot
        adapted, merged = shared(self.model), shared(self.model, own=MODULES["q,v"])
        self.handle = t2l.attach(adapted, self.stack)
        self.handle.set([0])
        t2l.attach(merged, self.stack).merge(0)
        self.alone = Step.of(self.model, 1, self.load.question, new=self.load.question)
        # These keep the cache of the model alone, too: whichever runs writes all of it.
        self.adapted, self.merged = self.alone.on(adapted), self.alone.on(merged)

    def _small(self, context: Context, dtype: torch.dtype) -> None:
        """SmolLM2-135M with the paper's checkpoint; at size tiny a random model and hypernetwork, a real text encoder."""
        self.name, self.model = models.load(context, dtype)
        engine = t2l.TextToLoRA.from_pretrained("smollm2-135m-paper")
        encoder, self.net = engine.encoder, engine.hypernetwork
        sizes = costs.count(self.model.config), costs.count(encoder.model.config, head=False)
        if not context.full:
            torch.manual_seed(4)
            self.net = t2l.HyperNetwork(hypernetwork_for(*sizes, latent_size=32, head_in_size=40))
        self.net.requires_grad_(False)
        itemsizes = {"adapter_itemsize": self.net.dtype.itemsize, "encoder_itemsize": encoder.model.dtype.itemsize}
        self.setup = Setup(*sizes, self.net.config, **itemsizes)
        self.describe = functools.partial(uncached(encoder).encode, [text_of(encoder, self.load.description)])

    def _large(self, context: Context, dtype: torch.dtype) -> None:
        """Mistral-7B's shape, gte-large's and a hypernetwork of variant L, random weights."""
        device, values = context.device.torch, (models.MISTRAL, models.GTE)
        self.setup = costs.known_setup("mistral-7b")
        if not context.full:
            values = models.TINY, models.TINY_TEXT
            self.setup = Setup(costs.count(values[0]), costs.count(values[1], head=False), CUDA_TINY.config())
        self.name, self.model = "7B-shaped, random", models.decoder(values[0], device, dtype)
        encoder = models.encoder(values[1], device, dtype)
        _, self.net = one_net(context, "mistral-7b", str(dtype).removeprefix("torch."))
        text = _random(self.setup.encoder.vocabulary, self.load.description, device, seed=4)
        self.describe = functools.partial(encoder, text)

    # --- the steps of a request ---------------------------------------------------------------------------------------

    def new_task(self) -> Tensor:
        """From description and question to logits, with nothing kept of an earlier request."""
        with self.handle.borrow_slots(0, self.stack) as slot:  # that is in use
            self.net.generate(self.describe(), out=slot)
        return self.adapted(self.question)

    def calls(self) -> dict[str, Callable[[], Tensor]]:
        """Every way by name; each gives logits ``[1, vocabulary]``."""
        count = self.tokens.shape[1]
        whole, behind = (Step.of(self.model, 1, count, new=new) for new in (count, self.load.question))
        whole(self.tokens)
        behind.follow(whole)
        steps = {WARM: behind, KEPT: self.adapted, MERGED: self.merged, ALONE: self.alone}
        others = {name: functools.partial(step, self.question) for name, step in steps.items()}
        return {OURS: self.new_task, ICL: functools.partial(whole, self.tokens), **others}

    def requests(self) -> dict[str, Request]:
        """What every way does, by name."""
        ways, alone = (costs.ways(self.setup, dataclasses.replace(self.load, shots=n)) for n in (self.load.shots, 0))
        first = {OURS: ways["t2l-task"].first, ICL: ways["icl"].first, WARM: ways["icl-warm"].first}
        return first | {KEPT: ways["t2l-task"].later, MERGED: ways["t2l-merged"].later, ALONE: alone["icl"].first}


def _random(vocabulary: int, count: int, device: torch.device, seed: int) -> Tensor:
    return torch.randint(vocabulary, (1, count), generator=torch.Generator(device).manual_seed(seed), device=device)


def uncached(encoder: t2l.TextEncoder) -> t2l.TextEncoder:
    """The same encoder, for which every text is new."""
    return t2l.TextEncoder(encoder.model, encoder.tokenizer, encoder.config, cache_size=0)


def tokens_of(encoder: t2l.TextEncoder, text: str) -> int:
    """Tokens that ``encoder`` reads of a description, special ones included."""
    return len(encoder.tokenizer(encoder.prepare([text])[0])["input_ids"])


def text_of(encoder: t2l.TextEncoder, count: int) -> str:
    """A description that ``encoder`` reads as ``count`` tokens, at least those of "list"."""
    return "list" + " word" * (count - tokens_of(encoder, "list"))


# --- verification ----------------------------------------------------------------------------------------------------


def errors(served: Served, calls: Mapping[str, Callable[[], Tensor]]) -> dict[str, Error]:
    """Of adapters, of the adapted linears where they are, and of logits, against the model in float64.

    ICL without and with a cache, and an adapter applied or merged, are the other implementations that bounds want.
    """
    adapters = cuda_errors(served.net, served.describe(), {}, {})[OURS]
    layers = layer_error(served.adapted, served.question)
    got = {name: calls[name]() for name in (ICL, WARM, KEPT, MERGED)}
    with served.handle.borrow_slots(0, served.stack) as slot:
        for tensor in (*slot.lora_A.values(), *slot.lora_B.values()):
            tensor.fill_(float("nan"))  # a request writes all of it
    got[OURS] = calls[OURS]()
    alone, behind = exact_logits(served.model, served.question, served.stack), exact_logits(served.model, calls[ICL].args[0])
    return {
        OURS: worst([adapters, layers, logits_error(got[OURS], alone, got[MERGED])]),
        KEPT: worst([layers, logits_error(got[KEPT], alone, got[MERGED])]),
        MERGED: logits_error(got[MERGED], alone, got[KEPT]),
        ICL: logits_error(got[ICL], behind, got[WARM]),
        WARM: logits_error(got[WARM], behind, got[ICL]),
        ALONE: Error(0.0, 0.0),
    }


def exact_logits(model: nn.Module, tokens: Tensor, stack: t2l.AdapterStack | None = None) -> Tensor:
    """In float64, with adapter 0 of ``stack`` merged; one layer at a time, since the whole would be four times the model."""
    x = model.model.embed_tokens(tokens).double()
    rotary = model.model.rotary_emb(x, torch.arange(tokens.shape[1], device=tokens.device)[None])
    for i, block in enumerate(model.model.layers):
        wide = copy.deepcopy(block).double()
        for name, a in stack.lora_A.items() if stack else ():
            delta = stack.lora_B[name][0, i].double() @ a[0, i].double()
            getattr(wide.self_attn, name).weight.add_(stack.scaling[0].double() * delta)
        x = wide(x, position_embeddings=rotary)
    return F.linear(copy.deepcopy(model.model.norm).double()(x[:, -1]), model.lm_head.weight.double())


# --- records ---------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def first(context: Context, dtype: torch.dtype) -> Iterator[Record]:
    """The row that carries the claim, and what the operations say."""
    served = Served(context, dtype)
    load, dtype = served.load, str(dtype).removeprefix("torch.")
    calls, requests = served.calls(), served.requests()
    found = errors(served, calls)
    case = f"first question of a new task, {load.question} against {load.question + load.prefix} tokens, {dtype}"
    for name in (KEPT, MERGED):  # ours, too, and what bounds of the others come from
        verify(f"{case}: {name}", {OURS: calls[name]}, {OURS: found[name]})
    verified, skipped = verify(case, calls, found)
    timings = context.time(verified, factor=30, skipped=skipped)
    flops = {name: request.flops(first_token=True) for name, request in requests.items()}
    num_bytes = sum(moved for _, moved in requests[OURS].until(first_token=True))
    least = context.roofline(flops[OURS], num_bytes, dtype)
    lengths = {field: getattr(load, field) for field in ("question", "shots", "shot", "description")}
    shape = {"model": served.name, "dtype": dtype, **lengths}
    given = {"skipped": skipped, "least": least, "target": TARGET if context.on_cpu else None}
    yield row(context, case, "icl", shape, timings, found[OURS], **given)
    predicted = {name: {"flops": round(flops[name] / flops[OURS], 4)} for name in requests if name != OURS}
    yield record("first_question", case=case, dtype=dtype, predicted=predicted)
