import functools
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from t2l_engine import CheckpointError, ConfigError, HyperNetwork
from t2l_engine.hypernetwork.network import build
from t2l_engine.hypernetwork.sakana import SakanaFiles

# --- what a file may not hold --------------------------------------------------------------------------------------


@functools.cache
def tensors_of(folder):
    return torch.load(folder / "hypermod.pt", weights_only=True)


def refused_tensors(folder, change):
    """The message with which the changed tensors of a folder are refused."""
    files = SakanaFiles.open(folder)
    files.state = change(tensors_of(folder))
    with pytest.raises(CheckpointError) as error:
        build(files.contents())
    return str(error.value)


def keys_of(golden, case):
    """The tensors of a case; of cases with another encoder those that only they have."""
    state = tensors_of(golden / case)
    return state if case in ("L-sft", "S-pos-sft") else {k: v for k, v in state.items() if k.startswith("task_encoder.")}


@pytest.mark.parametrize("case", ["L-sft", "S-pos-sft", "L-vq-sft", "L-discrete-sft"])
def test_missing_key_is_named(golden, case):
    # Without these the file looks like another variant, or another encoder of another width, which args.yaml contradicts.
    named = {"pos_emb.0.weight": "learnable_pos_emb", "task_encoder.cluster_size": "hypernet_latent_size"}
    if case == "L-discrete-sft":
        named["task_encoder.mlp.3.weight"] = "hypernet_latent_size"
    for key in keys_of(golden, case):
        message = refused_tensors(golden / case, lambda state, key=key: {k: v for k, v in state.items() if k != key})
        assert named.get(key, key) in message and ("args.yaml" if key in named else "hypermod.pt") in message


@pytest.mark.parametrize("case", ["L-sft", "S-pos-sft", "L-vq-sft", "L-softmax-sft", "L-discrete-sft"])
def test_misshaped_key_is_named(golden, case):
    # These define sizes, so it is args.yaml that contradicts them.
    task_width = {"L-vq-sft": "mlp.3.weight", "L-softmax-sft": "embed", "L-discrete-sft": "mlp.3.weight"}
    named = {f"task_encoder.{task_width.get(case, 'mlp.0.weight')}": "hypernet_latent_size", "mlp3.4.weight": "head_in_size"}
    for key, tensor in keys_of(golden, case).items():
        wrong = torch.zeros([n + 1 for n in tensor.shape])
        message = refused_tensors(golden / case, lambda state, key=key, wrong=wrong: state | {key: wrong})
        if key.startswith("AB_offset."):  # A and B define each other's sizes
            assert "AB_offset" in message and key.rpartition(".")[2] in message
        else:
            assert named.get(key, key) in message


def bias(tensor):
    return {"state": lambda state: state | {"mixer.4.bias": tensor}}


def extra(key):
    return {"state": lambda state: state | {key: torch.zeros(3)}}


def sides_of_two_dtypes(state):
    """They are one tensor here, and conversion keeps dtypes."""
    return state | {"out_emb.q_proj.A": state["out_emb.q_proj.A"].bfloat16()}


def reversed_sides(state):
    moved = {key: tensor for key, tensor in state.items() if key.startswith("out_emb.")}
    return {key: tensor for key, tensor in state.items() if key not in moved} | dict(reversed(moved.items()))


def unknown_encoder(state):
    return {key.replace("task_encoder.mlp.1.", "task_encoder.ln."): tensor for key, tensor in state.items()}


REFUSED = [
    # "norm" is our name for what SakanaAI's code calls 1.
    *(("M-sft", extra(key), key) for key in (
        "surprise", "mixer.1.surprise", "AB_offset.A.k_proj", "out_emb.q_proj.C", "heads.q_proj.surprise",
        "pos_emb.1.weight", "layer_type_encoder.0.norm.weight",
    )),
    ("L-sft", bias(torch.zeros(32, dtype=torch.int64)), "mixer.4.bias"),
    ("L-sft", bias(torch.zeros(1).expand(1 << 30)), "mixer.4.bias.*claim more bytes than the file has"),
    ("M-sft", {"state": sides_of_two_dtypes}, "out_emb.*: expected tensors of one dtype, got torch.bfloat16, torch.float32"),
    ("M-sft", {"state": reversed_sides}, "module order of heads .* and of out_emb .* disagree"),
    ("L-sft", {"state": unknown_encoder}, r"unexpected keys .*task_encoder\.ln"),
    *((case, {"args": {field: value}}, rf"args\.yaml.*{field}") for case, field, value in (
        ("L-sft", "shared_AB_head", True), ("L-sft", "head_in_size", 64), ("L-sft", "head_in_size", None),
        ("L-sft", "hypernet_latent_size", 64), ("L-sft", "hypernet_latent_size", "32"), ("L-sft", "training_task", "rl"),
        ("L-recon-delta", "delta_w_scaling", 0), ("M-recon-z", "factorized", False),
    )),
    *(("L-sft", {"peft": {field: value}}, rf"adapter_config\.json.*{field}") for field, value in (
        ("r", 8), ("r", None), ("target_modules", ["q_proj"]), ("target_modules", ["q_proj", "k_proj"]),
        ("target_modules", "q_proj|v_proj"), ("lora_alpha", 0), ("lora_alpha", None),
    )),
    *(("L-sft", {"args": {"t2l_engine": own}}, r"args\.yaml: t2l_engine: " + message) for own, message in (
        (3, "expected a mapping, got 3"), ({"training": 3}, "training: expected dict, got 3"),
        ({"encoder": 3}, "encoder: expected dict, got 3"), ({"base_model": 3}, "base_model: expected str, got 3"),
        ({"scaling": 1.0}, r"scaling 1\.0 contradicts the other fields, which say 4\.0"),
        ({"output_scale": 0.5}, r"output_scale 0\.5 contradicts the other fields, which say 1\.0"),
        ({"lora_alpha": -1}, "lora_alpha: expected a positive number"),
    )),
]  # fmt: skip


