"""Writes the tables of README.md and docs/results.md and the figures of docs/figures from ``bench/results``.

``--check`` writes nothing.  It fails, and names the place, where a table was edited by hand, markers are missing or unknown,
a result is missing, or a figure is older than its data or than the code that draws it.

python -m bench.report [--check]
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import figures, learn_tables, rows, tables, train_tables
from bench.gpu import tables as gpu
from bench.icl import measured, summary
from bench.icl import tables as icl
from bench.rows import ResultError
from bench.source import bundled
from bench.study import tables as study

ROOT = Path(__file__).resolve().parents[1]


def _json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


@dataclasses.dataclass(frozen=True)
class Source:
    """A file of ``bench/results``, what makes it, what reads it, and whether it says something of the bundled checkpoint."""

    file: str
    command: str
    load: Callable[[Path], Any]
    bundled: bool = False


@dataclasses.dataclass(frozen=True)
class Table:
    """The text between the markers ``name`` of a document: ``make`` of what its sources hold."""

    document: str
    name: str
    make: Callable[..., str]
    sources: tuple[str, ...]


SOURCES = {
    "generate": Source("generate.json", "python -m bench generate", rows.load),
    "apply": Source("apply.json", "python -m bench apply", rows.load),
    "icl": Source("icl.json", "python -m bench icl --tasks TASKS", rows.load, bundled=True),
    "train": Source("train.json", "python -m bench train", rows.load),
    "learn": Source(learn_tables.FILE, "python -m bench learn --work WORK --library LIBRARY", _json),
    "study": Source(
        study.FILE, "python -m bench study --tasks TASKS --benchmarks BENCHMARKS --work WORK", _json, bundled=True
    ),
    "lengths": Source("lengths.json", "python -m bench.lengths, see docs/results.md", _json),
    "gpu": Source("gpu.json", "bash bench/gpu_suite.sh OUT", gpu.committed),
}
#: A new suite is an entry in SOURCES and one here or in figures.FIGURES for each thing shown of it.
TABLES = (
    Table("README.md", "study", study.summary, ("study",)),
    Table("t2l_engine/checkpoints/smollm2-135m/README.md", "study-card", study.card, ("study",)),
    Table("README.md", "speed", tables.speed, ("generate", "apply")),
    Table("docs/results.md", "study-claims", study.claims, ("study",)),
    Table("docs/results.md", "study-arms", study.arms, ("study",)),
    Table("docs/results.md", "study-requests", study.requests, ("study",)),
    Table("docs/results.md", "study-unseen", study.unseen_tasks, ("study",)),
    Table("docs/results.md", "study-seen", study.seen_tasks, ("study",)),
    Table("docs/results.md", "study-reconstruction", study.reconstruction, ("study",)),
    Table("docs/results.md", "study-short", study.short, ("study",)),
    Table("docs/results.md", "study-lengths", study.lengths, ("study",)),
    Table("docs/results.md", "study-wordings", study.wordings, ("study",)),
    Table("docs/results.md", "study-scalings", study.scalings, ("study",)),
    Table("docs/results.md", "study-steered", study.steered, ("study",)),
    Table("docs/results.md", "study-benchmarks", study.benchmarks, ("study",)),
    Table("docs/results.md", "study-runs", study.runs, ("study",)),
    Table("docs/results.md", "generate", tables.generate, ("generate",)),
    Table("docs/results.md", "generate-memory", tables.generate_memory, ("generate",)),
    Table("docs/results.md", "bf16-weights", tables.bf16_weights, ("generate",)),
    Table("docs/results.md", "split", tables.split, ("generate", "apply")),
    Table("docs/results.md", "lora", tables.lora, ("apply",)),
    Table("docs/results.md", "linear", tables.linear, ("apply",)),
    Table("docs/results.md", "sweep", tables.sweep, ("apply",)),
    Table("docs/results.md", "backward", tables.backward, ("apply",)),
    Table("docs/results.md", "model", tables.model, ("apply",)),
    Table("docs/results.md", "model-sweep", tables.model_sweep, ("apply",)),
    Table("docs/results.md", "misses", tables.misses, ("generate", "apply")),
    Table("docs/results.md", "losses", tables.losses, ("generate", "apply")),
    Table("docs/results.md", "ceilings", tables.ceilings, ("generate", "apply")),
    Table("README.md", "icl", summary.readme, ("icl",)),
    Table("docs/results.md", "icl-costs", icl.costs, ("icl",)),
    Table("docs/results.md", "icl-phases", icl.phases, ("icl",)),
    Table("docs/results.md", "icl-memory", icl.memory, ("icl",)),
    Table("docs/results.md", "icl-paper", icl.paper, ("icl",)),
    Table("docs/results.md", "icl-first", measured.first, ("icl",)),
    Table("docs/results.md", "icl-examples", measured.examples, ("icl",)),
    Table("docs/results.md", "icl-questions", measured.questions, ("icl",)),
    Table("docs/results.md", "icl-lengths", icl.token_counts, ("lengths",)),
    Table("docs/results.md", "icl-terms", icl.terms, ("icl",)),
    Table("README.md", "train", train_tables.summary, ("train",)),
    Table("docs/results.md", "train", train_tables.steps, ("train",)),
    Table("docs/results.md", "train-memory", train_tables.memory, ("train",)),
    Table("docs/results.md", "train-hypernetworks", train_tables.hypernetworks, ("train",)),
    Table("docs/results.md", "train-library", train_tables.library, ("train",)),
    Table("README.md", "learn", learn_tables.summary, ("learn",)),
    Table("docs/results.md", "learn", learn_tables.whole, ("learn",)),
    Table("README.md", "gpu", gpu.summary, ("gpu",)),
    Table("docs/results.md", "gpu", gpu.everything, ("gpu",)),
)
FIGURES = Path("docs", "figures")


class Report:
    """The documents and figures under ``root``; what is wrong with them is collected in ``problems``."""

    def __init__(self, root: Path = ROOT):
        self.root = root
        self.problems: list[str] = []
        self.loaded = {name: self._load(source) for name, source in SOURCES.items()}

    def _load(self, source: Source) -> Any:
        try:
            loaded = source.load(self._result(source))
            if source.bundled and getattr(loaded, "meta", loaded).get("checkpoint") != bundled():
                self.problems.append(f"bench/results/{source.file}: not of the bundled checkpoint; run: {source.command}")
            return loaded
        except FileNotFoundError:
            self.problems.append(f"bench/results/{source.file}: missing; run: {source.command}")
        except ResultError as e:
            self.problems.append(f"bench/results/{e}")
        return None

    def _result(self, source: Source) -> Path:
        return self.root / "bench" / "results" / source.file

    def _from(self, names: tuple[str, ...], make: Callable[..., Any]) -> Any:
        """``make`` of the named results, or None where one of them is missing or lacks what is asked."""
        results = [self.loaded[name] for name in names]
        if any(result is None for result in results):
            return None  # named already
        try:
            return make(*results)
        except ResultError as e:
            self.problems.append(f"bench/results/{e}")
            return None

    def documents(self) -> dict[str, str]:
        """Each document with its tables made anew."""
        names = dict.fromkeys(table.document for table in TABLES)
        return {name: self._document(name, [t for t in TABLES if t.document == name]) for name in names}

    def _document(self, document: str, wanted: list[Table]) -> str:
        text = (self.root / document).read_text(encoding="utf-8")
        unknown = dict.fromkeys(re.findall(r"<!-- ([\w-]+): (?:begin|end) -->", text)).keys() - {t.name for t in wanted}
        self.problems += [f"{document}: markers of {name!r}, which is no table" for name in sorted(unknown)]
        for table in wanted:
            begin, end = f"<!-- {table.name}: begin -->\n", f"<!-- {table.name}: end -->"
            start, stop = text.find(begin), text.find(end)
            if not 0 <= start < stop or text.count(begin) > 1 or text.count(end) > 1:
                self.problems.append(f"{document}: markers of table {table.name!r} are missing, doubled or out of order")
                continue
            made = self._from(table.sources, table.make)
            if made is not None:
                text = text[: start + len(begin)] + made + "\n" + text[stop:]
        return text

    def stamp(self, name: str) -> str:
        """What figure ``name`` is drawn from: SHA-256 of its result files and of the code that draws."""
        paths = [self._result(SOURCES[source]) for source in figures.FIGURES[name].sources]
        digests = [f"{path.name} sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}" for path in paths]
        return ", ".join([*digests, f"drawing sha256:{figures.drawing_version(name)}"])

    def check(self) -> list[str]:
        """What is wrong, a line each."""
        for document, text in self.documents().items():
            if (self.root / document).read_text(encoding="utf-8") != text:
                self.problems.append(f"{document}: a table differs from bench/results; run: python -m bench.report")
        for name, drawing in figures.FIGURES.items():
            stamp = self._from(drawing.sources, lambda *_, name=name: self.stamp(name))
            for suffix in (".svg", ".png"):
                path = self.root / FIGURES / (name + suffix)
                place = (FIGURES / path.name).as_posix()
                if not path.exists():
                    self.problems.append(f"{place}: missing; run: python -m bench.report")
                elif stamp is not None and stamp.encode() not in path.read_bytes():
                    self.problems.append(f"{place}: older than its data or drawing; run: python -m bench.report")
        return list(dict.fromkeys(self.problems))

    def write(self) -> list[str]:
        """Writes all tables and figures, or nothing where something is wrong."""
        out = {self.root / document: text.encode() for document, text in self.documents().items()}
        for name, drawing in figures.FIGURES.items():
            draw = self._from(drawing.sources, lambda *results, name=name: figures.files(name, results, self.stamp(name)))
            out |= {self.root / FIGURES / file: data for file, data in (draw or {}).items()}
        if not self.problems:
            for path, data in out.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
        return list(dict.fromkeys(self.problems))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description="Tables and figures from bench/results.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where something is not up to date")
    report = Report()
    problems = report.check() if parser.parse_args().check else report.write()
    if problems:
        raise SystemExit("\n".join(problems))


if __name__ == "__main__":
    main()
