"""``t2l serve-flags``: how to start vLLM for a checkpoint."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from t2l_engine.cli.common import Json, print_json, say
from t2l_engine.hypernetwork import checkpoint as checkpoints
from t2l_engine.hypernetwork.config import TokenConfig
from t2l_engine.hypernetwork.folder import bundled_checkpoints, resolve_checkpoint
from t2l_engine.serving.vllm.settings import Settings

#: Values that vLLM takes for --max-lora-rank.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
ENDPOINTS = {"chat": "/v1/chat/completions", "raw": "/v1/completions"}


def serve_flags(
    checkpoints: Annotated[
        list[str], typer.Argument(metavar="CHECKPOINT...", help="Bundled checkpoint names, or folders; first the default.")
    ],
    max_loras: Annotated[int, typer.Option(min=1, help="Max adapters per batch; leave one slot for loading.")] = 8,
    max_cpu_loras: Annotated[
        int, typer.Option(min=1, help="Adapters cached in memory; others are read from disk again.")
    ] = 256,
    chunks: Annotated[int, typer.Option(min=1, help="Most chunks of a document, which set the largest rank.")] = 1,
    as_json: Json = False,
) -> None:
    """Print vLLM's flags for a checkpoint, or for several together, in one line.

    python -m vllm.entrypoints.openai.api_server --model MODEL $(t2l serve-flags CHECKPOINT) starts a server with them.

    The variables to set and the endpoint that fits the first checkpoint's prompts go to standard error; --json prints an
    object with flags, environment, endpoint and description_in_prompt.
    """
    if max_cpu_loras < max_loras:
        raise ValueError(f"--max-cpu-loras: expected at least --max-loras, {max_loras}, got {max_cpu_loras}")
    about = collect(checkpoints, max_loras, max_cpu_loras, chunks)
    if as_json:
        print_json(about)
        return
    typer.echo(shlex.join(about["flags"]))
    say("environment: " + " ".join(f"{name}={shlex.quote(value)}" for name, value in about["environment"].items()))
    say(f"endpoint: {about['endpoint']}" + (", with the description in the prompt" * about["description_in_prompt"]))


def collect(sources: Sequence[str], max_loras: int, max_cpu_loras: int, chunks: int = 1) -> dict[str, Any]:
    """Flags and variables for adapters of all ``sources``; the endpoint is that of the first, the default."""
    folders = [resolve_checkpoint(source) for source in sources]
    found = [checkpoints.read(folder) for folder in folders]
    if chunks > 1 and not any(isinstance(of.config, TokenConfig) for of in found):
        raise ValueError(f"--chunks: expected a checkpoint that reads documents, got {list(sources)}")
    ranks = [of.config.total_rank(chunks) if isinstance(of.config, TokenConfig) else of.config.rank for of in found]
    for folder, config, rank in zip(folders, [of.config for of in found], ranks, strict=True):
        if rank > VLLM_RANKS[-1]:
            error = f"{folder}: rank {rank}: vLLM takes adapters up to rank {VLLM_RANKS[-1]}"
            if isinstance(config, TokenConfig):
                error += f": --chunks: expected at most {max(0, VLLM_RANKS[-1] // config.rank - config.bias)}, got {chunks}"
            raise ValueError(error)
    rank = next(rank for rank in VLLM_RANKS if rank >= max(ranks))
    modules = dict.fromkeys(path.rpartition(".")[2] for of in found for path in of.config.module_paths.values())
    names = [s if s in bundled_checkpoints() else str(folder.resolve()) for s, folder in zip(sources, folders, strict=True)]
    flags = ["--enable-lora", "--max-lora-rank", rank, "--max-loras", max_loras, "--max-cpu-loras", max_cpu_loras]
    # Decoding without the penalties of the model's generation_config.json, as in training and evaluation.
    flags += ["--generation-config", "vllm", "--lora-target-modules", *modules]
    environment = {"T2L_VLLM_CHECKPOINT": ",".join(names), "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    known = Settings.from_environment(environment).checkpoints  # as the server reads it
    if list(known.values()) != names:
        raise ValueError(f"CHECKPOINT: expected folders without ',' and spaces at the ends of their paths, got {names}")
    return {
        "flags": [str(flag) for flag in flags],
        "environment": environment,
        "endpoint": ENDPOINTS[found[0].prompt_form],
        "description_in_prompt": checkpoints.has_described_prompts(found[0].blocks),
    }
