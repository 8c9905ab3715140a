"""Documents: every public name with what it takes, gives and raises and an example that runs; pages that are true."""

import doctest
import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer

import t2l_engine
from t2l_engine import ops
from t2l_engine.cli import app
from t2l_engine.hypernetwork import convert, export

OPS = [value for name, value in vars(ops).items() if inspect.isfunction(value) and not name.startswith("_")]
OBJECTS = [getattr(t2l_engine, name) for name in t2l_engine.__all__ if name != "__version__"]
ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    p.relative_to(ROOT).as_posix(): p.read_text(encoding="utf-8") for p in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
}
NAMED = {getattr(o, "__name__", str(o)): o for o in (*OBJECTS, *OPS, convert.convert, export.export)}


@pytest.mark.parametrize("name", NAMED)
def test_documented(name):
    """A docstring with an example; every public method has a docstring, and errors are stated somewhere."""
    documented = NAMED[name]
    assert ">>>" in inspect.getdoc(documented), "no example"
    if not inspect.isclass(documented):
        return
    for key, member in vars(documented).items():
        member = getattr(member, "__func__", member)
        if not key.startswith("_") and (inspect.isfunction(member) or isinstance(member, property)):
            known = inspect.getdoc(member) or key in ("weight", "bias", "in_features", "out_features", "forward")
            assert known, f"{name}.{key} has no docstring"


@pytest.mark.parametrize("name", NAMED)
def test_example_runs(name):
    torch.manual_seed(0)
    documented = NAMED[name]
    module = documented if inspect.ismodule(documented) else inspect.getmodule(documented)
    finder = doctest.DocTestFinder(recurse=False)
    (test,) = finder.find(documented, name, module=module, globs=dict(vars(module)))
    assert test.examples
    result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.IGNORE_EXCEPTION_DETAIL).run(test)
    assert result.failed == 0 and result.attempted


def test_what_is_supported_names_what_holds_it():
    """Every row of docs/support.md: files of tests that are there, and make targets that CI runs."""
    table = (ROOT / "docs" / "support.md").read_text(encoding="utf-8").partition("\n## ")[0]
    rows = [line.strip("|").split(" | ") for line in table.splitlines() if line.startswith("| ") and "tested by" not in line]
    scripts = "".join((ROOT / ".ci" / name).read_text(encoding="utf-8") for name in ("run", "release"))
    targets = " ".join(re.findall(r"^step (?:env CI=true )?make ([\w -]+)", scripts, re.M)).split()
    assert len(rows) > 8 and {len(row) for row in rows} == {3}
    for what, _, checks in rows:
        named = re.findall(r"`([^`]+)`", checks)
        assert named, what
        for name in named:
            kind, _, target = name.partition(" ")
            known = {"make": target in targets, "t2l": target == "info --check"}.get(kind, (ROOT / name).is_file())
            assert known, f"{what}: {name}"


@pytest.mark.parametrize("page", PAGES)
def test_pages_are_short(page):
    """The README is a screen and a half, the changelog a screen, a page of results one table and what it means."""
    lines = PAGES[page].splitlines()
    limits = {"README.md": 110, "CHANGELOG.md": 60}
    assert len(lines) <= limits.get(page, 100 if page.startswith("docs/results/") else 500)
    if page == "README.md":
        assert max(map(len, lines)) <= 120 and len(PAGES[page].split()) <= 900


def test_programs_are_run():
    """For each Python program of a page there is a test that names the page and the program's mark, if it has one."""
    sources = [path.read_text(encoding="utf-8") for path in ROOT.glob("tests/**/test_*.py") if path != Path(__file__)]
    for page, text in PAGES.items():
        for mark in re.findall(r"(?:<!-- ([\w ]+) -->\n)?```python\n", text) if page != "docs/ops.md" else ():
            named = (f'"{mark}"', f"<!-- {mark} -->") if mark else ("```python",)
            runs = [s for s in sources if Path(page).name in s and any(name in s for name in named)]
            assert runs, f"{page}: no test runs {mark!r}"


@pytest.mark.parametrize("number, code", enumerate(re.findall(r"```python\n(.*?)```", PAGES["docs/ops.md"], re.S)))
def test_op_examples_run(number, code):
    torch.manual_seed(number)
    exec(compile(code, f"docs/ops.md {number}", "exec"), {})


def test_commands_are_known():
    """Every line ``t2l ...`` and ``make ...`` in a block: the command, its options and the target exist."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", "\n".join(PAGES.values()), re.S | re.M)
    blocks = "".join(text for language, text in fenced if not language).replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in blocks.splitlines() if re.match(r"(t2l|make) ", line)]
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert len(lines) > 40
    root = typer.main.get_command(app)
    for name, *arguments in lines:
        if name == "make":
            assert [a for a in arguments if "=" not in a and a in targets], arguments
            continue
        command = root
        while hasattr(command, "commands"):  # typer has classes of its own for click's, or click's
            command = command.commands[arguments.pop(0)]
        assert command is not root
        arguments = [a for a in arguments if a != "..."]
        command.make_parser(command.context_class(command)).parse_args(arguments)  # an unknown option raises


def test_links_of_the_readme_lead_somewhere():
    """Those of docs/, CONTRIBUTING.md and CHANGELOG.md are held by ``make docs``."""
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", PAGES["README.md"]):
        assert (ROOT / link).exists(), link


def test_the_version_has_one_place():
    """Documents that cannot ask for it name the same one."""
    version = t2l_engine.__version__
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.M)[1]
    wheels = re.findall(r"t2l_engine-(\d[\w.]*)-py3", "".join(PAGES.values()))
    assert {cited, *wheels} == {version}
    changes = re.search(r"^## (\S+) - ", PAGES["CHANGELOG.md"], re.M)[1]
    assert changes == version


def test_release_notes():
    """They are this version's part of the changelog; a version without one is an error."""
    script = ROOT / "docs" / "release_notes.py"
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    title, _, body = run.stdout.partition("\n\n")
    assert title.startswith(f"# t2l_engine {t2l_engine.__version__} (") and "\n### " in body
    assert body.strip() in PAGES["CHANGELOG.md"] and "\n## " not in body
    run = subprocess.run([sys.executable, script, "9.9.9"], capture_output=True, text=True)
    assert run.returncode == 1 and "expected a part ## 9.9.9 - DATE" in run.stderr
