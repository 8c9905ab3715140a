"""The first answer token of a new task by each way: a real small model on a CPU, one of 7B shape on a card.

Token ids are drawn at random: what they say does not change what a forward pass costs.  What answers are worth is measured
in :mod:`bench.icl.questions`.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import t2l_engine as t2l
from bench import models
from bench.harness import OURS, Context, Error, Record, Target, logits_error, record, row, verify, worst
from bench.icl.names import ALONE, DESCRIBE, GENERATE, ICL, KEPT, MERGED, WARM
from bench.models import MODULES, Step, layer_error, shared
from bench.suites.generate import CUDA_TINY, cuda_errors, one_net
from bench.timing import Timing
from t2l_engine.research import costs
from t2l_engine.research.costs import PAPER, Request, Setup, Workload, hypernetwork_for

TINY = Workload(question=12, answer=1, shots=3, shot=8, description=12)
#: Three shots without a prefix cache take at least three times what a new task by description does; stated for a CPU.
TARGET = Target(round(1 / 3, 4), of=ICL)
RIVALS = (ICL, WARM, KEPT, MERGED, ALONE)


def setup_of(context: Context) -> Setup:
    """Mistral-7B with gte-large and a hypernetwork of variant L; at size tiny a small one of the same kind."""
    if context.full:
        return costs.known_setup("mistral-7b")
    return Setup(costs.count(models.TINY), costs.count(models.TINY_TEXT, head=False), CUDA_TINY.config())


class Served:
    """A model as it is, with a slot for an adapter, and with one merged, on the same weights; and what makes adapters."""

    @torch.inference_mode()
    def __init__(self, context: Context, dtype: torch.dtype):
        self.load, device = PAPER if context.full else TINY, context.device.torch
        (self._small if context.on_cpu else self._large)(context, dtype)
        self.setup = dataclasses.replace(self.setup, itemsize=dtype.itemsize, cache_itemsize=dtype.itemsize)
        most = self.load.question + self.load.prefix
        self.tokens = _random(self.setup.model.vocabulary, most, device, seed=3)
        self.question = self.prompt(0)
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
        """SmolLM2-135M with the bundled checkpoint; at size tiny a random model and hypernetwork, a real text encoder."""
        self.name, self.model = models.load(context, dtype)
        engine = t2l.TextToLoRA.from_pretrained("smollm2-135m")
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
        self.setup, device = setup_of(context), context.device.torch
        values = (models.MISTRAL, models.GTE) if context.full else (models.TINY, models.TINY_TEXT)
        self.name, self.model = "7B-shaped, random", models.decoder(values[0], device, dtype)
        encoder = models.encoder(values[1], device, dtype)
        _, self.net = one_net(context, "mistral-7b", str(dtype).removeprefix("torch."))
        text = _random(self.setup.encoder.vocabulary, self.load.description, device, seed=4)
        self.describe = functools.partial(encoder, text)

    # --- the steps of a request ---------------------------------------------------------------------------------------

    def prompt(self, shots: int) -> Tensor:
        """The last tokens are the question, whatever the number of shots before it."""
        return self.tokens[:, -(self.load.question + shots * self.load.shot) :]

    def new_task(self) -> Tensor:
        """From description and question to logits, with nothing kept of an earlier request."""
        self.generate_into(self.describe())
        return self.adapted(self.question)

    def generate_into(self, task_emb: Tensor) -> None:
        """The adapter into the slot that is in use."""
        with self.handle.borrow_slots(0, self.stack) as slot:
            self.net.generate(task_emb, out=slot)

    def in_context(self, shots: int) -> dict[str, Callable[[], Tensor]]:
        """Examples and question read at once, and the question read after the examples' keys and values."""
        prompt = self.prompt(shots)
        whole = Step.of(self.model, 1, prompt.shape[1], new=prompt.shape[1])
        behind = Step.of(self.model, 1, prompt.shape[1], new=self.load.question)
        whole(prompt)
        behind.follow(whole)
        return {ICL: functools.partial(whole, prompt), WARM: functools.partial(behind, self.question)}

    def calls(self) -> dict[str, Callable[[], Tensor]]:
        """Every way by name; each gives logits ``[1, vocabulary]``."""
        others = {KEPT: self.adapted, MERGED: self.merged, ALONE: self.alone}
        others = {name: functools.partial(step, self.question) for name, step in others.items()}
        return {OURS: self.new_task, **self.in_context(self.load.shots), **others}

    def parts(self) -> dict[str, Callable[[], object]]:
        """What ours consists of, but for the question."""
        return {DESCRIBE: self.describe, GENERATE: functools.partial(self.generate_into, self.describe())}

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

    ICL reads examples and question at once, or the question after cached examples: each is the other implementation that
    the bound of both wants.  So are an adapter that is applied and one that is merged.  Of the question alone nothing is
    claimed.
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
    """The row that carries the claim, and its parts."""
    served = Served(context, dtype)
    load, dtype = served.load, str(dtype).removeprefix("torch.")
    calls, requests = served.calls(), served.requests()
    found = errors(served, calls)
    case = f"first question of a new task, {load.question} against {load.question + load.prefix} tokens, {dtype}"
    for name in (KEPT, MERGED):  # ours, too, and what bounds of the others come from
        verify(f"{case}: {name}", {OURS: calls[name]}, {OURS: found[name]})
    verified, skipped = verify(case, calls, found)
    timings = context.time(verified | served.parts(), factor=30, skipped=skipped)
    flops = {name: request.flops(first_token=True) for name, request in requests.items()}
    num_bytes = sum(moved for _, moved in requests[OURS].until(first_token=True))
    least = context.roofline(flops[OURS], num_bytes, dtype)
    lengths = {field: getattr(load, field) for field in ("question", "shots", "shot", "description")}
    shape = {"model": served.name, "dtype": dtype, **lengths}
    ways = {name: timing for name, timing in timings.items() if name in requests}
    given = {"skipped": skipped, "least": least, "target": TARGET if context.on_cpu else None}
    yield row(context, case, "icl", shape, ways, found[OURS], **given)
    if not context.device.timed:
        return
    rates = {name: least[name] for name in ("gflops", "gbps")}
    seconds = {name: r.seconds(*(1e9 * rate for rate in rates.values()), first_token=True) for name, r in requests.items()}
    measured, predicted = {}, {}
    for name in (name for name in RIVALS if name in ways):
        measured[name] = spread(timings[name], timings[OURS])
        over = {"flops": flops[name] / flops[OURS], "roofline": seconds[name] / seconds[OURS]}
        predicted[name] = {by: round(ratio, 4) for by, ratio in over.items()}
    phases = requests[OURS].phases
    flops |= {DESCRIBE: phases["describe"][0], GENERATE: phases["generate"][0]}
    parts = {
        name: {**timing.to_json(), "flops": flops[name], "gflops": round(flops[name] / timing.median_us / 1e3, 3)}
        for name, timing in timings.items()
    }
    about = {"case": case, "dtype": dtype, "threads": context.threads, "rates": rates}
    yield record("first_question", **about, parts=parts, measured=measured, predicted=predicted)


def quantiles(values: Sequence[float], digits: int) -> dict[str, float]:
    """Median, and between which values nine tenths lie."""
    cut = statistics.quantiles(values if len(values) > 1 else [*values, *values], n=20, method="inclusive")
    return {name: round(value, digits) for name, value in (("median", cut[9]), ("low", cut[0]), ("high", cut[-1]))}


def spread(of: Timing, over: Timing) -> dict[str, float]:
    """Ratio of two timings that took turns, round by round.

    On a card the slower one has fewer samples, spread over all rounds: each is paired with the other's of that time.
    """
    count = min(len(of.samples), len(over.samples))
    pairs = [[timing.samples[i * len(timing.samples) // count] for timing in (of, over)] for i in range(count)]
    return quantiles([a / b for a, b in pairs], 4)
