"""Adapters without a hypernetwork: one start, independent of their neighbours, as PEFT reads them."""

import copy
import json

import pytest
import torch

import t2l_engine as t2l
from t2l_engine.files.errors import ConfigError
from t2l_engine.research.training import lora
from t2l_engine.research.training import runs as training_runs
from t2l_engine.research.training.context import TrainingContext
from t2l_engine.research.training.reconstruction import Library
from t2l_engine.testing import numerics
from t2l_engine.text import base_model as base_model_loader
from tests.research.training import small_runs

CPU = torch.device("cpu")
FIRST = "000"


@pytest.fixture
def four_tasks(tasks):
    """The folder of tasks with two more, of other lengths: both words, always the same one."""
    about = json.loads((tasks / "descriptions.json").read_text())
    for name, answer in (("both", None), ("cat", "cat")):
        found = [json.loads(line) for line in (tasks / "first.jsonl").read_text().splitlines()]
        found = [row | {"output": [answer or row["input"]]} for row in found]
        (tasks / f"{name}.jsonl").write_text("\n".join(map(json.dumps, found)))
        about[name] = [f"Say {name} now."]
    (tasks / "descriptions.json").write_text(json.dumps(about))
    return tasks


@pytest.fixture
def context(base_model, tasks):
    """Makes what a job needs; detached at the end."""
    made = []

    def make(folder=tasks, **changes):
        made.append(TrainingContext(small_runs.lora(base_model, **changes), folder, CPU))
        return made[-1]

    yield make
    for fit in made:
        fit.close()


def read(folder, *names):
    """Adapters of a run as one stack."""
    return t2l.AdapterStack.from_peft([folder / name for name in names])


def test_an_adapter_does_not_depend_on_its_neighbours(base_model, four_tasks, tmp_path):
    """Nor on how waves and batches are cut; clipped, noisy, and with answers of other lengths beside it."""
    same = {
        "neftune_alpha": 5.0, "label_smoothing": 0.1, "grad_clip": 0.5, "prompt": "description", "weighting": "token",
        "samples_per_task": 2,
    }  # fmt: skip
    cuts = {
        "together": ({"tasks_per_batch": 4}, None),
        "accumulated": ({"tasks_per_batch": 2, "accumulation": 2}, None),
        "waves": ({"tasks_per_batch": 3}, None),
        "alone": ({"tasks_per_batch": 4}, ["last"]),
    }
    for name, (cut, names) in cuts.items():
        lora.train(small_runs.lora(base_model, **same, **cut), four_tasks, tmp_path / name, names=names)
    assert len(list((tmp_path / "waves" / lora.WAVES).iterdir())) == 2
    tasks = ["both", "cat", "first", "last"]
    for part in (lora.ADAPTERS, lora.LAST):
        expected = small_runs.tensors(read(tmp_path / "together" / part, *tasks))
        for name, (_, names) in cuts.items():
            got = small_runs.tensors(read(tmp_path / name / part, *(names or tasks)))
            for key, value in got.items():
                wanted = expected[key][-1:] if names else expected[key]
                assert numerics.relative_frobenius(value, wanted) <= numerics.TRAINED_FROBENIUS, (name, part, key)
    losses = [small_runs.losses(tmp_path / name / lora.WAVES / "000") for name in ("together", "accumulated")]
    assert losses[1] == pytest.approx(losses[0], rel=numerics.TRAINING_RTOL)
    waves = [small_runs.losses(wave) for wave in (tmp_path / "waves" / lora.WAVES).iterdir()]  # of two tasks each
    means = [(first + second) / 2 for first, second in zip(*waves, strict=True)]
    assert means == pytest.approx(losses[0], rel=numerics.TRAINING_RTOL)


def test_each_adapter_is_kept_at_its_own_best(context, tmp_path):
    fit = context()
    job = lora.LoRA(fit.settings, fit, [0, 1], tmp_path)
    steps = [{"first": 3.0, "last": 1.0}, {"first": 2.0, "last": 2.0}, {"first": float("nan"), "last": 1.0}]
    for step, losses in enumerate(steps, 1):
        with torch.no_grad():
            for parameter in job.model.parameters():
                parameter.fill_(step)
        better = job.improved(losses, step)
        assert better == (step < 3)
        if better:
            job.write(tmp_path / "unused", step, best=True)
        job.write(tmp_path / "unused", step, best=False)
    for part, values in ((lora.ADAPTERS, (2, 1)), (lora.LAST, (3, 3))):
        for name, value in zip(("first", "last"), values, strict=True):
            assert all((t == value).all() for t in small_runs.tensors(read(tmp_path / part, name)).values()), (part, name)
    saved = copy.deepcopy(job.best)
    assert saved["losses"] == {"first": 2.0, "last": 1.0} and not (tmp_path / "unused").exists()


