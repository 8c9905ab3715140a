"""What the adapters of the study look like: maps, similarities, distances, one input under many descriptions, requests."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Iterator
from pathlib import Path

import torch
from scipy.stats import spearmanr
from sklearn.manifold import TSNE
from torch import Tensor, nn

import t2l_engine as t2l
from bench.harness import Record, record
from bench.models import shared
from bench.study import plan
from bench.study.runs import WORDINGS, folder_of
from bench.suites.learn import answerer, distance
from bench.timing import elapsed_us
from t2l_engine import ops
from t2l_engine.adapters.similarity import inner_products
from t2l_engine.hypernetwork.task_encoders import TaskEncoder
from t2l_engine.research.evaluation.answers import Query
from t2l_engine.research.evaluation.methods import Generated, shots_of
from t2l_engine.research.tasks import manifest as manifests
from t2l_engine.research.tasks.folder import load_tasks, read_descriptions
from t2l_engine.research.training import lora
from t2l_engine.research.training.descriptions import TaskEmbeddings
from t2l_engine.text import base_model
from t2l_engine.text.encoder import MINILM, TextEncoder
from t2l_engine.text.prompts import raw_prompt

REQUESTS, REQUEST_TOKENS, ROUNDS = 20, 16, 5


@torch.no_grad()
def maps(work: Path) -> Iterator[Record]:
    """``map`` records: a task's place in t-SNE of task embeddings and trunk outputs, and its cosines to all later tasks.

    Cosines of descriptions and of adapters; ``correlation``: their rank correlation over all pairs.  Every task of the
    evaluation has the mean of its held-out descriptions' embeddings.
    """
    manifest, engine = manifests.read(plan.MANIFEST), t2l.TextToLoRA.from_pretrained(work / "t2l")
    tasks = load_tasks(folder_of(work, "evaluation"), None)
    emb = torch.stack([engine.encoder.encode(list(task.descriptions)).mean(0) for task in tasks])
    emb = nn.functional.normalize(emb, dim=-1) * emb.shape[1] ** 0.5
    net = engine.hypernetwork
    folded, stack = net.folded(), net.generate(emb)
    latent = ops.hypernet_trunk(net.task_encoder(emb), folded["weights"], folded["side_emb"], folded["pos_emb"], 0)
    cosines = {"texts": _cosines(emb @ emb.T), "adapters": _cosines(inner_products(stack, stack))}
    places = {"task_emb": _tsne(emb), "trunk": _tsne(latent.flatten(1))}
    for i, task in enumerate(tasks):
        known = manifest.tasks[task.name]
        later = {name: [round(float(v), 4) for v in of[i, i + 1 :]] for name, of in cosines.items()}
        where = {name: points[i] for name, points in places.items()}
        yield record("map", task=task.name, skill=known.skill, tier=known.tier, **where, cosines=later)
    pairs = tuple(torch.triu_indices(len(tasks), len(tasks), 1))
    correlation = spearmanr(*(of[pairs].numpy() for of in cosines.values()))
    yield record("correlation", spearman=float(correlation.statistic))


@torch.no_grad()
def wordings(work: Path) -> Record:
    """Percent of held-out descriptions whose nearest task of LEARNABLE is the right one, before anything is trained.

    A task stands at the mean of the descriptions trained on; distances are of embeddings, or behind a task encoder.
    ``"within"``: percent of the variance of embeddings trained on that is between descriptions of one task.
    """
    fit, held = (read_descriptions(folder_of(work, name), plan.LEARNABLE) for name in ("train", "evaluation"))
    config = t2l.TextToLoRA.from_pretrained(work / "t2l").hypernetwork.config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.RUNS["t2l"].settings.seed)
        random, start = TaskEncoder(config), TaskEncoder(config)
    TaskEmbeddings(plan.RUNS["t2l"].settings, list(fit.items()), torch.device("cpu")).initialise(start.linear)
    encoder = TextEncoder.from_pretrained(MINILM)
    trained, asked = ([encoder.encode(texts) for texts in tasks.values()] for tasks in (fit, held))
    whole, *parts = ((rows - rows.mean(dim=0)).square().sum() for rows in (torch.cat(trained), *trained))
    found = {"within": round(100 * float(sum(parts) / whole), 1)}
    right = torch.cat([torch.full((len(rows),), i) for i, rows in enumerate(asked)])
    for name, layer in (("embeddings", nn.Identity()), ("random", random), ("discriminant", start)):
        means = torch.stack([layer(rows).mean(dim=0) for rows in trained])
        nearest = torch.cdist(layer(torch.cat(asked)), means).argmin(dim=1)
        found[name] = round(100 * float((nearest == right).double().mean()), 1)
    return record("wordings", **found)


@torch.no_grad()
def distances(work: Path) -> Iterator[Record]:
    """What reconstruction costs and loses: relative error of B A, parameters of the network, values of the library."""
    library = work / "library-train" / lora.ADAPTERS
    for count in plan.COUNTS:
        engine = t2l.TextToLoRA.from_pretrained(work / f"reconstruction-{count}")
        names = plan.chosen(read_descriptions(library), count)
        oracle = t2l.AdapterStack.from_peft([library / name for name in names], dtype=torch.float32)
        texts = read_descriptions(folder_of(work, "train"), names)
        error = distance(engine.generate([texts[name][0] for name in names]), oracle)
        sizes = {"parameters": engine.hypernetwork.config.num_parameters, "library_values": oracle.num_parameters * count}
        yield record("distance", adapters=count, relative_error=error, **sizes)


def steered(work: Path) -> Iterator[Record]:
    """Answers to inputs that have different ones by description, in one batch; no such description was trained on."""
    model, tokenizer = base_model.load(plan.MODEL, torch.bfloat16)
    engine = t2l.TextToLoRA.from_pretrained(work / "t2l")
    asked = [(text, description) for text, of in WORDINGS["steered"].items() for description in of]
    queries = [Query(engine.prompt(tokenizer, text), description) for text, description in asked]
    answers = answerer(model, tokenizer, 32).ask(queries, Generated(engine))
    for (text, description), answer in zip(asked, answers, strict=True):
        yield record("steered", input=text, description=description, answer=answer.text)


@torch.no_grad()
def requests(work: Path) -> Iterator[Record]:
    """Prompt tokens and seconds of requests one at a time by arm, REQUEST_TOKENS generated each, the fastest of ROUNDS.

    Questions of the siblings; arms take turns.  Adapters are generated and attached before: a server does that once a task.
    """
    model, tokenizer = base_model.load(plan.MODEL, torch.bfloat16)
    names = manifests.read(plan.MANIFEST).names("sibling")
    tasks, pools = (load_tasks(folder_of(work, "evaluation"), split, names=names) for split in ("test", "train"))
    engine = t2l.TextToLoRA.from_pretrained(work / "t2l")
    multi_task = t2l.AdapterStack.from_peft(work / "multi-task-description" / lora.ADAPTERS / lora.MULTI_TASK)
    asked = []
    for i in range(REQUESTS):
        turn, number = divmod(i, len(tasks))
        task, shots = tasks[number], shots_of(tasks[number], pools[number].examples, 0)
        asked.append((number, task.descriptions[0], task.examples[turn].input, shots))
    generated = engine.generate([task.descriptions[0] for task in tasks])
    arms: dict[str, tuple[t2l.AdapterStack | None, list[tuple[int, str]]]] = {
        "t2l": (generated, [(number, engine.prompt(tokenizer, text)) for number, _, text, _ in asked]),
        "multi-task-description": (multi_task, [(0, engine.prompt(tokenizer, text, d)) for _, d, text, _ in asked]),
        "base-description": (None, [(-1, raw_prompt(d, text)) for _, d, text, _ in asked]),
        "icl": (None, [(-1, raw_prompt(d, text, shots)) for _, d, text, shots in asked]),
    }
    limits = {"max_new_tokens": REQUEST_TOKENS, "min_new_tokens": REQUEST_TOKENS, "do_sample": False}
    prompt_tokens, calls = {}, {}
    for arm, (stack, prompts) in arms.items():
        adapted = shared(model)
        handle = t2l.attach(adapted, stack) if stack else None
        batches = [tokenizer(prompt, return_tensors="pt", add_special_tokens=False) for _, prompt in prompts]
        prompt_tokens[arm] = statistics.fmean(batch["input_ids"].shape[1] for batch in batches)
        ask = [functools.partial(adapted.generate, **batch, **limits) for batch in batches]
        calls[arm] = [(handle, number, call) for (number, _), call in zip(prompts, ask, strict=True)]
    best = {arm: [math.inf] * REQUESTS for arm in arms}
    for _ in range(ROUNDS):
        for arm, of in calls.items():
            for i, (handle, number, call) in enumerate(of):
                if handle:
                    handle.set([number])
                best[arm][i] = min(best[arm][i], elapsed_us(call) / 1e6)
    settings = {"requests": REQUESTS, "new_tokens": REQUEST_TOKENS, "rounds": ROUNDS}
    for arm, seconds in best.items():
        yield record("request", arm=arm, **settings, prompt_tokens=prompt_tokens[arm], seconds=statistics.median(seconds))


def _cosines(gram: Tensor) -> Tensor:
    """Of every two vectors, out of their inner products ``[N, N]``."""
    norms = gram.diagonal().sqrt()
    return (gram / (norms[:, None] * norms)).float()


def _tsne(rows: Tensor) -> list[list[float]]:
    """Two coordinates of every row."""
    found = TSNE(perplexity=15, metric="cosine", init="pca", random_state=0).fit_transform(rows.double().numpy())
    return [[round(float(v), 3) for v in point] for point in found]
