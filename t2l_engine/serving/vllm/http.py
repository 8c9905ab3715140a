"""Endpoint plugin: ``POST /v1/t2l/adapters`` generates an adapter and returns its name.

Unlike the resolver it takes documents, needs no ``VLLM_ALLOW_RUNTIME_LORA_UPDATING``, and keeps the text out of vLLM's log.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from fastapi import APIRouter, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.datastructures import State
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest
from vllm.exceptions import VLLMValidationError
from vllm.lora.resolver import LoRAResolverRegistry

from t2l_engine.serving import names
from t2l_engine.serving.vllm.resolver import NAME, T2LResolver, client_errors

PATH = "/v1/t2l/adapters"
_MAX_BYTES = 6 * names.MAX_DOCUMENT_BYTES + 4096  # of a request: fits the longest document with every character escaped


def endpoint() -> AdaptersEndpoint:
    """The endpoint plugin with the adapters of the registered resolver; RuntimeError if there is none."""
    if NAME not in LoRAResolverRegistry.get_supported_resolvers():
        raise RuntimeError("t2l_http: expected T2L_VLLM_CHECKPOINT, and t2l beside t2l_http in VLLM_PLUGINS")
    resolver = LoRAResolverRegistry.get_resolver(NAME)
    assert isinstance(resolver, T2LResolver)
    return AdaptersEndpoint(resolver)


class _Asked(BaseModel):
    """The body of a request, with either text; ``checkpoint``: None = the default."""

    model_config = ConfigDict(extra="forbid", strict=True)
    description: str | None = None
    document: str | None = None
    checkpoint: str | None = None


class AdaptersEndpoint:
    """vLLM's EndpointPlugin with the route PATH; ``resolver`` generates."""

    name = "t2l_http"
    required_tasks = ("generate",)

    def __init__(self, resolver: T2LResolver):
        self.resolver = resolver
        self.models: OpenAIServingModels | None = None

    def attach_router(self, app: FastAPI) -> None:
        """Add the route to the server."""
        router = APIRouter()

        @router.post(PATH)
        async def create_adapter(request: Request) -> JSONResponse:
            created = await self.create(*await _read(request))
            if isinstance(created, ErrorResponse):
                return JSONResponse(created.model_dump(), status_code=created.error.code)
            return JSONResponse(created)

        app.include_router(router)

    async def init_state(self, engine_client: EngineClient | None, state: State, args: Namespace) -> None:
        """Take the server's models, to which adapters are added, and the largest rank that it takes.

        Raises ValueError with several API servers: each numbers its adapters from 1, and the engine identifies adapters by
        number.
        """
        servers = getattr(args, "api_server_count", None) or 1
        if servers > 1:
            raise ValueError(f"--api-server-count: expected 1 with t2l_http in VLLM_PLUGINS, got {servers}")
        self.models = state.openai_serving_models
        lora = engine_client and engine_client.vllm_config.lora_config
        self.resolver.generator.max_rank = lora.max_lora_rank if lora else None

    async def create(self, argument: str, text: str, checkpoint: str | None) -> dict[str, Any] | ErrorResponse:
        """Generate and load an adapter unless it is loaded; its id is a model's name from then on.

        ``argument``: "description" or "document".  Returns vLLM's error if the engine does not load it.  Raises as
        :meth:`T2LResolver.resolve_lora`.
        """
        models = self.models
        assert models is not None  # init_state() is called before the server listens
        with client_errors(argument):
            name, used, folder = await self.resolver.generate(models.model_config.model, checkpoint, text, argument)
            if name not in models.lora_requests:
                failed = await models.load_lora_adapter(LoadLoRAAdapterRequest(lora_name=name, lora_path=str(folder)))
                # Of several requests for one adapter the first loads it; the others get an error.
                if isinstance(failed, ErrorResponse) and name not in models.lora_requests:
                    return failed
            if models.lora_requests[name].lora_path != str(folder):  # clients may load folders under any name
                raise RuntimeError(f"{name}: another folder was loaded under this name; unload it")
        return {"id": name, "object": "t2l.adapter", "checkpoint": used, "parent": models.base_model_paths[0].name}


async def _read(request: Request) -> tuple[str, str, str | None]:
    """(argument, text, checkpoint) of a body; VLLMValidationError, quoting no value, if it is invalid, 413 if too long."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > _MAX_BYTES:
            raise HTTPException(413, f"expected a body of at most {_MAX_BYTES} bytes")
    try:
        asked = _Asked.model_validate_json(body)
    except ValidationError as error:
        wrong = error.errors(include_url=False)[0]
        field = ".".join(map(str, wrong["loc"])) or None
        got = f", got {type(wrong['input']).__name__}" if wrong["type"].endswith("_type") else ""
        raise VLLMValidationError(f"{field or 'body'}: {wrong['msg']}{got}", parameter=field) from None
    texts = asked.model_dump(include={"description", names.DOCUMENT}, exclude_none=True)
    if len(texts) != 1:
        raise VLLMValidationError(f"description, document: expected one of them, got {len(texts)}", parameter="description")
    ((argument, text),) = texts.items()
    if argument == names.DOCUMENT and (size := len(text.encode())) > names.MAX_DOCUMENT_BYTES:
        raise HTTPException(413, f"document: expected at most {names.MAX_DOCUMENT_BYTES} bytes of UTF-8, got {size}")
    return argument, text, asked.checkpoint
