"""``t2l tasks`` as a user types it."""

import dataclasses
import json

import pytest

from t2l_engine.cli import tasks as command
from t2l_engine.research.tasks import manifest as manifests
from t2l_engine.research.tasks.folder import load_tasks, write_tasks
from t2l_specs import synthetic

FACTS = {"skill": "letters", "task_split": "train", "source": "made here", "licence": ["Apache-2.0"], "permissive": True}
ANTS = {
    "Definition": "Name it.",
    "Instance License": "MIT",
    "Instances": [{"input": f"ant {i}", "output": "x"} for i in range(20)],
}


@pytest.fixture
def manifest(tmp_path, suite):
    """A manifest of the suite, ``m.json``: its last task is held out."""
    facts = {task.name: FACTS | {"task_split": "train" if task is not suite[-1] else "out-of-family"} for task in suite}
    (tmp_path / "m.json").write_text(json.dumps(manifests.build(suite, facts, "For tests.")))
    return tmp_path / "m.json"


@pytest.fixture
def call(t2l_tasks, tmp_path, monkeypatch):
    """Run a command, in words, in a folder of its own; (stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(words):
        out, err, error = t2l_tasks(*words.split())
        assert error is None, words
        return out, err

    return run


@pytest.fixture
def fails(t2l_tasks):
    """Run a command, in words, that prints nothing on stdout and fails with ``message``."""

    def run(message, words):
        out, _, error = t2l_tasks(*words.split())
        assert out == "" and message in str(error)

    return run


def test_task_splits_are_those_of_manifests():
    assert tuple(split.value for split in command.TaskSplit) == manifests.TASK_SPLITS


def test_synthetic(call, fails, tmp_path):
    assert call("synthetic -o out --examples 30 --seed 4") == ("out: 12 tasks, 360 examples\n", "")
    assert load_tasks("out", None) == sorted(synthetic.suite(30, 4), key=lambda task: task.name)
    fails("descriptions.json: exists; expected a folder without tasks", "synthetic -o out")
    fails("examples: expected a number from 20 to 120, got 7", "synthetic -o new --examples 7")
    assert not (tmp_path / "new").exists()


def test_files_that_are_kept(call, fails, tmp_path):
    """A file of a task's name, without --force; what a killed call left, of which descriptions.json is last, is replaced."""
    call("synthetic -o out")
    files = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    (tmp_path / "out" / "descriptions.json").unlink()
    call("synthetic -o out")
    assert {path: path.read_bytes() for path in files} == files
    (tmp_path / "out" / "descriptions.json").unlink()
    last = max(files)
    last.write_text("mine")
    fails(f"{last.name}: exists; expected no file of a task's name, or overwrite=True (--force)", "synthetic -o out")
    assert last.read_text() == "mine" and not (tmp_path / "out" / "descriptions.json").exists()
    call("synthetic -o out --force")
    assert {path: path.read_bytes() for path in files} == files


def test_show(call, folder, suite):
    about = json.loads(call("show tasks --json")[0])
    assert [row["task"] for row in about] == sorted(task.name for task in suite)
    assert about[0]["splits"] == {"train": 13, "val": 2, "test": 5} and about[0]["descriptions"] == 8
    examples = sorted(suite, key=lambda task: task.name)[0].examples
    assert about[0]["mean_chars"] == sum(len(e.input) + len(e.outputs[0]) for e in examples) / 20
    table = call("show tasks")[0]
    assert "4 tasks" in table and "syn_first_of_3" in table and "mean characters" in table


def test_splits_of_other_names_are_shown(call, suite):
    odd = [dataclasses.replace(e, split=name) for e, name in zip(suite[0].examples, ("extra", "\x1b[31m"), strict=False)]
    write_tasks("odd", [dataclasses.replace(suite[0], examples=tuple(odd))])
    counts = json.loads(call("show odd --json")[0])[0]["splits"]
    assert counts == {"train": 0, "val": 0, "test": 0, "extra": 1, "\x1b[31m": 1}
    table = call("show odd")[0]
    assert "extra" in table and "\x1b" not in table and r"\x1b[31m" in table
    told = call("check odd")[1]
    assert "training reads no splits other than train, val, test: " in told and "extra" in told and "\x1b" not in told


def test_select_and_check(call, fails, folder, suite, manifest):
    trained = sorted(suite[:-1], key=lambda task: task.name)
    assert call("select tasks --manifest m.json --task-split train -o train") == ("train: 3 tasks, 60 examples\n", "")
    assert load_tasks("train", None) == trained
    assert call("check tasks --manifest m.json")[0] == "tasks: 4 tasks as in manifest m.json\n"
    about = json.loads(call("check train --manifest m.json --task-split train --json")[0])
    assert about == {"manifest": "m.json", "tasks": [t.name for t in trained]}
    permissive = "select tasks --manifest m.json --task-split out-of-family --permissive -o out"
    assert call(permissive)[0].endswith(": 1 tasks, 20 examples\n")
    manifest.write_text(manifest.read_text().replace('"permissive": true', '"permissive": false'))
    for message, words in (
        ("none of its 4 tasks is permissive and of task split out-of-family", permissive),
        ("packaged manifests: ['skills', 'specs']", "select tasks --manifest none --task-split train -o x"),
        ("of task split in-family", "select tasks --manifest m.json --task-split in-family -o x"),
        ("none of its 4 tasks is of task split train in manifest skills", "select tasks --task-split train -o x"),
    ):
        fails(message, words)


