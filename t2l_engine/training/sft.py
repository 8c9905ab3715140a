"""Supervised fine-tuning of a hypernetwork through a frozen language model (paper section 3.2).

Every step takes a batch of (task, example) pairs, generates one adapter a sample from a description of its task, applies
them with :func:`t2l_engine.ops.lora_delta`, and minimises the cross-entropy of the answer.  The prompt is the input alone:
only the adapter knows the task.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
from pathlib import Path

import torch
from torch import Tensor

from t2l_engine import config as cfg
from t2l_engine.adapters import AdapterStack
from t2l_engine.config import ConfigError, EncoderConfig, HyperNetworkConfig
from t2l_engine.encoder import TextEncoder
from t2l_engine.handle import attach
from t2l_engine.hypernetwork import HyperNetwork
from t2l_engine.integrations import base_model
from t2l_engine.module_paths import DEFAULT_PATHS, generic
from t2l_engine.prompts import chat_prompt
from t2l_engine.tasks import Task, load_tasks


@dataclasses.dataclass(frozen=True)
class SFTConfig:
    """Settings of one training run (YAML; unknown fields are errors).

    ``base_model``: "smollm2-135m" (packaged) or a local transformers folder.  ``batch_size`` samples a step, each of a task
    drawn uniformly.  ``embedding_noise``: standard deviation of noise on ``task_emb`` (whose entries have unit RMS), and
    ``mix_descriptions``: use a random convex mix of two descriptions of the task; both widen what few descriptions cover.
    """

    base_model: str
    target_modules: tuple[str, ...]
    variant: str = "L"
    rank: int = 8
    lora_alpha: float = 16.0
    scaling: str | float = "plain"
    latent_size: int = 128
    head_in_size: int = 256
    encoder: str = "minilm"
    steps: int = 1000
    batch_size: int = 16
    learning_rate: float = 1e-3
    warmup_steps: int = 50
    weight_decay: float = 0.01
    grad_clip: float = 1.0
    max_tokens: int = 192
    embedding_noise: float = 0.1
    mix_descriptions: bool = True
    seed: int = 0
    save_every: int = 100
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        object.__setattr__(self, "target_modules", tuple(self.target_modules))
        for name in ("steps", "batch_size", "max_tokens", "save_every"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected a positive integer, got {getattr(self, name)!r}")
        for name in ("seed", "warmup_steps"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ConfigError(f"{name}: expected an integer of 0 or more, got {value!r}")
        if self.dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"dtype: expected 'float32' or 'bfloat16', got {self.dtype!r}")
        if not isinstance(self.learning_rate, float) or self.learning_rate <= 0:
            raise ConfigError(f"learning_rate: expected a positive number such as 1.0e-3, got {self.learning_rate!r}")


@dataclasses.dataclass(frozen=True)
class Sample:
    """A tokenised example: ``tokens`` is prompt then answer, the last ``answer_len`` of them are the answer."""

    task: int
    tokens: tuple[int, ...]
    answer_len: int


def hypernetwork_config(config: SFTConfig, model: torch.nn.Module, embed_dim: int) -> HyperNetworkConfig:
    """Sizes of the hypernetwork for ``config.target_modules`` of ``model``, and where these are unless as in Llama."""
    shapes: dict[str, tuple[int, int]] = {}
    places: dict[str, str] = {}
    for full, module in model.named_modules():
        name = full.rsplit(".", 1)[-1]
        if name in config.target_modules and hasattr(module, "in_features"):
            shapes[name] = (module.in_features, module.out_features)
            places[name] = generic(full)
    missing = [m for m in config.target_modules if m not in shapes]
    if missing:
        raise ConfigError(f"target_modules: {type(model).__name__} has no linear named {missing}")
    return HyperNetworkConfig(
        variant=config.variant,
        modules=config.target_modules,
        in_features=tuple(shapes[m][0] for m in config.target_modules),
        out_features=tuple(shapes[m][1] for m in config.target_modules),
        num_layers=model.config.num_hidden_layers,
        rank=config.rank,
        embed_dim=embed_dim,
        latent_size=config.latent_size,
        head_in_size=config.head_in_size,
        lora_alpha=config.lora_alpha,
        scaling=config.scaling,
        paths=None if all(places[m] == DEFAULT_PATHS.get(m) for m in places) else [places[m] for m in config.target_modules],
    )


def tokenize(tasks: list[Task], tokenizer, max_tokens: int) -> list[list[Sample]]:
    """Samples per task; examples beyond ``max_tokens`` are left out (an error where that empties a task)."""
    samples = []
    for index, task in enumerate(tasks):
        kept = []
        for example in task.examples:
            prompt = tokenizer(chat_prompt(tokenizer, example.input), add_special_tokens=False)["input_ids"]
            answer = tokenizer(example.outputs[0], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
            if len(prompt) + len(answer) <= max_tokens:
                kept.append(Sample(index, tuple(prompt + answer), len(answer)))
        if not kept:
            raise ConfigError(f"max_tokens: no example of task {task.name} fits into {max_tokens} tokens")
        samples.append(kept)
    return samples


def batches(samples: list[list[Sample]], config: SFTConfig, step: int, pool: int = 8) -> list[Sample]:
    """The samples of ``step``: a pure function of seed and step, so a resumed run sees the same data.

    ``pool`` consecutive steps are drawn together and cut by length, which keeps padding small.
    """
    rng = random.Random(f"{config.seed}/{step // pool}")
    drawn = [rng.choice(samples[rng.randrange(len(samples))]) for _ in range(pool * config.batch_size)]
    drawn.sort(key=lambda s: len(s.tokens))
    order = list(range(pool))
    rng.shuffle(order)
    start = order[step % pool] * config.batch_size
    return drawn[start : start + config.batch_size]


def sample_loss(model, hypernetwork: HyperNetwork, handle, batch: list[Sample], task_emb: Tensor, pad: int) -> Tensor:
    """Mean over samples of the mean cross-entropy of each answer."""
    longest = max(len(s.tokens) for s in batch)
    answer = max(s.answer_len for s in batch)
    ids = torch.full((len(batch), longest), pad)
    mask = torch.zeros(len(batch), longest, dtype=torch.long)
    labels = torch.full((len(batch), answer), -100)
    for row, s in enumerate(batch):  # left padding: answers end together
        ids[row, -len(s.tokens) :] = torch.tensor(s.tokens)
        mask[row, -len(s.tokens) :] = 1
        labels[row, -s.answer_len :] = torch.tensor(s.tokens[-s.answer_len :])
    with handle.differentiable(hypernetwork(task_emb), list(range(len(batch)))):
        hidden = model.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    # Vocabulary logits of answer positions only, as flat rows (a 3-d product would copy the vocabulary matrix per row).
    chosen = labels != -100
    logits = model.get_output_embeddings()(hidden[:, -answer - 1 : -1][chosen]).float()
    cap = getattr(model.config, "final_logit_softcapping", None)
    if cap is not None:
        logits = torch.tanh(logits / cap) * cap
    losses = torch.nn.functional.cross_entropy(logits, labels[chosen], reduction="none")
    weights = (chosen / chosen.sum(dim=1, keepdim=True))[chosen] / len(batch)
    return (losses * weights).sum()


def _task_embeddings(batch: list[Sample], embeddings: list[Tensor], config: SFTConfig, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    rows = []
    for s in batch:
        choices = embeddings[s.task]
        i, j = torch.randint(len(choices), (2,), generator=generator).tolist()
        weight = torch.rand((), generator=generator) if config.mix_descriptions else torch.ones(())
        mixed = weight * choices[i] + (1 - weight) * choices[j]
        rows.append(mixed * (math.sqrt(mixed.numel()) / mixed.norm()))
    emb = torch.stack(rows)
    return emb + config.embedding_noise * torch.randn(emb.shape, generator=generator)


def _learning_rate(config: SFTConfig, step: int) -> float:
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    return config.learning_rate * max(0.0, (config.steps - step) / max(1, config.steps - config.warmup_steps))


def train(config: SFTConfig, tasks_folder: str | Path, output: str | Path) -> Path:
    """Train and write a native checkpoint to ``output``; resumes from ``output``'s training state when there is one.

    Args:
        config: the run.
        tasks_folder: a task folder (:mod:`t2l_engine.tasks`); examples of split "train" are used.
        output: checkpoint folder; ``log.jsonl`` and ``training_state.pt`` lie beside the checkpoint.

    Raises:
        FloatingPointError: the loss is NaN or infinite; the last saved state stays.
    """
    from tqdm import tqdm

    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    tasks = load_tasks(tasks_folder, "train")
    # Eager attention: SDPA's bfloat16 backward on CPU is slower at these lengths.
    model, tokenizer = base_model.load(config.base_model, getattr(torch, config.dtype), attention="eager")
    model.requires_grad_(False)
    encoder = TextEncoder.from_pretrained(config.encoder)
    embeddings = [encoder.encode(task.descriptions) for task in tasks]
    samples = tokenize(tasks, tokenizer, config.max_tokens)

    generator = torch.Generator().manual_seed(config.seed)
    torch.manual_seed(config.seed)
    net = HyperNetwork(hypernetwork_config(config, model, encoder.embed_dim)).bias_hyperinit(generator)
    optimizer = torch.optim.AdamW(net.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    state_path = output / "training_state.pt"
    step = 0
    if state_path.is_file():
        state = torch.load(state_path, weights_only=True)
        if state["config"] != json.dumps(cfg.to_json(config)):
            raise ConfigError(f"{state_path}: written by a run with another configuration; choose another output folder")
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]

    def save() -> None:
        state = {
            "config": json.dumps(cfg.to_json(config)),
            "net": net.state_dict(),
            "optimizer": optimizer.state_dict(),
        }
        temporary = state_path.with_suffix(".writing")
        torch.save(state | {"step": step}, temporary)
        os.replace(temporary, state_path)
        net.save_pretrained(output, _metadata(config, encoder.config, tasks, step))

    with torch.no_grad():
        first: AdapterStack = net(embeddings[0][:1])
    handle = attach(model, first)
    try:
        with (output / "log.jsonl").open("a") as log, tqdm(total=config.steps, initial=step, unit="step") as bar:
            while step < config.steps:
                for group in optimizer.param_groups:
                    group["lr"] = _learning_rate(config, step)
                batch = batches(samples, config, step)
                emb = _task_embeddings(batch, embeddings, config, step)
                loss = sample_loss(model, net, handle, batch, emb, tokenizer.pad_token_id)
                if not torch.isfinite(loss):
                    raise FloatingPointError(f"loss is {loss.item()} at step {step}; last saved state: {state_path}")
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                norm = torch.nn.utils.clip_grad_norm_(net.parameters(), config.grad_clip)
                optimizer.step()
                step += 1
                row = {"step": step, "loss": round(loss.item(), 4), "grad_norm": round(norm.item(), 4)}
                log.write(json.dumps(row | {"tokens": len(batch) * max(len(s.tokens) for s in batch)}) + "\n")
                bar.set_postfix(loss=f"{loss.item():.3f}")
                bar.update()
                if step % config.save_every == 0:
                    log.flush()
                    save()
    finally:
        handle.detach()
    save()
    return output


def _metadata(config: SFTConfig, encoder: EncoderConfig, tasks: list[Task], step: int) -> dict:
    return {
        "encoder": cfg.to_json(encoder),
        "base_model": config.base_model,
        "training": {"steps_done": step, "tasks": [t.name for t in tasks], **cfg.to_json(config)},
    }
