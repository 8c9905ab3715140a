"""Generating adapters: hypernetworks of released shapes, random weights, beside what torch and cuBLAS make of them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
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
from bench.gpu.tables import EAGER, HEADS, OPS
from bench.gpu.timing import Call, Candidate, measure, num_sets
from bench.harness import OURS, Bar, Error, admit, worst
from t2l_engine import AdapterStack, HyperNetwork, ops, reference
from t2l_engine.flops import hypernet_flops
from t2l_engine.testing import numerics
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
TINY = HyperShape("tiny", 2, 32, 32, 16, embed_dim=24, latent_size=16, head_in_size=24)
KERNELS = ("hypernet_trunk", "hypernet_heads_out_")
Generate = Callable[[Tensor], Adapters]


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
    c, folded = net.config, net._fold()
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
    c, folded, out = net.config, net._fold(), net.generate(task_emb)
    z, rotary = net.task_encoder(task_emb), c.rank if c.rotary else 0
    trunk = z, folded["weights"], folded["side_emb"], folded["pos_emb"], rotary
    stored = list(out.lora_A.values()), list(out.lora_B.values())
    heads = *folded["heads"], c.rank, c.in_features, c.out_features

    def call() -> None:
        ops.hypernet_heads_out_(*stored, ops.hypernet_trunk(*trunk), *heads, **folded["offsets"])

    return call, out


# --- rows ------------------------------------------------------------------------------------------------------------


def nets(context: Context, name: str, dtype: str) -> tuple[HyperShape, list[HyperNetwork]]:
    """As many copies of a hypernetwork as exceed the caches."""
    shape = SHAPES[name] if context.on_card else TINY
    net = shape.make(seed=1).to(context.device.torch).set_dtype(getattr(torch, dtype))
    count = num_sets(context.device, weight_bytes(net)) if context.on_card else 2
    return shape, [net, *(copy.deepcopy(net) for _ in range(count - 1))]


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
        case = f"{shape.name} L {dtype}, {count} description{'s' if count > 1 else ''}"
        fresh, timed = (shape.task_embeddings(count, seed).to(device.torch) for seed in (2, 3))
        errors = adapter_errors(net, exact, fresh)
        admitted, absent = admit(case, dict.fromkeys(errors), errors)
        calls: dict[str, Candidate] = {
            OURS: Candidate([kept(one, timed)[0] for one in copies]),
            OPS: Candidate([ops_alone(one, timed)[0] for one in copies]),
            EAGER: Candidate([kept(one, timed)[0] for one in copies], graph=False),
            "cuBLAS": Candidate([functools.partial(cublas(one), timed) for one in copies]),
            "reference": Candidate([functools.partial(baselines.plain(one), timed) for one in copies]),
            "eager": Candidate([functools.partial(reference_style(net), timed)], graph=False),
        }
        if count <= CAPTURED:
            styles = [reference_style(one) for one in copies]
            calls["eager, captured"] = Candidate([functools.partial(style, timed) for style in styles])
        else:
            absent |= {"eager, captured": f"one description at a time: timed up to {CAPTURED}"}
        calls = {name: candidate for name, candidate in calls.items() if name.removesuffix(", captured") in admitted}
        num_bytes = weight_bytes(net) + adapter_bytes(net.config, count, net.dtype)
        seconds = max(0.5, min(3.0, context.left / 12)) if context.on_card else 0.05
        timings = measure(device, calls | results.copies(device, num_bytes, len(copies)), seconds)
        timings = results.with_best_copy(timings)
        least = results.floor(ceilings, hypernet_flops(net.config, count), num_bytes, net.dtype)
        heads = sum(p.nbytes for p in net.heads.parameters()) / ceilings.gbps / 1e3
        bar = {"bar": ONE, "unit_us": heads} if count == 1 else {}
        given = {"cache": "cold", "absent": absent, "least": least, **bar}
        fields = {"model": shape.name, "variant": "L", "dtype": dtype, "descriptions": count}
        yield results.row(context, case, "generate", fields, timings, errors[OURS], **given)


@torch.inference_mode()
def compiled(context: Context) -> None:
    """The careful author's version through torch.compile, one description of the released Mistral form."""
    need_kernels(context, *KERNELS)
    context.attempt("mistral-7b L bfloat16, torch.compile", lambda: _compiled(context), needs=20.0)


def _compiled(context: Context) -> Iterator[tuple[str, dict[str, Any]]]:
    shape, (net, *_) = nets(context, "mistral-7b", "bfloat16")
    fresh, timed = (shape.task_embeddings(1, seed).to(context.device.torch) for seed in (2, 3))
    errors = adapter_errors(net, copy.deepcopy(net).set_dtype(torch.float64), fresh)
    generate = torch.compile(cublas(net), dynamic=False)
    generate(timed)
    calls = {OURS: kept(net, timed)[0], "torch.compile": functools.partial(generate, timed)}
    timings = measure(context.device, {name: Candidate([call]) for name, call in calls.items()}, 2.0)
    fields = {"model": shape.name, "variant": "L", "dtype": "bfloat16", "descriptions": 1}
    case = f"{shape.name} L bfloat16, 1 description"
    yield results.row(context, case, "compiled", fields, timings, errors[OURS], cache="hot", absent={})


# --- verification ----------------------------------------------------------------------------------------------------


def adapter_errors(net: HyperNetwork, exact: HyperNetwork, task_emb: Tensor) -> dict[str, Error]:
    """The worst error of every way over modules, sides and descriptions.

    ``exact``: ``net`` in float64.  The reference ops in the dtype of ``net`` make the bound.
    """
    eager = reference_style(net)
    got: dict[str, Adapters] = {
        "cuBLAS": cublas(net)(task_emb),
        "reference": baselines.plain(net)(task_emb),
        "eager": eager.stacked(eager(task_emb)),
    }
    for name, make in ((OURS, kept), (OPS, ops_alone)):
        call, out = make(net, task_emb)
        for tensor in (*out.lora_A.values(), *out.lora_B.values()):
            tensor.fill_(float("nan"))
        call()
        got[name] = {module: (out.lora_A[module], out.lora_B[module]) for module in out.lora_A}
    got[EAGER] = got[OURS]
    oracle, errors = baselines.plain(exact), {name: [] for name in got}
    for start in range(0, len(task_emb), CHUNK):
        some = slice(start, start + CHUNK)
        for module, sides in oracle(task_emb[some].double()).items():
            for side, right in enumerate(sides):
                bound = numerics.trunk_bound(right, got["reference"][module][side][some], net.dtype)
                for name, result in got.items():
                    value = numerics.relative_frobenius(result[module][side][some], right)
                    errors[name].append(Error(value, bound))
    return {name: worst(found) for name, found in errors.items()}
