"""Every variant, task encoder and last step against the plain network in float64, which the golden folders verify."""

import copy
import itertools

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.func import functional_call

from t2l_engine import AdapterStack, CheckpointError, HyperNetwork
from t2l_engine.testing.numerics import PARITY_FROBENIUS, relative_frobenius, trunk_bound
from tests.hypernetwork.plain_network import ENCODERS, FLAGS, TRAININGS, adapters, cast, checkpoint, write

VARIANTS = tuple(FLAGS)


@pytest.fixture
def load(tmp_path):
    """Factory: (hypernetwork, state, args) of ``plain_network.checkpoint(...)`` with changed arguments."""

    def make(*settings, args=None, dtype=None, **sizes):
        state, arguments, peft = checkpoint(*settings, **sizes)
        arguments |= args or {}
        folder = write(tmp_path / str(len(list(tmp_path.iterdir()))), state, arguments, peft)
        return HyperNetwork.from_pretrained(folder, dtype=dtype), state, arguments

    return make


def task_embs(count=3, embed=14, seed=1):
    return torch.randn(count, embed, generator=torch.Generator().manual_seed(seed))


def assert_adapters(net, state, args, task_emb):
    encoded, expected = adapters(state, args, task_emb)
    assert relative_frobenius(net.task_encoder(task_emb).detach(), encoded) <= PARITY_FROBENIUS
    stack = net.generate(task_emb)
    assert tuple(stack.lora_A) == tuple(stack.lora_B) == tuple(expected) == net.config.modules
    for name, pair in expected.items():
        for side, got, want in zip("AB", (stack.lora_A[name], stack.lora_B[name]), pair, strict=True):
            assert got.shape == want.shape and relative_frobenius(got, want) <= PARITY_FROBENIUS, (name, side)


# --- adapters ------------------------------------------------------------------------------------------------------


def test_the_plain_network_agrees_with_sakana(golden):
    folders = sorted(golden.iterdir())
    assert len(folders) == 11
    for folder in folders:
        expected = load_file(folder / "expected.safetensors")
        state = torch.load(folder / "hypermod.pt", weights_only=True)
        encoded, found = adapters(state, yaml.safe_load((folder / "args.yaml").read_text()), expected["task_emb"])
        assert relative_frobenius(encoded, expected["encoded_task_emb"]) <= PARITY_FROBENIUS, folder.name
        for (name, pair), task, layer, (side, lora) in itertools.product(found.items(), range(3), range(3), enumerate("AB")):
            key = f"adapter{task}.base_model.model.model.layers.{layer}.self_attn.{name}.lora_{lora}.weight"
            assert relative_frobenius(expected[key], pair[side][task, layer]) <= PARITY_FROBENIUS, (folder.name, key)


RECON = ("M", "linear", "recon-delta")


@pytest.mark.parametrize("settings, sizes", [
    *(((variant, encoder), {}) for variant in VARIANTS for encoder in ENCODERS),
    *(((variant, "linear", training), {}) for variant in VARIANTS for training in TRAININGS),
    *(((variant,), {"rank": 1, "layers": 1, "modules": {"o_proj": (9, 7)}}) for variant in VARIANTS),
    # Odd widths, and with latent sizes that are no multiple of 4 some narrower than those.
    *(((variant, "discrete"), {"layers": 4}) for variant in VARIANTS if not variant.endswith("rotary")),
    *((("M",), {"latent": latent}) for latent in (21, 22, 23)),
    *((RECON, {"args": {"delta_w_scaling": scaling}}) for scaling in (10000, 3, 0.25)),
], ids=str)  # fmt: skip
def test_adapters(load, settings, sizes):
    net, state, args = load(*settings, **sizes)
    assert net.config.variant == settings[0] and net.config.task_encoder == (*settings, "linear")[1]
    assert_adapters(net, state, args, task_embs())


@pytest.mark.parametrize("encoder", ENCODERS)
def test_unit_vectors_as_task_embeddings(load, encoder):
    net, state, args = load("L", encoder, embed=6)
    assert_adapters(net, state, args, torch.eye(6))


# --- rank 1: tensors of two variants have the same shapes ----------------------------------------------------------


