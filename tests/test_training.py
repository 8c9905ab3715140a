"""SFT on a tiny random model: it learns, it resumes bit for bit, and its checkpoint loads and evaluates."""

import json
import shutil

import pytest
import torch
import yaml

import t2l_engine as t2l
from t2l_engine.cli import app
from t2l_engine.config import ConfigError, from_json
from t2l_engine.evaluation import exact_match
from t2l_engine.integrations import base_model as base_model_loader
from t2l_engine.tasks import load_tasks
from t2l_engine.testing import numerics
from t2l_engine.training import sft

TEMPLATE = "{% for m in messages %}<user> {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}<bot> {% endif %}"
WORDS = ["red", "blue", "green", "cat", "dog", "cow"]


@pytest.fixture
def base_model(tiny_model, tmp_path):
    """A saved tiny Llama with a word-level tokenizer and a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {
        w: i for i, w in enumerate(["<pad>", "<s>", "</s>", "<user>", "<bot>", "<unk>", ":", "Input", "Output", *WORDS])
    }
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    fast.chat_template = TEMPLATE
    folder = tmp_path / "base"
    tiny_model("Llama").save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture
def tasks(tmp_path):
    """Two tasks over pairs of words: the first word, the last word."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, pick in (("first", 0), ("last", 1)):
        rows = [
            {"input": f"{a} {b}", "output": [(a, b)[pick]], "split": "test" if a == "cow" else "train"}
            for a in WORDS
            for b in WORDS
            if a != b
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    texts = {"first": ["Say the first word.", "Repeat the word that comes first"], "last": ["Say the last word."]}
    (folder / "descriptions.json").write_text(json.dumps(texts))
    return folder


def config(base_model, **changes):
    values = {
        "base_model": str(base_model), "target_modules": ["q_proj", "v_proj"], "rank": 4, "latent_size": 32,
        "head_in_size": 16, "steps": 40, "batch_size": 8, "learning_rate": 5e-3, "warmup_steps": 4, "dtype": "float32",
    }  # fmt: skip
    return from_json(sft.SFTConfig, values | changes, "test")


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def test_learns_resumes_and_evaluates(base_model, tasks, tmp_path, monkeypatch):
    whole = sft.train(config(base_model), tasks, tmp_path / "whole")
    curve = losses(whole)
    assert len(curve) == 40
    assert sum(curve[-8:]) < 0.8 * sum(curve[:8])

    part = tmp_path / "part"
    monkeypatch.setattr(sft, "sample_loss", _failing_after(sft.sample_loss, calls=15))
    with pytest.raises(KeyboardInterrupt):
        sft.train(config(base_model, save_every=10), tasks, part)
    monkeypatch.undo()
    sft.train(config(base_model, save_every=10), tasks, part)
    assert losses(part)[-30:] == curve[-30:]  # steps 11..40: 11..15 were done twice
    a, b = (t2l.HyperNetwork.from_pretrained(f).state_dict() for f in (whole, part))
    assert all(torch.equal(a[k], b[k]) for k in a)
    with pytest.raises(ConfigError, match="another configuration"):
        sft.train(config(base_model, rank=2), tasks, part)

    engine = t2l.TextToLoRA.from_pretrained(whole)
    model, tokenizer = base_model_loader.load(str(base_model), torch.float32)
    loaded = load_tasks(tasks, "test")
    shots = {t.name: t.examples for t in load_tasks(tasks, "train")}
    result = exact_match.evaluate(
        engine, model, tokenizer, loaded, arms=exact_match.ARMS, shots=shots, max_new_tokens=2, batch_size=4
    )
    assert set(result["tasks"]) == {"first", "last"} and set(result["mean"]) == set(exact_match.ARMS)
    assert result["items"] == {"first": 5, "last": 5}
    with pytest.raises(ValueError, match="arms: expected some of"):
        exact_match.evaluate(engine, model, tokenizer, loaded, arms=("t2l", "oracle"))

    from typer.testing import CliRunner

    file = tmp_path / "result.json"
    command = [
        "evaluate",
        "--checkpoint",
        str(whole),
        "--tasks",
        str(tasks),
        "--json",
        str(file),
        "--max-new-tokens",
        "2",
    ]
    run = CliRunner().invoke(app, command)
    assert run.exit_code == 0, run.output
    assert json.loads(file.read_text())["tasks"]["first"]["t2l"] == result["tasks"]["first"]["t2l"]


def _failing_after(function, calls):
    def run(*arguments):
        nonlocal calls
        if calls == 0:
            raise KeyboardInterrupt
        calls -= 1
        return function(*arguments)

    return run


def tiny_config(variant):
    """Out wider than in for one module, narrower for the other."""
    return t2l.HyperNetworkConfig(
        variant=variant, modules=("q_proj", "v_proj"), in_features=(12, 12), out_features=(20, 6), num_layers=2, rank=4,
        embed_dim=8, latent_size=16, head_in_size=10, lora_alpha=8.0,
    )  # fmt: skip


@pytest.mark.parametrize("variant", ["L", "M", "S-learnable", "S-rotary"])
def test_first_adapter_is_a_lora_initialisation(variant):
    """B = 0 and A within PEFT's Kaiming bound, whatever the task, for out > in too; and every variant has gradients."""
    c = tiny_config(variant)
    net = t2l.HyperNetwork(c).bias_hyperinit(torch.Generator().manual_seed(1))
    stack = net(torch.randn(3, 8))
    for name in c.modules:
        assert not stack.lora_B[name].any()
        a = stack.lora_A[name]
        assert a.abs().max() <= 12**-0.5 and a.std().item() == pytest.approx(12**-0.5 / 3**0.5, rel=0.2)
        assert torch.equal(a[0], a[2]) and not torch.equal(a[0, 0, 0], a[0, 0, 1])
    stack.lora_B["q_proj"].sum().backward()
    assert net.heads["q_proj"].weight.grad.abs().sum() > 0


def test_hypernetwork_gradients_equal_those_of_the_plain_reference():
    """Through our ops and through autograd over the float64 reference: L, M and S."""
    from t2l_engine import ops, reference

    for variant in ("L", "M", "S-learnable", "S-rotary"):
        c = tiny_config(variant)
        torch.manual_seed(0)
        net = t2l.HyperNetwork(c)
        wide = t2l.HyperNetwork(c).set_dtype(torch.float64)
        wide.load_state_dict(net.state_dict())
        emb = torch.randn(3, 8)

        def plain_heads(latent, weight, bias, *sizes, mul_A, add_A, mul_B, add_B):
            made = reference.hypernet_heads(latent, weight, bias, mul_A, add_A, mul_B, add_B, *sizes)
            return made[::2], made[1::2]

        def total(stack):
            return sum((s[m].double() ** 2).sum() for s in (stack.lora_A, stack.lora_B) for m in s)

        total(net(emb)).backward()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ops, "hypernet_trunk", reference.hypernet_trunk)
            patch.setattr(ops, "hypernet_heads", plain_heads)
            total(wide(emb.double())).backward()
        for (name, p), q in zip(net.named_parameters(), wide.parameters(), strict=True):
            error = (p.grad.double() - q.grad).abs().max()
            assert error <= numerics.GRADIENT_RTOL * q.grad.abs().max() + 1e-12, (variant, name)


