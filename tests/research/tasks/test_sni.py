"""Import of Super-NaturalInstructions: the format, its early versions, what is left out, and broken or hostile files."""

import json

import pytest

from t2l_engine.files.errors import ConfigError
from t2l_engine.research.tasks import sni as importer
from t2l_engine.research.tasks.sni import further_descriptions, import_sni

COLOURS = {
    "Contributors": ["somebody"], "Source": ["colour_words"], "Categories": ["Word Semantics"],
    "Definition": ["Name the colour of the thing."], "Instance License": ["CC BY 4.0"],
    "Positive Examples": [{"input": "snow", "output": "white", "explanation": "It is."}],
    "Instances": [{"id": f"task001-{i}", "input": text, "output": outputs} for i, (text, outputs) in enumerate((
        ("grass", ["green"]), ("coal", ["black", "dark"]), ("Grass ", ["light green", "green"]), (" ", ["nothing"]),
        ("air", [""]), ("sky", ["blue"])))],
}  # fmt: skip
#: An early version: texts where later ones have lists, and fields that are absent.
EARLY = {"Definition": "Count the letters.", "Instances": [{"input": "ant", "output": "3"}, {"input": "bee", "output": "3"}]}


def changed(**fields):
    return {**COLOURS, **{name.replace("_", " "): value for name, value in fields.items()}}


def test_instances_are_pooled_and_split(sni):
    imported = import_sni(sni(task001_colours=COLOURS, task002_count=EARLY))
    colours, count = imported.tasks
    assert imported.left_out == imported.missing == {}
    assert (colours.name, colours.descriptions) == ("task001_colours", ("Name the colour of the thing.",))
    outputs = {"grass": ("green", "light green"), "coal": ("black", "dark"), "sky": ("blue",)}
    assert {e.input: e.outputs for e in colours.examples} == outputs
    assert (count.name, count.descriptions) == ("task002_count", ("Count the letters.",))
    assert sorted(e.split for e in count.examples) == ["train", "train"]


def test_at_most_so_many_instances_the_short_ones_first(sni):
    instances = [{"input": f"word {i}", "output": ["x" * (1000 if i % 2 else 1)]} for i in range(100)]
    source = sni(task003_words=changed(Instances=instances))
    (task,) = import_sni(source, max_instances=40).tasks
    assert len(task.examples) == 40 and all(e.outputs == ("x",) for e in task.examples)
    assert [sum(e.split == s for e in task.examples) for s in ("train", "val", "test")] == [26, 4, 10]
    assert import_sni(source, max_instances=40).tasks[0] == task


def test_tasks_by_name_and_number(sni):
    source = sni(task001_colours=COLOURS, task0010_other=COLOURS, task861_a=COLOURS, task861_b=COLOURS)
    (source / "README.md").write_text("not a task")
    for wanted, found in ((["task001_colours"], 1), (["1"], 1), (["task001", "10"], 2), (["861"], 2), (None, 4)):
        assert len(import_sni(source, wanted).tasks) == found, wanted
    assert [t.name for t in import_sni(source / "task0010_other.json").tasks] == ["task0010_other"]
    for wanted in (["2"], ["task001_colour"], ["../task001_colours"], ["\ud800"]):
        with pytest.raises(ConfigError, match="tasks: expected names or numbers of tasks in .*sni"):
            import_sni(source, wanted)


def test_descriptions_follow_the_definition(sni, tmp_path):
    path = tmp_path / "descriptions.json"
    path.write_text(json.dumps({"task001_colours": ["Which colour?", " Which colour? "], "2": ["How long?"], "9": ["No."]}))
    source = sni(task001_colours=COLOURS, task002_count=EARLY, task003_bare={"Instances": EARLY["Instances"]})
    with pytest.raises(ConfigError, match=r"task003_bare\.json: Definition: expected one, or descriptions"):
        import_sni(source)
    texts = further_descriptions(path)
    colours, count = import_sni(source, ["1", "2"], descriptions=texts).tasks
    assert colours.descriptions == ("Name the colour of the thing.", "Which colour?")
    assert count.descriptions == ("Count the letters.", "How long?")
    assert import_sni(source, ["3"], descriptions={"task003": ["Count."]}).tasks[0].descriptions == ("Count.",)
    with pytest.raises(ConfigError, match="descriptions: expected names or numbers of tasks"):
        import_sni(source, ["2"], descriptions={"task009": ["No."]})


