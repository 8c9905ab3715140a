"""What the tests of training runs share: settings that train in milliseconds, a small library, and what a run leaves."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

import t2l_engine as t2l
from t2l_engine.research.training import settings
from t2l_engine.research.training.runs import read_log
from t2l_engine.research.training.sampling import Group, Sample

#: Every field that makes a step random, and steps of two batches.
NOISE = {
    "neftune_alpha": 5.0, "lora_dropout": 0.1, "label_smoothing": 0.1, "generated_l2": 1e-3, "accumulation": 2,
    "held_out_descriptions": 0,
}  # fmt: skip


def _model(base_model):
    return {
        "base_model": str(base_model), "target_modules": ["q_proj", "v_proj"], "rank": 4, "dtype": "float32", "steps": 8,
        "tasks_per_batch": 2, "learning_rate": 5e-3, "warmup_steps": 2, "save_every": 3, "validate_every": 4,
        "validation_samples": 3,
    }  # fmt: skip


def sft(base_model, **changes):
    small = {"latent_size": 16, "head_in_size": 8, "encoder": "one-hot"}
    return settings.build(settings.SFTSettings, _model(base_model) | small | changes)


def lora(base_model, **changes):
    return settings.build(settings.LoRASettings, _model(base_model) | changes)


def reconstruction(**changes):
    small = {
        "latent_size": 16, "head_in_size": 8, "encoder": "one-hot", "steps": 8, "tasks_per_batch": 2, "warmup_steps": 2,
        "save_every": 3, "validate_every": 4,
    }  # fmt: skip
    return settings.build(settings.ReconstructionSettings, small | changes)


def groups(sizes, tasks) -> list[Group]:
    """Groups of random tokens; ``sizes``: of each, tokens and answer tokens of its samples; ``tasks``: of each, its task."""
    generator = torch.Generator().manual_seed(0)

    def sample(length, answer):
        return Sample(tuple(torch.randint(3, 97, (length,), generator=generator).tolist()), answer)

    samples = [tuple(sample(*size) for size in group) for group in sizes]
    return [Group(task, 0, of, f"key{i}") for i, (task, of) in enumerate(zip(tasks, samples, strict=True))]


def library(folder: Path, count=3, rank=2, scaling=2.0, modules=None, layers=2, seed=0, texts=2) -> t2l.AdapterStack:
    """Write ``count`` random adapters and their descriptions to ``folder``; returns them as a stack, in order of name."""
    generator = torch.Generator().manual_seed(seed)
    shapes = modules or {"q_proj": (6, 8), "v_proj": (6, 5)}
    A = {name: torch.randn(count, layers, rank, n, generator=generator) / n**0.5 for name, (n, _) in shapes.items()}
    B = {name: torch.randn(count, layers, n, rank, generator=generator) / 10 for name, (_, n) in shapes.items()}
    stack = t2l.AdapterStack(A, B, torch.full((count,), scaling))
    names = [f"task{i}" for i in range(count)]
    for i, name in enumerate(names):
        stack.save_pretrained(folder / name, adapter=i, base_model_name_or_path="base")
    about = {name: [f"Do what {name} asks, in wording {i}." for i in range(texts)] for name in names}
    (folder / "descriptions.json").write_text(json.dumps(about))
    return stack


def tensors(stack: t2l.AdapterStack) -> dict[str, torch.Tensor]:
    return {f"{side} {name}": t for side in ("lora_A", "lora_B") for name, t in getattr(stack, side).items()}


def same(a: t2l.AdapterStack, b: t2l.AdapterStack) -> bool:
    """Whether two stacks are equal bit for bit."""
    ours, theirs = ({"scaling": stack.scaling} | tensors(stack) for stack in (a, b))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def rows(folder: Path) -> list[dict]:
    """The log without the time that steps took."""
    return [{key: value for key, value in row.items() if key != "seconds"} for row in read_log(folder)]


def losses(folder: Path) -> list[float]:
    """Of every step and of every validation, in order."""
    return [row.get("loss", row.get("val_loss")) for row in rows(folder)]


def assert_learns(folder: Path, factor: float = 0.9) -> None:
    """The loss of the last four steps is below ``factor`` of that of the first."""
    curve = [row["loss"] for row in rows(folder) if "loss" in row]
    assert sum(curve[-4:]) < factor * sum(curve[:4])


def left(folder: Path) -> dict[str, object]:
    """All that a run left, by path: tensors and numbers of states, tensors of weights, rows of logs, bytes of the rest."""
    found: dict[str, object] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = str(path.relative_to(folder))
        if path.suffix == ".pt":
            found |= {f"{name}{key}": value for key, value in _flat(torch.load(path, weights_only=True)).items()}
        elif path.suffix == ".safetensors":  # which orders metadata at random
            found |= {f"{name}/{key}": value for key, value in load_file(path).items()}
        else:
            found[name] = rows(path.parent) if path.suffix == ".jsonl" else path.read_bytes()
    return found


def _flat(value, key=""):
    if isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for name, item in items for k, v in _flat(item, f"{key}/{name}").items()} or {key: value}
    return {key: value}


def differing(a: dict[str, object], b: dict[str, object]) -> list[str]:
    """Where what two runs left is not the same bit for bit."""

    def same(x, y):
        return torch.equal(x, y) if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor) else x == y

    return sorted(a.keys() ^ b.keys()) + [name for name in sorted(a.keys() & b.keys()) if not same(a[name], b[name])]


def failing(function, number, error=OSError):
    """``function``, except that its call ``number`` (from 0) raises ``error`` before it does anything."""
    calls = 0

    def run(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == number + 1:
            raise error("for the test")
        return function(*args, **kwargs)

    return run
