"""Adapters for vLLM's LLM class, which has no resolvers."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

from vllm import envs
from vllm.lora.request import LoRARequest

from t2l_engine.engine import DocToLoRA, TextToLoRA
from t2l_engine.serving import names
from t2l_engine.serving.checkpoints import Checkpoint
from t2l_engine.serving.store import AdapterStore
from t2l_engine.serving.vllm import hooks
from t2l_engine.serving.vllm.fit import misfit
from t2l_engine.serving.vllm.memory import own_hypernetwork
from t2l_engine.serving.vllm.settings import MEMORY, PREFIX, Settings

#: This package's plugin, of the group vllm.general_plugins.
PLUGIN = "t2l"
#: vLLM takes adapters of one lora_int_id for the same, and callers count their own from 1.
_numbers = itertools.count(1 << 20)
_ids: dict[str, int] = {}  # lora_name -> lora_int_id, for the whole process
_open = functools.cache(AdapterStore)  # stays open: its lock keeps the folders of this process


def lora_requests(
    engine: TextToLoRA,
    texts: Sequence[str] = (),
    base: str | None = None,
    *,
    documents: Sequence[str] = (),
    settings: Settings | None = None,
) -> list[LoRARequest]:
    """A request per text and document for ``LLM.generate(prompts, sampling_params, lora_request=requests)``, a prompt each.

    The same text always gives the same request.  Every call hashes the weights of ``engine`` once: pass many texts at once.

    Args:
        base: the LLM's model, a folder or hub name; its sizes are compared with the checkpoint's.  None: not compared.
        documents: for a :class:`DocToLoRA`; their requests follow those of ``texts``.  The LLM's ``max_lora_rank`` must hold
            the ranks of all, or its engine ends: see ``t2l serve-flags --chunks``.
        settings: None = those of the environment.  In mode "memory" the workers generate the weights, so ``engine``
            must have one of its checkpoints.

    Raises:
        ValueError: no list of texts, a text that the encoder refuses, documents for an engine that reads none, a model of
            other sizes, another checkpoint, or mode "memory" in ``settings`` alone: workers read the environment.
        Unavailable: the store has no room.
    """
    if documents and not isinstance(engine, DocToLoRA):
        raise ValueError(f"documents: expected an engine that reads documents, got a {type(engine).__name__}")
    settings = Settings.from_environment() if settings is None else settings
    if settings.mode == MEMORY:
        _expect_workers_that_generate()
        settings = hooks.install(settings)  # mode "disk" if this vLLM's workers cannot
    checkpoint = Checkpoint.of(engine, "offline")
    if base is not None and (found := misfit(engine.hypernetwork.config, base)) is not None:
        raise ValueError(f"base: {found}")
    if settings.mode == MEMORY:
        own_hypernetwork(checkpoint.hash, settings)
    store = _open(settings.store, settings.store_bytes, settings.mode == MEMORY)
    found = checkpoint.folders(texts, store) + checkpoint.folders(documents, store, "documents")
    named = [(names.adapter_id(key), str(folder)) for key, folder in found]
    return [LoRARequest(name, _ids.setdefault(name, next(_numbers)), folder) for name, folder in named]


def _expect_workers_that_generate() -> None:
    """ValueError unless workers generate weights: the engine would end at a folder without any."""
    if Settings.from_environment().mode != MEMORY:
        raise ValueError(f"settings: mode {MEMORY!r} needs {PREFIX}MODE={MEMORY} in the environment, which the workers read")
    if envs.VLLM_PLUGINS is not None and PLUGIN not in envs.VLLM_PLUGINS:
        raise ValueError(
            f"VLLM_PLUGINS: expected {PLUGIN} among them for mode {MEMORY!r}, got {','.join(envs.VLLM_PLUGINS)}"
        )