@pytest.mark.parametrize("stated, allowed, kept", [
    (["CC BY 4.0"], ["cc by"], True), (["CC BY 4.0"], ["CC BY 4.0"], True), (["CC BY-NC 4.0"], ["CC BY"], False),
    (["CC BY-SA 4.0"], ["CC BY", "MIT"], False), (["CC BY-SA 4.0"], ["CC BY-SA"], True),
    (["Apache 2.0"], ["MIT", "Apache"], True), ("MIT", ["mit"], True), (["Permitted for research"], ["mit"], False),
    (["MIT", "CC BY-NC 4.0"], ["MIT"], False), (["Unknown"], ["MIT"], False), ([], ["MIT"], False), (None, ["MIT"], False),
    (["Unknown"], [], True),
])  # fmt: skip
def test_licences(sni, stated, allowed, kept):
    values = changed(Instance_License=stated)
    if stated is None:
        del values["Instance License"]
    imported = import_sni(sni(task001_colours=values), licences=allowed)
    assert bool(imported.tasks) == kept
    assert kept or "licence" in imported.left_out["task001_colours"]


@pytest.mark.parametrize("name, source, reason", [
    *(("task001_x", *case) for case in (
        (["winogrande_xl"], "winogrande"), (["ai2_arc"], "arc"), ("ARC-Challenge", "arc"), (["swag"], None),
        (["Open Book QA (openbook_qa)"], "openbookqa"), (["swag", "Human-Eval"], "humaneval"))),
    ("task001_obqa_question_generation", [], "obqa"), ("task001_piqa_answer", None, "piqa"),
    ("task001_search", ["research archive", "marc"], None), ("task001_winograd", ["winograd_wsc"], None),
])  # fmt: skip
def test_tasks_made_of_the_benchmarks_are_left_out(sni, name, source, reason):
    values = changed(Source=source)
    if source is None:
        del values["Source"]
    imported = import_sni(sni(**{name: values}))
    assert imported.left_out == ({name: f"made of {reason}"} if reason else {})


# --- broken and hostile ------------------------------------------------------------------------------------------------


def test_broken_json_is_named(sni, tmp_path, broken_json):
    with pytest.raises(ConfigError, match=r"task001_x\.json: ") as refused:
        import_sni(sni(task001_x=broken_json))
    assert len(str(refused.value)) < 1000
    (tmp_path / "d.json").write_text(broken_json)
    with pytest.raises(ConfigError, match=r"d\.json: "):
        further_descriptions(tmp_path / "d.json")


WRONG = {
    "Definition": [None, [1], {"a": "b"}, ["\ud800"], ["", " "]], "Source": [[None], True],
    "Instance License": [{"MIT": 1}, [["MIT"]]],
    "Instances": [
        None, {}, "grass", [None], [[]], [{"output": ["x"]}], [{"input": "x"}], [{"input": 3, "output": ["x"]}],
        *([{"input": "x", "output": value}] for value in (10**400, None, [["x"]], {"x": 1}, ["ok", "\udc80"])),
        [{"input": "\udc80", "output": ["x"]}],
    ],
}  # fmt: skip


@pytest.mark.parametrize("field, value", [(field, v) for field, found in WRONG.items() for v in found], ids=str)
def test_fields_of_other_kinds_are_named(sni, field, value):
    with pytest.raises(ConfigError, match=rf"task001_x\.json: {field}") as refused:
        import_sni(sni(task001_x={**COLOURS, field: value}))
    assert len(str(refused.value)) < 1000


def test_descriptions_of_other_kinds_are_named(tmp_path):
    for value in (None, "text", [1], [["x"]], {"a": 1}, ["\ud800"], 10**400):
        (tmp_path / "d.json").write_text(json.dumps({"../x": ["fine"], "task001": value}))
        with pytest.raises(ConfigError, match=r"d\.json: 'task001': expected a list of strings"):
            further_descriptions(tmp_path / "d.json")


def test_bytes_that_are_no_text_and_files_that_are_too_large(sni, monkeypatch):
    source = sni(task001_x=COLOURS)
    monkeypatch.setattr(importer, "MAX_FILE_BYTES", 64)
    with pytest.raises(ConfigError, match=r"task001_x\.json: expected at most 64 bytes, got more"):
        import_sni(source)
    (source / "task001_x.json").write_bytes(b'{"Definition": "\xff"}')
    with pytest.raises(ConfigError, match=r"task001_x\.json: not UTF-8 text"):
        import_sni(source)


def test_names_and_files_that_are_refused(sni, tmp_path):
    for name in ("task001_a b", "task001_" + "x" * 150):
        source = sni(**{name: COLOURS})
        with pytest.raises(ConfigError, match="expected task names of letters"):
            import_sni(source)
        (source / f"{name}.json").unlink()
    for source in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(FileNotFoundError, match=r"no task\*\.json files found"):
            import_sni(source)
