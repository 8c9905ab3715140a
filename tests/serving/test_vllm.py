"""The resolver, the endpoint and offline requests beside vLLM's own OpenAIServingModels and error handlers."""

import asyncio
import itertools
import json
import logging
import re
import sys
import types
from argparse import Namespace

import pytest
import torch

pytest.importorskip("vllm")

from fastapi import FastAPI, HTTPException
from fastapi.testclient import TestClient
from transformers import LlamaConfig
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.engine.serving import BaseServing
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
from vllm.exceptions import GracefulHTTPError, VLLMServerError, VLLMValidationError
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolverRegistry
from vllm.model_executor.models.registry import _SUBPROCESS_COMMAND
from vllm.plugins.endpoint_plugins.interface import EndpointPlugin

import t2l_engine as t2l
import t2l_vllm
from t2l_engine.serving import names
from t2l_engine.serving.checkpoints import Checkpoint
from t2l_engine.serving.vllm import http, offline, resolver

pytestmark = pytest.mark.serving
TEXT = "Return the last element of the list."
SMOLLM2 = dict(hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, intermediate_size=1536)


class Engine:
    """What OpenAIServingModels asks of an engine: its model, and that it loads adapters."""

    renderer = input_processor = None

    def __init__(self, model):
        self.model_config = types.SimpleNamespace(model=str(model), max_model_len=256)
        self.vllm_config = types.SimpleNamespace(lora_config=types.SimpleNamespace(max_lora_rank=8))
        self.loaded, self.error = [], None

    async def add_lora(self, request):
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error
        self.loaded.append(request)
        return True


#: What vLLM runs as a module to look at a model's class.
INSPECTION = _SUBPROCESS_COMMAND[-1]


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(LoRAResolverRegistry, "resolvers", {})
    return LoRAResolverRegistry


@pytest.fixture
def model(tmp_path):
    """A folder with the configuration of a model; keywords replace sizes of SmolLM2-135M."""

    def make(**changes):
        LlamaConfig(**(SMOLLM2 | changes)).save_pretrained(tmp_path / "served")
        return tmp_path / "served"

    return make


@pytest.fixture
def serve(registry, settings, loaded, model):
    """(vLLM's models, stub engine, generator) of a server with the plugin; keywords are settings."""

    def make(served=None, **changes):
        registry.resolvers.clear()
        resolver.register(settings(**changes))
        engine = Engine(served or model())
        models = OpenAIServingModels(engine, [BaseModelPath("base", str(engine.model_config.model))])
        return models, engine, registry.get_resolver("t2l").generator

    return make


def resolve(models, *asked):
    async def run():
        return await asyncio.gather(*(models.resolve_lora(name) for name in asked), return_exceptions=True)

    return asyncio.run(run())


def test_a_description_becomes_a_model(serve):
    models, engine, generator = serve()
    (found,) = resolve(models, f"t2l:{TEXT}")
    assert isinstance(found, LoRARequest) and engine.loaded == [found] and models.lora_requests[f"t2l:{TEXT}"] is found
    assert found.lora_name.startswith("t2lq-") and found.lora_int_id == 1 and not found.load_inplace
    helper = PEFTHelper.from_local_dir(found.lora_path, max_position_embeddings=None)
    assert (helper.r, helper.vllm_lora_scaling_factor) == (8, 1.0)
    assert resolve(models, f"t2l:{TEXT}") == [found] and generator.generated == len(engine.loaded) == 1


def test_spellings_share_a_folder_and_no_name(serve):
    """Two requests of one lora_name and different ids would end vLLM's engine."""
    models, engine, generator = serve()
    found = resolve(models, f"t2l:{TEXT}", f"t2l: {TEXT}", f"t2l/smollm2-135m-paper:{TEXT}")
    assert len({request.lora_path for request in found}) == generator.generated == 1
    assert len({request.lora_name for request in found}) == len({request.lora_int_id for request in found}) == 3


