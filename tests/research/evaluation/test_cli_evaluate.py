"""``t2l evaluate`` as a user types it, on a tiny model."""

import json
import shutil
from dataclasses import replace

import pytest
from safetensors.torch import load_file, save_file

import t2l_engine as t2l
from t2l_engine.cli import evaluate as command
from t2l_engine.research.evaluation.answers import Answerer
from t2l_engine.research.evaluation.methods import Generated
from t2l_engine.research.tasks import manifest
from t2l_engine.research.tasks.folder import write_tasks
from t2l_engine.research.training import lora
from t2l_engine.text import dtypes
from tests.cli.conftest import save_document_checkpoint
from tests.research.evaluation.conftest import DESCRIPTIONS, all_tasks, save_checkpoint
from tests.research.training import small_runs

OURS = ["t2l", "t2l-shuffled", "t2l-junk", "t2l-constant"]
BASE = ["base", "base-description", "icl"]
QUICK = ("--repeats", 1, "--max-items", 1, "--max-new-tokens", 1)


@pytest.fixture
def evaluate(run, checkpoint, tasks, tmp_path):
    """Run ``t2l evaluate`` on the shared tasks with short answers; (the result, stdout, stderr)."""

    def call(*options, checkpoint=checkpoint, tasks=tasks):
        file = tmp_path / "result.json"
        code, out, err = run("evaluate", "--checkpoint", checkpoint, "--tasks", tasks, "--json", file,
                             "--max-new-tokens", 2, *options)  # fmt: skip
        assert code == 0, err
        return json.loads(file.read_text(encoding="utf-8")), out, err

    return call


@pytest.fixture
def refuse(run, checkpoint, tasks, monkeypatch):
    """Run a command that fails before anything is asked; gives its line on stderr."""
    monkeypatch.setattr(Answerer, "ask", lambda *arguments: pytest.fail("a model was asked"))

    def call(*options, tasks=tasks, checkpoint=checkpoint):
        code, out, err = run("evaluate", "--checkpoint", checkpoint, "--tasks", tasks, *options)
        lines = err.splitlines()
        assert code == 1 and out == "" and len(lines) == 1 and lines[0].startswith("t2l: ") and err.endswith("\n"), err
        return lines[0][len("t2l: ") :]

    return call


# --- results ---------------------------------------------------------------------------------------------------------


def test_the_contract_with_a_test_split_alone(run, checkpoint, base_model, tmp_path):
    write_tasks(tmp_path / "tasks", all_tasks(("test",)))
    file = tmp_path / "result.json"
    code, out, err = run("evaluate", "--checkpoint", checkpoint, "--tasks", tmp_path / "tasks", "--json", file)
    assert code == 0, err
    assert "t2l: icl left out: fewer than 3 examples of split 'train' of task again\n" in err
    result = json.loads(file.read_text(encoding="utf-8"))
    methods = [*OURS, *BASE[:2]]
    assert list(result["details"]) == methods
    assert {name: list(scores) for name, scores in result["tasks"].items()} == dict.fromkeys(sorted(DESCRIPTIONS), methods)
    assert {key: value for key, value in result.items() if key not in ("tasks", "summary", "details")} == {
        "checkpoint": str(checkpoint),
        "base_model": str(base_model),
        "dtype": str(dtypes.preferred()).removeprefix("torch."),
        "device": "cpu",
        "split": "test",
        "scaling": 4.0,
        "settings": {
            "repeats": 3, "max_new_tokens": 16, "max_long_tokens": 256, "max_prompt_tokens": 1024, "validation_items": 8,
            "verify": False, "choose": False, "run_code": False, "batch_size": 32, "held_out_descriptions": 0,
        },
        "trained_tasks": ["first", "last"],
        "groups": {"all": ["again", "first", "last"], "trained": ["first", "last"], "not trained": ["again"]},
        "items": dict.fromkeys(DESCRIPTIONS, 3),
        "left_out": {},
        "no_adapter": {},
        "forms": {a: {"form": "raw" if a in BASE else "chat", "validation": None} for a in methods},
    }  # fmt: skip
    for group, of in result["summary"].items():
        assert of["tasks"] == len(result["groups"][group])
        assert list(of["mean"]) == methods and list(of["difference"]) == methods[1:]
    assert "score, %, split test, scaling 4" in out and "mean: not trained (1)" in out and "t2l minus this method" in out
    for name in (*methods, *DESCRIPTIONS):
        assert name in out


