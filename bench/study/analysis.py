"""What the adapters of the study look like: maps, similarities, distances, one input under many descriptions, requests."""

from __future__ import annotations

import contextlib
import json
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from sklearn.manifold import TSNE
from torch import Tensor, nn

import t2l_engine as t2l
from bench.study import plan
from bench.study.runs import WORDINGS, finished, folder_of
from bench.suites.learn import distance
from t2l_engine import ops
from t2l_engine.hypernetwork.task_encoders import TaskEncoder
from t2l_engine.research.evaluation.answers import Answerer, Query, Store
from t2l_engine.research.evaluation.arms import Generated, shots_of
from t2l_engine.research.tasks import manifest as manifests
from t2l_engine.research.tasks.folder import load_tasks
from t2l_engine.research.training import lora
from t2l_engine.research.training.descriptions import TaskEmbeddings
from t2l_engine.text import base_model
from t2l_engine.text.encoder import MINILM, TextEncoder
from t2l_engine.text.prompts import raw_prompt

REQUESTS, REQUEST_TOKENS, ROUNDS = 20, 16, 5


def maps(work: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """``map`` records: a task's place in t-SNE of task embeddings and trunk outputs, and its cosines to all later tasks.

    Cosines of descriptions and of adapters; ``correlation``: their rank correlation over all pairs.  Every task of the
    evaluation has the mean of its held-out descriptions' embeddings.
    """
    manifest, engine = manifests.read(plan.MANIFEST), t2l.TextToLoRA.from_pretrained(work / "t2l")
    tasks = load_tasks(folder_of(work, "evaluation"), None)
    emb = torch.stack([engine.encoder.encode(list(task.descriptions)).mean(0) for task in tasks])
    emb = torch.nn.functional.normalize(emb, dim=-1) * emb.shape[1] ** 0.5
    with torch.no_grad():
        net = engine.hypernetwork
        folded = net.folded()
        latent = ops.hypernet_trunk(net.task_encoder(emb), folded["weights"], folded["side_emb"], folded["pos_emb"], 0)
        stack = net.generate(emb)
    cosines = {"texts": _cosines(emb), "adapters": _delta_cosines(stack)}
    places = {"task_emb": _tsne(emb), "trunk": _tsne(latent.reshape(len(tasks), -1))}
    for i, task in enumerate(tasks):
        known = manifest.tasks[task.name]
        later = {name: [round(float(v), 4) for v in of[i, i + 1 :]] for name, of in cosines.items()}
        where = {name: points[i] for name, points in places.items()}
        yield "map", {"task": task.name, "skill": known.skill, "tier": known.tier, **where, "cosines": later}
    pairs = tuple(torch.triu_indices(len(tasks), len(tasks), 1))
    correlation = spearmanr(*(of[pairs].numpy() for of in cosines.values()))
    yield "correlation", {"spearman": float(correlation.statistic)}


def wordings(work: Path) -> dict[str, float]:
    """Percent of held-out descriptions whose nearest task of LEARNABLE is the right one, before anything is trained.

    A task stands at the mean of the descriptions trained on; distances are of embeddings, or behind a task encoder.
    ``"within"``: percent of the variance of embeddings trained on that is between descriptions of one task.
    """
    fit, held = (load_tasks(folder_of(work, name), None, names=plan.LEARNABLE) for name in ("train", "evaluation"))
    device = torch.device("cpu")
    embeddings = TaskEmbeddings(plan.T2L, [(task.name, task.descriptions) for task in fit], device)
    config = t2l.TextToLoRA.from_pretrained(work / "t2l").hypernetwork.config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.T2L.seed)
        random, start = TaskEncoder(config), TaskEncoder(config)
    embeddings.initialise(start.linear)
    encoder = TextEncoder.from_pretrained(MINILM)
    with torch.no_grad():
        texts = [[encoder.encode(list(task.descriptions)) for task in tasks] for tasks in (fit, held)]
        spread = [(rows - rows.mean(dim=0)).square().sum() for rows in (torch.cat(texts[0]), *texts[0])]
        found = {"within": round(100 * float(sum(spread[1:]) / spread[0]), 1)}
        for name, layer in (("embeddings", nn.Identity()), ("random", random), ("discriminant", start)):
            means = torch.stack([layer(rows).mean(dim=0) for rows in texts[0]])
            nearest = torch.cat([torch.cdist(layer(rows), means).argmin(dim=1) for rows in texts[1]])
            right = torch.arange(len(held)).repeat_interleave(torch.tensor([len(rows) for rows in texts[1]]))
            found[name] = round(100 * float((nearest == right).double().mean()), 1)
    return found


def distances(work: Path) -> Iterator[dict[str, Any]]:
    """What reconstruction costs and loses: relative error of B A, parameters of the network, values of the library."""
    for run, count in ((work / f"reconstruction-{count}", count) for count in plan.COUNTS):
        if not finished(run.name, work):
            continue
        engine = t2l.TextToLoRA.from_pretrained(run)
        library = work / "library-train" / lora.ADAPTERS
        names = plan.chosen([path.parent.name for path in library.glob("*/adapter_config.json")], count)
        oracle = t2l.AdapterStack.from_peft([library / name for name in names], dtype=torch.float32)
        texts = {task.name: task.descriptions[0] for task in load_tasks(folder_of(work, "train"), None, names=names)}
        with torch.no_grad():
            made = engine.generate([texts[name] for name in names])
        parameters, values = engine.hypernetwork.config.num_parameters, oracle.num_parameters * count
        error = distance(made, oracle)
        yield {"adapters": count, "relative_error": error, "parameters": parameters, "library_values": values}


