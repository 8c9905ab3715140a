"""Result files, ``bench/results``, read and judged: what tables, pages and figures are made from.

``SUITE.CLASS.jsonl`` is of a class of CPUs, ``SUITE-cuda.jsonl`` of a card, ``SUITE.jsonl`` of what no CPU's speed decides.
The first line is the run; every other line is one record, a row of times or something of another kind.  Times are in
microseconds.  Ratios, speedups and whether a target is met are computed here and stored nowhere.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

OURS = "ours"
#: The model without adapters: what a target may refer to; no competitor.
BASE = "base"
#: In the case of a row that generates over earlier adapters, and what the same call into new memory is beside it.
PREALLOCATED, FRESH = "preallocated output", "fresh output"
#: What runs of a card time beside ours: ours called otherwise, bounds, and a part of a request.
HOST = "ours, from the host"
#: In vLLM or beside it: without LoRA but compiled, ours where vLLM wraps every layer, and ours in transformers.
COMPILED, OURS_ALL, ATTACHED = "base, compiled", "ours, every layer", "ours, transformers"
BESIDE = (
    BASE,
    FRESH,
    HOST,
    COMPILED,
    OURS_ALL,
    ATTACHED,
    "ours, a launch a linear",
    "ours, ops alone",
    "copy",
    "head weights",
    "text encoder",
)
#: What the runs of a card add to the name of their suite.
CUDA = "-cuda"
#: Suites whose results are times of a CPU: a file for each class of them, so that a run on another class replaces none.
OF_A_CPU = ("generate", "apply", "train", "icl", "serving", "levels", "costs")
#: Flag of a CPU -> what its class is named by: the first one that it has.
CPU_FLAGS = {"amx_bf16": "amx", "avx512_bf16": "avx512_bf16", "avx512f": "avx512", "avx2": "avx2"}
#: Suites that count, whatever else is in the tree.
COUNTED = ("lengths", "kernels")
VENDORS = {"GenuineIntel": "intel", "AuthenticAMD": "amd"}
#: Arms of a training step of which one holds less memory than the other.
HOOKS = "hooks"


def cpu_class(machine: dict[str, Any]) -> str:
    """Vendor and widest instruction set, ``intel-amx``, of what a run says about its machine."""
    vendor = VENDORS.get(machine["vendor"], machine["vendor"].lower())
    return f"{vendor}-{next((CPU_FLAGS[flag] for flag in CPU_FLAGS if flag in machine['flags']), 'generic')}"


def stem(suite: str, machine: dict[str, Any]) -> str:
    """The name of the result file of a whole run of ``suite`` there, without its ending."""
    if "gpu" in machine:
        return suite + CUDA
    return f"{suite}.{cpu_class(machine)}" if suite in OF_A_CPU else suite


class ResultError(ValueError):
    """A result file that is missing, broken, or does not hold what is asked of it; the message names it."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A figure beside its target.  ``value`` and ``limit`` share a unit; ``over`` is value / limit: met up to 1.

    ``iqr``: interquartile range of what ``value`` is the median of; 0 where it is none.
    """

    group: str
    name: str
    value: float
    limit: float
    unit: str
    ratio: float
    of: str
    target: str
    iqr: float = 0.0

    @property
    def over(self) -> float:
        return self.value / self.limit

    @property
    def met(self) -> bool:
        return self.over <= 1

    @property
    def near(self) -> bool:
        """Whether the value is nearer to its limit than its interquartile range, so that noise may have decided."""
        return abs(self.value - self.limit) < self.iqr


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement; the fields are those of the file, and the ``machine`` that the whole file is of."""

    case: str
    group: str
    shape: dict[str, Any]
    threads: int | None
    cache: str | None
    times: dict[str, dict[str, Any]]
    skipped: dict[str, str]
    roofline: dict[str, Any] | None
    target: dict[str, Any] | None
    error: dict[str, Any] | None
    unit_us: float | None = None
    peak_gflops: float | None = None
    also: tuple[dict[str, Any], ...] = ()  # further targets
    machine: str | None = None

    @property
    def us(self) -> float:
        return self.times[OURS]["median_us"]

    @property
    def iqr_us(self) -> float:
        return self.times[OURS]["iqr_us"]

    @property
    def name(self) -> str:
        """The case with what else tells rows apart."""
        threads = None if self.threads is None else f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        return ", ".join(filter(None, (self.case, threads, self.cache)))

    @property
    def baselines(self) -> list[str]:
        return [name for name in self.times if name != OURS]

    @property
    def over_roofline(self) -> float | None:
        return self.us / self.roofline["us"] if self.roofline else None

    @property
    def over_peak(self) -> float | None:
        """Over the time of as many multiply-adds on registers."""
        return self.us * self.peak_gflops * 1e3 / self.roofline["flops"] if self.peak_gflops and self.roofline else None

    def speedup(self, baseline: str) -> float | None:
        """Time of the baseline over ours; None where it did not run.

        A baseline that no graph holds, called from the host, is compared with ours called so.
        """
        ours, other = self.times[OURS], self.times.get(baseline)
        if other and ours.get("graph") and other.get("graph") is False:
            ours = self.times.get(HOST)
        return other["median_us"] / ours["median_us"] if ours and other else None

    def rivals(self) -> dict[str, float]:
        """Speedup over each other way of doing the same that ran."""
        return {name: s for name in self.baselines if name not in BESIDE and (s := self.speedup(name)) is not None}

    @property
    def verdict(self) -> Verdict | None:
        """The row beside its target, or None where it has none; ResultError where the target is of nothing measured."""
        return None if self.target is None else self._judged(self.target)

    @property
    def verdicts(self) -> list[Verdict]:
        """The row beside its target and the further ones."""
        return [self._judged(target) for target in (self.target, *self.also) if target is not None]

    def _judged(self, target: dict[str, Any]) -> Verdict:
        of, ratio, plus = target["of"], target["ratio"], target.get("plus_us") or 0
        known = {name: timing["median_us"] for name, timing in self.times.items()}
        known |= {"roofline": self.roofline["us"]} if self.roofline else {}
        unit = known.get(of, self.unit_us)
        if unit is None:
            raise ResultError(f"{self.name}: a target of {of!r}, which the file does not hold")
        text = " + ".join([f"{ratio:g} x {of}"] * bool(ratio) + [f"{plus:g} us"] * bool(plus))
        return Verdict(self.group, self.name, self.us, ratio * unit + plus, "us", self.us / unit, of, text, self.iqr_us)


