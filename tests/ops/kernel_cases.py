"""The tests that run on every backend and instruction set: their mark and number, and whether a native kernel runs."""

import pytest
import torch

from t2l_engine import ops
from t2l_engine.testing.cases import HYPER_CASES, HyperCase, LoraCase
from t2l_engine.testing.checks import CHECKS

by_name = {"ids": lambda case: case.name}
kernel_case = pytest.mark.kernel_case
SMALL = LoraCase("small", ((2, 0), (1, -1), (3, 1)), in_features=6, out_features=5, rank=2, adapters=2)
_TINY = {
    "task_width": 4, "width": 8, "head_in": 6, "in_features": 5, "out_features": 4, "rank": 2, "layers": 2, "tasks": 2,
}  # fmt: skip
#: Small enough for finite differences.
TINY_HYPERS = [HyperCase("L", **_TINY), HyperCase("M", sides=2, affine=True, **_TINY)] + [
    HyperCase(p, sides=2, position=p, bias=False, **_TINY) for p in ("learned", "rotary")
]
#: In names of cases: shapes of real models, which take most of the time.
LARGE = ("serve", "smollm2")
#: (op, case) of the ops that have native kernels.
VALUES = [(op, case) for op in ops.NATIVE_OPS for case in CHECKS[op][1]]
#: Cases whose trunk also encodes tasks, from embeddings of each of these widths.
ENCODED = [case for case in HYPER_CASES if case.position != "rotary" and not case.name.startswith("nine")]
EMBED_DIMS = (24, 37, 300)


def at_least(*without: str) -> int:
    """The number of tests of values whose names have none of the words: what a run in another process must reach."""
    cases = [case for _, case in VALUES] + ENCODED * (0 if "encoder" in without else len(EMBED_DIMS))
    return sum(not any(word in case.name for word in without) for case in cases)


def is_native(op: str = "lora_add_") -> bool:
    """Whether a native kernel takes operands on the default device."""
    return ops.has_kernel(op, "CUDA" if torch.get_default_device().type == "cuda" else "CPU")


def needs_native(why: str) -> None:
    if not is_native():
        pytest.skip(why)


def without_y(arguments: dict) -> dict:
    """Arguments of ``lora_delta`` from those of ``lora_add_``."""
    return {name: value for name, value in arguments.items() if name != "y"}


def with_threads(count, call):
    """What ``call`` returns with ``count`` threads of torch, which the CPU kernels run on; may be more than cores."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(count)
        return call()
    finally:
        torch.set_num_threads(before)
