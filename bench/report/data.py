"""The committed results, as pages, figures and tables ask for them; what is missing is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.records import BUNDLED, OF_A_CPU, PAPER, ROOT, Result, ResultError, Row, bundled, load

FOLDER = Path("bench", "results")
#: Suite -> field of its plan, or of its run -> the bundled checkpoint whose weights it names.
OF_CHECKPOINT = {"icl": {"checkpoint": PAPER}, "quality": {"checkpoint": BUNDLED, "paper": PAPER}}


class Data:
    """Every result file under ``root``, checked; ``problems``: why files were refused, a line each."""

    def __init__(self, root: Path = ROOT):
        self.problems: list[str] = []
        self.found: dict[str, Result] = {}
        for path in sorted((root / FOLDER).glob("*.jsonl")):
            try:
                self.found[path.stem] = self._checked(path)
            except ResultError as error:
                self.problems.append(f"{FOLDER.as_posix()}/{error}")

    @staticmethod
    def _checked(path: Path) -> Result:
        """ResultError where the file is of another checkpoint than the bundled one, or of an unknown machine."""
        result, (suite, _, machine) = load(path), path.stem.partition(".")
        if bool(machine) != (suite in OF_A_CPU):
            raise ResultError(f"{path.name}: expected a class of CPUs in the name exactly where a suite times a CPU")
        about = result.records("plan")[0] if "plan" in result.others else result.run
        for field, name in OF_CHECKPOINT.get(suite, {}).items():
            if about.get(field) != bundled(name):
                raise ResultError(f"{path.name}: not of the bundled checkpoint {name}")
        return result

    def results(self, suite: str, machine: str | None = None) -> list[Result]:
        """The results of a suite (on a GPU: SUITE-cuda), one a machine, or only of the class of CPUs ``machine``."""
        found = [of for stem, of in self.found.items() if stem.partition(".")[0] == suite]
        found = [of for of in found if machine in (None, of.path.stem.partition(".")[2])]
        if not found:
            of = f".{machine or '*'}" if suite in OF_A_CPU else ""
            raise ResultError(f"{FOLDER.as_posix()}/{suite}{of}.jsonl: missing")
        return found

    def run(self, suite: str, machine: str | None = None) -> dict[str, Any]:
        """What a run says of itself: command, commit, date, machine."""
        return self.results(suite, machine)[0].run

    def rows(self, suite: str, machine: str | None = None, **where: Any) -> list[Row]:
        """The rows whose fields, or entries of their shape, have the values of ``where``; a list allows several."""
        found = [row for result in self.results(suite, machine) for row in result.rows]
        for name, wanted in where.items():
            values = wanted if isinstance(wanted, list) else [wanted]
            found = [row for row in found if (vars(row) if name in vars(row) else row.shape).get(name) in values]
        if not found:
            raise ResultError(f"{FOLDER.as_posix()}/{suite}: no row with {where}")
        return found

    def row(self, suite: str, machine: str | None = None, **where: Any) -> Row:
        """The one row that ``where`` leaves."""
        found = self.rows(suite, machine, **where)
        if len(found) > 1:
            raise ResultError(f"{FOLDER.as_posix()}/{suite}: expected one row with {where}, got {len(found)}")
        return found[0]

    def records(self, suite: str, kind: str, machine: str | None = None, **where: Any) -> list[dict[str, Any]]:
        """The records of a kind whose fields have the values of ``where``."""
        found = [entry for result in self.results(suite, machine) for entry in result.records(kind)]
        found = [entry for entry in found if all(entry.get(name) == value for name, value in where.items())]
        if not found:
            raise ResultError(f"{FOLDER.as_posix()}/{suite}: no record {kind!r} with {where}")
        return found
