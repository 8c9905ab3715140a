"""Checkpoints between the two forms: nothing is lost on the way there or back."""

import itertools
import json

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from t2l_engine import AdapterStack, CheckpointError, HyperNetwork, HyperNetworkConfig
from t2l_engine.cli import serve_flags
from t2l_engine.files import weights
from t2l_engine.files import yaml as yaml_files
from t2l_engine.hypernetwork.checkpoint import describe, format_of, read
from t2l_engine.hypernetwork.convert import convert
from t2l_engine.hypernetwork.folder import resolve_checkpoint
from tests.hypernetwork.plain_network import ENCODERS, FLAGS, TRAININGS, checkpoint, write

CASES = (
    "L-sft", "M-sft", "S-pos-sft", "S-rot-sft", "L-autoreg-sft", "L-offset-sft", "M-recon-z", "L-recon-delta", "L-vq-sft",
    "L-softmax-sft", "L-discrete-sft",
)  # fmt: skip
SIZES = {
    "modules": ("q_proj", "v_proj"), "in_features": (12, 12), "out_features": (20, 6), "num_layers": 2, "rank": 2,
    "embed_dim": 10, "latent_size": 16, "head_in_size": 14, "lora_alpha": 8.0,
}  # fmt: skip
ENCODER = {"name": "minilm", "pooling": "mean", "max_length": 256, "full_stop": True, "template": None, "dtype": "float32"}


def sakana_files(folder):
    state = torch.load(folder / "hypermod.pt", weights_only=True)
    peft = json.loads((folder / "adapter_config.json").read_text())
    return state, yaml.safe_load((folder / "args.yaml").read_text()), peft


def assert_bitwise(first, second):
    """Two dicts of tensors: the same keys in the same order, dtypes, shapes and bits."""
    assert list(first) == list(second)
    for key, tensor in first.items():
        assert tensor.dtype == second[key].dtype and tensor.shape == second[key].shape, key
        assert torch.equal(*(t.contiguous().view(-1).view(torch.uint8) for t in (tensor, second[key]))), key


def assert_same_sakana(first, second):
    (state, *configs), (other_state, *others) = (sakana_files(folder) for folder in (first, second))
    assert_bitwise(state, other_state)
    assert configs == others


def assert_same_native(first, second):
    assert_bitwise(*(load_file(folder / "hypernet.safetensors") for folder in (first, second)))
    blocks, others = (json.loads((folder / "config.json").read_text()) for folder in (first, second))
    assert blocks == others


def assert_generates_alike(first, second):
    nets = [HyperNetwork.from_pretrained(folder) for folder in (first, second)]
    task_emb = torch.randn(3, nets[0].config.embed_dim, generator=torch.Generator().manual_seed(0))
    stacks = [net.generate(task_emb) for net in nets]
    assert torch.equal(stacks[0].scaling, stacks[1].scaling)
    for side in ("lora_A", "lora_B"):
        assert_bitwise(*(getattr(stack, side) for stack in stacks))


def assert_round_trip(folder, tmp_path):
    """Converted to the other form and back ``folder`` is the same; gives the other form, which generates the same."""
    first, second = tmp_path / "there", tmp_path / "back"
    other, same = {"native": ("sakana", assert_same_native), "sakana": ("native", assert_same_sakana)}[format_of(folder)]
    assert convert(folder, first) == other == format_of(first)
    assert convert(first, second) == format_of(folder)
    same(folder, second)
    assert_generates_alike(folder, first)
    return first


