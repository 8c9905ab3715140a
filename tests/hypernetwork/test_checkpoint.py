import json
import os
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from t2l_engine import CheckpointError, ConfigError, EncoderConfig, HyperNetwork
from t2l_engine.hypernetwork.checkpoint import describe, read
from t2l_engine.testing.numerics import PARITY_FROBENIUS, relative_frobenius, u
from t2l_engine.text.config import encoder_config_from_json

CASES = sorted(folder.name for folder in (Path(__file__).parents[1] / "data" / "golden").iterdir())


def adapters(net, task_emb):
    """What ``net`` generates, in the form of expected.safetensors."""
    stack = net.generate(task_emb)
    return {f"adapter{i}.{k}": v for i in range(len(stack)) for k, v in stack.state_dict_peft(i).items()}


def assert_parity(got, expected):
    assert got.keys() == {key for key in expected if key.startswith("adapter")}
    worst = max(got, key=lambda key: relative_frobenius(got[key], expected[key]))
    assert relative_frobenius(got[worst], expected[worst]) <= PARITY_FROBENIUS, worst


def reverse_modules(state):
    """The file of a training process that iterated over the module set in the other order."""
    names = list(dict.fromkeys(key.split(".")[1] for key in state if key.startswith("heads.")))
    moved = {
        key: tensor
        for name in reversed(names)
        for key, tensor in state.items()
        if key.startswith((f"heads.{name}.", f"out_emb.{name}."))
    }
    return {key: tensor for key, tensor in state.items() if key not in moved} | moved


def reverse_rows(state):
    return state | {"layer_type_encoder.0.weight": state["layer_type_encoder.0.weight"].flip(0)}


# --- parity with SakanaAI's code ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # float64 has no kernel: every op runs its reference
@pytest.mark.parametrize("case", CASES)
def test_golden_adapters(golden, case, dtype):
    net = HyperNetwork.from_pretrained(golden / case, dtype=dtype)
    expected = load_file(golden / case / "expected.safetensors")
    task_emb = expected["task_emb"]
    encoded = net.task_encoder(task_emb).detach()
    assert relative_frobenius(encoded, expected["encoded_task_emb"]) <= PARITY_FROBENIUS
    assert_parity(adapters(net, task_emb), expected)
    singly = {
        key.replace("adapter0", f"adapter{i}"): tensor
        for i in range(len(task_emb))
        for key, tensor in adapters(net, task_emb[i : i + 1]).items()
    }
    assert_parity(singly, expected)
    meta = json.loads((golden / case / "meta.json").read_text())
    assert {name: i for i, name in enumerate(net.config.modules)} == meta["module_to_int"]
    assert net.scaling == meta["scaling"]


@pytest.mark.parametrize("case", [case for case in CASES if case != "L-discrete-sft"])  # one-hot: no rows to swap
def test_module_order_comes_from_the_tensors(edit, golden, case):
    expected = load_file(golden / case / "expected.safetensors")
    targets = {"target_modules": ["v_proj", "q_proj"]}
    net = HyperNetwork.from_pretrained(edit(case, lambda s: reverse_rows(reverse_modules(s)), peft=targets))
    assert net.config.modules == ("v_proj", "q_proj")
    assert_parity(adapters(net, expected["task_emb"]), expected)
    swapped = adapters(HyperNetwork.from_pretrained(edit(case, reverse_rows)), expected["task_emb"])
    for key in swapped:
        assert relative_frobenius(swapped[key], expected[key]) > 100 * PARITY_FROBENIUS, key


