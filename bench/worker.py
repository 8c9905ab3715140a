"""One side of ``python -m bench compare``: writes a line about itself, then answers a case with microseconds a call.

It is started as the text of a command in trees that know nothing of it: it imports public names of t2l_engine alone.
"""

import functools
import gc
import json
import math
import os
import sys
import time

import torch
from torch import nn

import t2l_engine as t2l

#: Seconds of untimed calls before a sample; microseconds of one.
SETTLE_S, SAMPLE_US = 0.05, 10_000.0
F32, BF16 = torch.float32, torch.bfloat16


def randn(*shape, dtype=F32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def lora(tokens, adapters, features, dtype):
    """Arguments of ``lora_add_``: as many tokens for each adapter, in order."""
    return {
        "y": randn(tokens, features, dtype=dtype),
        "x": randn(tokens, features, dtype=dtype, seed=1),
        "lora_A": (randn(adapters, 8, features) * features**-0.5).to(dtype),
        "lora_B": randn(adapters, 8, features, dtype=dtype).mT,
        "scaling": torch.ones(adapters),
        "seg_indptr": torch.arange(0, tokens + 1, tokens // adapters, dtype=torch.int32),
        "seg_adapters": torch.arange(adapters, dtype=torch.int32),
        "max_seg_len": tokens // adapters,
        "ranks": torch.full((adapters,), 8, dtype=torch.int32),
    }


def lora_add(*size):
    return functools.partial(t2l.ops.lora_add_, **lora(*size))


def backward(*size):
    """``lora_delta`` forward and backward."""
    arguments = lora(*size)
    grad, leaves = arguments.pop("y"), [arguments[name] for name in ("x", "lora_A", "lora_B")]
    for leaf in leaves:
        leaf.requires_grad_()
    return lambda: torch.autograd.grad(t2l.ops.lora_delta(**arguments), leaves, grad)


def generate(variant, dtype, count):
    """Adapters for SmolLM2-135M's ``q_proj`` and ``v_proj``."""
    sizes = {"in_features": (576, 576), "out_features": (576, 192), "num_layers": 30, "rank": 8, "embed_dim": 384}
    torch.manual_seed(0)
    config = t2l.HyperNetworkConfig(
        variant=variant, modules=("q_proj", "v_proj"), latent_size=128, head_in_size=512, lora_alpha=16.0, **sizes
    )
    net = t2l.HyperNetwork(config).requires_grad_(False).eval().set_dtype(dtype)
    return functools.partial(net.generate, nn.functional.normalize(randn(count, 384), dim=-1) * 384**0.5)


class Block(nn.Module):
    """The adapted linears of a decoder's layer: the rest of it is not this engine's."""

    def __init__(self, width):
        super().__init__()
        self.q_proj, self.v_proj = (nn.Linear(width, width, bias=False) for _ in range(2))

    def forward(self, x):
        return x + self.q_proj(x).tanh() * self.v_proj(x).tanh()


def decode(rows, adapters):
    """A decode step of a tiny random model with an adapter a row."""
    width, layers = 256, 4
    model = nn.Sequential(*(Block(width) for _ in range(layers))).requires_grad_(False)
    A, B = ({name: randn(adapters, layers, 8, width) * 0.05 for name in ("q_proj", "v_proj")} for _ in range(2))
    stack = t2l.AdapterStack(A, {name: side.mT.contiguous() for name, side in B.items()}, torch.ones(adapters))
    t2l.attach(model, stack).set([row % adapters for row in range(rows)])
    return functools.partial(model, randn(rows, 1, width))


#: Name -> what makes the call that is timed.
CASES = {
    "lora_add_ 8x8, 576, float32": functools.partial(lora_add, 8, 8, 576, F32),
    "lora_add_ 64x64, 2048, bfloat16": functools.partial(lora_add, 64, 64, 2048, BF16),
    "lora_add_ 512x8, 2048, bfloat16": functools.partial(lora_add, 512, 8, 2048, BF16),
    "lora_delta 512x8, 576, forward and backward": functools.partial(backward, 512, 8, 576, F32),
    "generate L float32, 1": functools.partial(generate, "L", F32, 1),
    "generate L float32, 8": functools.partial(generate, "L", F32, 8),
    "generate L bfloat16, 1": functools.partial(generate, "L", BF16, 1),
    "generate M bfloat16, 8": functools.partial(generate, "M", BF16, 8),
    "decode step, 1 row, 1 adapter": functools.partial(decode, 1, 1),
    "decode step, 8 rows, 8 adapters": functools.partial(decode, 8, 8),
}


def elapsed(call, count):
    """Microseconds a call, of ``count`` in a row, after one that is not timed."""
    call()
    start = time.perf_counter_ns()
    for _ in range(count):
        call()
    return (time.perf_counter_ns() - start) / 1e3 / count


def settle(call):
    """Call for a while: threads of another process spin after its last call, and would slow whoever comes next."""
    settled = time.perf_counter() + SETTLE_S
    while time.perf_counter() < settled:
        call()


@functools.cache
def prepared(name):
    """A call, and how many fill a sample."""
    call = CASES[name]()
    return call, max(1, math.ceil(SAMPLE_US / min(elapsed(call, 3) for _ in range(3))))


def main():
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what else is printed must not be taken for an answer
    torch.set_num_threads(int(sys.argv[1]))
    about = {"package": os.path.dirname(t2l.__file__), "native": t2l.ops.NATIVE}
    print(json.dumps(about), file=answers)
    gc.disable()
    for line in sys.stdin:
        name = json.loads(line)
        with torch.inference_mode("lora_delta" not in name):
            call, count = prepared(name)
            settle(call)
            print(json.dumps(elapsed(call, count)), file=answers)


if __name__ == "__main__":
    main()