def test_errors_of_the_client(serve, model):
    """400 for a wrong description, checkpoint or model, 404 for names that are not ours."""
    models, engine, generator = serve(model(num_key_value_heads=9))
    for found in resolve(models, "someone/model", "t2l/owner", "t2l-0123456789abcdef", "t2lq-0123456789abcdef"):
        assert isinstance(found, ErrorResponse) and found.error.code == 404
    misfit = "checkpoint 'smollm2-135m-paper': .* v_proj has 576 inputs and 192 outputs, the served one has 576 and 576"
    empty, unknown = "model: expected a description, got an empty one", "checkpoint: expected one of .*, got 'other'"
    for asked, message in (("t2l: ", empty), ("t2l/other:secret", unknown), ("t2l:secret", misfit)):
        (error,) = resolve(models, asked)
        assert isinstance(error, VLLMValidationError) and error.parameter == "model" and error.value is None
        assert re.match(message, str(error)) and "secret" not in str(error)
    assert engine.loaded == [] and generator.generated == 0


def test_errors_of_the_server(serve, monkeypatch):
    """503 where there is no room for a name or a folder, 500 for faults."""
    models, engine, generator = serve(max_names=1)
    (first,), (second,) = resolve(models, f"t2l:{TEXT}"), resolve(models, "t2l:Another one.")
    assert isinstance(first, LoRARequest) and isinstance(second, GracefulHTTPError) and second.http_status == 503
    assert generator.generated == 1
    assert isinstance(resolve(serve(store_bytes=1)[0], "t2l:A third one.")[0], GracefulHTTPError)
    monkeypatch.setattr(Checkpoint, "make", lambda *arguments: 1 / 0)
    (error,) = resolve(serve()[0], "t2l:A fourth one.")
    assert isinstance(error, VLLMServerError) and "ZeroDivisionError" in str(error)


def test_sizes_that_are_not_known_are_not_compared(serve, model, caplog):
    path = model() / "config.json"
    path.write_text(json.dumps({"architectures": ["Unheard"], "model_type": "unheard"}))
    models, engine, generator = serve(path.parent)
    with caplog.at_level(logging.WARNING):
        assert isinstance(resolve(models, f"t2l:{TEXT}")[0], LoRARequest)
    assert "sizes of the served model are not known and not compared" in caplog.text


def test_check_model_takes_descriptions_where_vllm_may_load_adapters(serve, monkeypatch):
    models, engine, generator = serve()
    server = BaseServing(models, engine.model_config)
    request = types.SimpleNamespace(model=f"t2l:{TEXT}")
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "0")
    assert asyncio.run(server._check_model(request)).error.code == 404 and generator.generated == 0
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    assert asyncio.run(server._check_model(request)) is None and generator.generated == 1


# --- entry points ----------------------------------------------------------------------------------------------------


@pytest.fixture
def hooks(monkeypatch):
    """Calls of hooks.install, which replaces parts of vLLM and has tests of its own."""
    calls = []
    monkeypatch.setattr("t2l_engine.serving.vllm.hooks.install", lambda settings: (calls.append(settings), settings)[1])
    for name in ("CHECKPOINT", "KERNELS", "STORE"):
        monkeypatch.delenv(f"T2L_VLLM_{name}", raising=False)
    return calls


def test_register(registry, hooks, monkeypatch, tmp_path):
    t2l_vllm.register()
    assert hooks == [] and not registry.resolvers, "nothing without a variable"
    for kernels in ("0", "1"):
        monkeypatch.setenv("T2L_VLLM_KERNELS", kernels)
        t2l_vllm.register()
        assert hooks.pop().kernels == (kernels == "1") and not registry.resolvers, "hooks alone"
    monkeypatch.setenv("T2L_VLLM_CHECKPOINT", "smollm2-135m")
    monkeypatch.setenv("T2L_VLLM_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("VLLM_SKIP_MODEL_NAME_VALIDATION", "1")
    with pytest.raises(ValueError, match="VLLM_SKIP_MODEL_NAME_VALIDATION: expected it unset with T2L_VLLM_CHECKPOINT"):
        t2l_vllm.register()
    monkeypatch.delenv("VLLM_SKIP_MODEL_NAME_VALIDATION")
    t2l_vllm.register()
    resolver = registry.get_resolver("t2l")
    t2l_vllm.register()
    assert registry.get_resolver("t2l") is resolver and len(registry.resolvers) == 1
    assert not (tmp_path / "store").exists(), "nothing is loaded or opened before it is needed"


@pytest.mark.parametrize("parent, runs, loads", [
    (None, "vllm.entrypoints.openai.api_server", 1), (None, None, 1), (object(), None, 0), (None, INSPECTION, 0),
])  # fmt: skip
def test_only_the_main_process_warms_up(registry, settings, bundled, monkeypatch, parent, runs, loads):
    spec = runs and types.SimpleNamespace(name=runs)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)
    calls = []
    monkeypatch.setattr(Checkpoint, "load", lambda name, source: (calls.append(name), bundled)[1])
    monkeypatch.setattr(resolver.multiprocessing, "parent_process", lambda: parent)
    resolver.register(settings(warmup=True))
    asyncio.run(registry.get_resolver("t2l").generator.checkpoint(None)) if loads else None
    assert len(calls) == loads