def test_all_methods(evaluate, one_hot, by_input, adapters, shared, base_model, tasks):
    """Another checkpoint of each kind, per-task LoRAs, a library, one adapter for all tasks; none of "again" in some."""
    run = lora.train(small_runs.lora(base_model, mode="multi-task", steps=1, validate_every=0), tasks, shared / "cli-multi")
    options = ("--also", f"names={one_hot}", "--also", f"inputs={by_input}", "--oracle", adapters, "--library", adapters)
    result, _, err = evaluate(*options, "--multi-task", run, "--repeats", 2, "--dtype", "bfloat16", "--shots", "2,3")
    named = [*OURS, "names", "names-shuffled", "inputs", "oracle", "average", "arrow", "nearest", "multi-task", *BASE[:2],
             "icl-2", "icl"]  # fmt: skip
    lacking = {"names", "names-shuffled", "oracle"}
    assert list(result["details"]) == named and result["dtype"] == "bfloat16" and err.count("left out") == 0
    assert list(result["tasks"]["again"]) == [name for name in named if name not in lacking]
    assert list(result["tasks"]["first"]) == named
    assert result["no_adapter"] == dict.fromkeys(["names", "names-shuffled", "oracle"], 1)
    assert "t2l: oracle has no adapter for 1 of 3 tasks" in err
    differences = result["summary"]["all"]["difference"].items()
    assert {a: of["tasks"] for a, of in differences} == {name: 3 - (name in lacking) for name in named[1:]}
    repeats = {name: len(of["tasks"]["first"]["by_repeat"]) for name, of in result["details"].items()}
    once = {"t2l-constant", "names", "inputs", "oracle", "average", "arrow", "multi-task", "base"}
    assert repeats == {name: 1 if name in once else 2 for name in named}
    assert result["forms"]["base"]["validation"].keys() == {"raw", "chat"}  # there is a split val
    assert result["forms"]["inputs"] == {"form": "chat", "validation": None}


def test_families(evaluate, tmp_path):
    """A baseline of the same family, without the task that is alone, and intervals over families beside those over tasks."""
    names = [*(f"{family}-{i:03}" for family in ("cut", "wrap") for i in range(2)), "alone-000"]
    made = all_tasks()
    write_tasks(tmp_path / "tasks", [replace(made[i % 3], name=name) for i, name in enumerate(names)])
    options = ("--methods", "t2l,t2l-same-family,base", *QUICK)
    result, out, err = evaluate(*options, tasks=tmp_path / "tasks")
    assert result["no_adapter"] == {"t2l-same-family": 1}
    assert "t2l: t2l-same-family has no adapter for 1 of 5 tasks, which are not compared with it\n" in err
    of = result["summary"]["all"]
    assert {m: d["tasks"] for m, d in of["difference"].items()} == {"t2l-same-family": 4, "base": 5}
    families = {"t2l": 3, "t2l-same-family": 2, "base": 3}
    assert {m: d["families"] for m, d in of["over_families"]["mean"].items()} == families
    assert {m: d["families"] for m, d in of["over_families"]["difference"].items()} == {"t2l-same-family": 2, "base": 3}
    rows = [line for line in out.splitlines() if "95 % CI over families (3)" in line]
    assert [row.count("[") for row in rows] == 2 * [3, 2] and out.count("] (4)") == 2  # in groups all and not trained