def edit_config(folder, network=None, **blocks):
    """Change fields of the hypernetwork, and whole blocks, in the config.json of a native folder."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["hypernetwork"] |= network or {}
    path.write_text(json.dumps(config | blocks))


@pytest.fixture
def native(tmp_path):
    """Factory of native folders with a random hypernetwork; ``prepare`` may change it."""

    def make(prepare=None, metadata=None, dtype=torch.float32, **changes):
        torch.manual_seed(0)
        net = HyperNetwork(HyperNetworkConfig(**{"variant": "M", **SIZES, **changes}))
        if prepare is not None:
            prepare(net)
        net.set_dtype(dtype).save_pretrained(tmp_path / "native", metadata)
        return tmp_path / "native"

    return make


@pytest.fixture
def converted(golden, tmp_path):
    """Factory: a golden case in the native form."""

    def make(case):
        convert(golden / case, tmp_path / case)
        return tmp_path / case

    return make


# --- from the Sakana format and back ---------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_golden_there_and_back(golden, tmp_path, case):
    first = assert_round_trip(golden / case, tmp_path)
    config, again = (HyperNetwork.from_pretrained(folder).config for folder in (golden / case, first))
    assert config == again
    convert(tmp_path / "back", tmp_path / "again")
    assert_same_native(first, tmp_path / "again")
    # Blank dictionaries are most of a Sakana file; the native format leaves them out.
    assert (first / "hypernet.safetensors").stat().st_size < (golden / case / "hypermod.pt").stat().st_size


RANDOM = [*((v, "linear", t) for v in FLAGS for t in TRAININGS), *(("S-learnable", e) for e in ENCODERS)]


@pytest.mark.parametrize("settings", RANDOM, ids="-".join)
def test_random_there_and_back(tmp_path, settings):
    """Dictionaries that do not apply are kept."""
    assert_round_trip(write(tmp_path / "sakana", *checkpoint(*settings)), tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_of_a_sakana_file_are_kept(tmp_path, dtype):
    state, args, peft = checkpoint("M", "softmax")
    state = {key: (torch.zeros_like(value) if key.startswith("std") else value).to(dtype) for key, value in state.items()}
    folder = write(tmp_path / "sakana", state, args, peft)
    assert_round_trip(folder, tmp_path)
    assert HyperNetwork.from_pretrained(folder).generate(torch.ones(1, 14)).lora_A["q_proj"].dtype == dtype


def test_negative_zeros_are_kept(edit, tmp_path):
    folder = edit("L-sft", lambda state: {k: -v if k.startswith(("AB_", "mean_")) else v for k, v in state.items()})
    assert_round_trip(folder, tmp_path)


def test_optional_arguments_may_be_absent(tmp_path):
    for training in ("sft", "recon-delta"):
        state, args, peft = checkpoint("L", "linear", training)
        absent = ("factorized", "delta_w_scaling", "mt_lora_path", "hypernet_latent_size", "head_in_size")
        args = {key: value for key, value in args.items() if key not in absent}
        folder = write(tmp_path / training, state, args, peft)
        (tmp_path / f"{training}-out").mkdir()
        assert_round_trip(folder, tmp_path / f"{training}-out")


def test_module_order_is_the_order_of_the_tensors(tmp_path):
    shapes = {"v_proj": (10, 8), "q_proj": (10, 10), "k_proj": (10, 8)}
    folder = write(tmp_path / "sakana", *checkpoint("M", modules=shapes))
    first = assert_round_trip(folder, tmp_path)
    assert json.loads((first / "config.json").read_text())["hypernetwork"]["modules"] == list(shapes)


def test_module_order_override(golden, tmp_path):
    order = ["v_proj", "q_proj"]
    convert(golden / "M-sft", tmp_path / "native", module_order=order)
    convert(golden / "M-sft", tmp_path / "sakana", to="sakana", module_order=order)
    with pytest.warns(UserWarning, match="target_modules"):
        assert_generates_alike(tmp_path / "native", tmp_path / "sakana")
    for source, wrong in ((tmp_path / "native", ["q_proj", "v_proj"]), (golden / "M-sft", ["q_proj"])):
        with pytest.raises(CheckpointError, match="module_order"):
            convert(source, tmp_path / "x", module_order=wrong)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("to", ["native", "sakana"])
def test_the_same_form_is_a_copy(golden, converted, tmp_path, to):
    source = golden / "M-recon-z" if to == "sakana" else converted("M-recon-z")
    assert convert(source, tmp_path / "copy", to=to) == to
    (assert_same_sakana if to == "sakana" else assert_same_native)(source, tmp_path / "copy")


# --- from the native form and back ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", FLAGS)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_native_there_and_back(native, tmp_path, variant, encoder, dtype):
    changes = {"latent_size": 129, "num_layers": 4} if encoder == "discrete" else {}
    folder = native(variant=variant, task_encoder=encoder, dtype=dtype, **changes)
    assert_round_trip(folder, tmp_path)


@pytest.mark.parametrize("scaling", ["rslora", "plain", 0.75, 1 / 3])
def test_scaling(native, tmp_path, scaling):
    folder = native(scaling=scaling, lora_alpha=7.0, rank=3)
    first = assert_round_trip(folder, tmp_path)
    _, _, peft = sakana_files(first)  # what PEFT and SakanaAI's code read
    value = peft["lora_alpha"] / peft["r"] ** (0.5 if peft["use_rslora"] else 1)
    assert value == pytest.approx(HyperNetwork.from_pretrained(folder).scaling, rel=1e-12)


def test_paths_survive(native, tmp_path):
    """Modules of a model unlike Llama: Sakana files name them without their paths."""
    paths = {"fc1": "model.decoder.layers.{layer}.fc1", "v_proj": "model.decoder.layers.{layer}.self_attn.v_proj"}
    folder = native(modules=list(paths), paths=list(paths.values()))
    first = assert_round_trip(folder, tmp_path)
    swapped = HyperNetwork.from_pretrained(first, module_order=["v_proj", "fc1"])
    for net in (swapped, HyperNetwork.from_pretrained(first)):
        assert net.config.module_paths == paths
        assert net.generate(torch.randn(1, 10)).paths == paths
    args = yaml.safe_load((first / "args.yaml").read_text())
    for other in ({"fc1": paths["fc1"]}, list(paths.values()), paths | {"v_proj": "{layer}"}):
        args["t2l_engine"]["paths"] = other
        (first / "args.yaml").write_text(yaml.safe_dump(args))
        with pytest.raises(CheckpointError, match="paths"):
            HyperNetwork.from_pretrained(first)


def test_modules_that_share_a_name(native, tmp_path):
    """Two c_proj of GPT-2: generated, written and read they have the same names."""
    paths = ["transformer.h.{layer}.attn.c_proj", "transformer.h.{layer}.mlp.c_proj"]
    folder = native(modules=["attn_proj", "mlp_proj"], paths=paths)
    net = HyperNetwork.from_pretrained(folder)
    stack = net.generate(torch.randn(2, 10))
    assert stack.paths == {"attn.c_proj": paths[0], "mlp.c_proj": paths[1]}
    for i in (0, 1):
        stack.save_pretrained(tmp_path / str(i), adapter=i)
    again = AdapterStack.from_peft([tmp_path / "0", tmp_path / "1"])
    assert again.allclose(stack) and len(AdapterStack.cat([stack, again])) == 4
    flags = serve_flags.collect([str(folder)], 2, 4)["flags"]
    assert flags[-2:] == ["--lora-target-modules", "c_proj"]  # of linears


def test_blocks_survive(native, tmp_path):
    (tmp_path / "none").mkdir()
    assert_round_trip(native(metadata={"encoder": None, "base_model": None}), tmp_path / "none")
    training = {"steps": 3, "rate": 1e-5, "tasks": ["a: b", "<<", "2024-01-01", "1e5", "ü\n"], "none": None, "on": True}
    metadata = {"encoder": ENCODER, "base_model": "some/model", "training": training}
    folder = native(metadata=metadata)
    first = assert_round_trip(folder, tmp_path)
    assert describe(first) == describe(tmp_path / "back") == metadata
    _, args, peft = sakana_files(first)
    assert (args["emb_model"], args["model_dir"], peft["base_model_name_or_path"]) == ("minilm", "some/model", "some/model")


@pytest.mark.parametrize("variant", ["L", "M"])
def test_bias_hyperinit(native, tmp_path, variant):
    folder = native(lambda net: net.bias_hyperinit(), variant=variant)
    first = assert_round_trip(folder, tmp_path)
    state, _, _ = sakana_files(first)
    assert state["AB_offset.A.q_proj"].any() == (variant != "L") and not state["AB_offset.B.q_proj"].any()


def test_bundled_checkpoint(tmp_path):
    bundled = resolve_checkpoint("smollm2-135m-paper")
    assert convert(bundled, tmp_path / "there") == "sakana" and convert(tmp_path / "there", tmp_path / "back") == "native"
    assert_bitwise(*(load_file(folder / "hypernet.safetensors") for folder in (bundled, tmp_path / "back")))
    ours, again = read(bundled), read(tmp_path / "back")
    assert ours.config == again.config and ours.blocks == again.blocks == describe(tmp_path / "there")
    assert_generates_alike(bundled, tmp_path / "there")


# --- a converted folder that was changed ---------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_changed_scaling_reaches_sakana(converted, golden, tmp_path, case):
    folder = converted(case)
    edit_config(folder, {"scaling": 0.75})
    first = assert_round_trip(folder, tmp_path)
    state, args, peft = sakana_files(first)
    assert_bitwise(sakana_files(golden / case)[0], state)
    assert (peft["lora_alpha"], peft["use_rslora"]) == (0.75 * 4, False)
    assert args["exp_setup"] == "hyper_lora" and peft["lora_dropout"] == 0.0  # what was not changed stays, or is set anew


@pytest.mark.parametrize(
    "changes", [{"base_model": "other/base"}, {"encoder": ENCODER}, {"training": {"steps": 3}}], ids=lambda c: next(iter(c))
)
def test_changed_blocks_reach_sakana(converted, tmp_path, changes):
    folder = converted("L-sft")
    edit_config(folder, **changes)
    first = assert_round_trip(folder, tmp_path)
    name, value = next(iter(changes.items()))
    assert describe(first)[name] == value


def test_stored_arguments_may_say_nothing_useful(converted, tmp_path):
    folder = converted("L-sft")
    useless = [{}, {"args": {"t2l_engine": 3}}, {"adapter_config": {"r": 4, "target_modules": ["q_proj", "v_proj"]}}]
    for i, reference in enumerate(useless):
        edit_config(folder, reference=reference)
        (tmp_path / str(i)).mkdir()
        assert_round_trip(folder, tmp_path / str(i))


# --- what cannot be converted --------------------------------------------------------------------------------------


def offsets(*names, lacking=None):
    """Sets the offsets ``names`` of every module, but not ``lacking`` of v_proj."""

    def prepare(net):
        for i, module in enumerate(net.config.modules):
            sizes = {"A": (2, 2, net.config.in_features[i]), "B": (2, net.config.out_features[i], 2)}
            for name, (side, shape) in itertools.product(names, sizes.items()):
                if (module, f"{name}_{side}") != ("v_proj", lacking):
                    setattr(net.offsets[module], f"{name}_{side}", torch.rand(shape))

    return prepare


@pytest.mark.parametrize("prepare, changes, message", [
    (offsets("std", "mean"), {"head_bias": True}, "heads.q_proj.bias"),
    (offsets("std", "mean", lacking="std_B"), {"head_bias": False}, "offsets.v_proj.std_B"),
    (offsets("add"), {"head_bias": True, "output_scale": 0.01}, "offsets.q_proj.add_A"),
    (offsets("mean"), {"head_bias": True, "output_scale": 0.01}, "offsets.q_proj.mean_A"),
    (offsets("std", "mean"), {"head_bias": False, "output_scale": 0.01}, "output_scale 0.01"),
    (None, {"head_bias": False, "output_scale": 0.01}, "heads.q_proj.bias"),
])  # fmt: skip
def test_what_the_sakana_format_cannot_express(native, tmp_path, prepare, changes, message):
    folder = native(prepare, **changes)
    HyperNetwork.from_pretrained(folder)
    with pytest.raises(CheckpointError, match=f"the Sakana format cannot express this checkpoint.*{message}"):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("prepare, changes, multi_task_lora", [
    (offsets("std", "mean", "add"), {"head_bias": False}, False),
    (offsets("add", lacking="add_A"), {"head_bias": False}, True),
    (None, {"head_bias": True, "output_scale": 0.3}, False),
])  # fmt: skip
def test_what_the_sakana_format_can_express(native, tmp_path, prepare, changes, multi_task_lora):
    first = assert_round_trip(native(prepare, **changes), tmp_path)
    assert bool(sakana_files(first)[1].get("mt_lora_path")) is multi_task_lora


@pytest.mark.parametrize("value", ["2024-01-01", "!!binary aGk=", "{1: 2}", "[[{a: 2024-01-01}]]"], ids=lambda v: v[:6])
def test_arguments_that_json_cannot_hold(edit, tmp_path, value):
    folder = edit("L-sft")
    with (folder / "args.yaml").open("a") as file:
        file.write(f"run_id: {value}\n")
    HyperNetwork.from_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"args\.yaml: 'run_id': expected a JSON value"):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_blocks_beyond_the_bounds_of_the_other_format(native, edit, tmp_path, monkeypatch):
    monkeypatch.setattr(yaml_files, "MAX_NODES", 500)
    folder = native()
    edit_config(folder, training={"losses": [1] * 501})
    with pytest.raises(CheckpointError, match=r"out/args\.yaml: not plain YAML: more than 500 values"):
        convert(folder, tmp_path / "out")
    monkeypatch.setattr(weights, "MAX_CONFIG_BYTES", 5000)
    with pytest.raises(CheckpointError, match=r"out/config\.json: expected at most 5000 bytes to write, got"):
        convert(edit("L-sft", args={"losses": ["x" * 516] * 10}), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("name", ["args", "adapter_config"])
def test_stored_arguments_of_another_kind(converted, tmp_path, name):
    folder = converted("L-sft")
    edit_config(folder, reference={name: [1]})
    with pytest.raises(CheckpointError, match=rf"reference\.{name}: expected a mapping, got \[1\]"):
        convert(folder, tmp_path / "out")
    if name == "args":  # also where they are only copied
        with pytest.raises(CheckpointError, match=rf"reference\.{name}: expected a mapping, got \[1\]"):
            convert(folder, tmp_path / "out", to="native")


def test_sources_are_checked(golden, edit, native, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        convert(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(ValueError, match="to: expected one of"):
        convert(golden / "L-sft", tmp_path / "out", to="gguf")
    with pytest.raises(CheckpointError, match=r"hypermod\.pt: mixer\.4\.bias"):
        convert(edit("L-sft", lambda state: state | {"mixer.4.bias": torch.zeros(3)}), tmp_path / "out")
    folder = native()
    state = load_file(folder / "hypernet.safetensors")
    save_file(state | {"surprise": torch.zeros(1)}, folder / "hypernet.safetensors")
    with pytest.raises(CheckpointError, match=r"hypernet\.safetensors.*surprise"):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
