"""The dtype in which language models run on this machine, unless it is stated.

Many CPUs have no instructions for bfloat16: torch then multiplies it several times more slowly than float32, and whatever
reads many tokens at once (texts, prompts, batches of training) is slower too, though bfloat16 has half the bytes.
"""

from __future__ import annotations

import functools
import time

import torch
from torch import nn

from t2l_engine.text.config import DocumentEncoderConfig, EncoderConfig

TOKENS, WIDTH = 32, 512  # of a small layer that reads a sentence
ROUNDS = 3  # the best counts


@functools.cache
def gflops() -> dict[str, float]:
    """GFLOP/s of torch's matrix products on the CPU in "float32" and "bfloat16", measured once a process, in some 10 ms."""
    seconds: dict[str, float] = {}
    with torch.inference_mode():
        ones = torch.ones(TOKENS + WIDTH, WIDTH)
        operands = {"float32": ones, "bfloat16": ones.bfloat16()}
        for _ in range(ROUNDS + 1):  # the first prepares kernels
            for name, both in operands.items():
                start = time.perf_counter()
                nn.functional.linear(both[:TOKENS], both[TOKENS:])
                seconds[name] = min(seconds.get(name, float("inf")), time.perf_counter() - start)
    return {name: 2e-9 * TOKENS * WIDTH**2 / best for name, best in seconds.items()}


def preferred(device: str | torch.device = "cpu") -> torch.dtype:
    """bfloat16, or float32 on a CPU that multiplies it faster."""
    rates = gflops() if torch.device(device).type == "cpu" else {"bfloat16": 1.0, "float32": 0.0}
    return torch.bfloat16 if rates["bfloat16"] >= rates["float32"] else torch.float32


def of(config: EncoderConfig | DocumentEncoderConfig, device: str | torch.device = "cpu") -> torch.dtype:
    """The dtype that ``config`` states, or instead of bfloat16 what is :func:`preferred`: float32 holds the same numbers."""
    return preferred(device) if config.dtype == "bfloat16" else getattr(torch, config.dtype)
