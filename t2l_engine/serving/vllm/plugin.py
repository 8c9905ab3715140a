"""Registers the resolver with vLLM, and gives its adapters to the endpoint plugin."""

from __future__ import annotations

import multiprocessing
import sys
from typing import TYPE_CHECKING

from vllm import envs
from vllm.lora.resolver import LoRAResolverRegistry

from t2l_engine.serving.vllm.generator import Generator
from t2l_engine.serving.vllm.resolver import T2LResolver
from t2l_engine.serving.vllm.settings import Settings

if TYPE_CHECKING:
    from t2l_engine.serving.vllm.http import AdaptersEndpoint

NAME = "t2l"  # of the resolver
#: vLLM inspects a model's class in a process that loads plugins too, and that multiprocessing does not know as a child.
_INSPECTION = "vllm.model_executor.models.registry"


def register(settings: Settings) -> None:
    """Register a resolver if a checkpoint is set; with ``warmup`` the main process starts loading it.  May be called again.

    Raises ValueError if vLLM is set to answer unknown models by the base model.
    """
    if not settings.enabled or NAME in LoRAResolverRegistry.get_supported_resolvers():
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


def endpoint() -> AdaptersEndpoint:
    """The endpoint plugin with the adapters of the registered resolver; RuntimeError if there is none."""
    from t2l_engine.serving.vllm.http import AdaptersEndpoint

    if NAME not in LoRAResolverRegistry.get_supported_resolvers():
        raise RuntimeError("t2l_http: expected T2L_VLLM_CHECKPOINT, and t2l beside t2l_http in VLLM_PLUGINS")
    resolver = LoRAResolverRegistry.get_resolver(NAME)
    assert isinstance(resolver, T2LResolver)
    return AdaptersEndpoint(resolver)
