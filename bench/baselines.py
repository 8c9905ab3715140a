"""What ours is compared with, in plain torch; what a caller could prepare once is prepared before the clock starts."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.timing import Candidate, Device, Timing
from t2l_engine import AdapterStack
from t2l_engine.hypernetwork.config import HEAD_WIDTH
from t2l_engine.hypernetwork.network import MLP, HyperNetwork, NormedEmbedding
from t2l_engine.hypernetwork.perceiver import RMS_EPS, PerceiverHyperNetwork
from t2l_engine.ops import reference

Adapters = dict[str, tuple[Tensor, Tensor]]  # module -> A [N, n, r, in], B [N, n, out, r]


def sides(stack: AdapterStack) -> Adapters:
    return {name: (stack.lora_A[name], stack.lora_B[name]) for name in stack.lora_A}


def of_stack(net: HyperNetwork) -> Callable[[Tensor], Adapters]:
    """``net`` as it is, with the plain result that baselines have."""
    return lambda task_emb: sides(net.generate(task_emb))


def plain(net: HyperNetwork) -> Callable[[Tensor], Adapters]:
    """The ops' own reference over the same folded weights: batched like ours, with torch's products."""
    c, folded = net.config, net.folded()
    rotary = c.rank if c.rotary else 0

    @torch.no_grad()
    def generate(task_emb: Tensor) -> Adapters:
        z = net.task_encoder(task_emb)
        latent = reference.hypernet_trunk(z, folded["weights"], folded["side_emb"], folded["pos_emb"], rotary)
        offsets = (folded["offsets"][key] for key in ("mul_A", "add_A", "mul_B", "add_B"))
        made = reference.hypernet_heads(latent, *folded["heads"], *offsets, c.rank, c.in_features, c.out_features)
        return dict(zip(c.modules, zip(made[::2], made[1::2], strict=True), strict=True))

    return generate


class Eager:
    """A hypernetwork as SakanaAI's code runs it: ``torch.nn`` modules over rows ``[task, depth, module]``.

    One description at a time, one module at a time, and a copy per layer, side and module, in the dtype of the weights,
    which are those of ``net``.  ValueError but for released variants with a linear task encoder and no offsets.
    """

    def __init__(self, net: HyperNetwork):
        c = net.config
        if c.variant not in ("L", "M", "S-learnable") or c.task_encoder != "linear" or list(net.offsets.buffers()):
            raise ValueError(f"net: expected a released variant without offsets, got {c.variant}, {c.task_encoder}")
        self.config, self.dtype = c, net.dtype
        matrices = {id(layer.weight): layer.weight for layer in net.modules() if isinstance(layer, nn.Linear)}
        net, silu = copy.deepcopy(net, matrices).to(self.dtype), nn.SiLU()

        def mlp(block: MLP) -> nn.Sequential:
            first = [block.norm] if hasattr(block, "norm") else []
            return nn.Sequential(*first, block.linear1, silu, block.linear2, silu)

        def embedding(table: NormedEmbedding) -> Callable[..., Tensor]:
            """Rows from the first one on: no index, whose transfer no graph could hold."""
            rows = table.weight.flatten(0, -2)
            return lambda first, count=1: table.norm(rows[first : first + count])

        self.task = nn.Sequential(net.task_encoder.linear, net.task_encoder.norm)
        self.depth, self.kind = embedding(net.depth_emb), embedding(net.module_emb)
        self.mixer, self.mlp1, self.mlp2, self.mlp3 = map(mlp, (net.mixer, net.mlp1, net.mlp2, net.mlp3))
        self.side, self.position = (e and embedding(e) for e in (net.side_emb, net.pos_emb))
        self.heads = list(net.heads.values())

    @torch.no_grad()
    def __call__(self, task_emb: Tensor) -> list[dict[str, tuple[list[Tensor], ...]]]:
        """For each description and module the tensors of A, and of B, by layer."""
        return [self._one(description.to(self.dtype)) for description in task_emb]

    def _one(self, description: Tensor) -> dict[str, tuple[list[Tensor], ...]]:
        c, tensors = self.config, {}
        for i, name in enumerate(c.modules):
            task = self.task(description[None]).expand(c.num_layers, -1)
            kind = self.kind(i).expand(c.num_layers, -1)
            x = self.mixer(torch.cat((task, self.depth(0, c.num_layers), kind), dim=-1))
            x = x + self.mlp1(x)
            lora_A, lora_B = self._sides(x, i)
            tensors[name] = tuple([t.clone(memory_format=torch.contiguous_format) for t in of] for of in (lora_A, lora_B.mT))
        return tensors

    def _sides(self, x: Tensor, i: int) -> list[Tensor]:
        """``[n, r, in]`` and ``[n, r, out]`` of module ``i`` from its rows ``x [n, m]``."""
        c, head = self.config, self.heads[i]
        widths = c.in_features[i], c.out_features[i]
        if self.side is None:
            y = head(self.mlp3(x + self.mlp2(x)))
            return [part.unflatten(-1, (c.rank, -1)) for part in y.split([c.rank * width for width in widths], dim=-1)]
        parts = []
        for side, width in enumerate(widths):
            u = x + self.side(2 * i + side)
            u = u + self.mlp2(u)
            if self.position is not None:
                p = self.position(0, c.rank)
                u = u[:, None] + (p + self.mlp2(p))  # [n, r, m]
            y = head(self.mlp3(u))
            parts.append((y if self.position is not None else y.unflatten(-1, (c.rank, -1)))[..., :width])
        return parts

    def stacked(self, tensors: Sequence[dict[str, tuple[list[Tensor], ...]]]) -> Adapters:
        """The result of a call as one stack."""
        of = lambda name, side: torch.stack([torch.stack(one[name][side]) for one in tensors])  # noqa: E731
        return {name: (of(name, 0), of(name, 1)) for name in self.config.modules}


def careful(net: HyperNetwork) -> Callable[[Tensor], Adapters]:
    """Variant L over all rows at once, in products of torch and the dtype of the weights: what a careful author writes."""
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


def perceiver(net: PerceiverHyperNetwork) -> Callable[[Tensor], Adapters]:
    """A perceiver and MLPs a layer as SakanaAI's code runs them: all in the dtype of ``net``, keys and values repeated.

    Contexts of one chunk each, without padding: ``states [N, layers, L, f]``.  No norm is a product of torch.
    """
    c, shared = net.config, {id(p): p for p in net.parameters() if p.dtype == net.dtype}
    net = copy.deepcopy(net, shared).to(net.dtype)

    def normed(norm: nn.Module, x: Tensor) -> Tensor:
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        return norm.weight * (exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + RMS_EPS)).to(x.dtype)

    def attend(of: nn.Module, latents: Tensor, context: Tensor) -> Tensor:
        query, key, value = (
            project(x).unflatten(-1, (-1, HEAD_WIDTH)).transpose(1, 2)
            for project, x in ((of.q_proj, latents), (of.k_proj, context), (of.v_proj, context))
        )
        key, value = (side.repeat_interleave(query.shape[1] // side.shape[1], dim=1) for side in (key, value))
        return of.o_proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))

    def resample(of: nn.Module, context: Tensor) -> Tensor:
        latents = of.latents_q.expand(len(context), -1, -1)
        for layer in of.layers:
            read = normed(layer.input_context_layernorm, context)
            seen = attend(layer.self_attn, normed(layer.input_latents_layernorm, latents), read)
            latents = latents + normed(layer.post_attention_layernorm, seen)
            latents = latents + normed(layer.post_ff_layernorm, layer.mlp(normed(layer.pre_ff_layernorm, latents)))
        return normed(of.layernorm, latents)

    @torch.no_grad()
    def generate(states: Tensor) -> Adapters:
        tokens = net.projection(states.transpose(0, 1).flatten(0, 1))  # one (layer, context) after the other
        x = resample(net.decoder, resample(net.encoder, tokens)).unflatten(0, (c.num_layers, -1))
        x = x.transpose(0, 1).unflatten(2, (len(c.modules), c.rank))  # [N, layers, modules, r, d]
        for mlp in net.mlps:
            norm1, first, silu, second, norm2 = mlp.layers
            hidden = silu(torch.einsum("nlkrd,ldh->nlkrh", norm1(x), first.weight) + first.bias)
            x = x + norm2(torch.einsum("nlkrh,lhd->nlkrd", hidden, second.weight) + second.bias)
        head = net.head.view(c.num_layers, len(c.modules), c.latent_size, -1)
        flat = torch.einsum("nlkrd,lkdw->nlkrw", x / torch.norm(x, dim=-1, keepdim=True), head)
        made = {}
        for i, (name, n_in, n_out) in enumerate(zip(c.modules, c.in_features, c.out_features, strict=True)):
            sides = flat[:, :, i, :, : n_in + n_out].split([n_in, n_out], dim=-1)
            A, B = (
                torch.cat([side * scale[name], bias[name].expand(len(side), -1, -1, -1)], dim=2)
                for side, scale, bias in zip(sides, (net.scale_A, net.scale_B), (net.bias_A, net.bias_B), strict=True)
            )
            made[name] = A, B.mT
        return made

    return generate


def _segments(arguments: dict[str, Any]) -> list[tuple[int, int, int, float]]:
    """(first token, end, adapter, scaling) of every segment that has work."""
    bounds, scaling = arguments["seg_indptr"].tolist(), arguments["scaling"].tolist()
    ids = arguments["seg_adapters"].tolist()
    return [(bounds[s], bounds[s + 1], a, scaling[a]) for s, a in enumerate(ids) if a >= 0 and bounds[s + 1] > bounds[s]]


def _of_tokens(arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The adapter of every token, ``[T]`` int64, and its scaling, ``[T, 1, 1]``."""
    ids = torch.repeat_interleave(arguments["seg_adapters"].long(), arguments["seg_indptr"].diff())
    return ids, arguments["scaling"][ids, None, None]


