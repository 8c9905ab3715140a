"""Generating adapters: hypernetworks of released shapes, random weights, beside what torch and cuBLAS make of them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import baselines
from bench.baselines import Adapters
from bench.generate import CHUNK, adapter_bytes, weight_bytes
from bench.gpu import results
from bench.gpu.ceilings import Ceilings, begin
from bench.gpu.context import Context
from bench.gpu.lora import need_kernels
from bench.gpu.tables import AS_IT_COMES, EAGER, HEADS, OPS, REFERENCE
from bench.gpu.timing import Call, Candidate, measure, num_sets, tolerant
from bench.harness import OURS, Bar, Error, admit, worst
from t2l_engine import AdapterStack, HyperNetwork, ops
from t2l_engine.ops import reference
from t2l_engine.research.costs import hypernet_flops
from t2l_engine.testing import models, numerics
from t2l_engine.testing.models import SHAPES, HyperShape

#: Model, dtype: in order of worth.
FULL = (
    ("mistral-7b", "bfloat16"),
    ("llama-3.1-8b", "bfloat16"),
    ("gemma-2-2b", "bfloat16"),
    ("mistral-7b", "float32"),
    ("llama-3.1-8b", "float32"),
    ("gemma-2-2b", "float32"),
)
COUNTS = (1, 8, 64)
#: Descriptions up to which a graph holds what runs one at a time: more would be tens of thousands of launches.
CAPTURED = 8
ONE = Bar(1.3, of=HEADS)
#: The careful author's version through torch.compile.
COMPILED = "torch.compile"
TINY = HyperShape("tiny", 2, 32, 32, 16, embed_dim=24, latent_size=16, head_in_size=24)
KERNELS = ("hypernet_trunk", "hypernet_heads_out_")
Generate = Callable[[Tensor], Adapters]
Way = Callable[[HyperNetwork], Generate | baselines.Eager]


# --- ways to generate ------------------------------------------------------------------------------------------------


class _Lookup:
    """Rows of a normed embedding by a range of indices that lie on the host: no transfer, so a graph can hold it."""

    def __init__(self, embedding: nn.Sequential):
        table, self.norm = embedding
        self.rows = table.weight

    def __call__(self, index: Tensor) -> Tensor:
        first = int(index[0])
        return self.norm(self.rows[first : first + len(index)])


def reference_style(net: HyperNetwork) -> baselines.Eager:
    """:class:`bench.baselines.Eager` on any device, without its transfers of indices."""
    eager = baselines.Eager(net)
    for name in ("depth", "kind", "side", "position"):
        embedding = getattr(eager, name)
        if embedding is not None:
            setattr(eager, name, _Lookup(embedding))
    return eager


def cublas(net: HyperNetwork) -> Generate:
    """Variant L over all rows at once, in products of torch and the dtype of the weights: what a careful author writes.

    A and B are views of what the head products gave.
    """
    c, folded = net.config, net.folded()
    w_task, table, w2, b2, *rest = folded["weights"]
    dtype = w_task.dtype
    vectors = [t.to(dtype) for t in (table, b2)]
    blocks = [[t.to(dtype) for t in rest[6 * i : 6 * i + 6]] for i in range(3)]
    head_weights, head_biases = folded["heads"]
    head_biases = [bias.to(dtype) for bias in head_biases] or [None] * len(head_weights)

    def block(x: Tensor, norm_weight, norm_bias, w1, b1, w2, b2) -> Tensor:
        x = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, reference.LAYER_NORM_EPS)
        return F.silu(F.linear(F.silu(F.linear(x, w1, b1)), w2, b2))

    @torch.no_grad()
    def generate(task_emb: Tensor) -> Adapters:
        z = net.task_encoder(task_emb).to(dtype)
        x = F.silu(F.linear(F.silu(F.linear(z, w_task)[:, None, None] + vectors[0]), w2, vectors[1]))
        x = x + block(x, *blocks[0])
        x = x + block(x, *blocks[1])
        latent = block(x, *blocks[2])  # [N, K, n, h]
        out = {}
        for i, (name, weight, bias) in enumerate(zip(c.modules, head_weights, head_biases, strict=True)):
            y = F.linear(latent[:, i], weight, bias)
            a, b = y.split([c.rank * c.in_features[i], c.rank * c.out_features[i]], dim=-1)
            out[name] = a.unflatten(-1, (c.rank, -1)), b.unflatten(-1, (c.rank, -1)).mT
        return out

    return generate


def kept(net: HyperNetwork, task_emb: Tensor) -> tuple[Call, AdapterStack]:
    """Ours: the public call over earlier adapters, and where it writes."""
    out = net.generate(task_emb)
    return functools.partial(net.generate, task_emb, out=out), out


def ops_alone(net: HyperNetwork, task_emb: Tensor) -> tuple[Call, AdapterStack]:
    """Trunk and heads of ours from encoded tasks, without what the public call does around them; where they write."""
    c, folded, out = net.config, net.folded(), net.generate(task_emb)
    z, rotary = net.task_encoder(task_emb), c.rank if c.rotary else 0
    trunk = z, folded["weights"], folded["side_emb"], folded["pos_emb"], rotary
    stored = list(out.lora_A.values()), list(out.lora_B.values())
    heads = *folded["heads"], c.rank, c.in_features, c.out_features

    def call() -> None:
        ops.hypernet_heads_out_(*stored, ops.hypernet_trunk(*trunk), *heads, **folded["offsets"])

    return call, out


#: Ways to do the same.
WAYS: dict[str, Way] = {"cuBLAS": cublas, REFERENCE: baselines.plain, "eager": reference_style}


# --- rows ------------------------------------------------------------------------------------------------------------


def one_net(context: Context, name: str, dtype: str) -> tuple[HyperShape, HyperNetwork]:
    """A hypernetwork as :meth:`HyperShape.make` makes it, but for its weights, which are drawn where they stay."""
    shape, device = (SHAPES[name] if context.on_card else TINY), context.device.torch
    with torch.device("meta"):
        net = HyperNetwork(shape.config())
    models.fill(net.to_empty(device=device), torch.Generator(device).manual_seed(1))
    return shape, net.requires_grad_(False).eval().set_dtype(getattr(torch, dtype))


def nets(context: Context, name: str, dtype: str) -> tuple[HyperShape, list[HyperNetwork]]:
    """As many copies of a hypernetwork as exceed the caches."""
    shape, net = one_net(context, name, dtype)
    count = num_sets(context.device, weight_bytes(net)) if context.on_card else 2
    return shape, [net, *(copy.deepcopy(net) for _ in range(count - 1))]


def case_name(model: str, dtype: str, count: int) -> str:
    return f"{model} L {dtype}, {count} description{'s' if count > 1 else ''}"


def barred() -> list[dict[str, Any]]:
    """The bars of a whole run."""
    return [results.expected("generate", case_name(model, dtype, 1), "cold", ONE) for model, dtype in FULL]


def run(context: Context) -> None:
    need_kernels(context, *KERNELS)
    ceilings = begin(context)
    chosen = FULL if context.on_card else (("tiny", "float32"), ("tiny", "bfloat16"))
    for name, dtype in chosen:
        make = functools.partial(rows_of, context, ceilings, name, dtype, COUNTS if context.on_card else (1, 2))
        context.attempt(f"{name} L {dtype}", make, needs=8.0)


@torch.inference_mode()
def rows_of(
    context: Context, ceilings: Ceilings, name: str, dtype: str, counts: Sequence[int]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of one hypernetwork, cold: copies of it take turns."""
    shape, copies = nets(context, name, dtype)
    net, device = copies[0], context.device
    exact = copy.deepcopy(net).set_dtype(torch.float64)
    for count in counts:
        case = case_name(shape.name, dtype, count)
        fresh, timed = (shape.task_embeddings(count, seed).to(device.torch) for seed in (2, 3))
        absent: dict[str, str] = {}
        errors = adapter_errors(net, exact, fresh, WAYS, absent)
        admitted, wrong = admit(case, dict.fromkeys(errors), errors)
        num_bytes = weight_bytes(net) + adapter_bytes(net.config, count, net.dtype)
        candidates = results.copies(device, num_bytes, len(copies)) | {
            OURS: Candidate([kept(one, timed)[0] for one in copies]),
            EAGER: Candidate([kept(one, timed)[0] for one in copies], graph=False),
        }
        if OPS in admitted:
            candidates[OPS] = Candidate([ops_alone(one, timed)[0] for one in copies])
        for way in [way for way in WAYS if way in admitted]:
            with tolerant(way, absent):
                candidates[way] = Candidate([functools.partial(WAYS[way](one), timed) for one in copies])
        if eager := candidates.get("eager"):
            candidates["eager"] = Candidate(eager.calls[:1], graph=False)
            if count <= CAPTURED:
                candidates["eager, captured"] = eager
            else:
                absent["eager, captured"] = f"one description at a time: timed up to {CAPTURED}"
        seconds = max(0.5, min(3.0, context.left / 12)) if context.on_card else 0.05
        timings = results.with_best_copy(measure(device, candidates, seconds, absent))
        least = results.floor(ceilings, hypernet_flops(net.config, count).total, num_bytes, net.dtype)
        heads = sum(p.nbytes for p in net.heads.parameters()) / ceilings.gbps / 1e3
        bar = {"bar": ONE, "unit_us": heads} if count == 1 else {}
        given = {"cache": "cold", "absent": absent | wrong, "least": least, **bar}
        fields = {"model": shape.name, "variant": "L", "dtype": dtype, "descriptions": count}
        yield results.row(context, case, "generate", fields, timings, errors[OURS], **given)