# --- endpoint --------------------------------------------------------------------------------------------------------


@pytest.fixture
def client(serve):
    """(HTTP client, models, engine, generator) of a server with the endpoint plugin, with vLLM's error handlers."""

    def make(**changes):
        models, engine, generator = serve(**changes)
        endpoint = t2l_vllm.http()
        assert isinstance(endpoint, EndpointPlugin) and endpoint.name == "t2l_http"
        app = FastAPI()
        app.state.args = Namespace(log_error_stack=False)
        app.state.openai_serving_models = models
        init_exception_handler(app)
        endpoint.attach_router(app)
        asyncio.run(endpoint.init_state(engine, app.state, app.state.args))
        return TestClient(app, raise_server_exceptions=False), models, engine, generator

    return make


def test_the_endpoint_needs_the_resolver_and_one_api_server(registry, serve):
    """Each server would number its adapters from 1."""
    with pytest.raises(RuntimeError, match="expected T2L_VLLM_CHECKPOINT, and t2l beside t2l_http in VLLM_PLUGINS"):
        t2l_vllm.http()
    serve()
    endpoint, state = t2l_vllm.http(), types.SimpleNamespace(openai_serving_models=None)
    asyncio.run(endpoint.init_state(None, state, Namespace(api_server_count=1)))
    with pytest.raises(ValueError, match="--api-server-count: expected 1 with t2l_http in VLLM_PLUGINS, got 2"):
        asyncio.run(endpoint.init_state(None, state, Namespace(api_server_count=2)))


def post(http, body):
    return http.post("/v1/t2l/adapters", content=body if isinstance(body, str) else json.dumps(body))


def test_an_adapter_is_created_once_under_an_id(client, caplog):
    http, models, engine, generator = client()
    with caplog.at_level(logging.DEBUG):
        first, again = (post(http, {"description": text}) for text in (TEXT, f"{TEXT} "))
    assert first.status_code == again.status_code == 200 and first.json() == again.json()
    created = first.json()
    assert created["id"] in models.lora_requests and models.lora_requests[created["id"]].lora_name == created["id"]
    assert created["id"].startswith("t2l-") and len(created["id"]) == 20
    assert (created["checkpoint"], created["parent"]) == ("smollm2-135m-paper", "base")
    assert len(engine.loaded) == generator.generated == 1
    listed = asyncio.run(models.show_available_models()).model_dump_json()
    assert created["id"] in listed and TEXT not in listed + caplog.text


def test_names_of_one_adapter(client):
    """The two ways have different ones, and a folder that a client loaded under ours is refused."""
    http, models, engine, generator = client()
    created = post(http, {"description": TEXT}).json()["id"]
    (found,) = resolve(models, f"t2l:{TEXT}")
    assert found.lora_path == models.lora_requests[created].lora_path and found.lora_name != created
    assert generator.generated == 1
    models.lora_requests[created].lora_path = "/somewhere/else"
    again = post(http, {"description": TEXT})
    assert again.status_code == 500 and "another folder was loaded under this name" in again.text