def mm_loop(arguments: dict[str, Any]) -> Callable[[], None]:
    """Two matrix products an adapter, the second accumulating into its rows of y.  Adapters of full rank."""
    y, x, lora_A, lora_B = (arguments[name] for name in ("y", "x", "lora_A", "lora_B"))
    work = [(y[lo:hi], x[lo:hi], lora_A[a].mT, lora_B[a].mT, s) for lo, hi, a, s in _segments(arguments)]

    def run() -> None:
        for rows, tokens, A, B, scaling in work:
            rows.addmm_(torch.mm(tokens, A), B, alpha=scaling)

    return run


def gather_bmm_delta(arguments: dict[str, Any]) -> Callable[[], Tensor]:
    """A and B gathered for every token, then two batched products, as vLLM's torch path.  Ids of -1 are not handled."""
    x, lora_A, lora_B = (arguments[name] for name in ("x", "lora_A", "lora_B"))
    ids, scaling = _of_tokens(arguments)
    stored = lora_B.mT if lora_B.mT.is_contiguous() else lora_B  # gathered as it lies

    def run() -> Tensor:
        v = (torch.bmm(lora_A[ids], x[:, :, None]) * scaling).to(x.dtype)  # [T, r, 1]
        rows = stored[ids]
        return torch.bmm(v.mT, rows)[:, 0] if stored is not lora_B else torch.bmm(rows, v)[..., 0]

    return run