@pytest.mark.parametrize(("variant", "other"), [("L", "autoregressive-rotary"), ("M", "S-rotary")])
def test_flags_settle_rank_one(tmp_path, variant, other):
    state, args, peft = checkpoint(variant, rank=1)
    for name in (variant, other):
        flags = dict(zip(("shared_AB_head", "autoreg_gen", "learnable_pos_emb"), FLAGS[name], strict=True))
        net = HyperNetwork.from_pretrained(write(tmp_path / name, state, args | flags, peft))
        assert net.config.variant == name
        assert_adapters(net, state, args | flags, task_embs())


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_contradictions(load, variant, rank):
    shared, autoregressive, learnable = FLAGS[variant]
    wrong = [("shared_AB_head", not shared)]
    if rank > 1 or learnable:
        wrong.append(("autoreg_gen", not autoregressive))
    if autoregressive:
        wrong.append(("learnable_pos_emb", not learnable))
    for name, value in wrong:
        with pytest.raises(CheckpointError, match=rf"args\.yaml: {name}: {value} contradicts the tensors"):
            load(variant, rank=rank, args={name: value})


def test_tensors_of_no_variant(load, tmp_path):
    with pytest.raises(CheckpointError, match=r"hypermod\.pt.*expected an even trunk width for S-rotary, got width 71"):
        load("S-rotary", "discrete", layers=4)
    state, args, peft = checkpoint("L")
    state |= {key: value for key, value in checkpoint("S-learnable")[0].items() if key.startswith("pos_emb.")}
    with pytest.raises(CheckpointError, match=r"unexpected keys .*pos_emb\.0\.weight"):
        HyperNetwork.from_pretrained(write(tmp_path / "x", state, args, peft))
    state, args, peft = checkpoint("autoregressive-rotary")
    state["heads.up_proj.weight"] = state["heads.up_proj.weight"][1:]
    with pytest.raises(CheckpointError, match=r"heads\.up_proj\.weight.*expected 195 or 65 rows .*, got 64"):
        HyperNetwork.from_pretrained(write(tmp_path / "y", state, args, peft))


# --- low precision -------------------------------------------------------------------------------------------------


def assert_within_bound(net, state, args, dtype):
    """Against the same rounded weights in float64, and the error of rounding where the engine says that it rounds."""
    state = cast(state, dtype)
    (encoded, exact), (_, rounded) = (adapters(state, args, task_embs(), inputs) for inputs in (torch.float64, dtype))
    # The task encoder rounds its weights alone, so that descriptions close to each other stay apart.
    assert relative_frobenius(net.task_encoder(task_embs()).detach(), encoded) <= PARITY_FROBENIUS
    stack = net.generate(task_embs())
    for name in exact:
        for i, got in enumerate((stack.lora_A[name], stack.lora_B[name])):
            assert got.dtype == dtype
            assert relative_frobenius(got, exact[name][i]) <= trunk_bound(exact[name][i], rounded[name][i], dtype)


@pytest.mark.parametrize("settings", [
    *((variant, encoder) for variant in VARIANTS for encoder in ENCODERS),
    *(("autoregressive-rotary", "linear", training) for training in TRAININGS),
], ids="-".join)  # fmt: skip
def test_bfloat16_and_float64(load, settings):
    assert_within_bound(*load(*settings, dtype=torch.bfloat16), torch.bfloat16)
    net, state, args = load(*settings, dtype=torch.float64)
    stack, (_, expected) = net.generate(task_embs()), adapters(state, args, task_embs())
    for name, pair in expected.items():
        for got, want in zip((stack.lora_A[name], stack.lora_B[name]), pair, strict=True):
            assert relative_frobenius(got, want) < 1e-12


