"""``t2l train`` as a user types it: settings, runs that go on, what is printed, errors in one line."""

import json

import pytest

import t2l_engine as t2l
from t2l_engine.research.training import loop
from t2l_engine.research.training import settings as kinds
from t2l_engine.text import dtypes
from tests.research.training import conftest as shared
from tests.research.training import small_runs

save_model, base_model, tasks = shared.save_model, shared.base_model, shared.tasks
one_thread = shared.one_thread
KINDS = {"sft": kinds.SFTSettings, "lora": kinds.LoRASettings, "reconstruction": kinds.ReconstructionSettings}


@pytest.fixture
def train(run, tmp_path):
    """Run ``t2l train KIND`` with settings in a file; (exit status, stdout, stderr)."""

    def call(kind, settings, *arguments):
        path = tmp_path / "settings.yaml"
        path.write_text(settings if isinstance(settings, str) else kinds.to_yaml(settings))
        return run("train", kind, "--config", path, "--threads", "1", *arguments)

    return call


def cells(text):
    """The rows of a printed table, as lists of stripped cells."""
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]


@pytest.mark.parametrize("kind", KINDS)
def test_fields(run, kind):
    """All of them, with their defaults and a sentence; nothing else is needed."""
    code, out, err = run("train", kind, "--fields")
    assert (code, err) == (0, "")
    assert cells(out) == [[name, default, meaning] for name, default, meaning in kinds.fields(KINDS[kind])]
    assert all(meaning for _, _, meaning in cells(out))


def test_sft(train, run, base_model, tasks, tmp_path):
    out = tmp_path / "out"
    file = f"base_model: {base_model}\ntarget_modules: [q_proj, v_proj]\nlatent_size: 16\nhead_in_size: 8\nsteps: 9\n"
    command = ("--tasks", tasks, "-o", out, "--set", "steps=4", "--set", "encoder=one-hot", "--set", "learning_rate=1e-2")
    code, printed, err = train("sft", file, *command, "--names", "last, first")
    assert (code, printed) == (0, f"{out}: done\n")
    expected = kinds.read(kinds.SFTSettings, tmp_path / "settings.yaml", command[5::2])
    expected = expected.model_copy(update={"dtype": str(dtypes.preferred()).removeprefix("torch.")})
    assert expected.steps == 4 and expected.learning_rate == 0.01
    assert len(small_runs.rows(out)) == 5
    assert kinds.read(kinds.SFTSettings, out / loop.SETTINGS) == expected
    assert len(t2l.TextToLoRA.from_pretrained(out).generate(["first", "last"])) == 2
    code, printed, err = train("sft", file, "--tasks", tasks, "-o", out)
    assert (code, printed) == (1, "") and "steps: 4 then, 9 now" in err.splitlines()[-1]


def test_a_run_goes_on_in_the_dtype_it_was_begun_with(train, base_model, tasks, tmp_path, monkeypatch):
    out, file = tmp_path / "out", small_runs.sft(base_model)
    for rates in ({"float32": 2.0, "bfloat16": 1.0}, {"float32": 1.0, "bfloat16": 2.0}):
        monkeypatch.setattr(dtypes, "gflops", lambda rates=rates: rates)
        assert train("sft", file, "--tasks", tasks, "-o", out)[0] == 0
        assert kinds.read(kinds.SFTSettings, out / loop.SETTINGS).dtype == "float32"
    code, _, err = train("sft", file, "--tasks", tasks, "-o", out, "--set", "dtype=bfloat16")
    assert code == 1 and "dtype: 'float32' then, 'bfloat16' now" in err.splitlines()[-1]


@pytest.mark.parametrize("arguments, message", [
    ("--tasks {here}/none", "descriptions.json"), ("--tasks {tasks} --device tpu", "'tpu'"),
    ("--tasks {tasks} --manifest nowhere", "'nowhere'"), ("--tasks {tasks} --names first,other", "'other'"),
    ("--tasks {tasks} --set base_model=nowhere", "nowhere"), ("--tasks {tasks} --set steps=-3", "--set: steps: "),
])  # fmt: skip
def test_runs_that_cannot_start(train, run, base_model, tasks, tmp_path, arguments, message):
    """The last line says why; test_settings.py has all that may be wrong with settings."""
    words = arguments.format(here=tmp_path, tasks=tasks).split()
    code, out, err = train("sft", small_runs.sft(base_model), "-o", tmp_path / "out", *words)
    assert (code, out) == (1, "") and sum(line.startswith("t2l: ") for line in err.splitlines()) == 1
    assert err.splitlines()[-1].startswith("t2l: ") and message in err.splitlines()[-1]
    assert not (tmp_path / "out").exists()
    assert run("train", "sft", "--tasks", tasks)[0] == 2  # no output


def test_a_task_split_of_a_manifest(train, base_model, tasks, tmp_path):
    """Trains on the tasks it has in that task split, with the examples it lists and no other."""
    from t2l_engine.research.tasks import manifest
    from t2l_engine.research.tasks.folder import load_tasks

    about = {"skill": "words", "source": "made for the test", "licence": ["CC0"], "permissive": True}
    facts = {"first": about | {"task_split": "train"}, "last": about | {"task_split": "out-of-family"}}
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(manifest.build(load_tasks(tasks, None), facts, "For the test.")))
    listed, settings = ("--manifest", path), small_runs.sft(base_model, steps=1)

    def last_line(*arguments, output="out"):
        return train("sft", settings, "--tasks", tasks, *arguments, "-o", tmp_path / output)[2].splitlines()[-1]

    for split, name in (("train", "first"), ("out-of-family", "last")):
        last_line(*listed, "--task-split", split, output=split)
        assert list(json.loads((tmp_path / split / "config.json").read_text())["training"]["tasks"]) == [name]
    assert "--task-split: expected --manifest beside it" in last_line("--task-split", "train")
    for message, *arguments in (
        (f"--task-split: {tasks} has no task that {path} lists as 'in-family'", "--task-split", "in-family"),
        (f"--names: expected tasks that {path} lists as 'train', got 'last'", "--names", "first,last"),
        ("--task-split: expected one of", "--task-split", "none"),
    ):
        assert message in last_line(*listed, *arguments)
    lines = (tasks / "first.jsonl").read_text().splitlines()
    (tasks / "first.jsonl").write_text("\n".join(lines[1:]))
    assert f"{tasks}: expected the examples of {path}, got 1 differences: first: 1 examples" in last_line(*listed)
    assert not (tmp_path / "out").exists()