@pytest.mark.parametrize("changes, losses, better, kept", [
    ({"min_delta": 0.25}, [(1.0, 1.0), (0.8, 0.7), (0.74, 0.5)], [True, True, True],
     {"losses": {"first": 0.74, "last": 0.7}, "steps": {"first": 20, "last": 10}}),
    # The patience of first is over at 10, though last goes on to 30.
    ({"patience": 1}, [(1.0, 1.0), (1.1, 0.9), (0.9, 0.8), (0.8, 0.9)], [True, True, True, False],
     {"losses": {"first": 1.0, "last": 0.8}, "steps": {"first": 0, "last": 20}}),
    ({"min_delta": 0.25, "mode": "multi-task"}, [(1.0,), (0.8,), (0.7,)], [True, False, True],
     {"val_loss": 0.7, "step": 20}),
])  # fmt: skip
def test_what_counts_as_an_improvement(context, tmp_path, changes, losses, better, kept):
    fit = context(validate_every=10, **changes)
    job = lora.LoRA(fit.settings, fit, [0, 1], tmp_path)
    found = [job.improved(dict(zip(("first", "last"), of, strict=False)), 10 * i) for i, of in enumerate(losses)]
    assert found == better and kept.items() <= job.best.items()


def test_a_task_without_validation_is_kept_as_of_the_last_step(base_model, four_tasks, tmp_path):
    """Also where nothing of its wave can be validated."""
    for name in ("both", "cat"):
        lines = (four_tasks / f"{name}.jsonl").read_text().splitlines()
        (four_tasks / f"{name}.jsonl").write_text("\n".join(line for line in lines if '"val"' not in line))
    of = {"tasks_per_batch": 1, "learning_rate": 0.02, "steps": 4}
    out = lora.train(small_runs.lora(base_model, validate_every=2, **of), four_tasks, tmp_path / "out")
    lora.train(small_runs.lora(base_model, validate_every=0, **of), four_tasks, tmp_path / "plain")
    for name in ("both", "cat"):
        got, wanted = (small_runs.tensors(read(folder / lora.ADAPTERS, name)) for folder in (out, tmp_path / "plain"))
        assert all(torch.equal(got[key], wanted[key]) for key in wanted) and not (out / lora.LAST / name).exists()
    assert Library(out / lora.ADAPTERS).names == ["both", "cat", "first", "last"]


def test_adapters_are_what_peft_and_reconstruction_read(base_model, tasks, tmp_path):
    peft = pytest.importorskip("peft")
    out = lora.train(small_runs.lora(base_model, scaling="rslora", steps=30), tasks, tmp_path / "out")
    curve = small_runs.losses(out / lora.WAVES / "000")
    assert sum(curve[-4:]) < 0.8 * sum(curve[:4])
    adapters = out / lora.ADAPTERS
    assert json.loads((adapters / "descriptions.json").read_text()) == json.loads((tasks / "descriptions.json").read_text())
    read_back = Library(adapters)
    assert (read_back.rank, read_back.scaling, read_back.base_model) == (4, 8.0, str(base_model))
    ids = torch.tensor([[3, 9, 10, 4]])
    model, _ = base_model_loader.load(str(base_model), torch.float32)
    with torch.no_grad():
        plain = model(ids).logits
        handle = t2l.attach(model, read(adapters, "first", "last"))
        ours = []
        for index in (0, 1):
            with handle.use(index):
                ours.append(model(ids).logits)
        handle.detach()
        for name, logits in zip(("first", "last"), ours, strict=True):
            theirs = peft.PeftModel.from_pretrained(model, adapters / name)
            assert (logits - theirs(ids).logits).abs().max() <= numerics.LOGITS_ATOL
            model = theirs.unload()
    assert min((logits - plain).abs().max() for logits in ours) > 100 * numerics.LOGITS_ATOL


def test_a_finished_run_does_nothing_and_another_is_refused(base_model, tasks, tmp_path):
    settings = small_runs.lora(base_model, steps=2, tasks_per_batch=1)
    out = lora.train(settings, tasks, tmp_path / "out")
    before = small_runs.left(out)
    assert not list(out.rglob("*.pt"))  # a state is of a wave that runs
    lora.train(settings, tasks, out)
    assert small_runs.differing(before, small_runs.left(out)) == []
    message = r"waves/.*/done.json: written by a run with other settings or data \({}\); choose another output folder"
    with pytest.raises(ConfigError, match=message.format("steps: 2 then, 3 now")):
        lora.train(small_runs.lora(base_model, steps=3, tasks_per_batch=1), tasks, out)
    about = json.loads((tasks / "descriptions.json").read_text())
    (tasks / "descriptions.json").write_text(json.dumps(about | {"last": ["Another."], "first": ["One more."]}))
    with pytest.raises(ConfigError, match=message.format(r"data: \['first'\]")):
        lora.train(settings, tasks, out)
    assert small_runs.differing(before, small_runs.left(out)) == []


