"""Methods to serve a batch that ``python -m bench serving`` times beside each other, and the cases; pages read them too."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from bench.records import BASE, COMPILED, OURS, OURS_ALL

STOCK, STOCK_TARGET = "vLLM", "vLLM, target modules"
MERGED = "merged"
PEFT, LLAMA_CPP, OPENVINO = "PEFT", "llama.cpp", "OpenVINO GenAI"
#: What sentences ask for: each task with each wish, then each again under another number.
TASKS = (
    *("Translate the text into French", "Write the words in reverse order"),
    *("Say whether the review is positive or negative", "Count the letters of the word", "Name the capital of the country"),
    *("Add the two numbers", "Repeat the last word of the list", "Write the text in capital letters"),
)
WISHES = ("", " as JSON", " in one word", " politely", " and explain why", " for a child", " twice", ", nothing else")


def sentences(count: int) -> list[str]:
    """Different ones, always the same."""
    made = [f"{task}{wish}" for wish in WISHES for task in TASKS]
    return [f"{made[i % len(made)]}{f', item {i // len(made)}' if i >= len(made) else ''}." for i in range(count)]


class Method(NamedTuple):
    """``targets``: vLLM wraps the adapters' linears alone; ``kernels``: ours below; ``merged``: all rows have adapter 0.

    ``vllm``: else it is one of :data:`bench.serving_systems.SYSTEMS`.
    """

    lora: bool = False
    targets: bool = False
    kernels: bool = False
    eager: bool = False
    merged: bool = False
    vllm: bool = True

    @property
    def reference(self) -> str:
        """vLLM without LoRA, compiled where this is, whose tokens rows without an adapter must have."""
        return BASE if self.eager or (self.lora and not self.kernels) else COMPILED


#: By name, in the order of tables.  vLLM compiles by default, but not with its own LoRA on a CPU.
METHODS = {
    BASE: Method(eager=True),
    COMPILED: Method(),
    MERGED: Method(merged=True),
    OURS: Method(lora=True, targets=True, kernels=True),
    OURS_ALL: Method(lora=True, kernels=True),
    STOCK_TARGET: Method(lora=True, targets=True),
    STOCK: Method(lora=True),
    **dict.fromkeys((PEFT, LLAMA_CPP, OPENVINO), Method(lora=True, vllm=False)),
}
OF_VLLM = tuple(name for name, method in METHODS.items() if method.vllm)
UNMERGED = tuple(name for name in OF_VLLM if name != MERGED)


@dataclasses.dataclass(frozen=True)
class Case:
    """Row i has adapter i, every ``stride``-th alone (0: none), or 0 if ``same``; ``target``: times the time of a method."""

    name: str
    requests: int
    methods: tuple[str, ...] = UNMERGED
    stride: int = 1
    same: bool = False
    target: tuple[float, str] | None = None

    def rows(self, method: str) -> list[int | None]:
        """The adapter of every row; None: the base model."""
        if METHODS[method].merged or (self.same and METHODS[method].lora):
            return [0] * self.requests
        adapted = range(0, self.requests, self.stride) if self.stride and METHODS[method].lora else ()
        return [i if i in adapted else None for i in range(self.requests)]


class Load(NamedTuple):
    """Cases with so many ``adapters`` loaded; ``tokens`` of a prompt and of an answer; ``passes`` over all methods and back.

    ``starts``: of every process; where its memory lies can make one slow for its whole life.
    ``eager``: nothing is compiled, so that a tiny run starts fast.
    """

    name: str
    adapters: int
    cases: tuple[Case, ...]
    tokens: int = 64
    starts: int = 1
    passes: int = 1
    eager: bool = False


NONE, HALF = "8 requests, none adapted", "64 requests, every other adapted"
EIGHT, MANY = "8 requests, 8 adapters", "64 requests, 64 adapters"
#: Shares of the tokens per second of another method that ours must reach, as times.
OF_BASE, OF_BASE_UNUSED = ((round(1 / share, 4), COMPILED) for share in (0.95, 0.98))
FEW = (
    Case(EIGHT, 8, OF_VLLM, target=OF_BASE),
    Case(NONE, 8, stride=0, target=OF_BASE_UNUSED),
    Case("1 request, 1 adapter", 1, OF_VLLM),
)
#: The same work in every system.
COMPARED = tuple(
    Case(f"systems: {name}", 8, (BASE, COMPILED, OURS, STOCK_TARGET, PEFT, LLAMA_CPP, OPENVINO), **of)
    for name, of in (("no adapter", {"stride": 0}), ("one adapter", {"same": True}), ("8 adapters", {}))
)
FULL = (
    Load("8 adapters", 8, FEW, starts=2, passes=3),
    Load("64 adapters", 64, (Case(MANY, 64, target=OF_BASE), Case(HALF, 64, stride=2, target=OF_BASE))),
    Load("systems", 8, COMPARED, passes=2),
)
TINY = (Load("8 adapters", 8, (Case(EIGHT, 8, (COMPILED, OURS, STOCK_TARGET)),), tokens=8, eager=True),)
