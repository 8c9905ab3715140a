"""T2LResolver: vLLM asks it for unknown models, and it answers descriptions with adapters."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import sys
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path

from vllm import envs
from vllm.exceptions import GracefulHTTPError, VLLMServerError, VLLMValidationError
from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

from t2l_engine.serving import names
from t2l_engine.serving.checkpoints import Checkpoint
from t2l_engine.serving.store import Unavailable
from t2l_engine.serving.vllm.fit import misfit
from t2l_engine.serving.vllm.generator import Generator, logger
from t2l_engine.serving.vllm.settings import Settings

NAME = "t2l"  # of the resolver
#: vLLM inspects a model's class in a process that loads plugins too, and that multiprocessing does not know as a child.
_INSPECTION = "vllm.model_executor.models.registry"


def register(settings: Settings) -> None:
    """Register a resolver if a checkpoint is set; with ``warmup`` the main process starts loading it.  May be called again.

    Raises ValueError if vLLM is set to answer unknown models by the base model.
    """
    if not settings.checkpoints or NAME in LoRAResolverRegistry.get_supported_resolvers():
        return
    if envs.VLLM_SKIP_MODEL_NAME_VALIDATION:
        raise ValueError(
            "VLLM_SKIP_MODEL_NAME_VALIDATION: expected it unset with T2L_VLLM_CHECKPOINT, got 1: vLLM would answer "
            "sentences without an adapter"
        )
    generator = Generator(settings)
    LoRAResolverRegistry.register_resolver(NAME, T2LResolver(generator))
    runs = getattr(sys.modules["__main__"], "__spec__", None)  # as python -m
    if settings.warmup and multiprocessing.parent_process() is None and getattr(runs, "name", None) != _INSPECTION:
        generator.warm_up()


@contextlib.contextmanager
def client_errors(parameter: str) -> Iterator[None]:
    """The generator's errors as vLLM's: ValueError is 400 naming ``parameter``, Unavailable 503, RuntimeError 500."""
    try:
        yield
    except ValueError as error:
        raise VLLMValidationError(str(error), parameter=parameter) from None
    except Unavailable as error:
        raise GracefulHTTPError(str(error), HTTPStatus.SERVICE_UNAVAILABLE) from None
    except RuntimeError as error:
        logger.error("%s", error, exc_info=error)
        raise VLLMServerError(str(error)) from None


class T2LResolver(LoRAResolver):
    """Adapters for names that :func:`.names.parse` accepts; other resolvers get the others."""

    def __init__(self, generator: Generator):
        self.generator = generator
        self._misfits: dict[tuple[str, str], str | None] = {}
        self._comparing = asyncio.Lock()

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """The request of the adapter that ``lora_name`` describes; vLLM sets its id.

        Raises VLLMValidationError (400) for an invalid description, or a checkpoint that does not fit the served model
        ``base_model_name``; GracefulHTTPError (503) if there is no room.
        """
        with client_errors("model"):
            asked = names.parse(lora_name)
            if asked is None:
                return None
            name, _, folder = await self.generate(base_model_name, *asked, "model", lora_name)
        return LoRARequest(lora_name=name, lora_int_id=1, lora_path=str(folder))

    async def generate(
        self, served: str, checkpoint: str | None, text: str, argument: str, model: str = ""
    ) -> tuple[str, str, Path]:
        """(name for vLLM, short name of the checkpoint, folder) of an adapter for the model ``served``.

        ``argument``: what errors call ``text``; ``model``: the requested name with the text, empty for the endpoint.  Raises
        the errors of :class:`.Generator`, ValueError also for a checkpoint that does not fit.
        """
        job = await self.generator.job(checkpoint, text, argument)
        await self._check_fit(job.checkpoint, served)
        name, owner = names.lora_name(model, job.key) if model else names.adapter_id(job.key), names.digest(model, job.key)
        self.generator.check(name, owner)
        folder = await self.generator.generate(job)
        self.generator.claim(name, owner)
        return name, job.checkpoint.name, folder

    async def _check_fit(self, checkpoint: Checkpoint, served: str) -> None:
        """ValueError unless the model ``served`` has the sizes that ``checkpoint`` is for; compared once."""
        asked = checkpoint.name, served
        async with self._comparing:  # one comparison for all requests that wait
            if asked not in self._misfits:
                try:
                    found = await asyncio.to_thread(misfit, checkpoint.engine.hypernetwork.config, served)
                except (OSError, ValueError) as error:
                    found = None
                    logger.warning(
                        "checkpoint %r: sizes of the served model are not known and not compared: %s", checkpoint.name, error
                    )
                self._misfits[asked] = found
        if found := self._misfits[asked]:
            raise ValueError(f"checkpoint {checkpoint.name!r}: {found}")