@torch.inference_mode()
def compiled(context: Context) -> None:
    """The careful author's version through torch.compile, one description of the released Mistral form."""
    need_kernels(context, *KERNELS)
    context.attempt("mistral-7b L bfloat16, torch.compile", lambda: _compiled(context), needs=20.0)


def _compiled(context: Context) -> Iterator[tuple[str, dict[str, Any]]]:
    shape, net = one_net(context, "mistral-7b", "bfloat16")
    case, absent = case_name(shape.name, "bfloat16", 1), {}
    fresh, timed = (shape.task_embeddings(1, seed).to(context.device.torch) for seed in (2, 3))
    generate = torch.compile(cublas(net), dynamic=False)
    exact = copy.deepcopy(net).set_dtype(torch.float64)
    errors = adapter_errors(net, exact, fresh, {COMPILED: lambda net: generate}, absent)
    calls = {OURS: kept(net, timed)[0], COMPILED: functools.partial(generate, timed)}
    calls, wrong = admit(case, {name: call for name, call in calls.items() if name in errors}, errors)
    timings = measure(context.device, {name: Candidate([call]) for name, call in calls.items()}, 2.0, absent)
    fields = {"model": shape.name, "variant": "L", "dtype": "bfloat16", "descriptions": 1}
    given = {"cache": AS_IT_COMES, "absent": absent | wrong}
    yield results.row(context, case, "compiled", fields, timings, errors[OURS], **given)


