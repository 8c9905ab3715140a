"""Tensor parallelism: a model divided between two processes computes with adapters what a whole one does."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from t2l_engine import AdapterStack, attach
from t2l_engine.testing import numerics
from tests.lora import tensor_parallel_worker as worker


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from transformers import LlamaConfig, LlamaForCausalLM

    made = tmp_path_factory.mktemp("sharded")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=worker.HIDDEN, intermediate_size=worker.INNER, num_hidden_layers=worker.LAYERS,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(made / "model")
    return made


@pytest.fixture(scope="module")
def divided(folder):
    """What each of two processes computed."""
    started = []
    for rank in range(2):
        command = [sys.executable, Path(worker.__file__), folder, rank, 2]
        own = os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}  # as torchrun's
        log = (folder / f"{rank}.log").open("w")
        started.append(subprocess.Popen(list(map(str, command)), env=own, stderr=log))
    try:
        while None in (codes := [process.poll() for process in started]) and not any(codes):
            time.sleep(0.1)
    finally:
        for process in started:
            process.kill()  # one that waits for another, which has failed
    assert codes == [0, 0], [(folder / f"{rank}.log").read_text()[-3000:] for rank in range(2)]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module", params=worker.KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def whole(folder, kind):
    """What one process computes."""
    return worker.results(kind, worker.model(kind, folder))


def close(kind, got, expected, exact):
    """Whether outputs of a model are equal to rounding; ``exact``: those of float64, in a narrower dtype than float32."""
    if kind.endswith("bfloat16"):
        return float((got.double() - exact).norm()) <= numerics.logits_bound(exact, expected)
    return float((got - expected).abs().max()) <= numerics.LOGITS_ATOL


@pytest.fixture(scope="module")
def exact(folder, kind):
    """What the model computes in float64, from the same weights, adapters and hypernetwork."""
    if not kind.endswith("bfloat16"):
        return None
    return worker.results(kind, worker.model(kind, folder).double(), torch.float64)


@pytest.mark.slow  # two processes that start torch and transformers
def test_the_whole_models_results(divided, whole, kind, exact):
    """With a mixed batch, one adapter, new ids, a replaced adapter, generated ones, one merged; tokens are the same."""
    for own in divided:
        found = own[kind]
        assert found.keys() == whole.keys()
        for name, expected in whole.items():
            if name == "tokens":
                assert torch.equal(found[name], expected)
            else:
                assert close(kind, found[name], expected, exact and exact[name]), name
        changed = [name for name in found if name not in ("base", "attached", "unmerged", "detached", "tokens")]
        assert not any(torch.equal(found[name], found["base"]) for name in changed)
    assert all(torch.equal(divided[0][kind][name], divided[1][kind][name]) for name in whole)


@pytest.mark.slow  # two processes that start torch and transformers
def test_the_divided_models_bits(divided, kind):
    """Attached, in rows of the base model, after unmerge and detach it is what it was."""
    found = divided[0][kind]
    for name in ("attached", "unmerged", "detached"):
        assert torch.equal(found[name], found["base"])
    assert torch.equal(found["mixed"][1], found["base"][1])
    assert torch.equal(found["put"][3], found["base"][3])


@pytest.fixture
def mesh(tmp_path):
    """Of one process."""
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh

    init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    destroy_process_group()


@pytest.fixture
def divide(mesh):
    """Divides linears of a model by torch's own tensor parallelism: path -> class of its plan."""
    from torch.distributed.tensor import parallel

    def make(model, plans, **options):
        plans = {path: getattr(parallel, plan)(**options) for path, plan in plans.items()}
        return parallel.parallelize_module(model, mesh, plans)

    return make


def test_what_is_refused(mesh, divide):
    from torch.distributed.tensor import DTensor, Replicate

    plans = {f"layers.{i}.down_proj": "RowwiseParallel" for i in range(worker.LAYERS)}
    stack, model = worker.stack("torch"), divide(worker.Plain(), plans)
    lora, linear, x = attach(model, stack), model.layers[0]["down_proj"], torch.zeros(1, 2, worker.INNER)
    with lora.use(0):
        with pytest.raises(RuntimeError, match="down_proj: adapters of a linear that is divided among processes have no gr"):
            linear(x)
        shape = rf"\(1, 2, {worker.INNER}\)"
        for wrong, got in ((x[..., 1:], "Tensor"), (DTensor.from_local(x, mesh, [Replicate()]), "DTensor")):
            with (
                torch.no_grad(),
                pytest.raises(RuntimeError, match=f"an input {shape} of this .* a plain tensor, got {got} "),
            ):
                linear(wrong)
    with pytest.raises(ValueError, match="stack: down_proj is divided among processes"), lora.differentiable(stack, 0):
        pass


def test_fully_sharded_weights_are_refused(mesh):
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(worker.Plain(), mesh=mesh)
    with pytest.raises(ValueError, match="model: the weight of layers.0.up_proj is divided by fully_shard; attach the"):
        attach(model, worker.stack("torch"))


def test_adapters_may_be_attached_before(mesh):
    """They are then used, but not merged."""
    from torch.distributed.fsdp import fully_shard

    model, x = worker.Plain(), worker.inputs("torch")
    lora = attach(model, worker.stack("torch"))
    with torch.no_grad(), lora.use([0, -1, 2, 1]):
        expected = model(x)
        assert torch.equal(fully_shard(model, mesh=mesh)(x), expected)
    with pytest.raises(ValueError, match="merge: fully_shard has divided weights of the model"):
        lora.merge(0)


