"""What all commands share: exit statuses, messages, ``t2l info``."""

import inspect
import json
import os
import platform
import subprocess
import sys
import warnings

import pytest

import t2l_engine as t2l
from t2l_engine import ops
from t2l_engine.cli import common


def test_info(run):
    code, out, _ = run("info")
    assert code == 0
    assert f"t2l_engine {t2l.__version__}" in out and ("instruction set: " in out) == ops.NATIVE
    for name in ops.SCHEMAS:
        assert name in out
    assert ("native library: loaded" in out) == ops.NATIVE
    code, out, _ = run("info", "--json")
    about = json.loads(out)
    assert (code, about["native_library"]) == (0, ops.NATIVE)
    assert about["bundled_checkpoints"] == ["smollm2-135m", "smollm2-135m-paper"]
    assert about["ops"].keys() == ops.SCHEMAS.keys()


def test_version_and_help(run):
    assert run("--version") == (0, f"t2l_engine {t2l.__version__}\n", "")
    for arguments in (["--help"], ["chat", "--help"], ["generate", "--help"]):
        code, out, _ = run(*arguments)
        assert code == 0 and "Exit status: 0 done; 1 an expected error" in out


def test_statuses(run, monkeypatch):
    def raising(error):
        def bundled_checkpoints():
            warnings.warn("of\ntwo lines", stacklevel=2)
            raise error

        monkeypatch.setattr("t2l_engine.cli.info.bundled_checkpoints", bundled_checkpoints)

    raising(ValueError("of\n  two lines"))
    assert run("info") == (1, "", "t2l: warning: of two lines\nt2l: of two lines\n")
    raising(FloatingPointError("loss is nan at step 3"))
    assert run("info")[0] == 1
    raising(KeyboardInterrupt())
    assert run("info")[0] == 130
    assert run("info", "--nonsense")[0] == 2
    raising(RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):  # keeps its traceback
        run("info")


def test_a_closed_pipe_is_quiet():
    command = [sys.executable, "-c", "from t2l_engine.cli import main; main()", "info"]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert done.returncode == 1 and done.stderr == b""


def test_checkpoints_that_no_one_can_chat_with(expect_error, checkpoint, tmp_path):
    command = ("chat", "--task", "Count.", "-c")
    expect_error("--base-model: the checkpoint does not name one", *command, checkpoint)
    net = t2l.HyperNetwork.from_pretrained(checkpoint)
    net.save_pretrained(tmp_path / "inputs", metadata={"training": {"condition": "input"}})
    message = f"--checkpoint: expected one trained on descriptions, got {tmp_path / 'inputs'}, which was trained on inputs"
    expect_error(message, *command, tmp_path / "inputs")


def test_names_that_no_text_can_hold():
    assert json.loads(common.json_text({"checkpoint": "a\udcff", "name": "ä"})) == {"checkpoint": "a\udcff", "name": "ä"}
    assert "ä" in common.json_text({"name": "ä"}) and "\\u" in common.json_text({"checkpoint": "a\udcff"})


#: Prints page faults of 20 allocations before and after keep_freed_memory; without torch, which takes seconds.
FAULTS = f"""
import contextlib, resource
{inspect.getsource(common.keep_freed_memory)}
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        b"x" * (1 << 22)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults())
keep_freed_memory()
faults()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc")
def test_freed_memory_is_used_again():
    """20 times 4 MiB, 1,024 pages each (fewer faults where the system has huge pages)."""
    out = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    fresh, kept = map(int, out.stdout.split())
    assert kept < 40 and fresh > 40, out.stdout
