"""The file that the C++ library opens: what is in it, and which networks have none (tests/cpp opens it)."""

import dataclasses
import zlib

import pytest
import torch

from t2l_engine import CheckpointError, HyperNetwork
from t2l_engine.hypernetwork.export import ALIGNMENT, HEADER, MODULE, export

GOLDEN = ("L-sft", "L-offset-sft", "L-recon-delta", "M-sft", "M-recon-z", "S-pos-sft", "S-rot-sft")


def records(content):
    """The header, and the modules with their texts decoded."""
    header = HEADER.unpack_from(content)
    modules = [MODULE.unpack_from(content, HEADER.size + i * MODULE.size) for i in range(header[-1])]
    return header, [(*m[:3], *(text.rstrip(b"\0").decode() for text in m[3:])) for m in modules]


def expected(net):
    """Every tensor in the order of the file."""
    folded, encoder = net.folded(), net.task_encoder
    tensors = [encoder.linear.weight.float(), encoder.linear.bias, encoder.norm.weight, encoder.norm.bias]
    tensors += [*folded["weights"], folded["side_emb"], folded["pos_emb"]]
    weights, biases = folded["heads"]
    for i in range(len(weights)):
        tensors += [weights[i], biases[i] if biases else None]
        for step, offsets in folded["offsets"].items():
            tensors.append(offsets[i].mT if step.endswith("B") and offsets[i] is not None else offsets[i])
    return [t.detach().contiguous() for t in tensors if t is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", GOLDEN)
def test_content(golden, tmp_path, case, dtype):
    net = HyperNetwork.from_pretrained(golden / case, dtype=dtype)
    c, file = net.config, tmp_path / "net.t2l"
    export(net, file)
    content = file.read_bytes()
    (magic, version, checksum, size, variant, scaling, *sizes), modules = records(content)
    assert (magic, version, size, scaling) == (b"T2L-NET\n", 1, len(content), net.scaling)
    assert checksum == zlib.crc32(content[16:]) and variant.rstrip(b"\0").decode() == c.variant
    positions = {"S-learnable": 1, "S-rotary": 2}.get(c.variant, 0)
    assert sizes[:5] == [int(dtype == torch.bfloat16), c.embed_dim, c.task_width, c.width, c.head_in_size]
    assert sizes[5:] == [c.num_layers, c.rank, c.num_sides, positions, c.head_bias, len(c.modules)]
    steps = {"L-offset-sft": (2, 8), "M-recon-z": (1, 2, 4, 8)}.get(case, ())
    assert modules == [
        (n_in, n_out, sum(steps), name, path)
        for n_in, n_out, (name, path) in zip(c.in_features, c.out_features, c.module_paths.items(), strict=True)
    ]
    at = HEADER.size + len(modules) * MODULE.size
    for tensor in expected(net):
        at += -at % ALIGNMENT
        raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        assert content[at : at + len(raw)] == raw
        at += len(raw)
    assert at == len(content)


def test_the_same_network_is_the_same_file(golden, tmp_path):
    for name in "ab":
        export(HyperNetwork.from_pretrained(golden / "M-recon-z"), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    "case, field",
    [("L-autoreg-sft", "variant"), ("L-vq-sft", "task_encoder"), ("L-softmax-sft", "task_encoder")]
    + [("L-discrete-sft", "task_encoder"), ("L-sft", "dtype")],
)
def test_other_networks_are_refused(golden, tmp_path, case, field):
    dtype = torch.float16 if field == "dtype" else None
    with pytest.raises(CheckpointError, match=f"^{field}: the C\\+\\+ library computes "):
        export(HyperNetwork.from_pretrained(golden / case, dtype=dtype), tmp_path / "net.t2l")
    assert list(tmp_path.iterdir()) == []


def test_values_that_overflow_are_refused(golden, tmp_path):
    net = HyperNetwork.from_pretrained(golden / "L-sft")
    net.config = dataclasses.replace(net.config, output_scale=1e9)
    with torch.no_grad():
        net.heads["v_proj"].weight[0, 0] = 1e38
    with pytest.raises(CheckpointError, match="heads.v_proj.weight.*infinite"):
        export(net, tmp_path / "net.t2l")


def test_matrices_of_two_dtypes_are_refused(golden, tmp_path):
    net = HyperNetwork.from_pretrained(golden / "L-sft")
    net.mlp2.linear1.weight.data = net.mlp2.linear1.weight.data.bfloat16()
    with pytest.raises(CheckpointError, match="mlp2_weight1: expected torch.float32"):
        export(net, tmp_path / "net.t2l")
