"""The hypernetwork that reads tokens and copies some of them into B."""

import dataclasses
import math

import pytest
import torch
from torch.func import functional_call
from torch.nn.functional import layer_norm, linear, silu

import t2l_engine as t2l
from t2l_engine.text import packaged

CONFIG = t2l.PointerConfig(
    variant="pointer", modules=("q_proj", "o_proj", "down_proj"), in_features=(12, 20, 16), out_features=(20, 12, 12),
    num_layers=4, rank=3, lora_alpha=6, feature_size=24, latent_size=8, num_blocks=2, num_heads=2,
    copied=("o_proj", "down_proj"), first_layer=1,
)  # fmt: skip


def network(config=CONFIG):
    """Random parameters, none of them trivial."""
    torch.manual_seed(0)
    net = t2l.PointerHyperNetwork(config).double()
    for parameter in net.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return net


def texts(lengths=(7, 4, 1)):
    states = torch.randn(len(lengths), max(lengths), CONFIG.feature_size, dtype=torch.float64)
    return states, torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def generated(net, states, mask):
    with torch.no_grad():
        return net.generate(net.latents(states, mask).split(1))


def by_hand(net, states):
    """(layer, module) -> A ``[r, in]`` and B ``[r, out]`` of a text ``[L, f]``: one query and one head at a time."""
    p, c = dict(net.named_parameters()), net.config

    def apply(name, x):
        return linear(x, p[f"{name}.weight"], p[f"{name}.bias"])

    def norm(name, x):
        return layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"])

    def attend(query, keys):
        scores = torch.stack([query @ key for key in keys]) / math.sqrt(len(query))
        return scores.softmax(0)

    tokens, made = apply("projection", states), {}
    for layer in range(c.num_layers - c.first_layer):
        rows = []
        for j in range(c.rank):
            x = p["layer_emb"][layer] + p["rank_emb"][j]
            for b in range(c.num_blocks):
                name = f"blocks.{b}"
                query = apply(f"{name}.query", norm(f"{name}.norm1", x))
                key, value = apply(f"{name}.key_value", norm(f"{name}.norm2", tokens)).chunk(2, dim=-1)
                parts = [t.chunk(c.num_heads, dim=-1) for t in (query, key, value)]
                seen = [attend(q, k) @ v for q, k, v in zip(*parts, strict=True)]
                x = x + apply(f"{name}.out", torch.cat(seen))
                x = x + apply(f"{name}.linear2", silu(apply(f"{name}.linear1", norm(f"{name}.norm3", x))))
            rows.append(norm("norm", x))
        for k, module in enumerate(c.modules):
            A, B = [], []
            for j, x in enumerate(rows):
                row = linear(x / math.sqrt(c.latent_size), p[f"heads.{module}.weight"])
                A.append(row[: c.in_features[k]] + p[f"bias_A.{module}"][layer, j])
                B.append(row[c.in_features[k] :] + p[f"bias_B.{module}"][layer, j])
                if module in c.copied:
                    keys = apply(f"pointer_key.{module}", tokens)
                    weights = attend(apply(f"pointer_query.{module}", x), keys)
                    embeddings = states[:, : c.copied_size] / math.sqrt(c.copied_size)
                    B[-1] = B[-1] + p[f"gate.{module}"][layer, j] * (weights @ embeddings)
            made[c.first_layer + layer, module] = torch.stack(A), torch.stack(B)
    return made


