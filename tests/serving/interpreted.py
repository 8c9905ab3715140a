"""A rival's Triton kernels on the CPU, by Triton's interpreter: prints the relative errors of its calls in bench.

``interpreted.py vllm`` or ``interpreted.py sglang``.
"""

import importlib.machinery
import importlib.util
import json
import os
import sys
import types

os.environ["TRITON_INTERPRET"] = "1"

import torch
import triton

from bench import cases, sglang_ops, vllm_ops
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


def without_the_rest() -> None:
    """SGLang's kernels as they are installed, without the server around them, which needs CUDA's packages.

    What they take from it: a cache of compiled kernels, which the CPU has no use for, the name of the device, by which
    tuned sizes are looked up, and a type of an annotation.
    """
    (home,) = importlib.util.find_spec("sglang").submodule_search_locations

    def module(name: str, **has: object) -> None:
        made = types.ModuleType(name)
        made.__spec__, made.__path__ = importlib.machinery.ModuleSpec(name, None), [os.path.join(home, *name.split(".")[1:])]
        made.__dict__.update(has)
        sys.modules[name] = made

    for name in ("", ".kernels", ".kernels.ops", ".kernels.ops.lora", ".kernels.ops.lora.dense", ".srt", ".srt.lora"):
        module("sglang" + name)
    module("sglang.srt.utils", cached_triton_kernel=lambda key: lambda kernel: kernel, get_device_name=lambda: "CPU")
    module("sglang.srt.lora.utils", LoRABatchInfo=object)


def ways(rival: str, tokens: int) -> dict:
    """Name -> a call of the groups of a case."""
    if rival == "vllm":
        return {vllm_ops.NAME: vllm_ops.grouped}
    of = sglang_ops.ways(tokens)
    return {name: lambda groups, most=most: sglang_ops.grouped(groups, most) for name, most in of.items()}


def errors(case: cases.Case, way) -> list[float]:
    operands = cases.operands(case, CPU, seed=1)
    exact = operands.exact()
    way(operands.groups)()
    return [numerics.relative_frobenius(member["y"], right) for member, right in zip(operands.members, exact, strict=True)]


if __name__ == "__main__":
    rival = sys.argv[1]
    {"vllm": with_triton, "sglang": without_the_rest}[rival]()
    module = {"vllm": vllm_ops, "sglang": sglang_ops}[rival]
    assert module.absent(F16) is None and "16 bits" in module.absent(torch.float32), module.absent(F16)
    made = {}
    for name, layer in LAYERS.items():
        for kind, segments in SEGMENTS.items():
            case = cases.Case(layer, segments, dtype=F16)
            for way, call in ways(rival, case.tokens).items():
                made[f"{way}, {name}, {kind}"] = errors(case, call)
    json.dump(made, sys.stdout)
