"""What the tests of ops share: which backend has kernels, and what runs under every instruction set and schedule."""

import pytest
import torch

from t2l_engine import ops
from t2l_engine.testing.cases import GROUP_CASES, HYPER_CASES, LORA_CASES, LoraCase

by_name = {"ids": lambda case: case.name}
kernel_case = pytest.mark.kernel_case  # what runs under every instruction set, schedule and sanitizer
SMALL = LoraCase("small", ((2, 0), (1, -1), (3, 1)), in_features=6, out_features=5, rank=2, adapters=2)


def kernel_cases(*without: str) -> int:
    """At least so many tests of cases whose names have none of the words: three of LoRA or hypernetwork, one of a group."""
    count = lambda cases: sum(not any(word in case.name for word in without) for case in cases)  # noqa: E731
    return 3 * count(LORA_CASES) + count(GROUP_CASES) + 3 * count(HYPER_CASES)


def is_native(op: str = "lora_add_") -> bool:
    """Whether operands on the default device are a kernel's."""
    return ops.has_kernel(op, "CUDA" if torch.get_default_device().type == "cuda" else "CPU")


def needs_native(why: str) -> None:
    if not is_native():
        pytest.skip(why)