def batched(x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float | Tensor) -> Tensor:
    """Two batched products of a matrix an adapter: the delta of ``x [rows, tokens, in]``."""
    return torch.bmm(torch.bmm(x, lora_A.mT) * scaling, lora_B.mT)


def batched_delta(arguments: dict[str, Any]) -> Callable[[], Tensor]:
    """:func:`batched`, of adapters with as many tokens each, in order."""
    x, lora_A, lora_B = (arguments[name] for name in ("x", "lora_A", "lora_B"))
    scaling, rows = arguments["scaling"][:, None, None].to(x.dtype), x.unflatten(0, (len(lora_A), -1))
    return lambda: batched(rows, lora_A, lora_B, scaling).flatten(0, 1)


def added(delta: Callable[[dict[str, Any]], Callable[[], Tensor]], arguments: dict[str, Any]) -> Callable[[], Tensor]:
    """A call that adds what ``delta`` makes to ``y``."""
    run, y = delta(arguments), arguments["y"]
    return lambda: y.add_(run())


COPY = "copy"


def copies(device: Device, num_bytes: int, sets: int) -> dict[str, Candidate]:
    """Moving ``num_bytes``, half read and half written, as often as there are ``sets``: by a copy, and by a kernel."""
    count = max(64, num_bytes // 8 // 64 * 64)  # int32; whole lines
    own = torch.Generator(device.torch).manual_seed(0)  # torch's own one is of no use after a capture that failed
    source = torch.randint(1 << 30, (sets, count), dtype=torch.int32, device=device.torch, generator=own)
    target = torch.empty_like(source)
    pairs = list(zip(source, target, strict=True))
    return {
        f"{COPY} by copy": Candidate([lambda a=a, b=b: b.copy_(a) for a, b in pairs]),
        f"{COPY} by kernel": Candidate([lambda a=a, b=b: torch.bitwise_not(a, out=b) for a, b in pairs]),
    }


def with_best_copy(timings: Mapping[str, Timing]) -> dict[str, Timing]:
    """``timings`` with the faster of :func:`copies` alone, under the name COPY."""
    ways = {name: timing for name, timing in timings.items() if name.startswith(f"{COPY} by ")}
    best = min(ways, key=lambda name: ways[name].median_us)
    others = {name: timing for name, timing in timings.items() if name not in ways}
    return others | {COPY: dataclasses.replace(ways[best], note=best.removeprefix(f"{COPY} "))}