@dataclasses.dataclass(frozen=True)
class Result:
    """One result file: its run, its rows, and every other record by kind."""

    path: Path
    run: dict[str, Any]
    rows: tuple[Row, ...]
    others: dict[str, list[dict[str, Any]]]

    @property
    def machine(self) -> str | None:
        """What pages call the machine whose speed decides; None where none does."""
        about, level = self.run.get("machine") or {}, self.path.stem.partition(".")[2].partition("-")[2]
        cpu = re.sub(r"\((R|TM)\)| CPU| Processor| \d+-Core| @.*", "", about.get("cpu", ""))
        return about.get("gpu") or (f"{cpu} ({level})" if level else None)

    def records(self, kind: str) -> list[dict[str, Any]]:
        """The records of a kind; ResultError where there is none."""
        if kind not in self.others:
            raise ResultError(f"{self.path.name}: no record of kind {kind!r}")
        return self.others[kind]

    @property
    def unfinished(self) -> list[str]:
        """Tasks that the run began with and did not end: of a card, where the time ran out or one failed."""
        return [name for name in self.run.get("tasks", []) if name not in {t["name"] for t in self.others.get("task", [])}]

    @property
    def peaks_hold(self) -> bool:
        """Whether multiply-adds on registers were nowhere slower than products: else they are no peak, and not shown."""
        rates: dict[str, dict] = {"gemm": {}, "fma": {}}
        for c in self.records("ceiling"):
            if c["when"] == "before" and c["kind"] in rates:
                rates[c["kind"]][c["dtype"], c["threads"]] = c["gflops"]
        return all(rate >= rates["gemm"].get(key, 0) for key, rate in rates["fma"].items())

    def verdicts(self) -> list[Verdict]:
        """Everything that has a target: rows, memory of generating, memory of training steps."""
        memory = [e for kind in ("memory", "train_memory") for e in self.others.get(kind, [])]
        of_rows = [v for row in self.rows for v in row.verdicts]
        return [*of_rows, *(v for v in map(memory_verdict, memory) if v)]