@pytest.mark.parametrize("copied", [("o_proj", "down_proj"), ("down_proj",), ()])
def test_adapters_are_those_of_the_formulas(copied):
    net, (states, mask) = network(dataclasses.replace(CONFIG, copied=copied)), texts()
    stack = generated(net, states, mask)
    assert all(ranks.tolist() == [[0, 3, 3, 3]] * 3 for ranks in stack.ranks.values())
    for i, n in enumerate(mask.sum(1).tolist()):
        for (layer, module), (A, B) in by_hand(net, states[i, :n]).items():
            torch.testing.assert_close(stack.lora_A[module][i, layer], A, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(stack.lora_B[module][i, layer].mT, B, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("changes", [{}, {"copied": ()}, {"num_blocks": 1, "first_layer": 0}])
def test_adapter_values(changes):
    config = dataclasses.replace(CONFIG, **changes)
    stack = t2l.PointerHyperNetwork(config).meta_stack(1)
    sizes = {name: stack.lora_A[name][0, 0].numel() + stack.lora_B[name][0, 0].numel() for name in stack.lora_A}
    assert config.adapter_values == sum(sizes[name] * int((stack.ranks[name] > 0).sum()) for name in sizes)


def test_a_new_network_makes_one_adapter_for_all_texts_but_for_what_it_copies():
    torch.manual_seed(0)
    states, mask = texts()
    for copied, same in (((), True), (("o_proj",), False)):
        stack = generated(t2l.PointerHyperNetwork(dataclasses.replace(CONFIG, copied=copied)), states, mask)
        assert torch.equal(stack.lora_B["o_proj"][0], stack.lora_B["o_proj"][1]) == same
        assert torch.equal(stack.lora_A["o_proj"][0], stack.lora_A["o_proj"][1])


def test_gradients_are_those_of_differences():
    net, (states, mask) = network(), texts((5, 2))
    names = [name for name, _ in net.named_parameters()]

    def run(*parameters):
        stack = functional_call(net, dict(zip(names, parameters, strict=True)), ([([1, 0], states, mask)],))
        return (*stack.lora_A.values(), *stack.lora_B.values())

    assert torch.autograd.gradcheck(run, tuple(net.parameters()), fast_mode=True)


def test_a_checkpoint_keeps_every_tensor(tmp_path):
    """SmolLM2 reads and is adapted: saved and loaded, the same bits, also in slots."""
    model, tokenizer = packaged.load(torch.float32)
    config = t2l.PointerConfig(
        variant="pointer", modules=("down_proj",), in_features=(1536,), out_features=(576,), num_layers=30, rank=2,
        lora_alpha=4, feature_size=2 * 576, latent_size=8, copied=("down_proj",), first_layer=28,
    )  # fmt: skip
    net = network(config).set_dtype(torch.bfloat16)
    reads = t2l.DocumentEncoderConfig("smollm2-135m", "layers", layers=(0, 2), prefix="", suffix="")
    engine = t2l.DocToLoRA(t2l.DocumentEncoder(model, tokenizer, reads), net)
    engine.save_pretrained(tmp_path)
    again = t2l.TextToLoRA.from_pretrained(tmp_path)
    assert again.hypernetwork.config == config and again.hypernetwork.dtype == torch.bfloat16
    sentences = ["Answer with the plural.", "Put the word flimsy before it, always."]
    first = engine.generate(sentences)
    assert again.generate(sentences).allclose(first, rtol=0, atol=0)
    lora = t2l.attach(model, first[0], slots=4)
    again.generate_into(lora, 1, sentences)
    ids = tokenizer(["flimsy word"] * 2, return_tensors="pt")["input_ids"]
    with torch.no_grad(), lora.use([1, 2]):
        in_slots = model(ids).logits
    lora.detach()
    lora = t2l.attach(model, first)
    with torch.no_grad(), lora.use([0, 1]):
        assert torch.equal(in_slots, model(ids).logits)
    assert not torch.equal(in_slots[0], in_slots[1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"copied": ("down_proj", "o_proj")}, "copied: expected some of the modules"),
        ({"copied": ("q_proj", "o_proj")}, "copied: expected modules with out_features of one size"),
        ({"copied": "o_proj"}, "copied: expected some of the modules"),
        ({"feature_size": 8}, "feature_size: expected at least 12, got 8"),
        ({"latent_size": 7}, "latent_size: expected a multiple of the 2 heads, got 7"),
        ({"first_layer": 4}, "first_layer: expected below the 4 layers, got 4"),
        ({"num_blocks": 0}, "num_blocks"),
    ],
)
def test_wrong_configurations(changes, message):
    with pytest.raises(t2l.ConfigError, match=message):
        dataclasses.replace(CONFIG, **changes)
