"""Hypernetworks with the shapes of released and bundled checkpoints and random weights."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from t2l_engine.hypernetwork.config import HyperNetworkConfig, PerceiverConfig
from t2l_engine.hypernetwork.modules import NormedEmbedding
from t2l_engine.hypernetwork.network import HyperNetwork
from t2l_engine.hypernetwork.perceiver import PerceiverHyperNetwork

#: Makes entries of A and B a few hundredths, as in trained adapters.
HEAD_SCALE = 0.1


@dataclasses.dataclass(frozen=True)
class HyperShape:
    """A hypernetwork for ``q_proj`` and ``v_proj`` of one base model.

    ``hidden``: input features of both; ``query``, ``value``: their output features.  Other fields as in
    :class:`t2l_engine.HyperNetworkConfig`.
    """

    name: str
    num_layers: int
    hidden: int
    query: int
    value: int
    embed_dim: int = 1024
    latent_size: int = 512
    head_in_size: int = 2048
    rank: int = 8
    variant: str = "L"

    def config(self) -> HyperNetworkConfig:
        return HyperNetworkConfig(
            variant=self.variant, modules=("q_proj", "v_proj"), in_features=(self.hidden, self.hidden),
            out_features=(self.query, self.value), num_layers=self.num_layers, rank=self.rank, embed_dim=self.embed_dim,
            latent_size=self.latent_size, head_in_size=self.head_in_size, lora_alpha=2.0 * self.rank,
        )  # fmt: skip

    def make(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> HyperNetwork:
        """A hypernetwork with random weights, matrices in ``dtype``, initialised without a second copy in memory."""
        with torch.device("meta"):
            net = HyperNetwork(self.config())
        net.set_dtype(dtype).to_empty(device="cpu")
        fill(net, torch.Generator().manual_seed(seed))
        return net.requires_grad_(False).eval()

    def task_embeddings(self, count: int, seed: int = 0) -> Tensor:
        """Random ``[count, embed_dim]`` float32 of norm sqrt(embed_dim), like those of text encoders."""
        drawn = torch.randn(count, self.embed_dim, generator=torch.Generator().manual_seed(seed))
        return nn.functional.normalize(drawn, dim=-1) * self.embed_dim**0.5


@torch.no_grad()
def fill(net: HyperNetwork, generator: torch.Generator) -> None:
    for name, module in net.named_modules():
        if isinstance(module, nn.Linear):
            scale = HEAD_SCALE if name.startswith("heads.") else 1.0
            module.weight.normal_(0, scale * module.in_features**-0.5, generator=generator)
            module.bias.normal_(0, 0.1 * scale, generator=generator)
        elif isinstance(module, nn.LayerNorm):
            module.weight.normal_(1, 0.1, generator=generator)
            module.bias.normal_(0, 0.1, generator=generator)
        elif isinstance(module, NormedEmbedding):
            module.weight.normal_(generator=generator)


#: By base model: SakanaAI's released variant-L checkpoints (the first three), and smollm2-135m-paper.
_ALL = (
    HyperShape("mistral-7b", 32, 4096, 4096, 1024, latent_size=128, head_in_size=512),
    HyperShape("llama-3.1-8b", 32, 4096, 4096, 1024),
    HyperShape("gemma-2-2b", 26, 2304, 2048, 1024),
    HyperShape("smollm2-135m", 30, 576, 576, 192, embed_dim=384, latent_size=128, head_in_size=112),
)
SHAPES = {shape.name: shape for shape in _ALL}
#: Variants that benchmarks compare.
VARIANTS = ("L", "M", "S-learnable")

#: Doc-to-LoRA's checkpoint that SakanaAI released for gemma-2-2b-it, and the same form at its smallest.
PERCEIVER = PerceiverConfig(
    variant="perceiver-layers", modules=("down_proj",), in_features=(9216,), out_features=(2304,), num_layers=26, rank=8,
    lora_alpha=16.0, feature_size=2304, latent_size=512, num_latents=8, num_blocks=9, num_mlps=1, per_layer_mlps=True,
)  # fmt: skip
_SMALL = {"in_features": (96,), "out_features": (48,), "num_layers": 2, "feature_size": 48, "latent_size": 32}
TINY_PERCEIVER = dataclasses.replace(PERCEIVER, num_blocks=2, **_SMALL)


@torch.no_grad()
def perceiver(config: PerceiverConfig) -> PerceiverHyperNetwork:
    """Random weights, all of them bfloat16 numbers; no norm, bias or scale is trivial."""
    torch.manual_seed(1)
    net = PerceiverHyperNetwork(config).set_dtype(torch.bfloat16).requires_grad_(False).eval()
    for p in net.parameters():
        if p.dtype != net.dtype:
            p.add_(torch.randn(p.shape), alpha=0.01 if p.dim() == 3 else 0.1).copy_(p.to(net.dtype))
    return net
