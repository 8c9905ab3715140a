"""Methods to serve a batch that ``python -m bench serving`` times beside each other, and the cases; pages read them too."""

from __future__ import annotations

import dataclasses

from bench.records import BASE, COMPILED, OURS, OURS_ALL

STOCK, STOCK_QV = "vLLM", "vLLM, target modules"
MERGED = "merged"
#: What the checkpoint adapts: vLLM's ``lora_target_modules``.
MODULES = ("q_proj", "v_proj")


@dataclasses.dataclass(frozen=True)
class Method:
    """A server.  ``modules``: what vLLM wraps, None: every layer; ``kernels``: ours under vLLM's LoRA layers.

    ``once``: it stands beside, and is not started anew.
    """

    about: str
    lora: bool = False
    modules: tuple[str, ...] | None = None
    kernels: bool = False
    eager: bool = True
    merged: bool = False
    own: bool = False
    once: bool = False


#: By name, in the order of tables.
METHODS = {
    BASE: Method("vLLM without LoRA, eager"),
    COMPILED: Method("vLLM without LoRA, compiled, which it is not with LoRA", eager=False, once=True),
    MERGED: Method("vLLM, one adapter for all rows merged into the weights", merged=True, once=True),
    OURS: Method("our kernels in vLLM, target modules given", lora=True, modules=MODULES, kernels=True, own=True),
    OURS_ALL: Method("our kernels in vLLM, every layer wrapped", lora=True, kernels=True, own=True),
    STOCK_QV: Method("vLLM's own LoRA, target modules given", lora=True, modules=MODULES),
    STOCK: Method("vLLM's own LoRA, every layer wrapped", lora=True),
}
IN_VLLM = (BASE, COMPILED, OURS, OURS_ALL, STOCK_QV, STOCK)


@dataclasses.dataclass(frozen=True)
class Case:
    """A batch: row i has adapter i, every ``stride``-th row alone; 0: none has one.

    ``target``: ours may take so many times the time of that method.
    """

    name: str
    requests: int
    methods: tuple[str, ...]
    stride: int = 1
    target: tuple[float, str] | None = None

    def rows(self, method: str) -> list[int | None]:
        """The adapter of every row; None: the base model."""
        if METHODS[method].merged:
            return [0] * self.requests
        adapted = range(0, self.requests, self.stride) if self.stride and METHODS[method].lora else ()
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
#: Shares of the tokens per second of another method that ours must reach, as times.
OF_BASE, OF_STOCK, OF_BASE_UNUSED = (round(1 / 0.93, 4), BASE), (round(1 / 1.5, 4), STOCK_QV), (round(1 / 0.97, 4), BASE)
FULL = Load(
    {
        8: (
            Case(EIGHT, 8, tuple(METHODS), target=OF_BASE),
            Case(NONE, 8, IN_VLLM, stride=0, target=OF_BASE_UNUSED),
            Case("1 request, 1 adapter", 1, tuple(METHODS)),
        ),
        64: (Case(MANY, 64, IN_VLLM, target=OF_STOCK), Case(HALF, 64, IN_VLLM, stride=2, target=OF_STOCK)),
    },
    prompt=64,
    new=64,
    starts={8: 3, 64: 1},
)
TINY = Load({2: (Case("2 requests, 2 adapters", 2, (BASE, OURS, STOCK_QV)),)}, prompt=8, new=8, starts={2: 1})