@pytest.mark.parametrize("case, changes, message", REFUSED)
def test_what_contradicts_is_named(edit, case, changes, message):
    with pytest.raises(CheckpointError, match=message):
        HyperNetwork.from_pretrained(edit(case, **changes))


@pytest.mark.parametrize("name", ["hypermod.pt", "args.yaml", "adapter_config.json"])
def test_missing_or_broken_file_is_named(edit, name):
    folder = edit("L-sft")
    whole = (folder / name).read_bytes()
    broken = [b"", whole[: len(whole) // 2], whole[:-1]]
    for content in (*(broken if name == "hypermod.pt" else [b"\xff", b"[", b"[1]", b'{"r": 1, "r": 2}']), b"no such format"):
        (folder / name).write_bytes(content)
        with pytest.raises(CheckpointError, match="not UTF-8 text" if content == b"\xff" else name):
            HyperNetwork.from_pretrained(folder)
    (folder / name).unlink()
    for path, missing in ((folder, name), (folder / "nowhere", "nowhere")):
        with pytest.raises(FileNotFoundError, match=missing):
            HyperNetwork.from_pretrained(path)


# --- native form ---------------------------------------------------------------------------------------------------


@pytest.fixture
def native(golden, tmp_path):
    HyperNetwork.from_pretrained(golden / "M-sft").save_pretrained(tmp_path / "native")
    return tmp_path / "native"


def test_native_config_is_strict(native):
    path = native / "config.json"
    blocks = json.loads(path.read_text())
    network = blocks["hypernetwork"]
    broken = [
        (blocks | {"surprise": 1}, "surprise"), (blocks | {"hypernetwork": network | {"surprise": 1}}, "surprise"),
        (blocks | {"hypernetwork": network | {"variant": "XL"}}, "variant"),
        (blocks | {"format": "t2l_engine.hypernetwork.network.v0"}, "format"),
        (blocks | {"encoder": "minilm"}, "encoder: expected dict"), (blocks | {"base_model": 3}, "base_model: expected str"),
        (blocks | {"training": []}, "training: expected dict"), (blocks | {"reference": None}, "reference: expected dict"),
        ({k: v for k, v in blocks.items() if k != "hypernetwork"}, "hypernetwork"), ([], "format"),
    ]  # fmt: skip
    for values, field in broken:
        path.write_text(json.dumps(values))
        with pytest.raises(ConfigError, match=rf"config\.json.*{field}"):
            HyperNetwork.from_pretrained(native)


def test_native_tensors_are_strict(native):
    path = native / "hypernet.safetensors"
    state = load_file(path)
    key = "mixer.linear2.bias"
    broken = [
        ({k: v for k, v in state.items() if k != key}, key),
        (state | {key: state[key][1:].clone()}, key),
        (state | {"surprise": state[key].clone()}, "surprise"),
        (state | {"offsets.q_proj.surprise": state[key].clone()}, "surprise"),
    ]
    for tensors, name in broken:
        save_file(tensors, path)
        with pytest.raises(CheckpointError, match=rf"hypernet\.safetensors.*{name}"):
            HyperNetwork.from_pretrained(native)
    expected = state | {"reference.std_recon_target.A.q_proj": torch.zeros(3)}  # kept for the way back, never read
    save_file(expected, path)
    HyperNetwork.from_pretrained(native)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="hypernet.safetensors"):
        HyperNetwork.from_pretrained(native)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="hypernet.safetensors"):
        HyperNetwork.from_pretrained(native)


def test_native_module_order_and_metadata(golden, native):
    assert HyperNetwork.from_pretrained(native, module_order=["q_proj", "v_proj"]).config.modules == ("q_proj", "v_proj")
    with pytest.raises(CheckpointError, match="module_order"):
        HyperNetwork.from_pretrained(native, module_order=["v_proj", "q_proj"])
    with pytest.raises(ValueError, match="metadata.*surprise"):
        HyperNetwork.from_pretrained(golden / "L-sft").save_pretrained(native, {"surprise": 1})


@pytest.mark.parametrize(
    "blocks, value, message",
    [({"training": None}, 1.0, "training: expected dict, got None"), ({}, math.nan, "holds NaN or infinite values")],
)
def test_what_readers_refuse_is_not_written(golden, tmp_path, blocks, value, message):
    network = HyperNetwork.from_pretrained(golden / "L-sft")
    with torch.no_grad():
        next(network.parameters()).mul_(value)
    with pytest.raises(CheckpointError, match=message):
        network.save_pretrained(tmp_path / "out", blocks)
    assert not (tmp_path / "out").exists()