@pytest.mark.parametrize("training", TRAININGS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_generate_into_a_stack(load, variant, training):
    net, _, _ = load(variant, "linear", training)
    fresh, out = net.generate(task_embs()), net.generate(task_embs(seed=2))
    out.scaling.zero_()
    out.ranks["q_proj"][1] = 0
    kept = [t.data_ptr() for side in (out.lora_A, out.lora_B) for t in side.values()]
    assert net.generate(task_embs(), out=out) is out
    assert kept == [t.data_ptr() for side in (out.lora_A, out.lora_B) for t in side.values()]
    assert out.allclose(fresh, rtol=0, atol=0)
    assert all(map(torch.equal, out.ranks.values(), fresh.ranks.values()))
    half = net.generate(task_embs(seed=2)).to(dtype=torch.bfloat16)  # keeps its dtype: one rounding more
    assert net.generate(task_embs(), out=half).dtype == torch.bfloat16
    assert half.allclose(fresh.to(dtype=torch.bfloat16), rtol=0, atol=0)


def test_constants_of_a_stack_are_right_again(load):
    """Once somebody wrote to them, or replaced a tensor; also where tensors cannot tell, in inference mode."""
    net, _, _ = load("L")
    for mode in (False, True):
        with torch.inference_mode(mode):
            out = net.generate(task_embs())
            net.generate(task_embs(), out=out)
            out.ranks["q_proj"][1] = 0
            out.scaling.mul_(0.5)
            for again in (copy.deepcopy(out), out):  # the versions of a copy begin anew
                net.generate(task_embs(), out=again)
                assert bool((again.ranks["q_proj"] == net.config.rank).all() and (again.scaling == net.scaling).all())
            out.scaling = torch.zeros_like(out.scaling)
            net.generate(task_embs(), out=out)
            assert bool((out.scaling == net.scaling).all())


def test_generate_into_what_does_not_fit(load):
    net, _, _ = load("L")
    stack = net.generate(task_embs())
    for out, message in (
        (stack[:2], r"out: \w+: expected lora_A and lora_B \(\[3, .* got \(\[2, "),
        (3, "out: expected a stack for the modules .* got int"),
        (
            AdapterStack({"o_proj": torch.ones(3, 1, 1, 2)}, {"o_proj": torch.ones(3, 1, 2, 1)}, torch.ones(3)),
            "out: expected a",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            net.generate(task_embs(), out=out)


# --- folding -------------------------------------------------------------------------------------------------------


def test_a_replaced_parameter_is_seen(load):
    """Also where it was replaced several times, until one has the address of the first, as may happen."""
    net, _, _ = load("L")
    table = net.depth_emb  # only folded: no result keeps it alive
    for _ in range(20):
        table.weight = torch.nn.Parameter(torch.randn_like(table.weight))
        net.generate(task_embs())
        first = id(table.weight)
        for _ in range(20):
            table.weight = torch.nn.Parameter(torch.randn_like(table.weight))
            if id(table.weight) == first:
                break
        got, expected = net.generate(task_embs()), net.forward(task_embs())  # which folds every time
        assert torch.equal(got.lora_A["q_proj"], expected.lora_A["q_proj"])


# --- gradients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "encoder"),
    [("autoregressive-learnable", "linear"), ("autoregressive-rotary", "linear"), ("L", "softmax"), ("S-rotary", "softmax")],
)
def test_gradients(load, variant, encoder):
    """Of every parameter, against finite differences in float64."""
    sizes = {"modules": {"q_proj": (5, 4), "v_proj": (3, 6)}, "layers": 2, "rank": 2, "embed": 5, "latent": 8, "head_in": 6}
    net, _, _ = load(variant, encoder, dtype=torch.float64, **sizes)
    names = [name for name, _ in net.named_parameters()]
    task_emb = task_embs(2, 5).double().requires_grad_()

    def run(task_emb, *parameters):
        stack = functional_call(net, dict(zip(names, parameters, strict=True)), (task_emb,))
        return (*stack.lora_A.values(), *stack.lora_B.values())

    assert torch.autograd.gradcheck(run, (task_emb, *net.parameters()), fast_mode=True)


@pytest.mark.parametrize("encoder", ["vq", "discrete"])
def test_no_gradient_passes_a_choice(load, encoder):
    net, _, _ = load("L", encoder)
    stack = net.forward(task_embs())
    sum(tensor.sum() for tensor in (*stack.lora_A.values(), *stack.lora_B.values())).backward()
    assert net.task_encoder.linear1.weight.grad is None and net.mixer.linear1.weight.grad is not None
