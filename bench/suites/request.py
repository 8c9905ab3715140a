"""Where the time of a request goes: text encoder, trunk, heads, putting adapters into a model, applying them to a token."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import t2l_engine as t2l
from bench.cases import ORDER
from bench.harness import OURS, Context, Error, Record, Task, roofline, row, verify, worst
from bench.suites.apply import BUILDERS
from bench.timing import Candidate
from t2l_engine import ops
from t2l_engine.ops import reference
from t2l_engine.research import costs
from t2l_engine.testing import numerics
from t2l_engine.testing.oracle import in_float64

COUNTS = (1, 8, 64)


def plan(context: Context) -> list[Task]:
    """On a CPU alone."""
    return [Task.of("split smollm2-135m bundled", bundled, context)] if context.on_cpu else []


def bundled(context: Context) -> Iterator[Record]:
    """The bundled checkpoint, text encoder included."""
    engine = t2l.TextToLoRA.from_pretrained("smollm2-135m")
    kept = engine.encoder
    engine.encoder = t2l.TextEncoder(kept.model, kept.tokenizer, kept.config, cache_size=0)
    for count in COUNTS:
        yield encoder(context, engine, count)
        yield from _Request(context, "smollm2-135m", engine.hypernetwork.requires_grad_(False), count).rows()


def _row(context: Context, model: str, dtype: str, count: int, part: str, functions, errors, least) -> Record:
    case = f"{model} {dtype}, {count} description{'s' if count > 1 else ''}: {part}"
    functions, skipped = verify(case, functions, errors)
    shape = {"model": model, "dtype": dtype, "descriptions": count, "part": part}
    timings = context.time(functions, factor=2)
    return row(context, case, "split", shape, timings, errors[OURS], skipped=skipped, least=least)


def sentences(count: int) -> list[str]:
    return [f"Return item {i:07d} of the comma separated list." for i in range(count)]


def in_double(encoder: t2l.TextEncoder) -> t2l.TextEncoder:
    """The same encoder in float64, by transformers."""
    return t2l.TextEncoder(copy.deepcopy(encoder.model).double(), encoder.tokenizer, encoder.config)


@torch.no_grad()
def by_transformers(encoder: t2l.TextEncoder, texts: list[str]) -> Tensor:
    """The embeddings of an encoder with mean pooling as its model's card computes them: a padded batch, transformers."""
    batch = encoder.tokenizer(texts, padding=True, truncation=True, max_length=encoder.max_length, return_tensors="pt")
    hidden, mask = encoder.model(**batch).last_hidden_state, batch["attention_mask"][..., None]
    pooled = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
    return nn.functional.normalize(pooled, dim=-1) * pooled.shape[-1] ** 0.5


