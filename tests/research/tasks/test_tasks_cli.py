"""``t2l tasks`` as a user types it."""

import dataclasses
import json

import pytest

from t2l_engine.cli import tasks as command
from t2l_engine.research.tasks import manifest as manifests
from t2l_engine.research.tasks import synthetic
from t2l_engine.research.tasks.folder import load_tasks, write_tasks

FACTS = {"skill": "letters", "task_split": "train", "source": "made here", "licence": ["Apache-2.0"], "permissive": True}
ANTS = {
    "Definition": "Name it.",
    "Instance License": "MIT",
    "Instances": [{"input": f"ant {i}", "output": "x"} for i in range(20)],
}


@pytest.fixture
def manifest(tmp_path, suite):
    """A manifest of the suite: its last task is held out."""
    facts = {task.name: FACTS | {"task_split": "train" if task is not suite[-1] else "out-of-family"} for task in suite}
    (tmp_path / "m.json").write_text(json.dumps(manifests.build(suite, facts, "For tests.")))
    return tmp_path / "m.json"


@pytest.fixture
def fails(t2l_tasks):
    """Run a command that prints nothing on stdout and fails with ``message``."""

    def call(message, *arguments):
        out, _, error = t2l_tasks(*arguments)
        assert out == "" and message in str(error)

    return call


def test_task_splits_are_those_of_manifests():
    assert tuple(split.value for split in command.TaskSplit) == manifests.TASK_SPLITS


def test_synthetic(t2l_tasks, fails, tmp_path):
    out, err, _ = t2l_tasks("synthetic", "-o", tmp_path / "out", "--examples", 30, "--seed", 4)
    assert (out, err) == (f"{tmp_path / 'out'}: 12 tasks, 360 examples\n", "")
    assert load_tasks(tmp_path / "out", None) == sorted(synthetic.suite(30, 4), key=lambda task: task.name)
    fails("descriptions.json: exists; expected a folder without tasks", "synthetic", "-o", tmp_path / "out")
    assert t2l_tasks("synthetic", "-o", tmp_path / "out", "--force")[2] is None
    assert len(load_tasks(tmp_path / "out", "test")[0].examples) == 30
    fails("examples: expected a number from 20 to 120, got 7", "synthetic", "-o", tmp_path / "new", "--examples", 7)
    assert not (tmp_path / "new").exists()


def test_show(t2l_tasks, folder, suite):
    about = json.loads(t2l_tasks("show", folder, "--json")[0])
    assert [row["task"] for row in about] == sorted(task.name for task in suite)
    assert about[0]["splits"] == {"train": 13, "val": 2, "test": 5} and about[0]["descriptions"] == 8
    examples = sorted(suite, key=lambda task: task.name)[0].examples
    assert about[0]["mean_chars"] == sum(len(e.input) + len(e.outputs[0]) for e in examples) / 20
    table = t2l_tasks("show", folder)[0]
    assert "4 tasks" in table and "syn_first_of_3" in table and "mean characters" in table


def test_show_has_a_column_for_every_split(t2l_tasks, suite, tmp_path):
    odd = [dataclasses.replace(e, split=name) for e, name in zip(suite[0].examples, ("extra", "\x1b[31m"), strict=False)]
    write_tasks(tmp_path / "odd", [dataclasses.replace(suite[0], examples=tuple(odd))])
    splits = json.loads(t2l_tasks("show", tmp_path / "odd", "--json")[0])[0]["splits"]
    assert splits == {"train": 0, "val": 0, "test": 0, "extra": 1, "\x1b[31m": 1}
    table = t2l_tasks("show", tmp_path / "odd")[0]
    assert "extra" in table and "\x1b" not in table and r"\x1b[31m" in table
    told = t2l_tasks("check", tmp_path / "odd")[1]
    assert "training reads no splits other than train, val, test: " in told and "extra" in told and "\x1b" not in told


