"""vLLM's Triton kernels on the CPU, by Triton's interpreter: prints the relative errors of their calls in bench."""

import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch
import triton

from bench import cases, vllm_ops
from t2l_engine.testing import numerics

CPU, F16 = torch.device("cpu"), torch.float16  # the interpreter computes in NumPy, which has no bfloat16
LAYERS = {
    "one": cases.Layer.linear(64),
    "packed": cases.Layer("packed", (cases.Group.packed(64, q=64, k=32, v=32),)),
    "gap": cases.Layer("gap", (cases.Group.packed(64, q=64, k_=32, v=32), cases.Group.packed(96, down=64))),
}
SEGMENTS = {"decode": cases.rows(0, -1, 2, 2, 1), "prefill": cases.ragged(40, 3), "long": cases.ragged(300, 2)}


def with_triton() -> None:
    """vLLM for a CPU leaves Triton alone, since it finds no driver."""
    import vllm.triton_utils

    vllm.triton_utils.triton, vllm.triton_utils.tl, vllm.triton_utils.HAS_TRITON = triton, triton.language, True


def errors(case: cases.Case, way) -> list[float]:
    operands = cases.operands(case, CPU, seed=1)
    exact = operands.exact()
    way(operands.groups)()
    return [numerics.relative_frobenius(member["y"], right) for member, right in zip(operands.members, exact, strict=True)]


if __name__ == "__main__":
    with_triton()
    assert vllm_ops.absent(F16) is None and "16 bits" in vllm_ops.absent(torch.float32), vllm_ops.absent(F16)
    made = {}
    for name, layer in LAYERS.items():
        for kind, segments in SEGMENTS.items():
            made[f"{name}, {kind}"] = errors(cases.Case(layer, segments, dtype=F16), vllm_ops.grouped)
    json.dump(made, sys.stdout)
