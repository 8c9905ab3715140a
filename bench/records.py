"""Result files in ``bench/results``: reading and checking them.

``SUITE.CLASS.jsonl`` was measured on one class of CPUs, ``SUITE-cuda.jsonl`` on a GPU; ``SUITE.jsonl`` depends on no CPU's
speed.  The first line is the run; every other line is one record: a row of times, or another kind.  Times are in
microseconds.  Ratios and speedups are computed here and stored nowhere.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
#: Bundled checkpoints, of which some results are; suites that time generation load the paper's.
BUNDLED, PAPER = "smollm2-135m", "smollm2-135m-paper"
OURS = "ours"
#: The model without adapters: what a target may refer to; no competitor.
BASE = "base"
#: In the case of a row that generates over earlier adapters, and what the same call into new memory is beside it.
FRESH = "fresh output"
#: On a GPU: ours called from the host, without a CUDA graph.
HOST = "ours, from the host"
#: Of the suite serving: vLLM without LoRA but compiled, ours where vLLM wraps every layer, and ours in transformers.
COMPILED, OURS_ALL, ATTACHED = "base, compiled", "ours, every layer", "ours, transformers"
#: Timed beside ours without being another way of doing the same work: other calls of ours, bounds, parts of a request, other
#: instruction sets, and one adapter for the whole batch where ours has one a row.
BESIDE = {
    *(BASE, FRESH, HOST, COMPILED, OURS_ALL, ATTACHED, "ours, a launch a linear", "ours, ops alone"),
    *("copy", "head weights", "text encoder", "merged", "PEFT single"),
    *("generic", "avx2", "avx512", "avx512_bf16", "avx512_bf16_wide", "amx"),
}
#: Suffix of the suite in the name of a file that was measured on a GPU.
CUDA = "-cuda"
#: Suites that time a CPU: one file for each class of CPUs, so that a run on one class never replaces that of another.
OF_A_CPU = ("generate", "apply", "documents", "train", "icl", "serving", "levels")
#: CPU flag -> name of the class: the first flag that a CPU has names its class.
CPU_FLAGS = {"amx_bf16": "amx", "avx512_bf16": "avx512_bf16", "avx512f": "avx512", "avx2": "avx2"}
#: Suites that count instead of timing: uncommitted changes elsewhere do not matter.
COUNTED = ("lengths", "kernels")
VENDORS = {"GenuineIntel": "intel", "AuthenticAMD": "amd"}
#: Of training steps: forward hooks, as in the code of the paper.
HOOKS = "hooks"


def cpu_class(machine: dict[str, Any]) -> str:
    """Vendor and widest instruction set of the machine of a run, such as ``intel-amx``."""
    vendor = VENDORS.get(machine["vendor"], machine["vendor"].lower())
    return f"{vendor}-{next((CPU_FLAGS[flag] for flag in CPU_FLAGS if flag in machine['flags']), 'generic')}"


def stem(suite: str, machine: dict[str, Any]) -> str:
    """Name of the result file of a whole run of ``suite`` on ``machine``, without the suffix."""
    if "gpu" in machine:
        return suite + CUDA
    return f"{suite}.{cpu_class(machine)}" if suite in OF_A_CPU else suite


class ResultError(ValueError):
    """A result file that is missing, broken, or does not hold what is asked of it; the message names it."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement: the fields of the file, and the ``machine`` of the whole file."""

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
    machine: str | None = None

    @property
    def us(self) -> float:
        return self.times[OURS]["median_us"]

    @property
    def name(self) -> str:
        """The case, its threads and its cache: unique in a file."""
        threads = None if self.threads is None else f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        return ", ".join(filter(None, (self.case, threads, self.cache)))

    @property
    def over_roofline(self) -> float | None:
        return self.us / self.roofline["us"] if self.roofline else None

    def speedup(self, baseline: str) -> float | None:
        """Time of the baseline (without a CUDA graph: over ours called from the host); None where it did not run."""
        ours, other = self.times[OURS], self.times.get(baseline)
        if other and ours.get("graph") and other.get("graph") is False:
            ours = self.times.get(HOST)
        return other["median_us"] / ours["median_us"] if ours and other else None

    def rivals(self) -> dict[str, float]:
        """Speedup over each other way of doing the same work."""
        others = self.times.keys() - BESIDE - {OURS}
        return {name: s for name in self.times if name in others and (s := self.speedup(name)) is not None}

    @property
    def best(self) -> str | None:
        """The fastest other way of doing the same work; None where there is none."""
        return min(rivals, key=rivals.__getitem__) if (rivals := self.rivals()) else None

    @property
    def target_text(self) -> str | None:
        """The target as it was set before the run, such as ``1.5 x roofline + 3 us``; None where there is none."""
        if self.target is None:
            return None
        ratio, plus = self.target["ratio"], self.target.get("plus_us") or 0
        parts = [f"{ratio:g} x {self.target['of']}"] * bool(ratio) + [f"{plus:g} us"] * bool(plus)
        return " + ".join(parts)