def steered(work: Path) -> list[dict[str, Any]]:
    """Answers to inputs that have different ones by description, in one batch; no such description was trained on."""
    model, tokenizer = base_model.load(plan.MODEL, torch.bfloat16)
    answerer = Answerer(model, tokenizer, identity="", store=Store(), batch_size=32, clock=time.perf_counter)
    inputs = json.loads(WORDINGS.read_text(encoding="utf-8"))["steered"]
    asked = [(text, description) for text, of in inputs.items() for description in of]
    engine = t2l.TextToLoRA.from_pretrained(work / "t2l")
    queries = [Query(engine.prompt(tokenizer, text), description) for text, description in asked]
    answers = answerer.ask(queries, Generated(engine))
    return [
        {"input": text, "description": description, "answer": answer.text}
        for (text, description), answer in zip(asked, answers, strict=True)
    ]


@torch.no_grad()
def requests(work: Path, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Prompt tokens and seconds of requests one at a time by arm, REQUEST_TOKENS generated each, the fastest of ROUNDS.

    Arms take turns.  Adapters are generated and attached before: a server does that once a task.
    """
    model, tokenizer = base_model.load(plan.MODEL, torch.bfloat16)
    folder = folder_of(work, "evaluation")
    tasks = load_tasks(folder, "test", names=names)
    pools = {task.name: task.examples for task in load_tasks(folder, "train", names=names)}
    asked = [(i % len(tasks), tasks[i % len(tasks)], i // len(tasks)) for i in range(REQUESTS)]
    described = [(n, t.descriptions[0], t.examples[i].input, shots_of(t, pools[t.name], 0)) for n, t, i in asked]
    engine = t2l.TextToLoRA.from_pretrained(work / "t2l")
    generated = engine.generate([task.descriptions[0] for task in tasks])
    multi_task = t2l.AdapterStack.from_peft(work / "multi-task-description" / lora.ADAPTERS / lora.MULTI_TASK)
    arms: dict[str, tuple[t2l.AdapterStack | None, list[tuple[int, str]]]] = {
        "t2l": (generated, [(number, engine.prompt(tokenizer, text)) for number, _, text, _ in described]),
        "multi-task-description": (multi_task, [(0, engine.prompt(tokenizer, text, d)) for _, d, text, _ in described]),
        "base-description": (None, [(-1, raw_prompt(d, text)) for _, d, text, _ in described]),
        "icl": (None, [(-1, raw_prompt(d, text, shots)) for _, d, text, shots in described]),
    }
    batches = {
        name: [(number, tokenizer(prompt, return_tensors="pt", add_special_tokens=False)) for number, prompt in prompts]
        for name, (_, prompts) in arms.items()
    }
    best = {name: [math.inf] * REQUESTS for name in arms}
    for _ in range(ROUNDS):
        for name, (stack, _) in arms.items():
            handle = None if stack is None else t2l.attach(model, stack)
            times = [_seconds(model, batch, handle, number) for number, batch in batches[name]]
            best[name] = [min(pair) for pair in zip(best[name], times, strict=True)]
            if handle is not None:
                handle.detach()
    for name, times in best.items():
        tokens = statistics.fmean(batch["input_ids"].shape[1] for _, batch in batches[name])
        settings = {"requests": REQUESTS, "new_tokens": REQUEST_TOKENS, "rounds": ROUNDS}
        yield {"arm": name, **settings, "prompt_tokens": tokens, "seconds": statistics.median(times)}


def _seconds(model: nn.Module, batch: Any, handle: t2l.LoRAHandle | None, number: int) -> float:
    with contextlib.nullcontext() if handle is None else handle.use([number]):
        start = time.perf_counter()
        model.generate(**batch, max_new_tokens=REQUEST_TOKENS, min_new_tokens=REQUEST_TOKENS, do_sample=False)
        return time.perf_counter() - start


def _cosines(rows: Tensor) -> Tensor:
    """Cosine of every two of ``rows [N, width]``."""
    rows = torch.nn.functional.normalize(rows.float(), dim=-1)
    return rows @ rows.T


def _delta_cosines(stack: t2l.AdapterStack) -> Tensor:
    """Cosine of the B A of every two adapters, all layers and modules as one vector; ``[N, N]``."""
    gram = torch.zeros(len(stack), len(stack), dtype=torch.float64)
    for name, A in stack.lora_A.items():
        for layer in range(A.shape[1]):
            a, b = A[:, layer].double(), stack.lora_B[name][:, layer].double()
            aa, bb = torch.einsum("iro,jso->ijrs", a, a), torch.einsum("ior,jos->ijrs", b, b)
            gram += (aa * bb).sum(dim=(2, 3))  # <B A, B' A'> without the products
    norms = gram.diagonal().sqrt()
    return (gram / (norms[:, None] * norms)).float()


def _tsne(rows: Tensor) -> list[list[float]]:
    """Two coordinates of every row."""
    found = TSNE(perplexity=15, metric="cosine", init="pca", random_state=0).fit_transform(rows.double().numpy())
    return [[round(float(v), 3) for v in point] for point in found]