def test_documents(evaluate, base_model, tasks, tmp_path):
    """As descriptions, of several chunks and so of several ranks in a batch; each is read once."""
    checkpoint = save_document_checkpoint(tmp_path / "documents", base_model, in_features=(64,), out_features=(64,))
    options = ("--repeats", 2, "--max-items", 1, "--max-chunk-tokens", 5)
    result, _, _ = evaluate(*options, checkpoint=checkpoint)
    assert result["scaling"] == 8.0 and set(result["details"]) == {*OURS, *BASE}
    engine = t2l.TextToLoRA.from_pretrained(checkpoint)
    texts = [of[0] for of in DESCRIPTIONS.values()] + ["red " * 20]
    made = Generated(engine)
    assert made._stack(texts).allclose(t2l.AdapterStack.cat([engine.generate([text]) for text in texts]), atol=1e-6)
    engine.encoder.config = replace(engine.encoder.config, max_chunk_tokens=5)
    assert Generated(engine).identity != made.identity  # answers that are kept are not those of other chunks


def test_descriptions_in_prompts(evaluate, base_model, tmp_path):
    """Of a checkpoint that was trained so, also under the constant description."""
    described = save_checkpoint(tmp_path / "described", base_model, seed=1, prompt="description")
    result, _, _ = evaluate("--also", f"other={described}", *QUICK, "--methods", "t2l,other,other-constant")
    t2l, *others = (of["tasks"]["first"]["prompt_tokens"] for of in result["details"].values())
    assert t2l == 4 < others[0] == others[1]


def test_held_out_descriptions_are_the_last(evaluate, checkpoint, tmp_path):
    """The same answers as of a folder with these alone; a checkpoint that was trained on them is named."""
    write_tasks(tmp_path / "few", [replace(t, descriptions=t.descriptions[-1:]) for t in all_tasks()])
    options = (*QUICK, "--methods", "base-description")
    held, _, _ = evaluate(*options, "--held-out-descriptions", 1)
    expected, _, _ = evaluate(*options, tasks=tmp_path / "few")
    assert held["settings"].pop("held_out_descriptions") == 1 and expected["settings"].pop("held_out_descriptions") == 0
    assert held == expected
    config = json.loads((checkpoint / "config.json").read_text())
    for kept, warned in ((0, True), (1, False)):
        folder = shutil.copytree(checkpoint, tmp_path / f"kept-{kept}")
        about = config | {"training": config["training"] | {"held_out_descriptions": kept}}
        (folder / "config.json").write_text(json.dumps(about))
        _, _, err = evaluate(*QUICK, "--methods", "t2l", "--held-out-descriptions", 1, checkpoint=folder)
        assert (f"{folder} held out 0 descriptions of each task, so that some of the 1 were" in err) == warned


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_was_stopped_goes_on(evaluate, tmp_path, monkeypatch, resume):
    """Its answers are kept until the result is written; with --resume they stay."""
    options = ["--methods", "t2l,t2l-junk", "--repeats", 1, "--batch-size", 4]
    unbroken = evaluate(*options)[0]
    kept = tmp_path / ("answers.jsonl" if resume else "result.json.unfinished.jsonl")
    options += ["--resume", kept] if resume else []
    asked, generate = [], Answerer._generate

    def stopped(*arguments):
        if len(asked) == 2:
            raise RuntimeError("power cut")
        asked.append(1)
        return generate(*arguments)

    monkeypatch.setattr(Answerer, "_generate", stopped)
    with pytest.raises(RuntimeError, match="power cut"):
        evaluate(*options)
    assert kept.read_bytes().count(b"\n") == 2
    monkeypatch.setattr(Answerer, "_generate", lambda *arguments: asked.append(1) or generate(*arguments))
    result, _, err = evaluate(*options)
    assert result == unbroken and len(asked) == 2 + 4
    assert kept.exists() == resume and (f"answers in {kept}" in err) != resume
    if resume:
        content = kept.read_bytes()
        assert evaluate(*options)[0] == unbroken
        assert len(asked) == 2 + 4 and kept.read_bytes() == content


