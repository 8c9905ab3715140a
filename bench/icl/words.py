"""What tables and figures of the suite ``icl`` share: its entries by name, amounts, and in words when a way costs less."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from bench.markdown import number
from bench.rows import Result, ResultError
from t2l_engine.research import costs
from t2l_engine.research.costs import LABELS

#: Workloads of the list ``costs`` that are no benchmark.
PAPER, MEAN = "paper", "mean of ten benchmarks"
MODELS = {
    "mistral-7b": "Mistral-7B",
    "llama-3.1-8b": "Llama-3.1-8B",
    "gemma-2-2b": "Gemma-2-2B",
    "smollm2-135m": "SmolLM2-135M",
}
PHASES = ("describe", "generate", "merge", "prompt", "answer")
PREFIXES = {1e15: "P", 1e12: "T", 1e9: "G", 1e6: "M", 1e3: "k", 1: ""}
Entry = dict[str, Any]
#: What was timed, by its name in rows and in the list ``first_question``.
OURS, ICL, WARM, ALONE = "ours", LABELS["icl"], LABELS["icl-warm"], "question alone"
KEPT, MERGED = (f"{LABELS[way]}, later question" for way in ("t2l-task", "t2l-merged"))
#: What ours consists of, timed by itself beside it.
DESCRIBE, GENERATE, PUT = "part: text encoder", "part: hypernetwork", "part: into its slot"


def entries(result: Result, name: str) -> list[Entry]:
    """The list ``name`` of the suite; ResultError where it is missing or empty."""
    found = result.meta.get(name)
    if not found:
        raise ResultError(f"{result.path.name}: nothing under {name!r}")
    return found


def entry(result: Result, name: str, **where: Any) -> Entry:
    """The one of list ``name`` with these fields; ResultError where there is none."""
    for found in entries(result, name):
        if where.items() <= found.items():
            return found
    raise ResultError(f"{result.path.name}: {name}: none with {', '.join(f'{k} {v!r}' for k, v in where.items())}")


def models(result: Result, name: str = "costs") -> list[str]:
    return list(dict.fromkeys(found["model"] for found in entries(result, name)))


def benchmarks(result: Result) -> list[str]:
    """Names of the workloads that are the paper's benchmarks."""
    named = dict.fromkeys(found["workload"] for found in entries(result, "costs"))
    return [name for name in named if name not in (PAPER, MEAN)]


def phases_of(ways: Entry) -> list[str]:
    """The phases that take operations in any of ``ways``, in the order of a request."""
    return [name for name in PHASES if any(way["phases"].get(name, {}).get("flops") for way in ways.values())]


def title(model: str) -> str:
    return MODELS.get(model, model)


def lengths_of(workload: str) -> str:
    return "lengths implied by the paper" if workload == PAPER else workload


# --- amounts ---------------------------------------------------------------------------------------------------------


def amount(value: float, unit: str) -> str:
    """Three digits with a decimal prefix: 6.82 MB, 0 FLOP."""
    scale = next((scale for scale in PREFIXES if abs(value) >= scale), 1)
    return f"{number(value / scale)} {PREFIXES[scale]}{unit}"


def tflop(value: float) -> str:
    return number(value / 1e12)


def ms(us: float) -> str:
    return number(us / 1e3)


def ratio(x: float) -> str:
    """Another way over ours; in bold where the other costs less."""
    return f"{number(x)} x" if x >= 1 else f"**{number(x)} x**"


def spread(measured: Entry) -> str:
    """The median of a ratio, and between which values nine tenths of the rounds lie."""
    return f"{ratio(measured['median'])} ({number(measured['low'])}–{number(measured['high'])})"


def listed(words: Sequence[str]) -> str:
    """One, two and three."""
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]])) if words else "none"


# --- when one way costs less -----------------------------------------------------------------------------------------


class Linear(NamedTuple):
    """What a task costs by a way, in any unit: its first question, and each further one."""

    first: float
    later: float

    def total(self, questions: int) -> float:
        return self.first + (questions - 1) * self.later


Won = Sequence[int | None] | None


def won(ours: Linear, rival: Linear) -> Won:
    """For which numbers of questions ``ours`` costs less in all: (first, last), last None: without end; None: for none."""
    return costs.questions_won(ours, rival, float)


def when(questions: Won) -> str:
    """A cell."""
    return _when(questions, "never", "always", "", "")


def when_said(questions: Won) -> str:
    """The end of a sentence."""
    return _when(questions, "at no number of questions", "at every number of questions", "from ", " questions")


def _when(questions: Won, never: str, always: str, between: str, unit: str) -> str:
    if questions is None:
        return never
    first, last = questions
    if last is None:
        return always if first == 1 else f"from {first:,}{unit} on"
    return f"up to {last:,}{unit}" if first == 1 else f"{between}{first:,} to {last:,}{unit}"


# --- captions --------------------------------------------------------------------------------------------------------


def counted(result: Result) -> str:
    """Where figures come from that no machine has a part in."""
    meta = result.meta
    commit = "no commit" if meta["commit"] is None else f"commit {meta['commit']}"
    changed = " with uncommitted changes" if meta["dirty"] else ""
    file = f"`bench/results/{result.path.name}` (`{meta['command']}`)"
    return f"Counted, not measured; {meta['date']}, {commit}{changed}.  From {file}."
