"""PointerHyperNetwork: reads the tokens of a text, and copies some of them into B."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu

from t2l_engine.hypernetwork.config import PointerConfig
from t2l_engine.hypernetwork.perceiver import LayerNorm
from t2l_engine.hypernetwork.tokens import TokenHyperNetwork

#: Standard deviation of the embeddings that make queries, and of gates.
INITIAL_QUERY, INITIAL_GATE = 0.3, 0.05


class Linear(nn.Linear):
    """A linear whose bias has the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias.to(x.dtype))


class CrossBlock(nn.Module):
    """Latents attend to tokens, then pass an MLP (pre-norm, residual)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2, self.norm3 = (LayerNorm(width) for _ in range(3))
        self.query, self.key_value, self.out = Linear(width, width), Linear(width, 2 * width), Linear(width, width)
        self.linear1, self.linear2 = Linear(width, 4 * width), Linear(4 * width, width)

    def forward(self, latents: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        def split(x: Tensor) -> Tensor:
            return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        key, value = map(split, self.key_value(self.norm2(tokens)).chunk(2, dim=-1))
        read = scaled_dot_product_attention(split(self.query(self.norm1(latents))), key, value, attn_mask=mask)
        latents = latents + self.out(read.transpose(1, 2).flatten(2))
        return latents + self.linear2(silu(self.linear1(self.norm3(latents))))


class PointerHyperNetwork(TokenHyperNetwork):
    """Queries of every adapted layer and rank attend to the tokens of a text; each makes a row of A and a column of B.

    In every module ``A_j = bias_A_j + W_A x_j`` and ``B_j = bias_B_j + W_B x_j``, with x_j the latent of norm 1 that query j
    becomes; layers share the linears, which are zero at the start.  In the modules ``copied``, column B_j gets besides
    ``gate_j * sum_t a_jt e_t``: a mean of the text's token embeddings, each of norm 1, by an attention of its own.  Where a
    language model ties its embeddings, such a column makes token t likelier, also one that training never had.

    Source: latent queries of perceivers (arXiv 2103.03206), copies of pointer-generators (arXiv 1704.04368).

    >>> import t2l_engine as t2l
    >>> config = t2l.PointerConfig(variant="pointer", modules=("o_proj",), in_features=(48,), out_features=(48,),
    ...     num_layers=4, rank=2, lora_alpha=4, feature_size=96, latent_size=16, copied=("o_proj",), first_layer=2)
    >>> net = t2l.PointerHyperNetwork(config)
    >>> stack = net.generate(net.latents(torch.randn(3, 7, 96), torch.ones(3, 7, dtype=torch.bool)).split(1))
    >>> stack.ranks["o_proj"][0].tolist()
    [0, 0, 2, 2]
    """

    def __init__(self, config: PointerConfig):
        super().__init__(config)
        c, d = config, config.latent_size
        layers, rank, _ = c.latent_shape
        sizes = list(zip(c.modules, c.in_features, c.out_features, strict=True))
        self.projection = Linear(c.feature_size, d)
        self.layer_emb, self.rank_emb = (nn.Parameter(torch.randn(n, d) * INITIAL_QUERY) for n in (layers, rank))
        self.blocks = nn.ModuleList(CrossBlock(d, c.num_heads) for _ in range(c.num_blocks))
        self.norm = LayerNorm(d)
        self.heads = nn.ModuleDict({m: nn.Linear(d, n_in + n_out, bias=False) for m, n_in, n_out in sizes})
        for parameter in self.heads.parameters():
            nn.init.zeros_(parameter)
        self.bias_A = nn.ParameterDict({m: (torch.rand(layers, rank, n) * 2 - 1) / math.sqrt(n) for m, n, _ in sizes})
        self.bias_B = nn.ParameterDict({m: torch.zeros(layers, rank, n) for m, _, n in sizes})
        self.pointer_query = nn.ModuleDict({m: Linear(d, d) for m in c.copied})
        self.pointer_key = nn.ModuleDict({m: Linear(d, d) for m in c.copied})
        self.gate = nn.ParameterDict({m: torch.randn(layers, rank) * INITIAL_GATE for m in c.copied})

    def matrices(self) -> list[Tensor]:
        """The weight matrices."""
        return [module.weight for module in self.modules() if isinstance(module, nn.Linear)]

    def latents(self, states: Tensor, mask: Tensor) -> Tensor:
        """``[chunks, adapted layers, rank, d + copied modules * copied_size]`` of chunks: what is read, and what is copied.

        ``states [chunks, L, f]``: of tokens, the embedding of RMS 1 first; ``mask [chunks, L]``: bool, the tokens of each
        chunk.
        """
        c = self.config
        if mask.dim() != 2 or list(states.shape) != [*mask.shape, c.feature_size]:
            expected, got = f"[chunks, L, {c.feature_size}]", (*states.shape,)
            raise ValueError(f"states: expected {expected} and a mask [chunks, L], got {got}, {tuple(mask.shape)}")
        states = states.to(self.dtype)
        tokens = self.projection(states)
        queries = (self.layer_emb[:, None] + self.rank_emb).to(self.dtype)
        read = queries.flatten(0, 1).expand(len(states), -1, -1)
        for block in self.blocks:
            read = block(read, tokens, mask[:, None, None])
        read = self.norm(read)
        # Of norm 1: then a step of Muon changes A and B no faster than one of AdamW does their biases.
        parts = [read / math.sqrt(c.latent_size)]
        embeddings = states[..., : c.copied_size] / math.sqrt(max(1, c.copied_size))  # of norm 1
        for name in c.copied:
            query, key = self.pointer_query[name](read), self.pointer_key[name](tokens)
            parts.append(scaled_dot_product_attention(query, key, embeddings, attn_mask=mask[:, None]))
        return torch.cat(parts, dim=-1).unflatten(1, queries.shape[:2])

    def _heads(self, latents: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
        c = self.config
        sizes = [c.latent_size, *[c.copied_size] * len(c.copied)]
        read, *copied = latents.to(self.dtype).split(sizes, dim=-1)
        for k, (name, module) in enumerate(zip(self._paths, c.modules, strict=True)):
            A, B = self.heads[module](read).split((c.in_features[k], c.out_features[k]), dim=-1)
            A, B = A + self.bias_A[module].to(A.dtype), B + self.bias_B[module].to(B.dtype)
            if module in c.copied:
                B = B + self.gate[module].to(B.dtype)[..., None] * copied[c.copied.index(module)]
            yield name, A, B


def pointer_flops(config: PointerConfig, tokens: int) -> int:
    """FLOPs of generating one adapter from the hidden states of a text of ``tokens`` tokens."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), torch.no_grad():
        network, states = PointerHyperNetwork(config), torch.empty(1, tokens, config.feature_size)
        with FlopCounterMode(display=False) as counter:
            list(network._heads(network.latents(states, torch.ones(1, tokens, dtype=torch.bool))))
    return counter.get_total_flops()
