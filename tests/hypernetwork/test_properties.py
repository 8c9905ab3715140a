"""What holds for every configuration and every small hypernetwork, on examples drawn by Hypothesis."""

import tempfile

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from t2l_engine import HyperNetwork, HyperNetworkConfig
from t2l_engine.hypernetwork.config import TASK_ENCODERS, VARIANTS
from t2l_engine.testing.numerics import PARITY_FROBENIUS, relative_frobenius, u

EXAMPLES = settings(max_examples=12)


@st.composite
def networks(draw, task_encoders=TASK_ENCODERS):
    """A small hypernetwork with random parameters, and task embeddings for it."""
    variant, task_encoder = draw(st.sampled_from(VARIANTS)), draw(st.sampled_from(task_encoders))
    modules = draw(st.lists(st.sampled_from(["q_proj", "v_proj", "up_proj"]), min_size=1, max_size=3, unique=True))
    sizes = st.lists(st.integers(1, 40), min_size=len(modules), max_size=len(modules))
    num_layers = draw(st.integers(1, 3))
    latent = 128 if task_encoder == "discrete" else draw(st.integers(4, 40))
    if variant.endswith("rotary"):  # an even trunk width
        latent -= latent // 2 % 2 * 2
        assume(task_encoder != "discrete" or (num_layers + len(modules)) % 2 == 0)
    config = HyperNetworkConfig(
        variant=variant, modules=modules, in_features=draw(sizes), out_features=draw(sizes), num_layers=num_layers,
        rank=draw(st.integers(1, 5)), embed_dim=draw(st.integers(1, 40)), latent_size=latent,
        head_in_size=draw(st.integers(1, 40)), lora_alpha=draw(st.floats(0.5, 64)),
        scaling=draw(st.sampled_from(["rslora", "plain", 1.5])), head_bias=draw(st.booleans()),
        output_scale=draw(st.sampled_from([1.0, 0.01])), task_encoder=task_encoder,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    net = HyperNetwork(config)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            value = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * value if name.endswith("norm.weight") else 0.3 * value)
    task_emb = torch.randn(draw(st.integers(1, 4)), config.embed_dim, generator=generator)
    return net.eval(), task_emb


@EXAMPLES
@given(networks(), st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_saved_hypernetwork_is_the_same_bit_for_bit(drawn, dtype):
    net, task_emb = drawn
    net.set_dtype(dtype)
    with tempfile.TemporaryDirectory() as folder:
        net.save_pretrained(folder)
        again = HyperNetwork.from_pretrained(folder)
    assert again.config == net.config
    state = again.state_dict()
    assert state.keys() == net.state_dict().keys()
    for key, tensor in net.state_dict().items():
        assert state[key].dtype == tensor.dtype and torch.equal(state[key], tensor), key
    assert net.generate(task_emb).allclose(again.generate(task_emb), rtol=0, atol=0)


@EXAMPLES
@given(networks(["linear", "softmax"]))  # the others choose: rounding may choose otherwise
def test_generated_adapters_have_their_shapes_and_the_values_of_the_reference(drawn):
    net, task_emb = drawn
    c, n = net.config, len(task_emb)
    stack = net.generate(task_emb)
    assert len(stack) == n and tuple(stack.lora_A) == c.modules
    for name, n_in, n_out in zip(c.modules, c.in_features, c.out_features, strict=True):
        assert stack.lora_A[name].shape == (n, c.num_layers, c.rank, n_in)
        assert stack.lora_B[name].shape == (n, c.num_layers, n_out, c.rank)
    torch.testing.assert_close(stack.scaling, torch.full((n,), net.scaling))
    # LayerNorm of few, nearly equal values magnifies rounding without bound: what rounding all parameters does is allowed.
    expected, rounded = _in_float64(net, task_emb), _in_float64(net, task_emb, rounding=4 * u(torch.float32))
    for side in ("lora_A", "lora_B"):
        for name in c.modules:
            got, want, other = (getattr(s, side)[name] for s in (stack, expected, rounded))
            assert relative_frobenius(got, want) <= PARITY_FROBENIUS + 4 * relative_frobenius(other, want), name


def _in_float64(net, task_emb, rounding=0.0):
    """The oracle: float64 has no native kernel, so every op runs its reference.

    ``rounding``: relative change of every parameter.
    """
    double = HyperNetwork(net.config).set_dtype(torch.float64)
    generator = torch.Generator().manual_seed(0)
    noise = {k: torch.randn(t.shape, generator=generator) for k, t in net.state_dict().items()}
    double.load_state_dict({k: t.double() * (1 + rounding * noise[k]) for k, t in net.state_dict().items()})
    return double.generate(task_emb.double())
