"""The public API is documented: every name with what it takes, gives and raises, and an example that runs here."""

import doctest
import inspect
import re
from pathlib import Path

import pytest
import torch

import t2l_engine
from t2l_engine import ops
from t2l_engine.hypernetwork import convert, export

OPS = [value for name, value in vars(ops).items() if inspect.isfunction(value) and not name.startswith("_")]
OBJECTS = [getattr(t2l_engine, name) for name in t2l_engine.__all__ if name != "__version__"]
ROOT = Path(__file__).resolve().parents[1]
NAMED = {getattr(o, "__name__", str(o)): o for o in (*OBJECTS, *OPS, convert.convert, export.export)}


#: The paper, other papers, the implementations whose formats and rules are followed; ops state what they compute.
SOURCES = ("paper", "arXiv", "reference", "PEFT", "sentence-transformers", "lora_delta", "hypernet_heads", "x @ A")


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
    """Every row of the README's table: files of tests that are there, and make targets that CI runs."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = readme.partition("## What is supported")[2].partition("\n## ")[0]
    rows = [line.strip("|").split(" | ") for line in table.splitlines() if line.startswith("| ") and "held by" not in line]
    targets = re.findall(r"^(?:CI=true )?make (\w+)", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.M)
    assert len(rows) > 8 and {len(row) for row in rows} == {3}
    for what, _, checks in rows:
        named = re.findall(r"`([^`]+)`", checks)
        assert named, what
        for name in named:
            kind, _, target = name.partition(" ")
            known = {"make": target in targets, "t2l": target == "info --check"}.get(kind, (ROOT / name).is_file())
            assert known, f"{what}: {name}"
