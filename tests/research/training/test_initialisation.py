"""Where training starts: B is zero and A is PEFT's draw, for every variant and shape, so that nothing changes at first."""

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import t2l_engine as t2l
from t2l_engine.hypernetwork.config import VARIANTS
from t2l_engine.research.training.context import Modules
from t2l_engine.research.training.lora import LoRABank
from t2l_engine.testing.numerics import STANDARD_ERRORS

EXAMPLES = settings(max_examples=20)
sizes = st.integers(1, 40)
NAMES = ("q_proj", "v_proj", "down_proj")


def network(variant, shapes, rank=4, num_layers=2, seed=1, **changes):
    """``shapes``: (in, out) of each module."""
    values = {
        "modules": NAMES[: len(shapes)], "in_features": [n for n, _ in shapes], "out_features": [n for _, n in shapes],
        "embed_dim": 6, "latent_size": 8, "head_in_size": 5, "lora_alpha": 8.0,
    }  # fmt: skip
    torch.manual_seed(0)
    made = t2l.HyperNetwork(t2l.HyperNetworkConfig(variant, rank=rank, num_layers=num_layers, **values | changes))
    return made.bias_hyperinit(torch.Generator().manual_seed(seed))


def check_start(stack, bound):
    """B and the delta are zero, A is within ``bound[name]``, the same for every adapter and other in every row."""
    for name, A in stack.lora_A.items():
        B = stack.lora_B[name]
        assert not B.any() and not (B @ A).any()
        assert A.isfinite().all() and A.any() and A.abs().max() <= bound[name]
        assert torch.equal(A, A[:1].expand_as(A))
        if A.shape[2] > 1 and A.shape[3] > 1:
            assert not torch.equal(A[0, 0, 0], A[0, 0, 1])


@EXAMPLES
@given(
    st.sampled_from(VARIANTS),
    st.lists(st.tuples(sizes, sizes), min_size=1, max_size=3),
    st.sampled_from([1, 2, 5, 16]),
    st.integers(1, 3),
    st.sampled_from([0.0, 1.0, 1e4]),
)
def test_the_first_delta_is_zero_for_every_task(variant, shapes, rank, num_layers, scale):
    """Also where out is wider than in, or in wider than out, and for any task embedding."""
    net = network(variant, shapes, rank, num_layers)
    task_emb = torch.randn(3, 6, generator=torch.Generator().manual_seed(2)) * scale
    bound = {name: n_in**-0.5 for name, (n_in, _) in zip(NAMES, shapes, strict=False)}
    check_start(net.generate(task_emb), bound)
    check_start(net(task_emb), bound)


def peft_draw(n_in, n_out, rank):
    torch.manual_seed(3)
    model = nn.ModuleDict({"q_proj": nn.Linear(n_in, n_out)})
    config = peft.LoraConfig(r=rank, target_modules=["q_proj"])
    made = peft.inject_adapter_in_model(config, model)["q_proj"]
    assert not made.lora_B["default"].weight.any()
    return made.lora_A["default"].weight.detach()


@pytest.mark.parametrize(("n_in", "n_out"), [(96, 160), (160, 96)])
@pytest.mark.parametrize("variant", [*VARIANTS, "bank"])
def test_A_is_drawn_as_in_peft(variant, n_in, n_out):
    """Mean, variance and bound, beside PEFT's own draw for a layer of that shape."""
    rank = 32
    if variant == "bank":
        bank = LoRABank(Modules(("q_proj",), ("l.{layer}.q_proj",), (n_in,), (n_out,), 1), 2, rank, 1.0, seed=1)
        ours = bank.lora_A["q_proj"].detach()[0, 0]
    else:
        ours = network(variant, [(n_in, n_out)], rank).generate(torch.randn(2, 6)).lora_A["q_proj"][0, 0]
    theirs = peft_draw(n_in, n_out, rank)
    assert ours.shape == theirs.shape
    bound, count = n_in**-0.5, ours.numel()
    error = (4 / 45 / count) ** 0.5 * bound**2  # of the mean square of uniform draws
    for draw in (ours, theirs):
        assert draw.abs().max() <= bound
        assert (draw.abs() > 0.99 * bound).any()
        assert abs(draw.mean()) <= STANDARD_ERRORS * bound * (1 / 3 / count) ** 0.5
        assert abs(draw.square().mean() - bound**2 / 3) <= STANDARD_ERRORS * error
    assert abs(ours.square().mean() - theirs.square().mean()) <= STANDARD_ERRORS * error * 2**0.5
    rows, columns = ours.square().mean(dim=1), ours.square().mean(dim=0)  # no part is drawn otherwise
    for parts, size in ((rows, n_in), (columns, rank)):
        assert (parts - bound**2 / 3).abs().max() <= STANDARD_ERRORS * error * (count / size) ** 0.5
    assert len(ours.unique()) > 0.99 * count
