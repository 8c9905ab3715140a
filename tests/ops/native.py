"""What the tests of ops share: which backend has kernels, and what runs under every instruction set and schedule."""

import pytest
import torch

from t2l_engine import ops
from t2l_engine.testing.cases import LoraCase

by_name = {"ids": lambda case: case.name}
kernel_case = pytest.mark.kernel_case  # what runs under every instruction set, schedule and sanitizer
SMALL = LoraCase("small", ((2, 0), (1, -1), (3, 1)), in_features=6, out_features=5, rank=2, adapters=2)


def is_native(op: str = "lora_add_") -> bool:
    """Whether operands on the default device are a kernel's."""
    return ops.has_kernel(op, "CUDA" if torch.get_default_device().type == "cuda" else "CPU")


def needs_native(why: str) -> None:
    if not is_native():
        pytest.skip(why)


def with_threads(count, call):
    """What ``call`` returns with ``count`` threads of torch, which the CPU kernels run on; more than cores will do."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(count)
        return call()
    finally:
        torch.set_num_threads(before)
