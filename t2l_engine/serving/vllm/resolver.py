"""T2LResolver: vLLM asks it for models it does not know, and a description becomes one."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from http import HTTPStatus

from vllm.exceptions import GracefulHTTPError, VLLMServerError, VLLMValidationError
from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver

from t2l_engine.serving import names
from t2l_engine.serving.checkpoints import Checkpoint
from t2l_engine.serving.spool import Unavailable
from t2l_engine.serving.vllm.fit import misfit
from t2l_engine.serving.vllm.generator import Generator, logger


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
    """Adapters for names as :func:`.names.parse` takes them; other names are left to other resolvers."""

    def __init__(self, generator: Generator):
        self.generator = generator
        self._misfits: dict[tuple[str, str], str | None] = {}

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """The request of the adapter that ``lora_name`` describes; vLLM sets its id.

        Raises VLLMValidationError (400) for a name of ours that describes none, or a served model (``base_model_name``) that
        the checkpoint does not fit; GracefulHTTPError (503) where there is no room.
        """
        with client_errors("model"):
            request = names.parse(lora_name)
            if request is None:
                return None
            job = await self.generator.job(request.checkpoint, request.description, "model")
            await self.check_fit(job.checkpoint, base_model_name)
            name, owner = names.lora_name(lora_name, job.key), names.digest(lora_name, job.key)
            self.generator.check(name, owner)
            folder = await self.generator.generate(job)
            self.generator.claim(name, owner)
        return LoRARequest(lora_name=name, lora_int_id=1, lora_path=str(folder))

    async def check_fit(self, checkpoint: Checkpoint, model: str) -> None:
        """ValueError unless the served ``model`` has the sizes that ``checkpoint`` is for; compared once."""
        asked = checkpoint.name, model
        if asked not in self._misfits:
            try:
                self._misfits[asked] = await asyncio.to_thread(misfit, checkpoint.engine.hypernetwork.config, model)
            except (OSError, ValueError) as error:  # asked again with the next sentence: a hub may have been out of reach
                logger.warning(
                    "checkpoint %r: sizes of the served model are not known and not compared: %s", checkpoint.name, error
                )
                return
        found = self._misfits[asked]
        if found is not None:
            raise ValueError(f"checkpoint {checkpoint.name!r}: {found}")