def test_kept_answers_are_of_the_weights_and_the_scaling(evaluate, base_model, tmp_path):
    """Not of the folder that they lay in; those of the base model of no scaling."""
    folder, kept = shutil.copytree(base_model, tmp_path / "model"), tmp_path / "answers.jsonl"
    options = ("--methods", "t2l,base", "--repeats", 1, "--resume", kept, "--base-model", folder)
    evaluate(*options)
    lines = kept.read_bytes().count(b"\n")
    assert evaluate(*options, "--scaling", 1)[0]["scaling"] == 1.0
    assert kept.read_bytes().count(b"\n") == lines + 1  # a batch of t2l
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] *= 1.5
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    evaluate(*options)
    assert kept.read_bytes().count(b"\n") == 2 * lines + 1


def test_the_result_is_written_before_the_table(run, checkpoint, tasks, tmp_path, monkeypatch):
    """A pipe that is closed ends the command: ``t2l evaluate ... | head``."""
    monkeypatch.setattr(command, "console", lambda: pytest.fail("closed", pytrace=False))
    options = ("--methods", "base", *QUICK, "--json", tmp_path / "result.json")
    with pytest.raises(pytest.fail.Exception):
        run("evaluate", "--checkpoint", checkpoint, "--tasks", tasks, *options)
    assert json.loads((tmp_path / "result.json").read_text())["summary"]["all"]["mean"].keys() == {"base"}


def test_the_split_that_is_asked(evaluate):
    """Validation examples choose no form of what is asked on them; worked examples are never the one that is asked."""
    result, _, _ = evaluate("--split", "val", "--methods", "base,icl", "--repeats", 1)
    assert result["items"] == dict.fromkeys(DESCRIPTIONS, 2)
    assert result["settings"]["validation_items"] == 0
    assert all(of == {"form": "raw", "validation": None} for of in result["forms"].values())
    assert evaluate("--split", "train", "--methods", "icl", "--repeats", 1)[0]["items"] == dict.fromkeys(DESCRIPTIONS, 4)


def test_a_manifest_adds_its_splits(evaluate, tmp_path):
    facts = {name: {"skill": "words", "task_split": split, "source": "tests", "licence": ["MIT"], "permissive": True}
             for name, split in (("first", "train"), ("last", "out-of-family"))}  # fmt: skip
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(manifest.build([t for t in all_tasks() if t.name in facts], facts, "For the tests.")))
    result, out, _ = evaluate("--manifest", path, "--methods", "t2l,base", "--repeats", 1, "--max-items", 1)
    assert result["groups"] == {
        "all": ["again", "first", "last"], "trained": ["first", "last"], "not trained": ["again"], "train": ["first"],
        "out-of-family": ["last"],
    }  # fmt: skip
    assert result["summary"].keys() == result["groups"].keys() and "mean: out-of-family (1)" in out


def test_a_base_model_that_has_moved(evaluate, base_model, tmp_path):
    """Reads the descriptions of a checkpoint that does so with its base model, too."""
    moved = save_checkpoint(tmp_path / "moved", "models/tiny", prompt="input")
    result, _, _ = evaluate("--base-model", base_model, "--methods", "t2l", *QUICK, checkpoint=moved)
    assert list(result["details"]) == ["t2l"] and result["base_model"] == str(base_model)


# --- errors ----------------------------------------------------------------------------------------------------------


def test_methods_that_there_are_not(refuse, tmp_path):
    """The message lists those there are, and says why another one is left out."""
    known = [*OURS, *BASE]
    assert refuse("--methods", "t2l,nonsense") == f"--methods: expected some of {known}, got 'nonsense'"
    write_tasks(tmp_path / "tasks", all_tasks(("test",)))
    told = refuse("--methods", "t2l,icl", tasks=tmp_path / "tasks")
    assert told.endswith(f"{known[:-1]}, got 'icl': fewer than 3 examples of split 'train' of task again")