@pytest.mark.parametrize("body, message, param", [
    ("{", "body: Invalid JSON: ", None),
    ("[" * 60000, "body: Invalid JSON: ", None),
    ({"description": "secret\ud800"}, "body: Invalid JSON: ", None),
    ("[]", "body: Input should be an object, got list", None),
    ({"checkpoint": "secret"}, "description, document: expected one of them, got 0", "description"),
    ({"description": "secret", "document": "secret"}, "document: expected one of them, got 2", "description"),
    ({"document": 3}, "document: Input should be a valid string, got int", "document"),
    ({"document": " "}, "document: expected a document, got an empty one", "document"),
    ({"document": "secret"}, "document: expected a checkpoint that reads documents, got 'smollm2-135m-paper'", "document"),
    ({"description": "secret", "other": "secret"}, "other: Extra inputs are not permitted", "other"),
    ({"description": "secret", "checkpoint": 3}, "checkpoint: Input should be a valid string, got int", "checkpoint"),
    ({"description": ["secret"]}, "description: Input should be a valid string, got list", "description"),
    ({"description": "secret", "checkpoint": "x"}, "checkpoint: expected one of", "description"),
    ({"description": " "}, "description: expected a description", "description"),
    ({"description": "secret\0"}, "description: expected Unicode text", "description"),
    ({"description": "secret" * 1000}, "at most 4000 characters, got 6000", "description"),
])  # fmt: skip
def test_errors_of_the_endpoint(client, caplog, body, message, param):
    http, models, engine, generator = client()
    with caplog.at_level(logging.DEBUG):
        answer = post(http, body)
    error = answer.json()["error"]
    assert answer.status_code == error["code"] == 400 and message in error["message"] and error["param"] == param
    assert "secret" not in answer.text + caplog.text and "Traceback" not in answer.text and generator.generated == 0


@pytest.mark.parametrize("body, message", [
    ({"document": "\u00e9" * (1 << 19) + "s"}, "document: expected at most 1048576 bytes of UTF-8, got 1048577"),
    ({"description": "x" * (7 << 20)}, "expected a body of at most 6295552 bytes"),
])  # fmt: skip
def test_what_is_too_long_is_413(client, body, message):
    answer = post(client()[0], body)
    assert answer.status_code == answer.json()["error"]["code"] == 413 and message in answer.json()["error"]["message"]


def test_a_body_that_is_too_long_is_not_read_whole():
    read = []

    async def parts():
        for _ in range(1 << 20):
            read.append(len(part := b" " * (1 << 16)))
            yield part

    with pytest.raises(HTTPException):
        asyncio.run(http._read(types.SimpleNamespace(stream=parts)))
    assert sum(read) < 7 << 20


def test_documents_become_adapters(client, reads_documents, model, monkeypatch):
    """Up to the server's rank."""
    checkpoint = Checkpoint.of(t2l.TextToLoRA.from_pretrained(reads_documents), "documents")
    monkeypatch.setattr(Checkpoint, "load", lambda name, source: checkpoint)
    sizes = dict(hidden_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, intermediate_size=80)
    http, models, engine, generator = client(served=model(**sizes), checkpoints={"documents": reads_documents})
    created = post(http, {"document": "drug"})
    assert created.status_code == 200, created.text
    request = models.lora_requests[created.json()["id"]]
    assert PEFTHelper.from_local_dir(request.lora_path, max_position_embeddings=None).r == 8 and engine.loaded == [request]
    assert post(http, {"description": "drug"}).json() == created.json()
    refused = post(http, {"document": "name the capital of a country ."})
    error = refused.json()["error"]
    assert refused.status_code == error["code"] == 400 and error["param"] == "document" and "rank 16" in error["message"]
    (by_name,) = resolve(models, "t2l:name the capital of a country .")
    assert isinstance(by_name, VLLMValidationError) and "model: its adapter has rank 16" in str(by_name)
    assert engine.loaded == [request] and generator.generated == 1


def test_the_endpoints_503_and_500(client, monkeypatch, caplog):
    http, models, engine, generator = client(max_names=1)
    engine.error = RuntimeError("no slot")
    refused = post(http, {"description": TEXT})
    assert refused.status_code == 500 and refused.json()["error"]["message"] == "no slot" and not models.lora_requests
    engine.error = None
    assert post(http, {"description": TEXT}).status_code == 200, "and may be asked for again"
    full = post(http, {"description": "Another secret."})
    monkeypatch.setattr(Checkpoint, "make", lambda *arguments: 1 / 0)
    failed = post(client()[0], {"description": "A third secret."})
    for answer, code, message in ((full, 503, "1 have names"), (failed, 500, "ZeroDivisionError")):
        assert answer.status_code == answer.json()["error"]["code"] == code and message in answer.json()["error"]["message"]
        assert "Traceback" not in answer.text and "secret" not in answer.text + caplog.text


