"""What is put into vLLM, and what is left alone where vLLM or the installation is another one."""

import asyncio
import contextlib
import logging
import types

import pytest
import torch

pytest.importorskip("vllm")

import prometheus_client
from vllm.entrypoints.serve.middleware import authenticate
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import WorkerLoRAManager
from vllm.platforms import current_platform
from vllm.v1.executor.abstract import Executor
from vllm.v1.metrics.loggers import PrometheusStatLogger
from vllm.v1.worker.gpu_worker import Worker

from t2l_engine import ops
from t2l_engine.serving.vllm import hooks

pytestmark = pytest.mark.serving
STOCK = "vllm.lora.punica_wrapper.punica_cpu.PunicaWrapperCPU"


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    """vLLM as it was, before and after a test, in a process without pipeline stages."""
    for owner, name in (
        (LoRAModelManager, "register_module"), (LoRAModel, "from_local_checkpoint"), (WorkerLoRAManager, "_load_adapter"),
        (Executor, "add_lora"), (PrometheusStatLogger, "record"), (authenticate, "GUARDED_PREFIX"),
        (type(current_platform), "get_punica_wrapper"), (type(current_platform), "check_and_update_config"),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, vars(owner)[name])
    monkeypatch.setattr(Worker, "t2l_try_lora", None, raising=False)
    monkeypatch.setattr(hooks, "_made", {})
    hooks._warn_not_compiled.cache_clear()
    monkeypatch.setattr("vllm.distributed.get_pp_group", lambda: types.SimpleNamespace(world_size=1))


@pytest.fixture
def warnings(monkeypatch):
    """Messages of the package's log."""
    found = []
    monkeypatch.setattr(hooks.logger, "handle", lambda record: found.append(record.getMessage()))
    monkeypatch.setattr(hooks.logger, "level", logging.WARNING)
    return found


def installed():
    return LoRAModelManager.register_module, current_platform.get_punica_wrapper(), LoRAModel.from_local_checkpoint.__func__


def test_nothing_is_replaced_unless_asked_for(settings, warnings):
    before = installed()
    assert hooks.install(settings(kernels=False)) == settings(kernels=False)
    assert installed() == before and not warnings


def test_installing_twice_is_installing_once(settings, warnings):
    both = settings(kernels=True, mode="memory")
    assert hooks.install(both) == both
    first = installed()
    assert first[1] == hooks.WRAPPER and hooks.install(both) == both
    assert installed() == first and not warnings


LOADERS = ("from_lora_tensors", "from_local_checkpoint")


#: Functions of vLLM that are replaced or overridden -> their class.
REPLACED = {
    name: owner
    for owner in (PunicaWrapperCPU, LoRAModelManager, LoRAModel)
    for definer, functions in hooks.PARAMETERS.items()
    if definer.rpartition(":")[2] in {of.__name__ for of in owner.__mro__}
    for name in functions
}


@pytest.mark.parametrize("name", REPLACED)
def test_functions_with_other_parameters_are_kept(name, settings, warnings, monkeypatch):
    """Each function that is replaced, in some later vLLM.  Without its loaders the API server writes whole folders."""
    owner = REPLACED[name]
    other = lambda self, something, new: None  # noqa: E731
    monkeypatch.setattr(owner, name, classmethod(other) if name in LOADERS else other)
    before, asked = installed(), {"mode": "memory", "kernels": False} if name in LOADERS else {"kernels": True}
    found = hooks.install(settings(**asked))
    assert (found.mode, found.kernels) == ("disk", False)
    assert installed() == before and current_platform.get_punica_wrapper() == STOCK
    assert len(warnings) == 1 and name in warnings[0]


@pytest.mark.parametrize("owner, name", [
    (PunicaWrapperCPU, "_shrink_decode"), (LoRAModelManager, "register_module"), (LoRAModelManager, "_get_punica_wrapper"),
    (LoRAModel, "from_lora_tensors"), (WorkerLoRAManager, "_load_adapter"), (Executor, "add_lora"),
    (authenticate, "GUARDED_PREFIX"),
])  # fmt: skip
def test_what_a_later_vllm_lacks_stops_no_server(owner, name, settings, warnings, monkeypatch):
    monkeypatch.delattr(owner, name)
    hooks.install(settings(kernels=True, mode="memory"))
    assert len(warnings) == 1 and name in warnings[0]