def test_select_and_check(t2l_tasks, fails, folder, suite, manifest, tmp_path):
    out, err, _ = t2l_tasks("select", folder, "--manifest", manifest, "--task-split", "train", "-o", tmp_path / "train")
    assert (out, err) == (f"{tmp_path / 'train'}: 3 tasks, 60 examples\n", "")
    assert load_tasks(tmp_path / "train", None) == sorted(suite[:-1], key=lambda task: task.name)
    assert t2l_tasks("check", folder, "--manifest", manifest)[0] == f"{folder}: 4 tasks as in manifest {manifest}\n"
    about = json.loads(t2l_tasks("check", tmp_path / "train", "--manifest", manifest, "--task-split", "train", "--json")[0])
    assert about == {"manifest": str(manifest), "tasks": sorted(t.name for t in suite[:-1]), "differences": []}
    fails(
        "none of its 4 tasks is of task split in-family",
        "select",
        folder,
        "--manifest",
        manifest,
        "--task-split",
        "in-family",
        "-o",
        "x",
    )
    fails(
        "packaged manifests: ['skills', 'specs']", "select", folder, "--manifest", "none", "--task-split", "train", "-o", "x"
    )
    arguments = (
        "select",
        folder,
        "--manifest",
        manifest,
        "--task-split",
        "out-of-family",
        "--permissive",
        "-o",
        tmp_path / "out-of-family",
    )
    assert t2l_tasks(*arguments)[0].endswith(": 1 tasks, 20 examples\n")
    manifest.write_text(manifest.read_text().replace('"permissive": true', '"permissive": false'))
    fails("none of its 4 tasks is permissive and of task split out-of-family", *arguments)
    fails(
        "none of its 4 tasks is of task split train in manifest skills", "select", folder, "--task-split", "train", "-o", "x"
    )


def test_check_without_a_manifest(t2l_tasks, fails, folder, suite, tmp_path):
    """What a folder was never meant to have is not missed; that its files are sound and its splits apart is checked."""
    assert t2l_tasks("check", folder)[:2] == (f"{folder}: 4 tasks, 80 examples\n", "")
    about = json.loads(t2l_tasks("check", folder, "--json")[0])
    assert about == {"manifest": None, "tasks": sorted(task.name for task in suite), "differences": []}
    for option, value in (("--task-split", "train"), ("--examples", "30")):
        fails("--task-split, --examples: expected --manifest beside them", "check", folder, option, value)
    (name, *_) = about["tasks"]
    first = (folder / f"{name}.jsonl").read_text().splitlines()[0]
    other = json.loads(first) | {"split": "another", "input": json.loads(first)["input"].upper() + " "}
    with (folder / f"{name}.jsonl").open("a") as file:
        file.write(json.dumps(other) + "\n")
    fails(f"1 tasks have inputs in more than one split, first: {name}: 1 inputs", "check", folder)
    (folder / f"{name}.jsonl").write_text("{")
    fails(f"{name}.jsonl", "check", folder)


def test_check_lists_differences(t2l_tasks, fails, suite, manifest, tmp_path):
    odd = dataclasses.replace(suite[0].examples[0], split="\x1b[31m", outputs=("?",))
    write_tasks(tmp_path / "few", [dataclasses.replace(suite[0], examples=(odd, *suite[0].examples[1:]))])
    out, _, error = t2l_tasks("check", tmp_path / "few", "--manifest", manifest)
    assert out.count("missing") == 4 and out.count("extra") == 1 and "\x1b" not in out
    assert f"differs from manifest {manifest} 5 times, first: " in str(error)
    fails("differs from manifest", "check", tmp_path / "few", "--manifest", manifest, "--json")


