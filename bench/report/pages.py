"""Writes and checks docs/results, the figures of docs/figures, and the blocks of other documents.

A page is a template of bench/report/templates; its numbers come from tables.  ``check`` names what was edited by hand, what
is missing, and what is older than its data or the code that draws it.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path

import jinja2
from rich.console import Console

from bench.kernels import COMMAND as KERNELS
from bench.records import CUDA, OF_A_CPU, Result, ResultError, load
from bench.report import (  # noqa: F401
    cells,
    figures,
    speed,
    tables,
    tables_adapt,
    tables_icl,
    tables_serving,
    tables_specs,
    tables_study,
    tables_train,
)
from bench.report.figures import FIGURES
from bench.report.tables import TABLES, Line, Table
from bench.report.view import Unavailable, View
from bench.source import ROOT, SPECS, bundled

TEMPLATES = Path(__file__).parent / "templates"
RESULTS, PAGES, DRAWN = Path("bench", "results"), Path("docs", "results"), Path("docs", "figures")
#: A block of a document between markers of this name, made from the template of that name.
BLOCKS = {
    "speed": "README.md",
    "limits": "README.md",
    "study-card": "t2l_engine/checkpoints/smollm2-135m/README.md",
    "specs-card": "t2l_engine/checkpoints/smollm2-135m-specs/README.md",
}
#: What makes a result file.
SOURCES = {
    "generate": "python -m bench generate",
    "apply": "python -m bench apply",
    "train": "python -m bench train",
    "icl": "python -m bench icl --tasks TASKS",
    "learn": "python -m bench learn --work WORK --library LIBRARY",
    "study": "python -m bench study --tasks TASKS --benchmarks BENCHMARKS --work WORK",
    "specs": "python -m bench specs --work WORK --skills SKILLS",
    "adapt": "python -m bench adapt --work WORK",
    "specs-first": "git checkout -- bench/results/specs-first.jsonl",
    "specs-second": "git checkout -- bench/results/specs-second.jsonl",
    "lengths": "python -m bench lengths --benchmarks DIR --descriptions FILE --examples EXAMPLES",
    "kernels": KERNELS,
}
#: What else, where there is a run: one needs an environment of its own, one native kernels, one hours.
OPTIONAL = {
    "serving": "python -m bench serving",
    "levels": "python -m bench levels",
    "small": "python -m bench small --work WORK",
    "robustness": "python -m bench robustness --work WORK",
    "rates": "python -m bench rates --work WORK",
    "costs": "python -m bench costs",
    "profile": "python -m bench profile --device cuda",
}
#: Results that say something of a bundled checkpoint: of smollm2-135m, of smollm2-135m-specs.
BUNDLED, OF_SPECS = ("icl", "study"), ("specs", "adapt", "costs", "rates")
AGAIN = "run: python -m bench report"


class Report(View):
    """The pages and figures under ``root``; what is wrong is collected in ``problems``, a line each."""

    def __init__(self, root: Path = ROOT):
        self.root = root
        self.problems: list[str] = []
        self._there = sorted((root / RESULTS).glob("*.jsonl"))
        self.results = {name: self._load(name, command) for name, command in SOURCES.items()}
        self.results |= {name: found for name, command in OPTIONAL.items() if (found := self._load(name, command)) != []}
        carded = [path.stem for path in self._there if path.stem.endswith(CUDA)]
        self.results |= {name: self._load(name, (SOURCES | OPTIONAL)[name.removesuffix(CUDA)]) for name in carded}
        self.problems += [f"{(RESULTS / path.name).as_posix()}: the name of no result" for path in self._there]
        made = [*map(self._of_results, TABLES.values()), *map(self._of_a_card, [*TABLES.values(), *speed.OF_A_CARD])]
        self.tables = {t.name: t for t in made if t}
        self.figures = {name: of for name, (_, of) in FIGURES.items() if of in self.tables}
        self._lines = functools.cache(self._of_all)

    def _load(self, name: str, command: str) -> list[Result] | None:
        """The results of ``name``, one for each machine; None where one is refused, or missing and needed."""
        pattern = f"{name}.*.jsonl" if name in OF_A_CPU else f"{name}.jsonl"
        paths = [path for path in self._there if path.match(pattern)]
        self._there = [path for path in self._there if path not in paths]
        if not paths and name not in OPTIONAL:
            self.problems.append(f"{(RESULTS / pattern).as_posix()}: missing; run: {command}")
            return None
        found = [self._read(path, name, command) for path in paths]
        return None if None in found else found

    def _read(self, path: Path, name: str, command: str) -> Result | None:
        try:
            result = load(path)
        except ResultError as e:
            self.problems.append(f"bench/results/{e}")
            return None
        other = name in BUNDLED and result.run.get("checkpoint") != bundled()
        if other or (name in OF_SPECS and result.records("plan")[0]["checkpoint"] != bundled(SPECS)):
            self.problems.append(f"{(RESULTS / path.name).as_posix()}: not of the bundled checkpoint; run: {command}")
        return result

    def _of_results(self, table: Table) -> Table | None:
        """The same table without results of OPTIONAL that are not there; None where it shows nothing else, or is
        optional and empty.
        """
        sources = tuple(source for source in table.sources if source in self.results or source not in OPTIONAL)
        made = dataclasses.replace(table, sources=sources)
        empty = table.optional and all(self.results.get(source) for source in sources) and not self._shows(made)
        return made if sources and not empty else None

    def _of_a_card(self, table: Table) -> Table | None:
        """The same table from runs of a card, or None where none of them holds what it shows."""
        sources = tuple(name for source in table.sources if self.results.get(name := source + CUDA))
        made = dataclasses.replace(table, name=table.name + CUDA, sources=sources)
        return made if sources and self._shows(made) else None

    def _shows(self, table: Table) -> bool:
        try:
            return bool(table.lines(self.of(table.sources)))
        except ResultError:
            return False

    def _of_all(self, name: str) -> list[Line]:
        return self.tables[name].lines(self.of(self.tables[name].sources))

    # --- what is written ----------------------------------------------------------------------------------------------

    def texts(self) -> dict[Path, str]:
        """Every document with what it is made of, by its place under the root."""
        out = {}
        for template in TEMPLATES.glob("results/*.md.j2"):
            out[PAGES / template.stem] = self._try(f"results/{template.name}", self._render)
        for name, document in BLOCKS.items():
            text = out.get(Path(document)) or (self.root / document).read_text(encoding="utf-8")
            out[Path(document)] = self._try(f"{name}.md.j2", functools.partial(self._block, name, document, text))
        for name in self.tables:
            out[PAGES / "tables" / f"{name}.csv"] = self._try(name, lambda name: tables.to_csv(self._lines(name)))
        return {path: text for path, text in out.items() if text is not None}

    def _try(self, name: str, make: Callable[[str], str]) -> str | None:
        """``make`` of ``name``, or None: for a reason that is among the problems."""
        try:
            return make(name)
        except Unavailable:
            return None
        except (ResultError, jinja2.TemplateError, TypeError, ValueError) as e:
            kind = "" if isinstance(e, ResultError) else f"{type(e).__name__}: "
            self.problems.append(f"{name}: {kind}{e}")
            return None

    def _render(self, template: str) -> str:
        names = {name: getattr(self, name) for name in ("grid", "lines", "value", "row", "of", "machines")}
        made = _environment().get_template(template).render(names, tables=self.tables, results=self.results)
        return f"<!-- Made from bench/report/templates/{template}: edit that. -->\n{made.strip()}\n"

    def _block(self, name: str, document: str, text: str, template: str) -> str:
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
        if text.count(begin) != 1 or text.count(end) != 1 or text.find(begin) > text.find(end):
            raise ResultError(f"{document}: markers of block {name!r} are missing, doubled or out of order")
        before, _, rest = text.partition(begin)
        return before + begin + self._render(template) + end + rest.partition(end)[2]

    def _drawing(self, make: Callable[[str, list[Line]], str]) -> Callable[[str], str]:
        """``make`` of a figure's name and lines, as a function of its name."""
        return lambda name: make(name, self._lines(self.figures[name]))

    def strangers(self) -> list[Path]:
        """Files in folders of generated files that nothing makes."""
        known = {PAGES / "tables" / f"{name}.csv" for name in self.tables} | {DRAWN / f"{name}.svg" for name in self.figures}
        known |= {PAGES / template.stem for template in TEMPLATES.glob("results/*.md.j2")}
        there = [path for folder in (PAGES, PAGES / "tables", DRAWN) for path in (self.root / folder).glob("*.*")]
        return sorted({path.relative_to(self.root) for path in there} - known)

    def check(self) -> list[str]:
        """What is wrong, a line each."""
        stamps = {DRAWN / f"{name}.svg": self._try(name, self._drawing(figures.stamp)) for name in self.figures}
        for path, made in (self.texts() | stamps).items():
            there = (self.root / path).read_text(encoding="utf-8") if (self.root / path).exists() else None
            if there is None:
                self.problems.append(f"{path.as_posix()}: missing; {AGAIN}")
            elif path not in stamps and there != made:
                self.problems.append(f"{path.as_posix()}: differs from what bench/results gives; {AGAIN}")
            elif path in stamps and made and made not in there:
                self.problems.append(f"{path.as_posix()}: older than its data or drawing; {AGAIN}")
        self.problems += [f"{path.as_posix()}: nothing makes this file; {AGAIN}" for path in self.strangers()]
        return list(dict.fromkeys(self.problems))

    def write(self) -> list[str]:
        """Writes everything, or nothing where something is wrong."""
        out = self.texts()
        out |= {DRAWN / f"{name}.svg": self._try(name, self._drawing(figures.svg)) for name in self.figures}
        if not self.problems:
            for path, text in out.items():
                (self.root / path).parent.mkdir(parents=True, exist_ok=True)
                (self.root / path).write_text(text, encoding="utf-8")
            for path in self.strangers():
                (self.root / path).unlink()
        return list(dict.fromkeys(self.problems))


@functools.cache
def _environment() -> jinja2.Environment:
    """Of all reports: it keeps what it has compiled."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        finalize=_said,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters |= {name: getattr(cells, name) for name in ("number", "duration", "times")}
    return made


def _said(value: object) -> object:
    """What a template prints: a value that a result lacks is no word of a page."""
    if value is None:
        raise TypeError("a template prints a value that is None")
    return value


def show(name: str) -> None:
    """Prints a table, in full width where not to a terminal; ResultError where there is none, or not what it is made of."""
    report = Report()
    if name not in report.tables:
        raise ResultError(f"table: expected one of {', '.join(sorted(report.tables))}; got {name!r}")
    try:
        lines = report.lines(name)
    except Unavailable:
        raise ResultError("\n".join(report.problems)) from None
    Console(width=None if sys.stdout.isatty() else 500).print(tables.to_terminal(report.tables[name].about, lines))
