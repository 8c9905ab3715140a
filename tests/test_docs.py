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
#: Who runs the Python programs of a page.
RUN_BY = {
    "AGENTS.md": ["test_smollm2.py"],
    "README.md": ["test_smollm2.py"],
    "docs/generate.md": ["test_smollm2.py", "test_engine.py", "test_adapter_library.py"],
    "docs/icl.md": ["test_icl.py"],
    "docs/llama-cpp.md": ["test_gguf.py"],
    "docs/ops.md": ["test_docs.py"],
    "docs/quickstart.md": ["test_smollm2.py"],
    "docs/serve.md": ["test_smollm2.py"],
    "docs/sglang.md": ["serving/test_sglang.py"],
    "docs/tasks.md": ["data_tools/test_tasks_doc.py"],
    "docs/vllm.md": ["serving/test_offline.py"],
}
#: In the one program that no test runs: it writes a file of the package.
NOT_RUN = '(manifest.PACKAGED / "specs.json").write_text('
NAMED = {getattr(o, "__name__", str(o)): o for o in (*OBJECTS, *OPS, convert.convert, export.export)}


#: The paper, other papers, the implementations whose formats and rules are followed; ops state what they compute.
SOURCES = ("paper", "arXiv", "SakanaAI", "PEFT", "sentence-transformers", "lora_delta", "hypernet_heads", "x @ A")


def text_of(documented) -> str:
    """Its docstring and, of a class, those of its public methods."""
    parts = [documented]
    if inspect.isclass(documented):
        parts += [v for k, v in vars(documented).items() if not k.startswith("_") or k == "__init__"]
    return "\n".join(inspect.getdoc(getattr(p, "__func__", p)) or "" for p in parts)


@pytest.mark.parametrize("name", NAMED)
def test_documented(name):
    documented = NAMED[name]
    text = text_of(documented)
    assert ">>>" in inspect.getdoc(documented), "no example"
    quiet = inspect.ismodule(documented) or (inspect.isclass(documented) and issubclass(documented, Exception))
    if not quiet and documented is not t2l_engine.bundled_checkpoints:  # which takes nothing and cannot fail
        assert "Raises" in text or "raises" in text, "says nothing about errors"
        assert re.search(r"\[[\w+., ]*\]|``[\w ]+``|list of strings", text), "says nothing about shapes or kinds"
        assert any(source in text for source in SOURCES) or documented is ops.has_kernel, "names no source"
    if inspect.isclass(documented):
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
    targets = re.findall(r"^step (?:env CI=true )?make ([\w-]+)", scripts, re.M)
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
    """The README is one screen's logic; no page is a scroll."""
    assert len(PAGES[page].splitlines()) <= (180 if page == "README.md" else 500)


def test_programs_are_run():
    """A Python program of a page has a test that runs it: the test names the page and, if it has one, the mark."""
    found = {page: re.findall(r"(?:<!-- ([\w ]+) -->\n)?```python\n(.*?)```", text, re.S) for page, text in PAGES.items()}
    assert {page for page, programs in found.items() if programs} == RUN_BY.keys()
    for page, tests in RUN_BY.items():
        sources = [(ROOT / "tests" / test).read_text(encoding="utf-8") for test in tests]
        for test, source in zip(tests, sources, strict=True):
            assert Path(page).name in source, f"{test} does not run {page}"
        marks = [mark for mark, code in found[page] if NOT_RUN not in code]
        for mark in marks if any(marks) else ():
            named = f'"{mark}"', f"<!-- {mark} -->"
            assert mark and any(name in source for name in named for source in sources), f"{page}: nobody runs {mark!r}"


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
    assert {cited, *wheels} == {version} and len(wheels) >= 2
    changes = re.search(r"^## (\S+) - ", PAGES["CHANGELOG.md"], re.M)[1]
    assert changes == version


def test_release_notes():
    """They are this version's part of the changelog; a version without one is an error."""
    script = ROOT / "docs" / "release_notes.py"
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    title, _, body = run.stdout.partition("\n\n")
    assert title.startswith(f"# t2l_engine {t2l_engine.__version__} (") and body.startswith("### ")
    assert body.strip() in PAGES["CHANGELOG.md"] and "\n## " not in body
    run = subprocess.run([sys.executable, script, "9.9.9"], capture_output=True, text=True)
    assert run.returncode == 1 and "expected a part ## 9.9.9 - DATE" in run.stderr