def test_batches_are_a_function_of_seed_and_step(base_model):
    c = config(base_model)
    samples = [[sft.Sample(t, tuple(range(n)), 1) for n in range(3, 30)] for t in range(5)]
    first = [sft.batches(samples, c, step) for step in range(16)]
    assert first == [sft.batches(samples, c, step) for step in range(16)]
    assert all(len(b) == c.batch_size for b in first)
    spread = [max(len(s.tokens) for s in b) - min(len(s.tokens) for s in b) for b in first]
    assert sum(spread) / len(spread) < 10  # drawn at random it would be near 25


def test_a_hypernetwork_for_a_model_unlike_llama(tiny_model, tmp_path):
    """Its modules are where the model has them, and PEFT finds them there."""
    peft = pytest.importorskip("peft")
    model = tiny_model("OPT", ffn_dim=96, word_embed_proj_dim=64)
    config = sft.SFTConfig(base_model="opt", rank=2, target_modules=("fc1", "v_proj"))
    settings = sft.hypernetwork_config(config, model, embed_dim=8)
    assert settings.module_paths == {
        "fc1": "model.decoder.layers.{layer}.fc1", "v_proj": "model.decoder.layers.{layer}.self_attn.v_proj",
    }  # fmt: skip
    llama = sft.hypernetwork_config(
        sft.SFTConfig(base_model="x", target_modules=("q_proj",)), tiny_model("Llama"), embed_dim=8
    )
    assert llama.paths is None
    torch.manual_seed(0)
    stack = t2l.HyperNetwork(settings).generate(torch.randn(1, 8))
    stack.save_pretrained(tmp_path)
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        with t2l.attach(model, stack).use(0) as lora:
            ours = model(ids).logits
        lora.detach()
        theirs = peft.PeftModel.from_pretrained(model, tmp_path).eval()(ids).logits
    assert (ours - theirs).abs().max() <= numerics.LOGITS_ATOL


def test_bad_settings(base_model, tasks, tmp_path):
    with pytest.raises(ConfigError, match="unknown field 'stepz'"):
        from_json(sft.SFTConfig, yaml.safe_load("{base_model: x, target_modules: [q_proj], stepz: 3}"), "file")
    with pytest.raises(ConfigError, match="steps: expected a positive integer"):
        config(base_model, steps=0)
    with pytest.raises(ConfigError, match=r"no linear named \['w_proj'\]"):
        sft.train(config(base_model, target_modules=["w_proj"]), tasks, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="base_model"):
        base_model_loader.load("nowhere", torch.float32)


@pytest.mark.parametrize("family", ["Gemma2", "GPT2"])  # no "sdpa"; tied weights that the file does not repeat
def test_base_models_of_other_families(base_model, tiny_model, tmp_path, family):
    folder = tmp_path / "model"
    shutil.copytree(base_model, folder)
    tiny_model(family, tie_word_embeddings=True).save_pretrained(folder)
    model, tokenizer = base_model_loader.load(str(folder), torch.bfloat16)
    assert not model.training and model.dtype == torch.bfloat16 and tokenizer.padding_side == "left"


def test_base_models_that_are_not_whole(base_model, tmp_path, monkeypatch):
    """Weights that are missing are not made up, and code in a folder is not run, nor asked about at the terminal."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(base_model, folder)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.self_attn.q_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"its weights lack \['model.layers.1.self_attn.q_proj.weight'\]"):
        base_model_loader.load(str(folder), torch.float32)
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asked at the terminal"))
    values = json.loads((folder / "config.json").read_text())
    own = {"model_type": "own", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (folder / "config.json").write_text(json.dumps(values | own))
    with pytest.raises(ValueError, match="trust_remote_code"):
        base_model_loader.load(str(folder), torch.float32)
    (folder / "adapter_config.json").write_text("{}")  # transformers would apply it: no base model any more
    with pytest.raises(ValueError, match="adapter_config.json in it would change the model"):
        base_model_loader.load(str(folder), torch.float32)
    with pytest.raises(FileNotFoundError, match="base_model: expected .* a local transformers folder with config.json"):
        base_model_loader.load(str(tmp_path), torch.float32)