# --- offline ---------------------------------------------------------------------------------------------------------


def test_offline_requests(settings, bundled, model, monkeypatch):
    own = 1 << 20  # above those that callers count for their own adapters
    monkeypatch.setattr(offline, "_ids", {})
    monkeypatch.setattr(offline, "_numbers", itertools.count(own))
    texts = [TEXT, "Name the antonym.", TEXT]
    first = offline.lora_requests(bundled.engine, texts, str(model()), settings=settings())
    again = offline.lora_requests(bundled.engine, texts[::-1], settings=settings())
    ids = [own, own + 1, own]
    assert [request.lora_int_id for request in first] == ids == [request.lora_int_id for request in again]
    assert [request.lora_path for request in first] == [request.lora_path for request in again[::-1]]
    assert all(request.lora_name.startswith("t2l-") for request in first)
    key = Checkpoint.of(bundled.engine, "x").prepare("text", TEXT)[1]
    assert first[0].lora_name == names.adapter_id(key) and first[0].lora_path == str(settings().store.resolve() / key)
    stored = t2l.AdapterStack.from_peft(first[1].lora_path)
    assert stored.dtype == torch.bfloat16 and len(stored) == 1


def test_offline_documents(settings, bundled, reads_documents):
    engine, chosen = t2l.TextToLoRA.from_pretrained(reads_documents), settings(checkpoints={})
    first, second = offline.lora_requests(engine, ["drug"], documents=["the capital of a"], settings=chosen)
    assert [max(t2l.AdapterStack.from_peft(of.lora_path).ranks["down_proj"][0]) for of in (first, second)] == [8, 12]
    assert offline.lora_requests(engine, documents=["drug"], settings=chosen) == [first]
    for documents, of, message in (
        ("drug", engine, "documents: expected a list of strings, got str"),
        (["drug", " "], engine, r"documents\[1\]: expected a non-empty text"),
        (["drug"], bundled.engine, "documents: expected an engine that reads documents, got a TextToLoRA"),
    ):
        with pytest.raises(ValueError, match=message):
            offline.lora_requests(of, documents=documents, settings=chosen)


def test_offline_errors(settings, bundled, model, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="texts: expected a list of strings, got str; wrap one text in a list"):
        offline.lora_requests(bundled.engine, TEXT, settings=settings())
    with pytest.raises(ValueError, match=r"texts\[1\]: expected a non-empty description"):
        offline.lora_requests(bundled.engine, [TEXT, " "], settings=settings())
    with pytest.raises(ValueError, match="base: the checkpoint is for a model of 30 layers, the served one has 4"):
        offline.lora_requests(bundled.engine, [TEXT], str(model(num_hidden_layers=4)), settings=settings())
    monkeypatch.delenv("T2L_VLLM_MODE", raising=False)
    monkeypatch.setenv("VLLM_PLUGINS", "lora_filesystem_resolver")
    for message in ("T2L_VLLM_MODE=memory in the environment", "VLLM_PLUGINS: expected t2l among them"):
        with pytest.raises(ValueError, match=message):  # workers would end at a folder without weights
            offline.lora_requests(bundled.engine, [TEXT], settings=settings(mode="memory"))
        monkeypatch.setenv("T2L_VLLM_MODE", "memory")
    monkeypatch.delenv("VLLM_PLUGINS")
    monkeypatch.setattr(offline.hooks, "install", lambda settings: settings)  # other tests have vLLM as it is
    with pytest.raises(ValueError, match="checkpoint: expected that of the adapter"):
        offline.lora_requests(bundled.engine, [TEXT], settings=settings(mode="memory", checkpoints={}))
    (found,) = offline.lora_requests(bundled.engine, [TEXT], settings=settings(mode="memory"))
    assert found.lora_path.endswith(".memory")