def memory_verdict(entry: dict[str, Any]) -> Verdict | None:
    """Of a record of kind memory or train_memory; None where it has no target.

    Generating: the peak over what must be held.  A training step: our peak over that of hooks, of which a target of 1.25
    allows 1 / 1.25.
    """
    if not entry.get("target"):
        return None
    bound = entry["target"]["ratio"]
    if entry["record"] == "memory":
        ratio, of = entry["peak_mib"] / (entry["weights_mib"] + entry["adapters_mib"]), "weights + adapters"
        return Verdict("memory", entry["what"], ratio, bound, "", ratio, of, f"{bound:g} x {of}")
    ratio = entry["ways"][OURS]["peak_mib"] / entry["ways"][HOOKS]["peak_mib"]
    return Verdict("train memory", entry["case"], ratio, 1 / bound, "", ratio, HOOKS, f"{HOOKS} at least {bound:g} x ours")


def read(path: Path) -> Result:
    """The file at ``path`` as it is; ResultError where a line is broken."""
    lines = path.read_text(encoding="utf-8").splitlines()
    rows, others, run = [], {}, None
    fields = {f.name for f in dataclasses.fields(Row)}
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            if number == 1:
                run = {"suite": entry["suite"], **entry}
            elif entry["record"] == "row":
                rows.append(Row(**{name: entry[name] for name in fields & entry.keys()}))
            else:
                others.setdefault(entry["record"], []).append(entry)
        except (KeyError, TypeError, json.JSONDecodeError) as e:
            raise ResultError(f"{path.name}: line {number} is no record of python -m bench: {type(e).__name__}: {e}") from e
    if run is None or run.get("record") != "run":
        raise ResultError(f"{path.name}: expected the record of a run in the first line")
    result = Result(path, run, tuple(rows), others)
    return dataclasses.replace(result, rows=tuple(dataclasses.replace(row, machine=result.machine) for row in rows))


def load(path: Path) -> Result:
    """The result file at ``path``; ResultError where it cannot be believed or holds less than a whole run."""
    result = read(path)
    try:
        for fault in _faults(result):
            raise ResultError(fault)
    except ResultError as e:
        raise ResultError(f"{path.name}: {e}") from e
    except (KeyError, TypeError) as e:
        raise ResultError(f"{path.name}: no result file of python -m bench: {type(e).__name__}: {e}") from e
    return result


def _faults(result: Result) -> Iterator[str]:
    run, (name, _, of_cpu) = result.run, result.path.stem.partition(".")
    expected = (name.removesuffix(CUDA), "full", "cuda" if name.endswith(CUDA) else "cpu")
    got = (run["suite"], run.get("size", "full"), run.get("device", "cpu"))
    if got != expected:
        yield "expected suite {!r} of size {!r} on {!r}".format(*expected) + ", got suite {!r} of size {!r} on {!r}".format(
            *got
        )
    if "flags" in (about := run.get("machine") or {}) and of_cpu not in ("", cpu_class(about)):  # older ones do not say
        yield f"expected a run on {of_cpu}, got one on {cpu_class(about)}"
    if "--only" in run["command"]:
        yield f"expected a whole suite, got a part of it: {run['command']}"
    if run.get("dirty") and run["suite"] not in COUNTED:
        yield f"expected the run of a commit, got one with uncommitted changes on {run['commit']}"
    if expected[2] == "cpu":  # of a card the time may have run out
        if result.unfinished:
            yield f"expected a whole run, got one without: {', '.join(result.unfinished)}"
        ceilings = result.others.get("ceiling", [])
        before, after = ({ceiling_key(c) for c in ceilings if c["when"] == when} for when in ("before", "after"))
        for key in sorted(before - after, key=str):
            yield f"ceiling {' '.join(str(part) for part in key if part)} was not measured again: the run did not end"
    for name, count in Counter(row.name for row in result.rows).items():
        if count > 1:
            yield f"{name}: two rows"
    for row in result.rows:
        if row.error and not row.error["value"] <= row.error["bound"]:
            yield f"{row.name}: error {row.error['value']:g} is beyond its bound {row.error['bound']:g}"
    result.verdicts()


def ceiling_key(entry: dict[str, Any]) -> tuple:
    """What tells one ceiling from another, but not when it was measured."""
    return entry["kind"], entry.get("dtype"), entry.get("bytes"), entry["threads"]