def encoder(context: Context, engine: t2l.TextToLoRA, count: int) -> Record:
    """As many texts at a time as there are descriptions; none is kept."""
    ours, texts = engine.encoder, sentences(count)
    dtype, exact = ours.config.dtype, in_double(ours).encode(texts)
    functions = {OURS: lambda: ours.encode(texts), "transformers": lambda: by_transformers(ours, texts)}
    bound = numerics.EMBEDDING_FROBENIUS
    errors = {name: Error(numerics.relative_frobenius(f(), exact), bound) for name, f in functions.items()}
    tokens = sum(len(ids) for ids in ours.tokenizer(ours.prepare(texts))["input_ids"])
    num_bytes = sum(p.nbytes for p in ours.model.encoder.layer.parameters())  # of a table, few rows are read
    one = costs.count(ours.model.config, head=False).flops(tokens // count, logits=0)
    least = context.roofline(count * sum(one.values()), num_bytes, dtype)
    named = str(engine.hypernetwork.dtype).removeprefix("torch.")  # the request's, beside its other parts
    return _row(context, "smollm2-135m", named, count, "encoder", functions, errors, least)


class _Bare(nn.Module):
    """A linear whose own product costs nothing: what is left is the adapter's share."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], self.out_features)


def skeleton(config: t2l.HyperNetworkConfig) -> nn.ModuleList:
    """A model that is nothing but the linears that ``config`` adapts."""
    sizes = list(zip(config.modules, config.in_features, config.out_features, strict=True))
    return nn.ModuleList(nn.ModuleDict({name: _Bare(*of) for name, *of in sizes}) for _ in range(config.num_layers))


class _Request:
    """``count`` descriptions through one hypernetwork, part by part."""

    def __init__(self, context: Context, model: str, net: t2l.HyperNetwork, count: int):
        self.context, self.model, self.net, self.count = context, model, net, count
        self.dtype = str(net.dtype).removeprefix("torch.")
        drawn = torch.randn(count, net.config.embed_dim, generator=torch.Generator().manual_seed(6))
        self.task_emb = nn.functional.normalize(drawn, dim=-1) * net.config.embed_dim**0.5
        self.folded = net.folded()
        self.flops = {part: count * flops for part, flops in costs.hypernet_flops(net.config).items()}
        self.head_bytes = sum(p.nbytes for p in net.heads.parameters())

    def rows(self) -> Iterator[Record]:
        """Every part with its ways, their errors, its roofline."""
        with torch.no_grad():
            latent, stack = self._trunk(ops), self.net.generate(self.task_emb)
            parts = {"trunk": (self.trunk, latent), "head": (self.head, latent)}
            parts |= {"put": (self.put, stack), "apply": (self.apply, stack)}
            for part, (make, given) in parts.items():
                yield _row(self.context, self.model, self.dtype, self.count, part, *make(given))

    def _errors(self, functions, exact: list[Tensor], plain: list[Tensor]) -> dict[str, Error]:
        """Over all tensors of a part; ``exact``: in float64; ``plain``: by the reference in the dtype of the weights."""
        bounds = [numerics.trunk_bound(right, low, self.net.dtype) for right, low in zip(exact, plain, strict=True)]

        def error(got: Tensor, right: Tensor, bound: float) -> Error:
            return Error(numerics.relative_frobenius(got, right), bound)

        return {name: worst(map(error, function(), exact, bounds)) for name, function in functions.items()}

    def _trunk(self, backend, net: t2l.HyperNetwork | None = None, folded: dict | None = None) -> Tensor:
        net, folded = net or self.net, folded or self.folded
        z = net.task_encoder(self.task_emb.to(folded["weights"][1].dtype))
        rotary = net.config.rank if net.config.rotary else 0
        return backend.hypernet_trunk(z, folded["weights"], folded["side_emb"], folded["pos_emb"], rotary)

    def trunk(self, latent: Tensor):
        """Task encoder and trunk."""
        functions = {OURS: functools.partial(self._trunk, ops), "reference": functools.partial(self._trunk, reference)}
        exact = copy.deepcopy(self.net).set_dtype(torch.float64)
        listed = {name: lambda f=f: [f()] for name, f in functions.items()}
        errors = self._errors(listed, [self._trunk(reference, exact, exact.folded())], [self._trunk(reference)])
        weights = sum(p.nbytes for p in self.net.parameters()) - self.head_bytes
        return functions, errors, self.context.roofline(self.flops["trunk"], weights + latent.nbytes, self.dtype)

    def head(self, latent: Tensor):
        """The heads of all modules."""
        c, folded = self.net.config, self.folded
        lists, sizes = [*folded["heads"], *folded["offsets"].values()], (c.rank, c.in_features, c.out_features)

        def ours() -> list[Tensor]:
            lora_A, lora_B = ops.hypernet_heads(latent, *folded["heads"], *sizes, **folded["offsets"])
            return lora_A + lora_B

        def plain(wide=lambda t: t) -> list[Tensor]:
            widened = [[None if t is None else wide(t) for t in tensors] for tensors in lists]
            made = reference.hypernet_heads(wide(latent), *widened, *sizes)
            return made[::2] + made[1::2]

        functions, rounded = {OURS: ours, "reference": plain}, plain()
        num_bytes = self.head_bytes + latent.nbytes + sum(t.nbytes for t in rounded)
        least = self.context.roofline(self.flops["heads"], num_bytes, self.dtype)
        return functions, self._errors(functions, plain(Tensor.double), rounded), least

    def put(self, stack: t2l.AdapterStack):
        """Every adapter into its slot of an attached model."""
        model, stack = skeleton(self.net.config), t2l.AdapterStack(stack.lora_A, stack.lora_B, stack.scaling, stack.ranks)
        handle = t2l.attach(model, stack)

        def put() -> None:
            for i in range(self.count):
                handle.put(i, stack[i])

        put()
        errors = []
        with handle.use(list(range(self.count))):
            for (name, layer), arguments in self._tokens(stack).items():
                errors.append(self._error(model[layer][name](arguments["x"]), arguments))
        num_bytes = 2 * sum(t.nbytes for side in (stack.lora_A, stack.lora_B) for t in side.values())
        ceilings, threads = self.context.ceilings, self.context.threads
        least = roofline(0, num_bytes, ceilings.gemm_at(self.dtype, threads), ceilings.copy_at(num_bytes, threads))
        return {OURS: put}, {OURS: worst(errors)}, least

    def apply(self, stack: t2l.AdapterStack):
        """One token of every adapter through all adapted linears, the linears' own products left out."""
        work, functions, errors = list(self._tokens(stack).values()), {}, {}
        for name in (OURS, "reference", "mm loop"):
            calls = [BUILDERS[name](arguments) for arguments in work]
            functions[name] = Candidate(calls).once
            functions[name]()
            errors[name] = worst(self._error(arguments["y"], arguments) for arguments in work)
            for arguments in work:
                arguments["y"].zero_()
        adapters = sum(t.nbytes for side in (stack.lora_A, stack.lora_B) for t in side.values())
        tokens = sum(a["x"].nbytes + 2 * a["y"].nbytes for a in work)
        operations = 2 * self.count * costs.adapter_values(self.net.config)
        return functions, errors, self.context.roofline(operations, adapters + tokens, self.dtype)

    def _tokens(self, stack: t2l.AdapterStack) -> dict[tuple[str, int], dict[str, Any]]:
        """Arguments of ``lora_add_`` by module and layer, y of zeros."""
        generator = torch.Generator().manual_seed(7)
        batch = t2l.AdapterBatch.from_rows(range(self.count), 1)
        routing = stack.scaling, batch.seg_indptr, batch.seg_adapters, batch.max_seg_len
        made = {}
        for name, A in stack.lora_A.items():
            B, ranks = stack.lora_B[name], stack.ranks[name].mT.contiguous()
            for i in range(A.shape[1]):
                y = torch.zeros(self.count, B.shape[2], dtype=stack.dtype)
                x = torch.randn(self.count, A.shape[3], generator=generator).to(stack.dtype)
                made[name, i] = dict(zip(ORDER, (y, x, A[:, i], B[:, i], *routing, ranks[i]), strict=True))
        return made

    def _error(self, got: Tensor, arguments: dict[str, Any]) -> Error:
        wide = in_float64(arguments)
        wide["y"] = torch.zeros_like(wide["y"])
        reference.lora_add_(**wide)
        return Error(numerics.relative_frobenius(got, wide["y"]), numerics.lora_frobenius(got.dtype))