def test_import_sni(t2l_tasks, fails, sni, tmp_path):
    source = sni(task001_ants=ANTS, task002_piqa_x=ANTS, task003_bees=ANTS | {"Instance License": "GPL 3.0"})
    (tmp_path / "d.json").write_text(json.dumps({"1": ["Say it."]}))
    arguments = ("import-sni", source, "--descriptions", tmp_path / "d.json", "--licence", "MIT", "--licence", "CC BY")
    out, err, _ = t2l_tasks(*arguments, "-o", tmp_path / "out", "--max-instances", 10)
    assert out == f"{tmp_path / 'out'}: 1 tasks, 10 examples\n"
    assert err == (
        "t2l: left out: task002_piqa_x: made of piqa\n"
        "t2l: left out: task003_bees: licence 'GPL 3.0'\n"
        "t2l: 2 tasks left out\n"
    )
    (task,) = load_tasks(tmp_path / "out", None)
    assert task.descriptions == ("Name it.", "Say it.")
    out, _, _ = t2l_tasks("import-sni", source, "--tasks", "1, task003", "-o", tmp_path / "two")
    assert "2 tasks, 40 examples" in out
    fails("no task to write, 1 left out", "import-sni", source, "--tasks", "2", "-o", tmp_path / "none")
    fails("no task to write, 3 left out", "import-sni", source, "--category", "Translation", "-o", tmp_path / "none")
    fails("tasks: expected names or numbers", "import-sni", source, "--tasks", "../task001_ants", "-o", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_import_benchmarks(t2l_tasks, fails, tmp_path):
    row = {"goal": "Open it.", "sol1": "Turn the knob.", "sol2": "Wait.", "label": 0}
    rows = [row, row | {"sol2": row["sol1"]}, row | {"label": -1}, row | {"label": 1}]
    source = tmp_path / "source"
    fails("no <name>.jsonl found", "import-benchmarks", source, "-o", tmp_path / "none")
    source.mkdir()
    (source / "piqa.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out, err, _ = t2l_tasks("import-benchmarks", source, "-o", tmp_path / "out")
    assert out == f"{tmp_path / 'out'}: 1 tasks, 2 examples\n"
    assert err == (
        "t2l: left out: 1 rows of piqa: the choices are not distinct texts\n"
        "t2l: left out: 1 rows of piqa: no answer is stated\n"
    )
    assert [e.outputs for e in load_tasks(tmp_path / "out", "test")[0].examples] == [("Turn the knob.",), ("Wait.",)]
    arguments = ("import-benchmarks", source, "-o", tmp_path / "out")
    fails("descriptions.json: exists", *arguments)
    assert t2l_tasks(*arguments, "--names", "piqa", "--max-examples", 1, "--force")[0].endswith("1 tasks, 1 examples\n")
    fails("names: expected some of", *arguments, "--names", "piqa,glue")
    fails("no arc_easy.jsonl found", *arguments, "--names", "piqa,arc_easy")
    (source / "piqa.jsonl").write_text(json.dumps(rows[2]))
    fails("no task to write", *arguments, "--force")


def test_import_sni_as_in_a_manifest(t2l_tasks, fails, sni, tmp_path):
    source = sni(task001_ants=ANTS, task002_bees=ANTS)
    assert t2l_tasks("import-sni", source, "--tasks", "1", "--max-instances", 12, "-o", tmp_path / "first")[2] is None
    (task,) = load_tasks(tmp_path / "first", None)
    values = manifests.build([task], {task.name: FACTS}, "For tests.")
    values["tasks"][task.name]["splits"]["extra"] = "AAAAAAA="
    (tmp_path / "m.json").write_text(json.dumps(values))
    arguments = ("import-sni", source, "--manifest", tmp_path / "m.json", "-o", tmp_path / "again")
    out, err, _ = t2l_tasks(*arguments)
    assert (out, err) == (
        f"{tmp_path / 'again'}: 1 tasks, 12 examples\n",
        "t2l: task001_ants: 1 examples of the manifest not found\n",
    )
    assert load_tasks(tmp_path / "again", None) == [task]
    fails("--max-instances: expected none with --manifest", *arguments, "--max-instances", 5)


def test_decontaminate(t2l_tasks, fails, folder, suite, tmp_path):
    text = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
    longer = dataclasses.replace(suite[0].examples[0], input=f"well, {text}")
    write_tasks(tmp_path / "long", [suite[1], dataclasses.replace(suite[0], examples=(longer, *suite[0].examples[1:]))])
    bench = dataclasses.replace(suite[0], name="bench", examples=(dataclasses.replace(longer, input=text.upper()),))
    write_tasks(tmp_path / "bench", [bench])
    arguments = ("decontaminate", tmp_path / "long", "--benchmarks", tmp_path / "bench", "-o", tmp_path / "clean")
    out, err, _ = t2l_tasks(*arguments)
    assert out == f"{tmp_path / 'clean'}: 2 tasks, 39 examples\n"
    assert err == f"t2l: {suite[0].name}: 1 examples share text with bench\n"
    assert suite[0].examples[1:] in [task.examples for task in load_tasks(tmp_path / "clean", None)]
    fails("exists", *arguments)
    fails("--words: expected at least 5 words, got 0", *arguments, "--force", "--words", 0)
    fails("no example is left", *arguments[:1], tmp_path / "bench", *arguments[2:5], tmp_path / "none")