def test_check_without_a_manifest(call, fails, folder, suite):
    """What a folder was never meant to have is not missed; that its files are sound and its splits apart is checked."""
    assert call("check tasks") == ("tasks: 4 tasks, 80 examples\n", "")
    about = json.loads(call("check tasks --json")[0])
    assert about == {"manifest": None, "tasks": sorted(task.name for task in suite)}
    for option in ("--task-split train", "--examples 30"):
        fails("--task-split, --examples: expected --manifest beside them", f"check tasks {option}")
    (name, *_) = about["tasks"]
    first = (folder / f"{name}.jsonl").read_text().splitlines()[0]
    other = json.loads(first) | {"split": "another", "input": json.loads(first)["input"].upper() + " "}
    with (folder / f"{name}.jsonl").open("a") as file:
        file.write(json.dumps(other) + "\n")
    fails(f"1 tasks have inputs in more than one split, first: {name}: 1 inputs", "check tasks")


def test_check_lists_differences(call, t2l_tasks, fails, suite, manifest):
    odd = dataclasses.replace(suite[0].examples[0], split="\x1b[31m", outputs=("?",))
    write_tasks("few", [dataclasses.replace(suite[0], examples=(odd, *suite[0].examples[1:]))])
    out, _, error = t2l_tasks("check", "few", "--manifest", "m.json")
    assert out.count("missing") == 4 and out.count("extra") == 1 and "\x1b" not in out
    assert "differs from manifest m.json 5 times, first: " in str(error)
    fails("differs from manifest", "check few --manifest m.json --json")


def test_import_sni(call, fails, sni, tmp_path):
    sni(task001_ants=ANTS, task002_piqa_x=ANTS, task003_bees=ANTS | {"Instance License": "GPL 3.0"})
    (tmp_path / "d.json").write_text(json.dumps({"1": ["Say it."]}))
    assert call("import-sni sni --descriptions d.json --licence MIT --licence CC -o out --max-instances 10") == (
        "out: 1 tasks, 10 examples\n",
        "t2l: left out: task002_piqa_x: made of piqa\nt2l: left out: task003_bees: licence 'GPL 3.0'\n",
    )
    assert load_tasks("out", None)[0].descriptions == ("Name it.", "Say it.")
    assert "2 tasks, 40 examples" in call("import-sni sni --tasks 1,task003 -o two")[0]
    fails("none: expected at least one task", "import-sni sni --tasks 2 -o none")
    assert not (tmp_path / "none").exists()


def test_import_sni_as_in_a_manifest(call, fails, sni, tmp_path):
    sni(task001_ants=ANTS, task002_bees=ANTS)
    call("import-sni sni --tasks 1 --max-instances 12 -o first")
    (task,) = load_tasks("first", None)
    values = manifests.build([task], {task.name: FACTS}, "For tests.")
    values["tasks"][task.name]["splits"]["extra"] = "AAAAAAA="
    (tmp_path / "m.json").write_text(json.dumps(values))
    again = "import-sni sni --manifest m.json -o again"
    assert call(again) == ("again: 1 tasks, 12 examples\n", "t2l: task001_ants: 1 examples of the manifest not found\n")
    assert load_tasks("again", None) == [task]
    fails("--max-instances: expected none with --manifest", f"{again} --max-instances 5")


def test_import_benchmarks(call, fails, tmp_path):
    row = {"goal": "Open it.", "sol1": "Turn the knob.", "sol2": "Wait.", "label": 0}
    rows = [row, row | {"sol2": row["sol1"]}, row | {"label": -1}, row | {"label": 1}]
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "piqa.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert call("import-benchmarks source -o out") == (
        "out: 1 tasks, 2 examples\n",
        "t2l: left out: 1 rows of piqa: the choices are not distinct texts\n"
        "t2l: left out: 1 rows of piqa: no answer is stated\n",
    )
    assert [e.outputs for e in load_tasks("out", "test")[0].examples] == [("Turn the knob.",), ("Wait.",)]
    assert call("import-benchmarks source -o out --names piqa --max-examples 1 --force")[0].endswith("1 examples\n")
    for message, words in (
        ("no <name>.jsonl found", "import-benchmarks nowhere -o none"),
        ("descriptions.json: exists", "import-benchmarks source -o out"),
        ("--output: expected another folder than SOURCE, whose", "import-benchmarks source -o source --force"),
        ("names: expected some of", "import-benchmarks source -o out --names piqa,glue"),
        ("no arc_easy.jsonl found", "import-benchmarks source -o out --names piqa,arc_easy"),
    ):
        fails(message, words)
    (tmp_path / "source" / "piqa.jsonl").write_text(json.dumps(rows[2]))
    fails("out: expected at least one task", "import-benchmarks source -o out --force")


def test_decontaminate(call, fails, suite):
    longer = dataclasses.replace(suite[0].examples[0], input="one two three four five six seven eight nine ten eleven")
    write_tasks("long", [suite[1], dataclasses.replace(suite[0], examples=(longer, *suite[0].examples[1:]))])
    write_tasks("bench", [dataclasses.replace(suite[0], name="bench", examples=(longer,))])
    command = "decontaminate long --benchmarks bench -o clean"
    told = f"t2l: {suite[0].name}: 1 examples share text with bench\n"
    assert call(f"{command} --words 11") == ("clean: 2 tasks, 39 examples\n", told)
    fails("--words: expected at least 5 words, got 0", f"{command} --force --words 0")
    fails("none: expected at least one task", "decontaminate bench --benchmarks bench -o none")