# --- verification ----------------------------------------------------------------------------------------------------


def adapter_errors(
    net: HyperNetwork, exact: HyperNetwork, task_emb: Tensor, ways: Mapping[str, Way], absent: dict[str, str]
) -> dict[str, Error]:
    """The worst error of ours and of ``ways`` over modules, sides and descriptions; a rival that throws goes to ``absent``.

    ``exact``: ``net`` in float64.  The reference ops in the dtype of ``net`` make the bound.
    """
    plain, got = baselines.plain(net)(task_emb), {}
    for name, build in ways.items():
        with tolerant(name, absent):
            generate = build(net)
            made = generate(task_emb)
            got[name] = generate.stacked(made) if isinstance(generate, baselines.Eager) else made
    for name, make in ((OURS, kept), (OPS, ops_alone)):
        with tolerant(name, absent):
            call, out = make(net, task_emb)
            for tensor in (*out.lora_A.values(), *out.lora_B.values()):
                tensor.fill_(float("nan"))
            call()
            got[name] = {module: (out.lora_A[module], out.lora_B[module]) for module in out.lora_A}
    oracle, errors = baselines.plain(exact), {name: [] for name in got}
    for start in range(0, len(task_emb), CHUNK):
        some = slice(start, start + CHUNK)
        for module, sides in oracle(task_emb[some].double()).items():
            for side, right in enumerate(sides):
                bound = numerics.trunk_bound(right, plain[module][side][some], net.dtype)
                for name, result in got.items():
                    value = numerics.relative_frobenius(result[module][side][some], right)
                    errors[name].append(Error(value, bound))
    return {name: worst(found) for name, found in errors.items()}