def test_a_model_with_lora_is_compiled_as_without(settings, warnings, monkeypatch):
    """But not where vLLM multiplies with adapters by ops of its own: sharded, or of experts; a warning says so once."""
    seen = []

    def stock(cls, vllm_config):
        seen.append(vllm_config.lora_config)

    monkeypatch.setattr(type(current_platform), "check_and_update_config", classmethod(stock))
    whole, sharded = (types.SimpleNamespace(fully_sharded_loras=sharded) for sharded in (False, True))
    hooks.install(settings(kernels=True))
    for lora, is_moe in ((None, False), (whole, False), (sharded, False), (whole, True), (sharded, False)):
        config = types.SimpleNamespace(lora_config=lora, model_config=types.SimpleNamespace(is_moe=is_moe))
        current_platform.check_and_update_config(config)
        assert config.lora_config is lora
    assert seen == [None, None, sharded, whole, sharded]
    assert [of in said for of, said in zip(("shards", "experts"), warnings, strict=True)] == [True, True]


def test_a_layer_that_a_graph_cannot_follow_stops_compilation(warnings):
    part = torch.nn.Module()
    part.do_not_compile = False
    model = torch.nn.Sequential(part, torch.nn.Linear(1, 1))
    for _ in range(2):
        hooks._run_eagerly(model, "layers.0.experts")
    assert part.do_not_compile and len(warnings) == 1 and "layers.0.experts" in warnings[0]


def test_without_native_kernels_vllm_keeps_its_own(settings, warnings, monkeypatch):
    monkeypatch.setattr(ops, "has_kernel", lambda name, backend: False)
    assert not hooks.install(settings(kernels=True)).kernels
    assert current_platform.get_punica_wrapper() == STOCK
    assert len(warnings) == 1 and "without native kernels" in warnings[0]


LAYER = "model.layers.0.self_attn"


@pytest.fixture
def load(settings, warnings, monkeypatch):
    """Loads an adapter, path -> weights, in a worker with the LoRA layers ``modules``; ``refused``: with this message."""

    def run(adapter, modules, name, refused):
        loaded = types.SimpleNamespace(loras=adapter)
        monkeypatch.setattr(WorkerLoRAManager, "_load_adapter", lambda self, lora_request: loaded)
        hooks.install(settings(kernels=False))
        packed = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
        adapters = types.SimpleNamespace(modules=modules, packed_modules_mapping=packed)
        worker, request = types.SimpleNamespace(_adapter_manager=adapters), LoRARequest(name, 1, "folder")
        with pytest.raises(ValueError, match=refused) if refused else contextlib.nullcontext():
            assert WorkerLoRAManager._load_adapter(worker, request) is loaded
        assert not warnings

    return run


@pytest.mark.parametrize("wrapped, name, refused", [
    ([f"{LAYER}.qkv_proj"], "t2l-0", False),
    ([f"{LAYER}.qkv_proj", "model.layers.0.mlp.down_proj"], "t2lq-0", False),
    ([f"{LAYER}.o_proj"], "t2l-0", True),
    ([f"{LAYER}.o_proj"], "t2lq-0", True),
    ([f"{LAYER}.o_proj"], "of-somebody-else", False),
    ([f"language_model.{LAYER}.qkv_proj"], "t2l-0", True),  # of a text model within a multimodal one
    (["model.layers.1.self_attn.qkv_proj"], "t2l-0", True),
    (["self_attn.qkv_proj"], "t2l-0", True),
])  # fmt: skip
def test_an_adapter_that_would_be_served_in_part_is_refused(wrapped, name, refused, load):
    """By the linears that vLLM wraps: those of --lora-target-modules.  For others it would serve the base model."""
    of_any_size = types.SimpleNamespace(lora_a_stacked=(), base_layer=None)
    adapter, modules = dict.fromkeys([f"{LAYER}.q_proj", f"{LAYER}.v_proj"]), dict.fromkeys(wrapped, of_any_size)
    load(adapter, modules, name, r"adapts \['q_proj', 'v_proj'\].*--lora-target-modules" if refused else None)