def test_training_of_other_modules(divide):
    """In ``differentiable`` a divided linear that the stack lacks is the base's."""
    stack, x = worker.stack("torch"), worker.inputs("torch")
    ups = AdapterStack({"up_proj": stack.lora_A["up_proj"]}, {"up_proj": stack.lora_B["up_proj"]}, stack.scaling)
    plain = worker.Plain()
    model = divide(worker.Plain(), {f"layers.{i}.down_proj": "RowwiseParallel" for i in range(worker.LAYERS)})
    expected_lora, lora = attach(plain, ups), attach(model, stack)
    with expected_lora.differentiable(ups, 2), lora.differentiable(ups, 2):
        assert torch.allclose(model(x), plain(x), atol=numerics.LOGITS_ATOL)


def test_an_output_that_is_not_plain(divide):
    plans = {f"layers.{i}.up_proj": "ColwiseParallel" for i in range(worker.LAYERS)}
    model = divide(worker.Plain(), plans, use_local_output=False)
    message = "expected an output .* as a plain tensor, got DTensor"
    with torch.no_grad(), attach(model, worker.stack("torch")).use(0), pytest.raises(RuntimeError, match=message):
        model.layers[0]["up_proj"](worker.inputs("torch"))


def test_an_adapter_that_is_compiled(divide):
    model = divide(nn.ModuleList([nn.ModuleDict({"up_proj": nn.Linear(8, 4)})]), {"0.up_proj": "ColwiseParallel"})
    ups = AdapterStack({"up_proj": torch.ones(1, 1, 2, 8)}, {"up_proj": torch.ones(1, 1, 4, 2)}, torch.ones(1))
    lora = attach(model, ups)
    compiled = torch.compile(model[0]["up_proj"], backend="eager", fullgraph=True)
    with torch.no_grad(), lora.use(0), pytest.raises(Exception, match="divided among processes are not compiled"):
        compiled(torch.ones(1, 8))


def test_layers_that_are_divided_differently(divide):
    model = divide(worker.Plain(), {"layers.1.up_proj": "ColwiseParallel"})
    message = "model: up_proj: expected layers divided alike among processes, got others in 0 and 1"
    with pytest.raises(ValueError, match=message):
        attach(model, worker.stack("torch"))


def test_linears_that_are_divided_in_other_ways(mesh, divide):
    """A weight that all processes have as a whole, a packed projection, a quantised linear."""
    from torch.distributed.tensor import distribute_tensor

    model, stack = worker.Plain(), worker.stack("torch")
    linear = model.layers[0]["up_proj"]
    linear.weight = nn.Parameter(distribute_tensor(linear.weight.detach(), mesh))
    message = "layers.0.up_proj: expected a linear whose rows or columns are divided among the proc"
    with pytest.raises(ValueError, match=message):
        attach(model, stack)
    model = nn.ModuleList([nn.ModuleDict({"gate_up_proj": nn.Linear(worker.HIDDEN, 2 * worker.INNER)})])
    model = divide(model, {"0.gate_up_proj": "ColwiseParallel"})
    A, B = (side["up_proj"][:, :1] for side in (stack.lora_A, stack.lora_B))
    ups = AdapterStack({"up_proj": A}, {"up_proj": B}, stack.scaling)
    with pytest.raises(ValueError, match="model: 0.gate_up_proj is a packed projection divided among processes"):
        attach(model, ups, packed={"gate_up_proj": {"gate_proj": worker.INNER, "up_proj": worker.INNER}})
    model = worker.Plain()
    model.layers[1]["up_proj"]._hf_quantized_needs_local_tp = True
    with pytest.raises(ValueError, match="model: layers.1.up_proj is quantised and divided among processes"):
        attach(model, stack)


@pytest.mark.parametrize(
    ("out", "world", "expected"), [(25, 2, [(0, 13), (13, 25)]), (24, 3, [(0, 8), (8, 16), (16, 24)]), (9, 4, None)], ids=str
)
def test_parts(out, world, expected):
    """Equal ones and what is left, as torch's chunk; a process without any is refused."""
    from torch.distributed.tensor.placement_types import Shard as Placement

    from t2l_engine.lora.sharding import sharding

    weight = torch.empty(out, 8)
    found = []
    for rank in range(world):
        parts = [*weight.chunk(world), *[weight[:0]] * world][:world]

        class DTensor:
            shape, placements = weight.shape, (Placement(0),)
            device_mesh = type("Mesh", (), {"size": lambda self: world, "get_local_rank": lambda self, r=rank: r})()
            to_local = lambda self, part=parts[rank]: part  # noqa: E731

        linear = nn.Linear(8, out)
        del linear.weight
        linear.weight = DTensor()
        if expected is None:
            with pytest.raises(ValueError, match=f"layers.0.up_proj: expected equal parts for {world} processes, of {out}"):
                sharding(linear, "layers.0.up_proj", False)
        else:
            found.append(sharding(linear, "layers.0.up_proj", False)[:2])
    assert expected is None or found == [((0, 8), ends) for ends in expected]
