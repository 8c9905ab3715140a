"""Importing the package is cheap and pulls in nothing but torch."""

import subprocess
import sys


def modules(statement):
    """Names of all modules that a process has after ``statement``."""
    code = f"import sys; {statement}; print(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_import_costs_little_more_than_torch():
    added = modules("import t2l_engine") - modules("import torch")
    own = {name for name in added if name.split(".")[0] == "t2l_engine"}
    assert len(own) < 40 and len(added - own) < 20
    assert {name.split(".")[0] for name in added - own} <= {"torch", *sys.stdlib_module_names}


def test_core_does_not_import_what_it_may_not():
    code = (
        "import sys, t2l_engine; heavy = ('transformers', 'peft', 'safetensors', 'yaml', 'typer', "
        "'t2l_engine.training', 't2l_engine.evaluation', 't2l_engine.integrations', 't2l_engine.testing', "
        "'t2l_engine._core'); print([m for m in heavy if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_a_broken_native_library_raises(tmp_path):
    """Present but unloadable: an ImportError that says what to do, unless the reference was asked for."""
    import os
    import shutil
    from pathlib import Path

    import t2l_engine

    package = Path(t2l_engine.__file__).parent
    shutil.copytree(package, tmp_path / "t2l_engine", ignore=shutil.ignore_patterns("*.so", "__pycache__", "checkpoints"))
    command = [sys.executable, "-c", "import t2l_engine; print(t2l_engine.ops.NATIVE)"]
    environment = {k: v for k, v in os.environ.items() if k != "T2L_DISABLE_NATIVE"} | {"PYTHONPATH": str(tmp_path)}
    absent = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert absent.stdout.strip() == "False", absent.stderr
    (tmp_path / "t2l_engine" / "_C.so").write_bytes(b"not a library")
    broken = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert broken.returncode != 0 and "present but does not load" in broken.stderr
    asked = subprocess.run(
        command, env={**environment, "T2L_DISABLE_NATIVE": "1"}, cwd=tmp_path, capture_output=True, text=True
    )
    assert asked.stdout.strip() == "False", asked.stderr
