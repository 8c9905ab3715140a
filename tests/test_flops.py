"""Closed forms against torch's own counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import t2l_engine as t2l
from t2l_engine import flops, reference


def counted(function) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("variant", ["L", "M", "S-learnable", "S-rotary"])
def test_hypernet(variant):
    config = t2l.HyperNetworkConfig(
        variant=variant, modules=("q_proj", "v_proj"), in_features=(64, 64), out_features=(64, 64), num_layers=3, rank=4,
        embed_dim=48, latent_size=32, head_in_size=40, lora_alpha=8.0,
    )  # fmt: skip
    net = t2l.HyperNetwork(config)
    folded = net._fold()
    task_emb = torch.randn(5, 48)

    def run():
        z = net.task_encoder(task_emb)
        rotary = config.rank if variant == "S-rotary" else 0
        latent = reference.hypernet_trunk(z, folded["weights"], folded["side_emb"], folded["pos_emb"], rotary)
        sizes = config.rank, config.in_features, config.out_features
        reference.hypernet_heads(latent, *folded["heads"], *([None] * 2,) * 4, *sizes)

    assert flops.hypernet_flops(config, 5) == pytest.approx(counted(run), rel=0.01)


def test_mistral_sizes_of_the_paper():
    """GFLOP per adapter of the released Mistral-7B shape, as computed independently."""
    shape = {
        "modules": ("q_proj", "v_proj"), "in_features": (4096, 4096), "out_features": (4096, 1024), "num_layers": 32,
        "rank": 8, "embed_dim": 1024, "latent_size": 128, "head_in_size": 512, "lora_alpha": 16.0,
    }  # fmt: skip
    expected = {"L": 3.58, "M": 3.64, "S-learnable": 4.23, "S-rotary": 4.50}
    for variant, gflop in expected.items():
        got = flops.hypernet_flops(t2l.HyperNetworkConfig(variant=variant, **shape)) / 1e9
        assert got == pytest.approx(gflop, rel=0.01), variant


def test_decoder_and_encoder():
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=97, head_dim=24, attn_implementation="eager",
    )  # fmt: skip
    model, n = LlamaForCausalLM(config).eval(), 40
    ids = torch.arange(n)[None] % 97
    with torch.no_grad():
        total = counted(lambda: model(input_ids=ids, logits_to_keep=1))
    # Eager attention multiplies the full square; the closed form counts the causal half.
    square = config.num_hidden_layers * 4 * 4 * 24 * (n * n - n * (n + 1) // 2)
    assert flops.decoder_flops(config, n) == pytest.approx(total - square, rel=0.01)
    one_by_one = flops.decoder_flops(config, n) + flops.decoder_flops(config, 1, cached_tokens=n)
    assert flops.decoder_flops(config, n, new_tokens=2) == one_by_one

    config = BertConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, vocab_size=97,
        attn_implementation="eager",
    )  # fmt: skip
    encoder = BertModel(config, add_pooling_layer=False).eval()
    with torch.no_grad():
        assert flops.encoder_flops(config, n) == pytest.approx(counted(lambda: encoder(input_ids=ids)), rel=0.01)
