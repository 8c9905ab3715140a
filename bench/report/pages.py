"""Writes and checks docs/results, docs/figures, and blocks between markers in other documents, from bench/results."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path

import jinja2
from rich.console import Console

from bench.records import ROOT, ResultError
from bench.report import cells, figures, icl, quality, tables  # noqa: F401
from bench.report.data import Data

TEMPLATES = Path(__file__).parent / "templates"
PAGES, DRAWN = Path("docs", "results"), Path("docs", "figures")
#: Documents with blocks between markers -> the templates of the same names.
BLOCKS = {
    "README.md": ("speed", "quality"),
    "t2l_engine/checkpoints/smollm2-135m/README.md": ("card",),
    "t2l_engine/checkpoints/smollm2-135m-paper/README.md": ("card",),
}
AGAIN = "run: python -m bench report"


class Report:
    """The pages, figures and blocks under ``root``; ``problems`` collects what is wrong, a line each."""

    def __init__(self, root: Path = ROOT):
        self.root = root
        self.data = Data(root)
        self.problems = list(self.data.problems)

    def texts(self) -> dict[Path, str]:
        """Every generated document by its place under the root."""
        found: dict[Path, str] = {}
        for template in TEMPLATES.glob("results/*.md.j2"):
            self._try(found, PAGES / template.stem, f"results/{template.name}", self._render)
        for document, names in BLOCKS.items():
            place = Path(document)
            for name in names:
                text = found.get(place) or (self.root / place).read_text(encoding="utf-8")
                self._try(found, place, f"{name}.md.j2", functools.partial(self._block, name, document, text))
        return found

    def drawings(self, make: Callable[[str, Data], str]) -> dict[Path, str]:
        """``make`` of every figure by its place under the root: its stamp, or the figure."""
        found: dict[Path, str] = {}
        for name in figures.FIGURES:
            self._try(found, DRAWN / f"{name}.svg", name, lambda name: make(name, self.data))
        return found

    def _try(self, found: dict[Path, str], place: Path, name: str, make: Callable[[str], str]) -> None:
        """Puts ``make`` of ``name`` at ``place``; an error becomes a problem."""
        try:
            found[place] = make(name)
        except (ResultError, jinja2.TemplateError, KeyError, TypeError, ValueError) as error:
            kind = "" if isinstance(error, ResultError) else f"{type(error).__name__}: "
            self.problems.append(f"{name}: {kind}{error}")

    def _render(self, template: str) -> str:
        data = self.data
        names = {name: getattr(data, name) for name in ("results", "rows", "row", "records", "run", "found")}
        derived = functools.cache(lambda name: tables.lines(data, name))
        made = _environment().get_template(template).render(names, derived=derived, data=data, quality=quality)
        return f"<!-- Made from bench/report/templates/{template}: edit that. -->\n{made.strip()}\n"

    def _block(self, name: str, document: str, text: str, template: str) -> str:
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
        if text.count(begin) != 1 or text.count(end) != 1 or text.find(begin) > text.find(end):
            raise ResultError(f"{document}: markers of block {name!r} are missing, doubled or out of order")
        before, _, rest = text.partition(begin)
        return before + begin + self._render(template) + end + rest.partition(end)[2]

    def strangers(self) -> list[Path]:
        """Files in the folders of generated files that nothing makes."""
        known = {DRAWN / f"{name}.svg" for name in figures.FIGURES}
        known |= {PAGES / template.stem for template in TEMPLATES.glob("results/*.md.j2")}
        there = [path for folder in (PAGES, DRAWN) for path in (self.root / folder).rglob("*.*")]
        return sorted({path.relative_to(self.root) for path in there} - known)

    def check(self) -> list[str]:
        """What is wrong, a line each."""
        texts, stamps = self.texts(), self.drawings(figures.stamp)
        for path, made in (texts | stamps).items():
            there = (self.root / path).read_text(encoding="utf-8") if (self.root / path).exists() else None
            if there is None:
                self.problems.append(f"{path.as_posix()}: missing; {AGAIN}")
            elif made != there if path in texts else made not in there:
                self.problems.append(f"{path.as_posix()}: differs from what bench/results gives; {AGAIN}")
        self.problems += [f"{path.as_posix()}: nothing makes this file; {AGAIN}" for path in self.strangers()]
        return self.problems

    def write(self) -> list[str]:
        """Writes everything, or nothing where something is wrong."""
        made = self.texts() | self.drawings(figures.svg)
        if not self.problems:
            for path, text in made.items():
                (self.root / path).parent.mkdir(parents=True, exist_ok=True)
                (self.root / path).write_text(text, encoding="utf-8")
            for path in self.strangers():
                (self.root / path).unlink()
        return self.problems


@functools.cache
def _environment() -> jinja2.Environment:
    """Shared by all reports: it keeps compiled templates."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        finalize=_printed,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    filters = ("number", "duration", "times", "points")
    made.filters |= {name: getattr(cells, name) for name in filters}
    functions = ("grid", "row_grid", "line_grid", "column", "label")
    made.globals |= {name: getattr(cells, name) for name in functions}
    return made


def _printed(value: object) -> object:
    """Refuses to print None: a value that a result lacks is no word of a page."""
    if value is None:
        raise TypeError("a template prints a value that is None")
    return value


def show(name: str | None) -> None:
    """Prints a table, in full width where not to a terminal, or the names of all; ResultError where there is none such."""
    data = Data()
    if data.problems:
        raise ResultError("\n".join(data.problems))
    console = Console(width=None if sys.stdout.isatty() else 500)
    if name is None:
        console.print("\n".join(tables.names(data)))
    else:
        about = tables.DERIVED[name][0] if name in tables.DERIVED else name
        console.print(tables.to_terminal(about, tables.lines(data, name)))
