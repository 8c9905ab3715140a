"""SFT end to end on a tiny model: it learns, and its checkpoint is one like any other."""

import json

import pytest
import torch

import t2l_engine as t2l
from t2l_engine.files.errors import MAX_CONFIG_BYTES, ConfigError
from t2l_engine.hypernetwork import convert
from t2l_engine.research.tasks.folder import Example, Task, load_tasks, write_tasks
from t2l_engine.research.tasks.manifest import summary
from t2l_engine.research.training import sft
from t2l_engine.testing import numerics
from t2l_engine.text import base_model as base_model_loader
from tests.research.training import small_runs

BOTH = ("first", "last")


def test_learns_and_converts(base_model, tasks, tmp_path):
    settings = small_runs.sft(
        base_model, encoder="minilm", prompt="description", variant="M", steps=40, tasks_per_batch=8, latent_size=32,
        head_in_size=16, warmup_steps=4, validate_every=20, save_every=20,
    )  # fmt: skip
    out = sft.train(settings, tasks, tmp_path / "out")
    found = small_runs.rows(out)
    curve = [row["loss"] for row in found if "loss" in row]
    assert len(curve) == 40 and sum(curve[-8:]) < 0.8 * sum(curve[:8])
    val = [row["val_loss"] for row in found if "val_loss" in row]
    assert len(val) == 2 and val[1] < val[0]
    # "<user> red blue <bot> red </s>", with a text of four to six words
    assert all(row["tokens"] >= 8 * 10 for row in found if "loss" in row)

    engine = t2l.TextToLoRA.from_pretrained(out)
    texts = [task.descriptions[0] for task in load_tasks(tasks, None)]
    first = engine.generate(texts)
    assert not torch.equal(first.lora_B["q_proj"][0], first.lora_B["q_proj"][1]) and first.scaling.tolist() == [4.0, 4.0]
    convert.convert(out, tmp_path / "sakana", to="sakana")
    convert.convert(tmp_path / "sakana", tmp_path / "back", to="native")
    for folder in ("sakana", "back"):
        assert small_runs.same(t2l.TextToLoRA.from_pretrained(tmp_path / folder).generate(texts), first), folder
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads((out / "config.json").read_text())


def test_what_the_checkpoint_says_of_its_training(base_model, tasks, tmp_path):
    settings = small_runs.sft(base_model, encoder="minilm", steps=3, save_every=2, generated_l2=0.5)
    out = sft.train(settings, tasks, tmp_path / "out")
    about = json.loads((out / "config.json").read_text())
    assert about["encoder"]["name"] == "minilm" and about["base_model"] == str(base_model)
    training = about["training"]
    assert training.pop("method") == "sft" and training.pop("steps_done") == 3
    assert training.pop("tasks") == json.loads(json.dumps(summary(load_tasks(tasks, None))))
    assert len(training.pop("base_model_sha256")) == 64
    assert training == settings.model_dump(mode="json")
    assert about["hypernetwork"]["rank"] == 4 and about["hypernetwork"]["scaling"] == "plain"
    only = sft.train(settings, tasks, tmp_path / "only", names=["last"])
    assert list(json.loads((only / "config.json").read_text())["training"]["tasks"]) == ["last"]


def test_tasks_without_text(base_model, tasks, tmp_path):
    out = sft.train(small_runs.sft(base_model), tasks, tmp_path / "out")  # encoder one-hot
    (tasks / "descriptions.json").write_text('{"first": ["Other."], "last": ["Texts."]}')
    other = sft.train(small_runs.sft(base_model), tasks, tmp_path / "other")
    assert small_runs.losses(other) == small_runs.losses(out)
    engine = t2l.TextToLoRA.from_pretrained(out)
    stack = engine.generate(list(BOTH))
    assert not torch.equal(stack.lora_B["v_proj"][0], stack.lora_B["v_proj"][1])
    convert.convert(out, tmp_path / "sakana", to="sakana")
    assert small_runs.same(t2l.TextToLoRA.from_pretrained(tmp_path / "sakana").generate(list(BOTH)), stack)
    with pytest.raises(ValueError, match="knows only the names of its 2 training tasks"):
        engine.generate(["Say the first word."])


def test_five_hundred_tasks_fit_into_a_checkpoint(base_model, tmp_path):
    """Long names, in a one-hot encoder too: its readers take a megabyte."""
    splits = ("train", "val", "test", "extra")
    names = [f"task{i:03}_{'of_a_long_name' * 8}" for i in range(500)]
    tasks = [Task(n, (f"Do {n}.",), tuple(Example("red", ("blue",), split) for split in splits)) for n in names]
    write_tasks(tmp_path / "tasks", tasks)
    out = sft.train(small_runs.sft(base_model, steps=1, validate_every=0), tmp_path / "tasks", tmp_path / "out")
    assert 300_000 < (out / "config.json").stat().st_size < MAX_CONFIG_BYTES
    assert len(t2l.TextToLoRA.from_pretrained(out).generate(names[:2])) == 2


def test_a_model_unlike_llama(save_model, tasks, tmp_path):
    """Modules are where the model has them, PEFT finds them there, and bfloat16 trains."""
    peft = pytest.importorskip("peft")
    folder = save_model("OPT", ffn_dim=96, word_embed_proj_dim=64)
    settings = small_runs.sft(folder, target_modules=["fc1", "v_proj"], dtype="bfloat16", steps=12, validate_every=0)
    out = sft.train(settings, tasks, tmp_path / "out")
    curve = small_runs.losses(out)
    assert sum(curve[-3:]) < sum(curve[:3])
    stack = t2l.TextToLoRA.from_pretrained(out).generate(["first"])
    assert stack.paths == {
        "fc1": "model.decoder.layers.{layer}.fc1", "v_proj": "model.decoder.layers.{layer}.self_attn.v_proj",
    }  # fmt: skip
    stack.save_pretrained(tmp_path / "adapter")
    model, _ = base_model_loader.load(str(folder), torch.float32)
    ids = torch.tensor([[3, 9, 10]])
    with torch.no_grad():
        with t2l.attach(model, stack).use(0) as handle:
            ours = model(ids).logits
        handle.detach()
        base = model(ids).logits
        theirs = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()(ids).logits
    assert (ours - theirs).abs().max() <= numerics.LOGITS_ATOL < (ours - base).abs().max()


def test_runs_that_cannot_start_write_nothing(base_model, tasks, tmp_path):
    """A task without examples is no obstacle where others are named."""
    lines = (tasks / "last.jsonl").read_text().splitlines()
    (tasks / "last.jsonl").write_text("\n".join(line for line in lines if '"train"' not in line))
    for changes, names, message in (
        ({"target_modules": ["w_proj"]}, ["first"], "target_modules: w_proj: "), ({}, ["first", "none"], "'none'"),
        ({"max_tokens": 5}, ["first"], "max_tokens: .*task first"), ({}, ["first", "last"], "'train' of task last"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            sft.train(small_runs.sft(base_model, **changes), tasks, tmp_path / "out", names=names)
        assert not (tmp_path / "out").exists()
    sft.train(small_runs.sft(base_model, steps=1), tasks, tmp_path / "out", names=["first"])
