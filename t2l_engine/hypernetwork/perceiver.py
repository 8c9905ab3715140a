"""PerceiverHyperNetwork: from the hidden states of a text's tokens to LoRA adapters (Doc-to-LoRA, arXiv 2602.15902)."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, normalize, pad, rms_norm, scaled_dot_product_attention, silu

from t2l_engine.hypernetwork.config import HEAD_WIDTH, HEADS, KEY_VALUE_HEADS, PerceiverConfig
from t2l_engine.hypernetwork.tokens import TokenHyperNetwork

RMS_EPS = 1e-6
#: Tokens that are projected at once without gradients: few enough for a cache, enough to read the weights seldom.
PROJECTED_TOKENS = 1024
#: Contexts are padded to a multiple of so many tokens: then attention sums in one order, however long the others are.
ATTENDED_TOKENS = 64
#: Initial norm of the columns of B that the head makes, and weight of the decoder's last norms: what is read begins small
#: beside the learned queries, so that A begins nearly the same for all texts.
INITIAL_B = INITIAL_READ = 0.3


class RMSNorm(nn.RMSNorm):
    def __init__(self, width: int):
        super().__init__(width, RMS_EPS)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class SwiGLU(nn.Module):
    """``down(silu(gate x) * up x)``."""

    def __init__(self, width: int, hidden: int, out: int):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))


class Attention(nn.Module):
    """Grouped-query attention of latents ``[n, q, d]`` to ``context [n, L, d]``, without positions."""

    def __init__(self, width: int):
        super().__init__()
        self.q_proj = nn.Linear(width, HEADS * HEAD_WIDTH, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(width, KEY_VALUE_HEADS * HEAD_WIDTH, bias=False) for _ in range(2))
        self.o_proj = nn.Linear(HEADS * HEAD_WIDTH, width, bias=False)

    def forward(self, latents: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        # The query heads of a group are further queries of their key-value head, so that keys are not repeated.
        query = self.q_proj(latents).unflatten(-1, (KEY_VALUE_HEADS, -1, HEAD_WIDTH))  # [n, q, kv, group, width]
        query = query.permute(0, 2, 3, 1, 4).flatten(2, 3)
        key, value = (
            project(context).unflatten(-1, (KEY_VALUE_HEADS, HEAD_WIDTH)).transpose(1, 2)
            for project in (self.k_proj, self.v_proj)
        )
        seen = scaled_dot_product_attention(query, key, value, attn_mask=mask)
        seen = seen.unflatten(2, (-1, latents.shape[1])).permute(0, 3, 1, 2, 4).flatten(2)
        return self.o_proj(seen)


class PerceiverLayer(nn.Module):
    """Cross-attention (``cross``) to a context or self-attention of latents, then an MLP; both normed before and after.

    The context comes divided by its RMS, which is the same for all layers that read it.
    """

    def __init__(self, width: int, cross: bool):
        super().__init__()
        self.input_latents_layernorm = RMSNorm(width)
        self.input_context_layernorm = RMSNorm(width) if cross else None
        self.self_attn = Attention(width)
        self.post_attention_layernorm, self.pre_ff_layernorm, self.post_ff_layernorm = (RMSNorm(width) for _ in range(3))
        self.mlp = SwiGLU(width, 4 * width, width)

    def forward(self, latents: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        query = self.input_latents_layernorm(latents)
        if self.input_context_layernorm is None:
            attended = self.self_attn(query, query, None)
        else:
            weight = self.input_context_layernorm.weight.to(context.dtype)
            attended = self.self_attn(query, context * weight, mask)
        latents = latents + self.post_attention_layernorm(attended)
        return latents + self.post_ff_layernorm(self.mlp(self.pre_ff_layernorm(latents)))


class Resampler(nn.Module):
    """``queries`` learned latents that read a context through blocks of one cross- and several self-attention layers."""

    def __init__(self, queries: int, width: int, blocks: int = 1, self_attention: int = 0, shared: bool = False):
        super().__init__()
        self.latents_q = nn.Parameter(torch.randn(queries, width))
        layers: list[PerceiverLayer] = []
        for i in range(blocks * (1 + self_attention)):
            block, place = divmod(i, 1 + self_attention)
            first = place if place else 1 + self_attention  # where a shared layer is first used: the cross layer, in block 1
            layers.append(layers[first] if shared and i > first else PerceiverLayer(width, cross=place == 0))
        self.layers = nn.ModuleList(layers)
        self.layernorm = RMSNorm(width)

    def forward(self, context: Tensor, mask: Tensor | None = None) -> Tensor:
        latents = self.latents_q.to(context.dtype).expand(len(context), -1, -1)
        context = rms_norm(context, context.shape[-1:], eps=RMS_EPS)
        for layer in self.layers:
            latents = layer(latents, context, mask)
        return self.layernorm(latents)


class LayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class LayerLinear(nn.Module):
    """``x W + b`` of ``x [layers, rows, in]``, with W and b of their own for each layer.

    ``layers`` None: one linear, whose weight is ``[out, in]``, for ``x [1, rows, in]``.
    """

    def __init__(self, layers: int | None, n_in: int, n_out: int):
        super().__init__()
        if layers is None:
            weight, bias = torch.empty(n_out, n_in), torch.zeros(n_out)
        else:  # as SakanaAI's code has them
            weight, bias = torch.empty(layers, n_in, n_out), torch.zeros(1, layers, 1, 1, n_out)
        bound = 1 / math.sqrt(n_in)
        self.weight, self.bias = nn.Parameter(weight.uniform_(-bound, bound)), nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight if self.weight.dim() == 3 else self.weight.mT[None]
        return torch.baddbmm(self.bias.to(x.dtype).view(len(weight), 1, -1), x, weight)


class ResidualMLP(nn.Module):
    """``x + LN(W2 silu(W1 LN(x) + b1) + b2)`` of ``x [layers, rows, d]``; ``layers`` None: one MLP, ``x [1, rows, d]``."""

    def __init__(self, layers: int | None, width: int):
        super().__init__()
        linears = LayerLinear(layers, width, 4 * width), LayerLinear(layers, 4 * width, width)
        dropout = [nn.Identity()] if layers is None else []  # for the places that parameters have in SakanaAI's code
        branch = nn.Sequential(LayerNorm(width), *dropout, linears[0], nn.SiLU(), *dropout, linears[1], LayerNorm(width))
        self.add_module("mlp" if layers is None else "layers", branch)  # its name there, so that keys map by their prefix

    def forward(self, x: Tensor) -> Tensor:
        (branch,) = self.children()
        return x + branch(x)


class PerceiverHyperNetwork(TokenHyperNetwork):
    """Doc-to-LoRA's hypernetwork: a perceiver of token states, residual MLPs and one head for all layers.

    A text is read in chunks; the adapters of its chunks, and a learned bias, follow each other along the rank.

    Source: arXiv 2602.15902.

    >>> import t2l_engine as t2l
    >>> config = t2l.PerceiverConfig(variant="perceiver-layers", modules=("down_proj",), in_features=(96,),
    ...     out_features=(48,), num_layers=4, rank=2, lora_alpha=4, feature_size=48, latent_size=16, num_latents=8,
    ...     num_blocks=2)
    >>> net = t2l.PerceiverHyperNetwork(config)
    >>> latents = net.latents(torch.randn(3, 4, 7, 48), torch.ones(3, 7, dtype=torch.bool))  # 3 chunks of 7 tokens
    >>> stack = net.generate(latents.split([1, 2]))  # of a text of one chunk and a text of two
    >>> stack.ranks["down_proj"][:, 0].tolist()
    [4, 6]
    """

    def __init__(self, config: PerceiverConfig):
        super().__init__(config)
        c, layers, rank, d = config, config.num_layers, config.rank, config.latent_size
        queries = len(c.modules) * rank * (1 if c.per_layer else layers)
        self.projection = SwiGLU(c.feature_size, 4 * c.feature_size, d)
        self.encoder = Resampler(c.num_latents, d, c.num_blocks, c.num_self_attention, c.shared_blocks)
        self.decoder = Resampler(queries, d)
        for name in ("post_attention_layernorm", "post_ff_layernorm"):
            nn.init.constant_(self.decoder.get_parameter(f"layers.0.{name}.weight"), INITIAL_READ)
        self.mlps = nn.ModuleList(ResidualMLP(layers if c.per_layer_mlps else None, d) for _ in range(c.num_mlps))
        widest = max(map(sum, zip(c.in_features, c.out_features, strict=True)))
        sizes = list(zip(c.modules, c.in_features, c.out_features, strict=True))
        head = torch.randn(layers, len(c.modules), d, widest)
        for k, (_, n_in, n_out) in enumerate(sizes):  # rows of A of norm 1, smaller ones of B: latents have norm 1
            head[:, k, :, :n_in] /= math.sqrt(n_in)
            head[:, k, :, n_in:] *= INITIAL_B / math.sqrt(n_out)
        self.head = nn.Parameter(head.squeeze(1))
        self.scale_A = nn.ParameterDict({m: torch.ones(1, layers, rank, 1) for m in c.modules})
        self.scale_B = nn.ParameterDict({m: torch.ones(1, layers, rank, 1) for m in c.modules})
        self.bias_A = nn.ParameterDict({m: torch.randn(layers, rank, n) / math.sqrt(n) for m, n, _ in sizes})
        self.bias_B = nn.ParameterDict({m: torch.zeros(layers, rank, n) for m, _, n in sizes})

    def matrices(self) -> list[Tensor]:
        """The weight matrices."""
        return [self.head, *(of.weight for of in self.modules() if isinstance(of, (nn.Linear, LayerLinear)))]

    def latents(self, states: Tensor, mask: Tensor) -> Tensor:
        """``[chunks, layers, modules, rank, d]`` of the states of the tokens of chunks.

        ``states``: ``[chunks, layers, L, f]`` in the layer-to-layer form, else ``[chunks, L, f]``; ``mask [chunks, L]``:
        bool, the tokens of each chunk.
        """
        c = self.config
        layers = [c.num_layers] if c.per_layer else []
        if mask.dim() != 2 or list(states.shape) != [len(mask), *layers, mask.shape[1], c.feature_size]:
            expected, got = ", ".join(map(str, ["chunks", *layers, "L", c.feature_size])), (*states.shape,)
            raise ValueError(f"states: expected [{expected}] and a mask [chunks, L], got {got}, {tuple(mask.shape)}")
        chunks, flat = len(states), states.to(self.dtype)
        if c.per_layer:
            flat, mask = flat.flatten(0, 1), mask.repeat_interleave(c.num_layers, dim=0)
        projected = self._project(flat[mask])
        mask = pad(mask, (0, -flat.shape[1] % ATTENDED_TOKENS))
        tokens = flat.new_zeros(*mask.shape, c.latent_size)
        tokens[mask] = projected
        latents = self.decoder(self.encoder(tokens, mask[:, None, None]))
        return latents.view(chunks, *c.latent_shape)

    def _project(self, tokens: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return self.projection(tokens)
        of, made = self.projection, []
        parts = tokens.chunk(-(-len(tokens) // PROJECTED_TOKENS))  # of one length: products of few rows round differently
        both = tokens.new_empty(2, len(parts[0]), of.gate_proj.out_features)  # memory anew would cost a tenth of the time
        for part in parts:
            gate, up = both[:, : len(part)]
            torch.mm(part, of.gate_proj.weight.T, out=gate)
            torch.mm(part, of.up_proj.weight.T, out=up)
            made.append(of.down_proj(silu(gate, inplace=True).mul_(up)))
        return torch.cat(made)

    def _heads(self, latents: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
        c = self.config
        x = latents.to(self.dtype).transpose(0, 1).contiguous()  # [layers, chunks, modules, r, d]
        rows = x.view(c.num_layers if c.per_layer_mlps else 1, -1, c.latent_size)
        for mlp in self.mlps:
            rows = mlp(rows)
        rows = normalize(rows, dim=-1, eps=0).view_as(x)
        head = self.head.view(c.num_layers, len(c.modules), c.latent_size, -1)
        for k, (name, n_in, n_out) in enumerate(zip(self._paths, c.in_features, c.out_features, strict=True)):
            made = torch.bmm(rows[:, :, k].flatten(1, 2), head[:, k, :, : n_in + n_out])
            made = made.unflatten(1, (-1, c.rank)).transpose(0, 1)  # [chunks, layers, r, in + out]
            module = c.modules[k]
            scale_A, scale_B = (scale[module].to(made.dtype) for scale in (self.scale_A, self.scale_B))
            yield name, made[..., :n_in] * scale_A, made[..., n_in:] * scale_B