def test_order_of_adapter_config_warns_after_sft_and_tensors_win(edit, golden):
    expected = load_file(golden / "M-sft" / "expected.safetensors")
    targets = {"target_modules": ["v_proj", "q_proj"]}
    with pytest.warns(UserWarning, match="target_modules"):
        net = HyperNetwork.from_pretrained(edit("M-sft", peft=targets))
    assert_parity(adapters(net, expected["task_emb"]), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # reconstruction copies the list from another process: no evidence
        HyperNetwork.from_pretrained(edit("M-recon-z", peft=targets))


def test_module_order_override(golden):
    expected = load_file(golden / "L-sft" / "expected.safetensors")
    task_emb = expected["task_emb"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net = HyperNetwork.from_pretrained(golden / "L-sft", module_order=["q_proj", "v_proj"])
    assert_parity(adapters(net, task_emb), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = HyperNetwork.from_pretrained(golden / "L-sft", module_order=["v_proj", "q_proj"])
    for key, tensor in adapters(net, task_emb).items():
        assert relative_frobenius(tensor, expected[key]) > 100 * PARITY_FROBENIUS, key
    for order in (["q_proj"], ["q_proj", "k_proj"], ["q_proj", "v_proj", "v_proj"]):
        with pytest.raises(CheckpointError, match="module_order"):
            HyperNetwork.from_pretrained(golden / "L-sft", module_order=order)


def test_intermediate_checkpoint_finds_its_configuration(edit, golden, monkeypatch):
    folder = edit("L-sft")
    step = folder / "checkpoints" / "it_100"
    step.mkdir(parents=True)
    (folder / "hypermod.pt").rename(step / "hypermod.pt")
    expected = load_file(golden / "L-sft" / "expected.safetensors")
    assert_parity(adapters(HyperNetwork.from_pretrained(step), expected["task_emb"]), expected)
    for working, name in ((folder, "checkpoints/it_100"), (step.parent, "it_100"), (step, ".")):
        monkeypatch.chdir(working)
        assert HyperNetwork.from_pretrained(name).config.rank == 4


def test_an_empty_multi_task_lora_takes_the_bias_of_the_heads_away(edit, golden):
    """As in SakanaAI's code, which asks whether the path is None."""
    state = torch.load(golden / "L-sft" / "hypermod.pt", weights_only=True)
    biases = [key for key in state if key.startswith("heads.") and key.endswith(".bias")]
    without = edit("L-sft", lambda state: {k: v for k, v in state.items() if k not in biases}, args={"mt_lora_path": ""})
    assert not HyperNetwork.from_pretrained(without).config.head_bias
    with pytest.raises(CheckpointError, match=r"heads\.q_proj\.bias.*expected absent"):
        HyperNetwork.from_pretrained(edit("L-sft", args={"mt_lora_path": ""}))


def test_fields_that_sakana_ignores_are_no_contradiction(edit, golden):
    expected = load_file(golden / "L-sft" / "expected.safetensors")
    net = HyperNetwork.from_pretrained(edit("L-sft", args={"encoder_type": "vq", "head_use_bias": True}))
    assert_parity(adapters(net, expected["task_emb"]), expected)


def test_scaling_and_dtype(golden):
    """lora_alpha 8, rank 4, rsLoRA."""
    for scaling, value in ((None, 4.0), ("rslora", 4.0), ("plain", 2.0), (0.75, 0.75), (3, 3.0)):
        net = HyperNetwork.from_pretrained(golden / "L-sft", scaling=scaling)
        assert net.scaling == value and net.generate(torch.ones(2, 48)).scaling.tolist() == [value, value]
    for scaling in ("rsLoRA", 0, -1.0, float("nan"), True, [2]):
        with pytest.raises(ConfigError, match="scaling"):
            HyperNetwork.from_pretrained(golden / "L-sft", scaling=scaling)
    for dtype in (torch.int8, torch.float8_e4m3fn, "bfloat16", "auto"):
        with pytest.raises(ValueError, match=f"dtype: expected .*torch.bfloat16.*, got {dtype!r}"):
            HyperNetwork.from_pretrained(golden / "L-sft", dtype=dtype)


# --- dtypes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["L-offset-sft", "L-softmax-sft", "L-vq-sft"])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float64])
def test_a_file_of_another_dtype(edit, golden, case, stored):
    """As stored means the matrices; vectors are computed with in float32, or float64."""
    folder = edit(case, lambda state: {key: tensor.to(stored) for key, tensor in state.items()})
    task_emb = load_file(golden / case / "expected.safetensors")["task_emb"]
    net = HyperNetwork.from_pretrained(folder)
    assert net.dtype == stored and net.generate(task_emb).lora_A["q_proj"].dtype == stored
    assert net.mlp1.norm.weight.dtype == (torch.float64 if stored == torch.float64 else torch.float32)
    expected = HyperNetwork.from_pretrained(golden / case, dtype=stored).generate(task_emb)
    # The vectors were rounded too: a few roundings more than casting the matrices alone.
    assert relative_frobenius(net.generate(task_emb).lora_B["v_proj"], expected.lora_B["v_proj"]) <= 8 * u(stored)


def test_matrices_of_several_dtypes(edit):
    folder = edit("L-sft", lambda state: state | {"mixer.4.weight": state["mixer.4.weight"].bfloat16()})
    message = r"hypermod\.pt: expected matrices of one dtype.*bfloat16.*float32.*pass dtype"
    with pytest.raises(CheckpointError, match=message):
        HyperNetwork.from_pretrained(folder)
    for dtype in (torch.float32, torch.bfloat16):
        assert HyperNetwork.from_pretrained(folder, dtype=dtype).generate(torch.ones(1, 48)).lora_A["q_proj"].dtype == dtype


# --- ways of saving a state_dict -------------------------------------------------------------------------------------


class Holder(torch.nn.Module):
    """A module whose state_dict is ``state``: an OrderedDict with ``_metadata``, as SakanaAI's code saves it."""

    def __init__(self, state):
        super().__init__()
        for key, tensor in state.items():
            module = self
            *parents, name = key.split(".")
            for parent in parents:
                if not hasattr(module, parent):
                    module.add_module(parent, torch.nn.Module())
                module = getattr(module, parent)
            module.register_parameter(name, torch.nn.Parameter(tensor))


def in_one_storage(state):
    """Views of one long vector, with a gap in front of each."""
    long = torch.zeros(sum(tensor.numel() + 1 for tensor in state.values()))
    views, at = {}, 0
    for key, tensor in state.items():
        views[key] = long[at + 1 : at + 1 + tensor.numel()].view(tensor.shape).copy_(tensor)
        at += tensor.numel() + 1
    return views


WAYS = {
    "state-dict": lambda state: Holder(state).state_dict(),
    "parameters": lambda state: Holder(state).state_dict(keep_vars=True),
    "requires-grad": lambda state: {key: tensor.requires_grad_() for key, tensor in state.items()},
    "transposed": lambda state: {
        key: tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor for key, tensor in state.items()
    },
    "one-storage": in_one_storage,
    "shared": lambda state: state | {"mlp2.mlp.0.bias": state["mlp1.mlp.0.bias"]},
}


@pytest.mark.parametrize("way", WAYS)
def test_ways_of_saving(edit, golden, tmp_path, way):
    same = {"mlp2.mlp.0.bias": "mlp1.mlp.0.bias"} if way == "shared" else {}
    plain = edit("M-sft", lambda state: state | {key: state[other].clone() for key, other in same.items()})
    state = torch.load(golden / "M-sft" / "hypermod.pt", weights_only=True)
    folder = edit("M-sft")
    torch.save(WAYS[way](state), folder / "hypermod.pt")
    first, second = (HyperNetwork.from_pretrained(f) for f in (plain, folder))
    assert list(first.state_dict()) == list(second.state_dict())
    for key, tensor in second.state_dict().items():
        assert torch.equal(tensor, first.state_dict()[key]) and tensor.is_contiguous(), key
    assert all(parameter.is_leaf and parameter.requires_grad for parameter in second.parameters())
    places = [parameter.untyped_storage().data_ptr() for parameter in second.parameters()]
    assert len(set(places)) == len(places)  # training one must not change another
    second.save_pretrained(tmp_path / "native")
    again = HyperNetwork.from_pretrained(tmp_path / "native").state_dict()
    assert all(torch.equal(tensor, again[key]) for key, tensor in second.state_dict().items())


@pytest.mark.parametrize("name", ["odd..näme (1).pt", "a\\b.pt", "data.pkl", None])
def test_a_file_saved_under_another_name(edit, golden, tmp_path, name):
    """torch names the folder inside the archive after the file; "archive" where it writes to an open file."""
    folder = edit("L-sft")
    state = torch.load(folder / "hypermod.pt", weights_only=True)
    if name is None:
        with (folder / "hypermod.pt").open("wb") as file:
            torch.save(state, file)
    else:
        torch.save(state, tmp_path / name)
        (tmp_path / name).rename(folder / "hypermod.pt")
    got, expected = (HyperNetwork.from_pretrained(f).state_dict() for f in (folder, golden / "L-sft"))
    assert got.keys() == expected.keys() and all(torch.equal(tensor, expected[key]) for key, tensor in got.items())


def test_a_file_saved_on_a_gpu(edit, monkeypatch):
    expected = HyperNetwork.from_pretrained(edit("L-sft")).state_dict()
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:3")
        folder = edit("L-sft", lambda state: state)
    assert b"cuda:3" in (folder / "hypermod.pt").read_bytes()
    got = HyperNetwork.from_pretrained(folder).state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in got.items())


# --- what a folder says beside the tensors ---------------------------------------------------------------------------


def test_a_models_own_config_beside_a_sakana_checkpoint(edit, golden):
    folder = edit("L-sft")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    expected = HyperNetwork.from_pretrained(golden / "L-sft").state_dict()
    assert all(torch.equal(t, expected[k]) for k, t in HyperNetwork.from_pretrained(folder).state_dict().items())
    assert describe(folder) == describe(golden / "L-sft")


def test_values_beyond_the_dtype_asked_for(edit):
    folder = edit("L-sft", lambda state: state | {"heads.v_proj.weight": state["heads.v_proj.weight"] * 1e7})
    assert HyperNetwork.from_pretrained(folder, dtype=torch.bfloat16).dtype == torch.bfloat16
    message = r"hypermod\.pt: dtype: heads\.v_proj\.weight holds values beyond the range of torch\.float16"
    with pytest.raises(CheckpointError, match=message):
        HyperNetwork.from_pretrained(folder, dtype=torch.float16)
    net = HyperNetwork.from_pretrained(folder)
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    with pytest.raises(ValueError, match="heads.v_proj.weight"):
        net.set_dtype(torch.float16)
    assert all(t.dtype == before[k].dtype and torch.equal(t, before[k]) for k, t in net.state_dict().items())


def test_describe_a_sakana_folder(golden, edit):
    blocks = describe(golden / "L-sft")
    args = yaml.safe_load((golden / "L-sft" / "args.yaml").read_text())
    peft = json.loads((golden / "L-sft" / "adapter_config.json").read_text())
    # No encoder: SakanaAI's code does not define the pooling of "tiny-encoder".
    assert blocks == {"base_model": "tiny-llama", "reference": {"args": args, "adapter_config": peft}}
    folder = edit("L-sft", args={"emb_model": "some/gte-tiny"}, peft={"base_model_name_or_path": "some/base"})
    blocks = describe(folder)
    assert blocks["base_model"] == "some/base"
    assert encoder_config_from_json(blocks["encoder"], "here") == read(folder).encoder_config()
    assert read(folder).encoder_config() == EncoderConfig("some/gte-tiny", "cls", 8192)
    assert "base_model" not in describe(edit("L-sft", args={"model_dir": None}))
    with pytest.raises(ConfigError, match=r"args\.yaml.*emb_model.*'tiny-encoder'"):
        read(golden / "L-sft").encoder_config()
    (folder / "hypermod.pt").write_bytes(b"")
    assert describe(folder) == blocks  # which needs no weights


# --- native form ---------------------------------------------------------------------------------------------------


def test_weights_are_no_longer_those_of_the_file(golden, tmp_path):
    HyperNetwork.from_pretrained(golden / "L-sft").save_pretrained(tmp_path)
    net = HyperNetwork.from_pretrained(tmp_path)
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    with open(tmp_path / "hypernet.safetensors", "r+b") as file:
        file.write(bytes(os.fstat(file.fileno()).st_size))
    assert all(torch.equal(tensor, before[key]) for key, tensor in net.state_dict().items())
    assert all(tensor.data_ptr() % 64 == 0 for tensor in net.state_dict().values())


def test_written_files_are_as_readable_as_any(golden, tmp_path):
    HyperNetwork.from_pretrained(golden / "L-sft").save_pretrained(tmp_path)
    (tmp_path / "plain").write_text("")
    assert {(tmp_path / name).stat().st_mode for name in ("plain", "config.json", "hypernet.safetensors")} == {
        (tmp_path / "plain").stat().st_mode
    }
