"""Two processes do what one does."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import t2l_engine as t2l
from t2l_engine.research.training import lora, reconstruction, sft
from t2l_engine.research.training.settings import to_yaml
from t2l_engine.testing import numerics
from tests.research.training import small_runs


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def launch(folder: Path, commands):
    """``t2l`` with each of ``commands`` in turn, by two processes; see ``launched_process.py``."""
    (folder / "commands.json").write_text(json.dumps([[stop, list(map(str, command))] for stop, command in commands]))
    # On a machine without a GPU, --multi_gpu is what makes accelerate start more than one process: --cpu does not.
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launcher += ["--main_process_port", str(free_port()), Path(__file__).parent / "launched_process.py", folder]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(list(map(str, launcher)), capture_output=True, text=True, env=environment)


def close(one: Path, two: Path):
    """Whether two runs logged the same, to rounding."""
    ours, theirs = small_runs.rows(one), small_runs.rows(two)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs] and len(ours) > 6
    assert small_runs.losses(two) == pytest.approx(small_runs.losses(one), rel=numerics.TRAINING_RTOL)
    for row, other in zip(ours, theirs, strict=True):
        assert row.get("best") == other.get("best") and row.get("learning_rate") == other.get("learning_rate")


def close_tensors(one, two):
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert numerics.relative_frobenius(two[key], value) <= numerics.TRAINED_FROBENIUS, key


def close_checkpoints(one: Path, two: Path):
    close_tensors(*(t2l.HyperNetwork.from_pretrained(folder).state_dict() for folder in (one, two)))


@pytest.mark.slow
def test_two_processes_do_what_one_does(base_model, tasks, tmp_path):
    """SFT with noise and accumulation, adapters of a wave of tasks, reconstruction of three adapters; each fails once."""
    noise = {"neftune_alpha": 5.0, "label_smoothing": 0.1, "generated_l2": 0.1, "accumulation": 2, "weighting": "token"}
    kinds = {
        "sft": small_runs.sft(base_model, **noise),
        "lora": small_runs.lora(base_model),
        "reconstruction": small_runs.reconstruction(tasks_per_batch=3, target="delta-w"),
    }
    small_runs.library(tmp_path / "library")
    commands = []
    for name, settings in kinds.items():
        source = ("--adapters", tmp_path / "library") if name == "reconstruction" else ("--tasks", tasks)
        (tmp_path / f"{name}.yaml").write_text(to_yaml(settings))
        command = ("train", name, *source, "-o", tmp_path / "out" / name, "--config", tmp_path / f"{name}.yaml")
        commands += [(5, command), (None, command)]  # which goes on
    done = launch(tmp_path, commands)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": done") == 3  # once, not by each process

    out, one = tmp_path / "out", tmp_path / "one"
    sft.train(kinds["sft"], tasks, one / "sft")
    close(one / "sft", out / "sft")
    for part in ("", "best"):
        close_checkpoints(one / "sft" / part, out / "sft" / part)

    lora.train(kinds["lora"], tasks, one / "lora")
    close(one / "lora" / "waves" / "000", out / "lora" / "waves" / "000")
    for part in (lora.ADAPTERS, lora.LAST):
        a, b = (t2l.AdapterStack.from_peft([f / "lora" / part / name for name in ("first", "last")]) for f in (one, out))
        close_tensors(small_runs.tensors(a), small_runs.tensors(b))

    reconstruction.train(kinds["reconstruction"], tmp_path / "library", one / "reconstruction")
    close(one / "reconstruction", out / "reconstruction")
    close_checkpoints(one / "reconstruction", out / "reconstruction")

    changed = [json.loads((tmp_path / f"changed-{rank}.json").read_text()) for rank in (0, 1)]
    assert len(changed[0]) > 20 and changed[1] == []  # the main process alone writes