def test_a_record_of_thousands_of_tasks(tmp_path):
    """Longer than configurations may be."""
    path = tmp_path / training_runs.WAVES / "000" / training_runs.RECORD
    path.parent.mkdir(parents=True)
    data = {
        f"task-{i}": dict.fromkeys(("descriptions", "test", "train", "val"), [18, "9104560cd39e535b"]) for i in range(8000)
    }
    path.write_text(json.dumps({"settings": {"prompt_form": "raw"}, "adapters": ["multi-task"], "data": data}))
    assert path.stat().st_size > 1 << 20
    assert training_runs.settings_of(tmp_path) == {"prompt_form": "raw"}


# --- starts ----------------------------------------------------------------------------------------


def test_adapters_start_from_folders(base_model, tasks, tmp_path):
    """One folder for all tasks, or one of each name; a step of no length leaves them as they are."""
    first = lora.train(small_runs.lora(base_model, steps=4, validate_every=0), tasks, tmp_path / "first")
    still = {"steps": 1, "learning_rate": 1e-12, "weight_decay": 0.0, "validate_every": 0}
    own = lora.train(small_runs.lora(base_model, initial=str(first / "adapters"), **still), tasks, tmp_path / "own")
    one = lora.train(small_runs.lora(base_model, initial=str(first / "adapters" / "last"), **still), tasks, tmp_path / "one")
    for name in ("first", "last"):
        for folder, start in ((own, name), (one, "last")):
            got, wanted = (small_runs.tensors(read(run / "adapters", of)) for run, of in ((folder, name), (first, start)))
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-9)
    stack = read(first / "adapters", "last")
    stack.lora_B["q_proj"][0, 0, 0, 0] += 1
    stack.save_pretrained(first / "adapters" / "last", adapter=0, base_model_name_or_path=str(base_model))
    with pytest.raises(ConfigError, match=r"other settings or data \(initial\); choose another"):
        lora.train(small_runs.lora(base_model, initial=str(first / "adapters"), **still), tasks, tmp_path / "own")


@pytest.mark.parametrize("change, match", [
    ({"rank": 2}, r".*first: expected the shapes .* and the scaling .*q_proj': \[\[2, 2, 64\], \[2, 64, 2\]\].* and 8.0, "
     r"got .*q_proj': \[\[2, 4, 64\], \[2, 64, 4\]\].* and 4.0"),
    ({"lora_alpha": 4.0}, ".* and 1.0, got .* and 4.0"), ({"target_modules": ["q_proj"]}, ".*q_proj.*, got .*v_proj"),
    ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, ".*k_proj.*, got "),
])  # fmt: skip
def test_starts_that_do_not_fit(base_model, tasks, tmp_path, change, match):
    first = lora.train(small_runs.lora(base_model, steps=1, validate_every=0), tasks, tmp_path / "first") / "adapters"
    with pytest.raises(ConfigError, match=f"initial: {match}"):
        lora.train(small_runs.lora(base_model, initial=str(first), **change), tasks, tmp_path / "second")
    with pytest.raises(FileNotFoundError, match="adapter_config.json: not found; expected a PEFT folder"):
        lora.train(small_runs.lora(base_model, initial=str(tmp_path)), tasks, tmp_path / "second")


def test_held_out_descriptions_are_in_no_prompt(base_model, tasks, tmp_path):
    changes = {"prompt": "description", "mode": "multi-task", "steps": 3, "held_out_descriptions": 1}
    out = lora.train(small_runs.lora(base_model, **changes), tasks, tmp_path / "out")
    about = json.loads((tasks / "descriptions.json").read_text())
    (tasks / "descriptions.json").write_text(json.dumps({k: [v[0], "Other words."] for k, v in about.items()}))
    other = lora.train(small_runs.lora(base_model, **changes), tasks, tmp_path / "other")
    assert small_runs.losses(out / "waves" / "000") == small_runs.losses(other / "waves" / "000")
    message = "held_out_descriptions: expected fewer than the 2 descriptions of task first, got 2"
    with pytest.raises(ConfigError, match=message):
        lora.train(small_runs.lora(base_model, **changes | {"held_out_descriptions": 2}), tasks, tmp_path / "none")
