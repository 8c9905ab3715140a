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


def refused(folder):
    """The message with which a checkpoint folder is refused."""
    with pytest.raises(CheckpointError) as error:
        HyperNetwork.from_pretrained(folder)
    return str(error.value)


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


@pytest.mark.parametrize(
    "key",
    [
        "surprise",
        "mixer.1.surprise",
        "AB_offset.A.k_proj",
        "out_emb.q_proj.C",
        "heads.q_proj.surprise",
        "layer_type_encoder.0.norm.weight",  # "norm" is our name for what SakanaAI's code calls 1
        "task_encoder.ln.weight",
        "pos_emb.1.weight",
    ],
)
def test_extra_key_is_named(edit, key):
    assert key in refused(edit("M-sft", lambda state: state | {key: torch.zeros(3)}))


def test_not_floating_point_is_named(edit):
    folder = edit("L-sft", lambda state: state | {"mixer.4.bias": torch.zeros(32, dtype=torch.int64)})
    with pytest.raises(CheckpointError, match=r"mixer\.4\.bias"):
        HyperNetwork.from_pretrained(folder)


@pytest.mark.parametrize(
    "overlapping", [torch.zeros(1).expand(32), torch.zeros(40).unfold(0, 32, 1)[0:2]], ids=["expanded", "unfolded"]
)
def test_overlapping_values_are_refused(edit, overlapping):
    message = refused(edit("L-sft", lambda state: state | {"mixer.4.bias": overlapping}))
    assert "mixer.4.bias" in message and "do not overlap" in message


def test_sides_of_several_dtypes(edit):
    """They are one tensor here, and conversion keeps dtypes."""
    folder = edit("M-sft", lambda state: state | {"out_emb.q_proj.A": state["out_emb.q_proj.A"].bfloat16()})
    assert "out_emb.*: expected tensors of one dtype, got torch.bfloat16, torch.float32" in refused(folder)


def test_a_doubled_argument_is_refused(edit):
    folder = edit("L-sft")
    for text in ("autoreg_gen: false\nautoreg_gen: true\n", "a: {b: 1, b: 1}\n"):
        (folder / "args.yaml").write_text(text)
        with pytest.raises(ConfigError, match=r"args\.yaml: not plain YAML: a key occurs twice"):
            HyperNetwork.from_pretrained(folder)


def test_module_order_of_heads_and_sides_disagree(edit):
    def reverse_sides(state):
        moved = {key: tensor for key, tensor in state.items() if key.startswith("out_emb.")}
        return {key: tensor for key, tensor in state.items() if key not in moved} | dict(reversed(moved.items()))

    with pytest.raises(CheckpointError, match="module order of heads .* and of out_emb .* disagree"):
        HyperNetwork.from_pretrained(edit("M-sft", reverse_sides))


CONTRADICTIONS = {
    "L-sft": {"shared_AB_head": [True], "head_in_size": [64, 41, None], "hypernet_latent_size": [64, "32"],
              "training_task": ["rl"]},
    "M-sft": {"shared_AB_head": [False], "autoreg_gen": [True]},
    "S-rot-sft": {"autoreg_gen": [False], "learnable_pos_emb": [True]},
    "S-pos-sft": {"learnable_pos_emb": [False]},
    "L-recon-delta": {"delta_w_scaling": [0, None]},
    "M-recon-z": {"factorized": [False]},
}  # fmt: skip


@pytest.mark.parametrize(
    ("case", "field", "value"),
    [
        (case, field, value)
        for case, fields in CONTRADICTIONS.items()
        for field, values in fields.items()
        for value in values
    ],
)
def test_args_contradict_the_tensors(edit, case, field, value):
    with pytest.raises(CheckpointError, match=rf"args\.yaml.*{field}"):
        HyperNetwork.from_pretrained(edit(case, args={field: value}))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", 8),
        ("r", None),
        ("target_modules", ["q_proj"]),
        ("target_modules", ["q_proj", "k_proj"]),
        ("target_modules", "q_proj|v_proj"),
        ("lora_alpha", 0),
        ("lora_alpha", None),
    ],
)
def test_adapter_config_contradicts_the_tensors(edit, field, value):
    with pytest.raises(CheckpointError, match=rf"adapter_config\.json.*{field}"):
        HyperNetwork.from_pretrained(edit("L-sft", peft={field: value}))


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (3, r"t2l_engine: expected a mapping, got 3"),
        ({"training": 3}, r"t2l_engine: training: expected dict, got 3"),
        ({"encoder": "minilm"}, r"t2l_engine: encoder: expected dict, got 'minilm'"),
        ({"base_model": 3}, r"t2l_engine: base_model: expected str, got 3"),
        ({"scaling": 1.0}, r"t2l_engine: scaling 1\.0 contradicts the other fields, which say 4\.0"),
        ({"output_scale": 0.5}, r"t2l_engine: output_scale 0\.5 contradicts the other fields, which say 1\.0"),
        ({"lora_alpha": -1}, r"t2l_engine: lora_alpha: expected a positive number"),
    ],
)
def test_our_block_of_a_sakana_folder(edit, own, message):
    with pytest.raises(CheckpointError, match=r"args\.yaml: " + message):
        HyperNetwork.from_pretrained(edit("L-sft", args={"t2l_engine": own}))


def test_unknown_task_encoders_are_refused(edit):
    def rename(state):
        return {key.replace("task_encoder.mlp.1.", "task_encoder.ln."): tensor for key, tensor in state.items()}

    folder = edit("L-sft", rename)
    with pytest.raises(CheckpointError, match=r"unexpected keys .*task_encoder\.ln"):
        HyperNetwork.from_pretrained(folder)


@pytest.mark.parametrize("name", ["hypermod.pt", "args.yaml", "adapter_config.json"])
def test_missing_or_broken_file_is_named(edit, name):
    folder = edit("L-sft")
    whole = (folder / name).read_bytes()
    kept = [b"", whole[: len(whole) // 2], whole[:-1]] if name == "hypermod.pt" else [b"\xff", b"[", b"[1]"]
    for content in (*kept, b"no such format"):
        (folder / name).write_bytes(content)
        with pytest.raises(CheckpointError, match="not UTF-8 text" if content == b"\xff" else name):
            HyperNetwork.from_pretrained(folder)
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        HyperNetwork.from_pretrained(folder)


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        HyperNetwork.from_pretrained(tmp_path / "nowhere")


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
        (blocks | {"surprise": 1}, "surprise"),
        (blocks | {"hypernetwork": network | {"surprise": 1}}, "surprise"),
        (blocks | {"hypernetwork": network | {"variant": "XL"}}, "variant"),
        (blocks | {"format": "t2l_engine.hypernetwork.network.v0"}, "format"),
        (blocks | {"encoder": "minilm"}, "encoder: expected dict"),
        (blocks | {"base_model": 3}, "base_model: expected str"),
        (blocks | {"training": []}, "training: expected dict"),
        (blocks | {"reference": None}, "reference: expected dict"),
        ({k: v for k, v in blocks.items() if k != "hypernetwork"}, "hypernetwork"),
        ([], "format"),
    ]
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
    assert HyperNetwork.from_pretrained(native, module_order=["q_proj", "v_proj"]).config.modules == (
        "q_proj",
        "v_proj",
    )
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
