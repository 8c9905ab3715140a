"""Endpoint plugin: ``POST /v1/t2l/adapters`` generates an adapter and returns its name.

Unlike the resolver it needs no ``VLLM_ALLOW_RUNTIME_LORA_UPDATING``, and the description is not in vLLM's log.
"""

from __future__ import annotations

import json
from argparse import Namespace
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.datastructures import State
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest
from vllm.exceptions import VLLMValidationError

from t2l_engine.serving import names
from t2l_engine.serving.vllm.resolver import T2LResolver, client_errors

PATH = "/v1/t2l/adapters"
_FIELDS = ("description", "checkpoint")
_MAX_BYTES = 1 << 16  # of a request: fits the longest description with every character escaped


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
            fields = _fields(await _body(request))
            created = await self.create(fields["description"], fields.get("checkpoint"))
            if isinstance(created, ErrorResponse):
                return JSONResponse(created.model_dump(), status_code=created.error.code)
            return JSONResponse(created)

        app.include_router(router)

    async def init_state(self, engine_client: EngineClient | None, state: State, args: Namespace) -> None:
        """Take the server's models, to which adapters are added.

        Raises ValueError with several API servers: each numbers its adapters from 1, and the engine identifies adapters by
        number.
        """
        servers = getattr(args, "api_server_count", None) or 1
        if servers > 1:
            raise ValueError(f"--api-server-count: expected 1 with t2l_http in VLLM_PLUGINS, got {servers}")
        self.models = state.openai_serving_models

    async def create(self, description: Any, checkpoint: str | None) -> dict[str, Any] | ErrorResponse:
        """Generate and load an adapter unless it is loaded; its id is a model's name from then on.

        Returns vLLM's error if the engine does not load it.  Raises as :meth:`T2LResolver.resolve_lora`.
        """
        assert self.models is not None  # init_state() is called before the server listens
        generator = self.resolver.generator
        with client_errors("description"):
            job = await generator.job(checkpoint, description)
            await self.resolver.check_fit(job.checkpoint, self.models.model_config.model)
            adapter = names.adapter_id(job.key)
            generator.check(adapter, job.key)
            folder = await generator.generate(job)
            generator.claim(adapter, job.key)
        if adapter not in self.models.lora_requests:
            request = LoadLoRAAdapterRequest(lora_name=adapter, lora_path=str(folder))
            failed = await self.models.load_lora_adapter(request)
            # Of several requests for one adapter the first loads it; the others get an error.
            if isinstance(failed, ErrorResponse) and adapter not in self.models.lora_requests:
                return failed
        if self.models.lora_requests[adapter].lora_path != str(folder):  # clients may load folders under any name
            with client_errors("description"):
                raise RuntimeError(f"{adapter}: another folder was loaded under this name; unload it")
        base = self.models.base_model_paths[0].name
        return {"id": adapter, "object": "t2l.adapter", "checkpoint": job.checkpoint.name, "parent": base}


async def _body(request: Request) -> bytes:
    """The body of a request; VLLMValidationError as soon as it is too long."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > _MAX_BYTES:
            raise VLLMValidationError(f"expected a body of at most {_MAX_BYTES} bytes")
    return body


def _fields(body: bytes) -> dict[str, Any]:
    """The fields of a request; VLLMValidationError, which quotes nothing of it, if they are invalid."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        raise VLLMValidationError("expected a JSON object, got a body that is not JSON") from None
    if not isinstance(fields, dict):
        raise VLLMValidationError(f"expected a JSON object, got {type(fields).__name__}")
    if "description" not in fields or not set(fields) <= set(_FIELDS):
        others = len(set(fields) - set(_FIELDS))
        raise VLLMValidationError(
            'expected a JSON object with "description", and "checkpoint" if it is not the default, got one '
            + (f"with {others} other fields" if others else 'without "description"')
        )
    checkpoint = fields.get("checkpoint")
    if not isinstance(checkpoint, (str, type(None))):
        raise VLLMValidationError(f"checkpoint: expected a string, got {type(checkpoint).__name__}", parameter="checkpoint")
    return fields
