"""Writes and checks docs/results, the figures of docs/figures, and the blocks of other documents.

A page is a template of bench/report/templates; its numbers come from tables.  ``check`` names what was edited by hand, what
is missing, and what is older than its data or the code that draws it.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from rich.console import Console

from bench.records import CUDA, Result, ResultError, Row, load
from bench.report import cells, figures, speed, tables, tables_icl, tables_serving, tables_study, tables_train  # noqa: F401
from bench.report.figures import FIGURES
from bench.report.tables import TABLES, Line, Table
from bench.source import ROOT, bundled

TEMPLATES = Path(__file__).parent / "templates"
RESULTS, PAGES, DRAWN = Path("bench", "results"), Path("docs", "results"), Path("docs", "figures")
#: A block of a document between markers of this name, made from the template of that name.
BLOCKS = {"speed": "README.md", "study-card": "t2l_engine/checkpoints/smollm2-135m/README.md"}
#: What a page may show of a table; the whole is its CSV.
MOST_COLUMNS, MOST_LINES = 8, 15
#: What makes a result file.
SOURCES = {
    "generate": "python -m bench generate",
    "apply": "python -m bench apply",
    "train": "python -m bench train",
    "icl": "python -m bench icl --tasks TASKS",
    "learn": "python -m bench learn --work WORK --library LIBRARY",
    "study": "python -m bench study --tasks TASKS --benchmarks BENCHMARKS --work WORK",
    "lengths": "python -m bench lengths",
    "kernels": "python -m bench kernels --write",
}
#: What else, where there is a run: it needs an environment of its own.
OPTIONAL = {"serving": "python -m bench serving"}
#: Results that say something of the bundled checkpoint.
BUNDLED = ("icl", "study")
AGAIN = "run: python -m bench report"


class Unavailable(ResultError):
    """A result is missing or refused, which is a problem that was named already."""


class Report:
    """The pages and figures under ``root``; what is wrong is collected in ``problems``, a line each."""

    def __init__(self, root: Path = ROOT):
        self.root = root
        self.problems: list[str] = []
        self.results = {name: self._load(name, command) for name, command in SOURCES.items()}
        there = {name: command for name, command in OPTIONAL.items() if (root / RESULTS / f"{name}.jsonl").exists()}
        self.results |= {name: self._load(name, command) for name, command in there.items()}
        for path in sorted((root / RESULTS).glob(f"*{CUDA}.jsonl")):
            self.results[path.stem] = self._load(path.stem, SOURCES[path.stem.removesuffix(CUDA)])
        made = [*map(self._of_results, TABLES.values()), *map(self._of_a_card, [*TABLES.values(), *speed.OF_A_CARD])]
        self.tables = {t.name: t for t in made if t}
        self.figures = {name: of for name, (_, of) in FIGURES.items() if of in self.tables}
        self._lines = functools.cache(self._lines)

    def _load(self, name: str, command: str) -> Result | None:
        place = (RESULTS / f"{name}.jsonl").as_posix()
        try:
            result = load(self.root / place)
            if name in BUNDLED and result.run.get("checkpoint") != bundled():
                self.problems.append(f"{place}: not of the bundled checkpoint; run: {command}")
            return result
        except FileNotFoundError:
            self.problems.append(f"{place}: missing; run: {command}")
        except ResultError as e:
            self.problems.append(f"bench/results/{e}")
        return None

    def _of_results(self, table: Table) -> Table | None:
        """The same table without results of OPTIONAL that are not there, or None where it shows nothing else."""
        sources = tuple(source for source in table.sources if source in self.results or source not in OPTIONAL)
        return dataclasses.replace(table, sources=sources) if sources else None

    def _of_a_card(self, table: Table) -> Table | None:
        """The same table from runs of a card, or None where none of them holds what it shows."""
        sources = tuple(name for source in table.sources if self.results.get(name := source + CUDA))
        made = dataclasses.replace(table, name=table.name + CUDA, sources=sources)
        try:
            return made if sources and made.lines(self.of(sources)) else None
        except ResultError:
            return None

    def of(self, names: Sequence[str]) -> list[Result]:
        """The results of these names; Unavailable where one is missing or refused."""
        found = [self.results[name] for name in names]
        if None in found:
            raise Unavailable
        return found

    # --- what templates call ----------------------------------------------------------------------------------------

    def lines(self, name: str, where: Mapping[str, Any] | None = None) -> list[Line]:
        """The lines of a table in which the columns of ``where`` have the value, or one of the list, that it gives."""
        lines = self._lines(name)
        self._expect_columns(name, lines, where or ())
        for head, wanted in (where or {}).items():
            lines = [line for line in lines if line[head] in (wanted if isinstance(wanted, list) else [wanted])]
        if not lines:
            raise ResultError(f"table {name!r} has no line with {where}")
        return lines

    def _lines(self, name: str) -> list[Line]:
        if name not in self.tables:
            raise ResultError(f"no table is named {name!r}")
        return self.tables[name].lines(self.of(self.tables[name].sources))

    def _expect_columns(self, name: str, lines: Sequence[Line], heads: Iterable[str]) -> None:
        for head in heads:
            if head not in lines[0]:
                raise ResultError(f"table {name!r} has no column {head!r}; it has: {', '.join(lines[0])}")

    def grid(
        self,
        name: str,
        columns: Sequence[str] | Mapping[str, str],
        where: Mapping[str, Any] | None = None,
        first: int | None = None,
    ) -> str:
        """A part of a table in Markdown: ``columns``, under other headings where a mapping gives them."""
        heads = columns if isinstance(columns, Mapping) else {head: head for head in columns}
        lines = self.lines(name, where)[:first]
        self._expect_columns(name, lines, heads.values())
        if len(heads) > MOST_COLUMNS or len(lines) > MOST_LINES:
            most = f"at most {MOST_COLUMNS} columns and {MOST_LINES} lines"
            raise ResultError(f"table {name!r}: expected {most} on a page, got {len(heads)} and {len(lines)}")
        return cells.grid(list(heads), [[line[head] for head in heads.values()] for line in lines])

    def value(self, name: str, column: str, where: Mapping[str, Any] | None = None) -> Any:
        """The one value of a column in the one line that ``where`` leaves."""
        lines = self.lines(name, where)
        if len(lines) > 1:
            raise ResultError(f"table {name!r}: {len(lines)} lines with {where}; expected one")
        if lines[0].get(column) is None:
            raise ResultError(f"table {name!r} has no {column!r} in the line with {where}")
        return lines[0][column]

    def row(self, source: str, name: str) -> Row:
        """The row of a result file that has this name: case, threads, cache."""
        for found in self.of([source])[0].rows:
            if found.name == name:
                return found
        raise ResultError(f"bench/results/{source}.jsonl: no row {name!r}")

    def run(self, name: str) -> dict[str, Any]:
        """The run of a result file."""
        return self.of([name])[0].run

    # --- what is written ----------------------------------------------------------------------------------------------

    @functools.cached_property
    def environment(self) -> jinja2.Environment:
        made = jinja2.Environment(
            loader=jinja2.FileSystemLoader(TEMPLATES),
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
        )
        made.globals |= {name: getattr(self, name) for name in ("grid", "lines", "value", "row", "run")}
        made.globals |= {"tables": self.tables, "results": self.results}
        made.filters |= {name: getattr(cells, name) for name in ("number", "duration", "times")}
        return made

    def texts(self) -> dict[Path, str]:
        """Every document with what it is made of, by its place under the root."""
        out = {}
        for template in TEMPLATES.glob("results/*.md.j2"):
            out[PAGES / template.stem] = self._try(f"results/{template.name}", self._render)
        for name, document in BLOCKS.items():
            out[Path(document)] = self._try(f"{name}.md.j2", functools.partial(self._block, name, document))
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
        made = self.environment.get_template(template)
        return f"<!-- Made from bench/report/templates/{template}: edit that. -->\n{made.render().strip()}\n"

    def _block(self, name: str, document: str, template: str) -> str:
        text = (self.root / document).read_text(encoding="utf-8")
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