@dataclasses.dataclass(frozen=True)
class Result:
    """One result file: its run, its rows, and every other record by kind."""

    path: Path
    run: dict[str, Any]
    rows: tuple[Row, ...]
    others: dict[str, list[dict[str, Any]]]

    @property
    def machine(self) -> str | None:
        """Name of the machine on pages; None where a result depends on no machine's speed."""
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
        """Tasks of the run that did not end, because the time ran out or one failed."""
        return [name for name in self.run.get("tasks", []) if name not in {t["name"] for t in self.others.get("task", [])}]


def read(path: Path) -> Result:
    """The file at ``path``, unchecked; ResultError where a line is broken."""
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
    """The result file at ``path``; ResultError unless it is a whole run of a commit whose results were correct."""
    result = read(path)
    try:
        fault = next(_faults(result), None)
    except (KeyError, TypeError) as e:
        fault = f"no result file of python -m bench: {type(e).__name__}: {e}"
    if fault:
        raise ResultError(f"{path.name}: {fault}")
    return result


def _faults(result: Result) -> Iterator[str]:
    run, (name, _, of_cpu) = result.run, result.path.stem.partition(".")
    expected = (name.removesuffix(CUDA), "full", "cuda" if name.endswith(CUDA) else "cpu")
    got = (run["suite"], run.get("size", "full"), run.get("device", "cpu"))
    if got != expected:
        yield "expected " + ", got ".join("suite {!r} of size {!r} on {!r}".format(*of) for of in (expected, got))
    if "flags" in (about := run.get("machine") or {}) and of_cpu not in ("", cpu_class(about)):  # older ones do not say
        yield f"expected a run on {of_cpu}, got one on {cpu_class(about)}"
    if "--only" in run["command"]:
        yield f"expected a whole suite, got a part of it: {run['command']}"
    if run.get("dirty") and run["suite"] not in COUNTED:
        yield f"expected the run of a commit, got one with uncommitted changes on {run['commit']}"
    if expected[2] == "cpu":  # on a GPU the time may have run out
        if result.unfinished:
            yield f"expected a whole run, got one without: {', '.join(result.unfinished)}"
        ceilings = result.others.get("ceiling", [])
        keys = {(of["when"], of["kind"], of.get("dtype"), of.get("bytes"), of["threads"]) for of in ceilings}
        for key in sorted((key[1:] for key in keys if ("after", *key[1:]) not in keys), key=str):
            yield f"ceiling {' '.join(str(part) for part in key if part)} was not measured again: the run did not end"
    for name, count in Counter(row.name for row in result.rows).items():
        if count > 1:
            yield f"{name}: two rows"
    for row in result.rows:
        if row.error and not row.error["value"] <= row.error["bound"]:
            yield f"{row.name}: error {row.error['value']:g} is beyond its bound {row.error['bound']:g}"


def source() -> dict[str, Any]:
    """Date, commit and bundled checkpoint of the measured tree; without a history ``commit`` and ``dirty`` are None."""

    def git(*arguments: str) -> str | None:
        try:
            return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    # Results themselves do not count: writing the first file would make the tree of the second dirty.
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")
    about = {"date": datetime.date.today().isoformat(), "commit": git("rev-parse", "--short", "HEAD")}
    return about | {"dirty": None if changed is None else bool(changed), "checkpoint": bundled()}


def bundled(name: str = PAPER) -> str:
    """SHA-256 of the weights of a bundled checkpoint."""
    return hashlib.sha256((ROOT / "t2l_engine" / "checkpoints" / name / "hypernet.safetensors").read_bytes()).hexdigest()
