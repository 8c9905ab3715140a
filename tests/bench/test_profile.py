"""What Nsight Compute is asked for, over a program in its place: ncu itself needs a card."""

import stat
import sys

import pytest

from bench import kernels, profile
from bench.harness import BenchError, Context
from bench.timing import Dry


@pytest.mark.parametrize("status", [0, 3])
def test_a_case_runs_under_ncu(tmp_path, monkeypatch, capfd, status):
    program = tmp_path / "ncu"
    program.write_text(f"#!{sys.executable}\nimport sys\nprint(*sys.argv[1:], sep='\\n')\nsys.exit({status})\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "none"))
    monkeypatch.setattr(kernels, "NSIGHT_COMPUTE", "")
    if status:
        with pytest.raises(BenchError, match="ncu: exit status 3"):
            profile.command("gradients")
        return
    profile.command("gradients")
    name, *words = capfd.readouterr().out.split("\n")[1:-1]
    assert name.startswith("gradients") and words[-4:] == [sys.executable, "-m", "bench.profile", name]
    assert words[words.index("--profile-from-start") + 1] == "off"


def test_every_case_can_be_called():
    """At the smallest size, on this CPU; full ones have other names and are as many kinds."""
    context = Context.of("tiny", 1, Dry("dry"))
    for make in profile.profiled(context.full).values():
        make(context)()
    assert {name.split()[0] for name in profile.profiled(True)} == {"generate", "apply", "gradients"}
