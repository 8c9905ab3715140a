"""``docs/tasks.md``: its commands and its example run."""

import json
import re
import shlex
from pathlib import Path

from t2l_engine.research.tasks.folder import Example, load_tasks

TEXT = (Path(__file__).parents[3] / "docs" / "tasks.md").read_text(encoding="utf-8")


def country(definition, instances):
    rows = [{"input": name, "output": [answer]} for name, answer in instances.items()]
    return {"Definition": [definition], "Instance License": ["MIT"], "Instances": rows}


def test_commands_and_example_run(sni, t2l_tasks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("natural-instructions").mkdir()
    sni(
        task1146_country_capital=country("Name the capital.", {"Ruritania": "Strelsau", "Elbonia": "Bahz"}),
        task1426_country_independence_year=country("Name the year.", {"India": "1947", "Ruritania": "1890"}),
    ).rename("natural-instructions/tasks")
    Path("more.json").write_text(json.dumps({"1146": ["Which city governs it?"]}))
    source = Path("function_vectors/dataset_files/abstractive")
    source.mkdir(parents=True)
    (source / "word_length.json").write_text(json.dumps([{"input": "igloo", "output": "5"}]))
    Path("downloads").mkdir()
    choices = {"label": ["A", "B"], "text": ["This", "That"]}
    row = {"question": "Which of these is a benchmark?", "choices": choices, "answerKey": "A"}
    Path("downloads/arc_easy.jsonl").write_text(json.dumps(row))
    boolq = {"passage": "It is.", "question": "is it", "answer": True}
    Path("downloads/boolq.jsonl").write_text(json.dumps(boolq))

    (example,) = re.findall(r"<!-- apply -->\n```python\n(.*?)```", TEXT, re.S)
    exec(compile(example, "docs/tasks.md", "exec"), {})
    assert load_tasks("other", None)[0].examples == (Example("igloo", ("5",), "test"),)

    commands = re.findall(r"^t2l tasks ([^#\n]*)", TEXT, re.M)
    assert len(commands) == 15
    for arguments in map(shlex.split, commands):
        if "specs" in arguments:  # thousands of tasks; test_specs.py runs the same commands for fewer
            continue
        _, _, error = t2l_tasks(*arguments)
        compared = arguments[0] == "check" and "--manifest" in arguments
        expected = "differs from manifest" if compared else None  # two tasks are not all of them
        assert error is None if expected is None else expected in str(error), arguments
    assert load_tasks("clean", None)[0].examples == (Example("India", ("1947",), "test"),)
