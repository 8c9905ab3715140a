"""Ways to serve a batch that ``python -m bench serving`` times beside each other, and the cases; read by its pages, too."""

from __future__ import annotations

import dataclasses

from bench.records import ATTACHED, BASE, COMPILED, OURS, OURS_ALL

STOCK, STOCK_QV = "vLLM", "vLLM, target modules"
MERGED, PEFT = "merged", "PEFT mixed"
#: What the checkpoint adapts: vLLM's ``lora_target_modules``.
MODULES = ("q_proj", "v_proj")


@dataclasses.dataclass(frozen=True)
class Arm:
    """A server.  ``modules``: what vLLM wraps, None: every layer; ``kernels``: ours under vLLM's LoRA layers.

    ``once``: it stands beside, and is not started anew.
    """

    about: str
    engine: str = "vllm"
    lora: bool = False
    modules: tuple[str, ...] | None = None
    kernels: bool = False
    eager: bool = True
    merged: bool = False
    own: bool = False
    once: bool = False

    @property
    def adapts(self) -> bool:
        """Whether rows have adapters of their own."""
        return self.lora or self.engine != "vllm"


#: By name, in the order of tables.
ARMS = {
    BASE: Arm("vLLM without LoRA, eager"),
    COMPILED: Arm("vLLM without LoRA, compiled, which it is not with LoRA", eager=False, once=True),
    MERGED: Arm("vLLM, one adapter for all rows merged into the weights", merged=True, once=True),
    OURS: Arm("our kernels in vLLM, target modules given", lora=True, modules=MODULES, kernels=True, own=True),
    OURS_ALL: Arm("our kernels in vLLM, every layer wrapped", lora=True, kernels=True, own=True),
    STOCK_QV: Arm("vLLM's own LoRA, target modules given", lora=True, modules=MODULES),
    STOCK: Arm("vLLM's own LoRA, every layer wrapped", lora=True),
    ATTACHED: Arm("transformers' generate with t2l_engine.attach", engine="attach", own=True, once=True),
    PEFT: Arm("transformers' generate with a mixed batch of PEFT", engine="peft", once=True),
}
IN_VLLM = (BASE, COMPILED, OURS, OURS_ALL, STOCK_QV, STOCK)


@dataclasses.dataclass(frozen=True)
class Case:
    """A batch: row i has adapter i, every ``stride``-th row alone; 0: none has one.  ``passes``: of both orders, a start."""

    name: str
    requests: int
    arms: tuple[str, ...]
    stride: int = 1
    passes: int = 1

    def rows(self, arm: str) -> list[int | None]:
        """The adapter of every row; None: the base model."""
        if ARMS[arm].merged:
            return [0] * self.requests
        adapted = range(0, self.requests, self.stride) if self.stride and ARMS[arm].adapts else ()
        return [i if i in adapted else None for i in range(self.requests)]


@dataclasses.dataclass(frozen=True)
class Load:
    """``cases`` by the number of adapters, all loaded before; tokens of a prompt and an answer; starts, by that number."""

    cases: dict[int, tuple[Case, ...]]
    prompt: int
    new: int
    starts: dict[int, int]


NONE, HALF = "8 requests, none adapted", "64 requests, every other adapted"
EIGHT, MANY = "8 requests, 8 adapters", "64 requests, 64 adapters"
FULL = Load(
    {
        8: (
            Case(EIGHT, 8, tuple(ARMS)),
            Case(NONE, 8, IN_VLLM, stride=0),
            Case("1 request, 1 adapter", 1, tuple(ARMS)),
        ),
        64: (Case(MANY, 64, IN_VLLM), Case(HALF, 64, IN_VLLM, stride=2)),
    },
    prompt=64,
    new=64,
    starts={8: 3, 64: 1},
)
TINY = Load({2: (Case("2 requests, 2 adapters", 2, (BASE, OURS, STOCK_QV)),)}, prompt=8, new=8, starts={2: 1})
