"""T2LResolver: vLLM asks it for unknown models, and it answers descriptions with adapters."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from http import HTTPStatus

from vllm.exceptions import GracefulHTTPError, VLLMServerError, VLLMValidationError
from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver

from t2l_engine.serving import names
from t2l_engine.serving.checkpoints import Checkpoint
from t2l_engine.serving.store import Unavailable
from t2l_engine.serving.vllm.fit import misfit
from t2l_engine.serving.vllm.generator import Generator, logger

#: Seconds until the sizes of a model are looked up again after a failure.
ASK_AGAIN = 60.0


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
        self._ask_again: dict[tuple[str, str], float] = {}
        self._comparing = asyncio.Lock()

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """The request of the adapter that ``lora_name`` describes; vLLM sets its id.

        Raises VLLMValidationError (400) for an invalid description, or a checkpoint that does not fit the served model
        ``base_model_name``; GracefulHTTPError (503) if there is no room.
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
        async with self._comparing:  # one comparison for all requests that wait
            if asked not in self._misfits and time.monotonic() >= self._ask_again.get(asked, 0):
                try:
                    self._misfits[asked] = await asyncio.to_thread(misfit, checkpoint.engine.hypernetwork.config, model)
                except (OSError, ValueError) as error:  # the hub may be unreachable for a while
                    self._ask_again[asked] = time.monotonic() + ASK_AGAIN
                    logger.warning(
                        "checkpoint %r: sizes of the served model are not known and not compared: %s", checkpoint.name, error
                    )
        found = self._misfits.get(asked)
        if found is not None:
            raise ValueError(f"checkpoint {checkpoint.name!r}: {found}")