@pytest.mark.parametrize("part, sizes, refused", [
    ("q", (8, 16), False), ("q", (8, 12), True), ("k", (8, 4), False), ("k", (8, 8), True), ("v", (8, 3), False),
    ("v", (6, 3), True), ("o", (16, 8), False), ("o", (8, 8), True), ("o", (16, 6), True), ("head", (9, 64), False),
    ("head", (9, 60), True), ("up", (8, 12), False), ("up", (8, 24), True), ("own_packed", (8, 24), False),
    ("own_packed", (8, 12), True),
])  # fmt: skip
def test_an_adapter_of_other_sizes_is_refused_before_it_has_a_slot(part, sizes, refused, load):
    """By whomever it was made; vLLM packs q, k and v.  Sizes are those of all processes together."""
    weights = types.SimpleNamespace(lora_a=torch.zeros(2, sizes[0]), lora_b=torch.zeros(sizes[1], 2))
    path = "lm_head" if part == "head" else f"{LAYER}.{part}_proj"

    def module(**base):
        return types.SimpleNamespace(lora_a_stacked=(), base_layer=types.SimpleNamespace(**base))

    # With two processes each has a copy of k and v, which vLLM counts in output_size.
    heads = {"total_num_heads": 4, "total_num_kv_heads": 1, "head_size": 4, "v_head_size": 3}
    slots = {"lora_a_stacked": torch.zeros(3, 1, 4, 9), "lora_b_stacked": torch.zeros(3, 1, 64, 4)}
    modules = {
        f"{LAYER}.qkv_proj": module(input_size=8, output_size=30, output_sizes=[16, 8, 6], **heads),
        f"{LAYER}.o_proj": module(input_size=16, output_size=8), "lm_head": types.SimpleNamespace(base_layer=None, **slots),
        f"{LAYER}.gate_up_proj": module(input_size=8, output_size=24, output_sizes=[12, 12]),
        f"{LAYER}.own_packed_proj": module(input_size=8, output_size=24, output_sizes=[12, 12]),
    }  # fmt: skip
    message = rf"of-somebody-else: {path}: expected .* got {sizes[0]} -> {sizes[1]}" if refused else None
    load({path: weights}, modules, "of-somebody-else", message)


@pytest.mark.parametrize("error, said", [(ValueError("too large"), "^too large$"), (KeyError("q"), "^KeyError: 'q'$")])
def test_every_worker_answers_what_it_refuses(settings, error, said):
    def refuse(lora_request):
        raise error

    hooks.install(settings(kernels=False))
    workers, asked = [types.SimpleNamespace(add_lora=refuse)] * 2, []
    request = LoRARequest("t2l-0", 1, "folder")

    def collective_rpc(name, args):
        asked.append((name, args))
        return [getattr(Worker, name)(worker, *args) for worker in workers]

    with pytest.raises(ValueError, match=said):
        Executor.add_lora(types.SimpleNamespace(collective_rpc=collective_rpc), request)
    assert asked == [("t2l_try_lora", (request,))]
    for answers in ([True, True], [True, False]):
        workers = [types.SimpleNamespace(add_lora=lambda _, answer=answer: answer) for answer in answers]
        assert Executor.add_lora(types.SimpleNamespace(collective_rpc=collective_rpc), request) == all(answers)


@pytest.mark.parametrize("engines, files, kept", [([0], False, 1), ([0, 1], False, 100), ([0], True, 100)])
def test_metrics_have_the_adapters_of_now(settings, monkeypatch, engines, files, kept):
    """Where they can be told from those of other engines and processes."""
    info = prometheus_client.Gauge("lora", "", ["running"], registry=None)

    def record(self, scheduler_stats, iteration_stats, mm_cache_stats=None, engine_idx=0):
        if self.gauge_lora_info and scheduler_stats:
            self.gauge_lora_info.labels(running=scheduler_stats).set(1)

    monkeypatch.setattr(PrometheusStatLogger, "record", record)
    if files:
        monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "folder")
    hooks.install(settings(kernels=False))
    server = types.SimpleNamespace(gauge_lora_info=info, engine_indexes=engines)
    for i in range(100):
        PrometheusStatLogger.record(server, str(i), None)
    PrometheusStatLogger.record(server, None, None)  # what has no statistics changes nothing
    names = [sample.labels["running"] for sample in info.collect()[0].samples]
    assert names[-1] == "99" and len(names) == kept
    for other in (None, types.SimpleNamespace(labels=lambda **_: info.labels(running="x"))):  # no LoRA; Ray's
        PrometheusStatLogger.record(types.SimpleNamespace(gauge_lora_info=other, engine_indexes=[0]), "y", None)


@pytest.mark.parametrize("path, answered", [("/tokenize", False), ("/adapters/t2l-0", False), ("/health", True)])
def test_the_key_of_the_server_covers_what_makes_adapters(settings, path, answered):
    hooks.install(settings(kernels=False))
    hooks.install(settings(kernels=False))
    assert authenticate.GUARDED_PREFIX.count("/tokenize") == 1
    sent = []

    async def app(scope, receive, send):
        sent.append("answered")

    async def send(message):
        sent.append(message.get("status"))

    scope = {"type": "http", "method": "POST", "path": path, "headers": []}
    asyncio.run(authenticate.AuthenticationMiddleware(app, ["key"])(scope, None, send))
    assert sent[0] == ("answered" if answered else 401)