def test_code_is_run_where_that_is_asked(refuse, tmp_path):
    code = [replace(e, metric="pass", tests="assert last('a b') == 'b'") for e in all_tasks()[0].examples]
    write_tasks(tmp_path / "tasks", [replace(all_tasks()[0], examples=tuple(code))])
    told = refuse("--methods", "base", tasks=tmp_path / "tasks")
    assert told == "--run-code: expected to be set, since some answers are code that has to be run to be judged"


def test_adapters_of_another_base_model_are_told(evaluate, adapters, tmp_path):
    _, _, quiet = evaluate("--oracle", adapters, "--methods", "oracle")
    others = tmp_path / "others"
    shutil.copytree(adapters, others)
    for path in others.glob("*/adapter_config.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "elsewhere"}))
    _, _, err = evaluate("--oracle", others, "--methods", "oracle")
    assert f"{others} is of elsewhere, and is evaluated on " in err and " is evaluated on " not in quiet


def test_a_tokenizer_without_chat_template(run, base_model, tasks, tmp_path):
    """Plain text is the only form then; a checkpoint of the template is told what it lacks."""
    plain = tmp_path / "plain"
    shutil.copytree(base_model, plain, ignore=shutil.ignore_patterns("chat_template*"))
    file, found = tmp_path / "result.json", {}
    for form in ("raw", "chat"):
        made = save_checkpoint(tmp_path / form, plain, prompt_form=form)
        found[form] = run("evaluate", "--checkpoint", made, "--tasks", tasks, "--json", file, "--max-new-tokens", 1)
    code, _, err = found["raw"]
    assert code == 0 and "t2l: the tokenizer has no chat template" in err
    forms = json.loads(file.read_text(encoding="utf-8"))["forms"]
    assert set(forms) == {*OURS, *BASE} and all(of == {"form": "raw", "validation": None} for of in forms.values())
    code, _, err = found["chat"]
    assert code == 1 and "t2l: prompt_form: expected 'raw'" in err


@pytest.mark.parametrize("options, message", [
    *((("--also", text), "--also: expected NAME=DIR, got " + repr(text)) for text in ("", "other", "=dir", "other=")),
    *((("--shots", text), "--shots: expected different numbers from 1, comma-separated, got " + repr(text))
      for text in ("", "0", "3,3", "03,3", "three", "-1")),
    (("--also", "base={checkpoint}"), "--also: expected methods with names of their own, got two called 'ba"),
    (("--held-out-descriptions", 2), "--held-out-descriptions: expected fewer than the 2 descriptions of task again, got 2"),
    (("--oracle", "{folder}"), "--oracle: {folder}: "), (("--library", "{folder}"), "--library: {folder}: "),
    (("--oracle", "{adapters}", "--names", "again"), "--oracle: none of the adapters in {adapters} is named as a task"),
    (("--also", "x={folder}/none"), "{folder}/none"), (("--names", "none"), "'none'"), (("--split", "other"), "'other'"),
    (("--manifest", "nowhere"), "'nowhere'"), (("--base-model", "nowhere"), "'nowhere'"),
    (("--scaling", "big"), "--scaling: "),
    (("--device", "tpu"), "--device: expected 'cpu' or 'cuda', got 'tpu'"),
    (("--resume", "{folder}/notes.txt"), "{folder}/notes.txt:1: "), (("--tasks", "{folder}"), "descriptions.json"),
    *(((option, f"{{folder}}{path}"), f"{option}: expected a file in a folder that exists, got {{folder}}{path}")
      for option in ("--json", "--resume") for path in ("", "/none/file.json")),
])  # fmt: skip
def test_options_that_cannot_be_met(refuse, checkpoint, adapters, tmp_path, options, message):
    """One line that names the option, before anything is asked."""
    (tmp_path / "notes.txt").write_text("mine")
    folders = {"folder": tmp_path, "checkpoint": checkpoint, "adapters": adapters}
    assert message.format(**folders) in refuse(*(str(option).format(**folders) for option in options))
    assert (tmp_path / "notes.txt").read_text() == "mine"
