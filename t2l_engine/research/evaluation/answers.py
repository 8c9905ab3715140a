"""Answers of a language model to prompts with an adapter each: batched over adapters, cached on disk.

Batches are a function of the queries alone: a resumed run computes missing answers in the same batches as an uninterrupted
one, since rounding depends on a batch's shape.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import inspect
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from t2l_engine.files.errors import ConfigError
from t2l_engine.text.base_model import cache_argument
from t2l_engine.text.prompts import answer_ids, continuation, prompt_ids

#: Tokens that verified prompts have in common, and prompts of a batch, from which their common prefix is computed once.
SHARED, FEWEST_SHARED = 16, 4

Use = Callable[[Sequence[str]], AbstractContextManager[Any]]  # keys -> context in which row i uses the adapter keys[i]


class Adapters(Protocol):
    """The adapters of a method, by key."""

    #: Digest of the adapters: equal identities give equal adapters for equal keys.
    identity: str

    def on(self, model: nn.Module) -> AbstractContextManager[Use]:
        """A context in which ``model`` can use the adapters; restores the model at its end."""


@dataclasses.dataclass(frozen=True)
class Query:
    """A prompt with the key of its adapter.

    Asks for a generated answer; or for the log-likelihood of each of ``options``; or whether greedy decoding gives one of
    the texts ``accepted``, in one pass instead of one per token.  Options and texts continue the prompt as they are.

    ``max_new_tokens``: of a generated answer; ``one_line``: cut it at its first line break.
    """

    prompt: str
    adapter: str = ""
    options: tuple[str, ...] = ()
    max_new_tokens: int = 16
    one_line: bool = True
    accepted: tuple[str, ...] = ()


#: Text of an answer that is not accepted; differs from every text, also from the empty one.
NOT_ACCEPTED = "\0"


@dataclasses.dataclass(frozen=True)
class Answer:
    """``text``: that was generated, or the accepted one that decoding gives, or NOT_ACCEPTED; ``likelihoods``: of options.

    ``prompt_tokens``: length of the prompt.
    """

    text: str
    likelihoods: tuple[float, ...]
    prompt_tokens: int


class Store:
    """Batches of answers by key, in memory and, with ``path``, in a JSON Lines file that is appended to.

    Drops an incomplete last line.  Raises ConfigError for a file of another format.
    """

    def __init__(self, path: Path | None = None):
        self._path, self._batches = path, {}
        lines = path.read_bytes().splitlines(keepends=True) if path is not None and path.exists() else []
        for number, line in enumerate(lines, start=1):
            started = b'{"key": "%s", "answers": [' % line[9:].partition(b'"')[0]  # as :meth:`put` writes
            if number == len(lines) and not line.endswith(b"\n") and line[: len(started)] == started[: len(line)]:
                os.truncate(path, sum(map(len, lines[:-1])))
                break
            try:
                row = json.loads(line)
                self._batches[row["key"]] = [
                    Answer(a["text"], tuple(a["likelihoods"]), a["prompt_tokens"]) for a in row["answers"]
                ]
            except (ValueError, KeyError, TypeError, RecursionError):
                raise ConfigError(f"{path}:{number}: expected a batch of answers that an evaluation wrote") from None

    def get(self, key: str) -> list[Answer] | None:
        return self._batches.get(key)

    def put(self, key: str, answers: list[Answer]) -> None:
        self._batches[key] = answers
        if self._path is not None:
            with self._path.open("ab") as file:
                file.write((json.dumps({"key": key, "answers": [dataclasses.asdict(a) for a in answers]}) + "\n").encode())


class Answerer:
    """Answers queries with ``model`` in batches of up to ``batch_size`` rows.

    Args:
        model: a transformers causal LM in eval mode.
        tokenizer: of the model, padding on the left.
        identity: of the model and its dtype, part of the keys of ``store``.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, *, identity: str, store: Store, batch_size: int):
        self._model, self._tokenizer, self._identity = model, tokenizer, identity
        self._store, self._batch_size = store, batch_size

    @torch.no_grad()
    def ask(
        self, queries: Sequence[Query], adapters: Adapters | None, progress: Callable[[int], None] = lambda count: None
    ) -> list[Answer]:
        """The answer to every query; ``adapters`` None: of the base model.  ``progress``: called with each batch's size."""
        results: list[Answer | None] = [None] * len(queries)
        prompts = prompt_ids(self._tokenizer, [q.prompt for q in queries])
        with contextlib.ExitStack() as stack:
            # Adapters are entered only if an answer is missing.
            use: Use | None = (lambda keys: contextlib.nullcontext()) if adapters is None else None
            for indices in self._batches(queries, prompts):
                batch = [queries[i] for i in indices]
                key = self._key(batch, adapters)
                answers = self._store.get(key)
                if answers is None or len(answers) != len(batch):
                    use = use or stack.enter_context(adapters.on(self._model))
                    answers = self._answers(batch, [prompts[i] for i in indices], use)
                    self._store.put(key, answers)
                for i, answer in zip(indices, answers, strict=True):
                    results[i] = answer
                progress(len(indices))
        return results

    def _batches(self, queries: Sequence[Query], prompts: Sequence[list[int]]) -> Iterator[list[int]]:
        """Indices of the queries of each batch: of one kind, in order of prompt length.

        Queries with accepted texts, one adapter and the first SHARED tokens in common make batches of their own, whose
        common prefix is computed once.
        """
        starts = [(q.adapter, *p[:SHARED]) for q, p in zip(queries, prompts, strict=True)]
        counts = Counter(start for q, start in zip(queries, starts, strict=True) if q.accepted)

        def kind(i: int) -> tuple:
            q, start = queries[i], starts[i]
            alike = q.accepted and len(start) > SHARED and counts[start] >= FEWEST_SHARED
            return bool(q.options), bool(q.accepted), q.max_new_tokens, q.one_line, start if alike else ()

        batch: list[int] = []
        rows = 0
        for i in sorted(range(len(queries)), key=lambda i: (*kind(i), len(prompts[i]))):
            needed = max(1, len(queries[i].options), len(queries[i].accepted))
            if batch and (rows + needed > self._batch_size or kind(i) != kind(batch[0])):
                yield batch
                batch, rows = [], 0
            batch.append(i)
            rows += needed
        if batch:
            yield batch

    def _key(self, queries: Sequence[Query], adapters: Adapters | None) -> str:
        content = [self._identity, adapters.identity if adapters else "", *(dataclasses.astuple(q) for q in queries)]
        return hashlib.sha256(json.dumps(content).encode("utf-8", "surrogatepass")).hexdigest()

    def _answers(self, queries: Sequence[Query], prompts: list[list[int]], use: Use) -> list[Answer]:
        if queries[0].options or queries[0].accepted:
            found = self._logits(queries, prompts, use)
            results = [self._judged(q, found) for q in queries]
        else:
            results = [(text, ()) for text in self._generate(queries, prompts, use)]
        return [Answer(*result, len(prompt)) for result, prompt in zip(results, prompts, strict=True)]

    def _generate(self, queries: Sequence[Query], prompts: list[list[int]], use: Use) -> list[str]:
        batch = self._padded(prompts)
        with use([q.adapter for q in queries]):
            out = self._model.generate(
                **batch,
                max_new_tokens=queries[0].max_new_tokens,
                do_sample=False,
                pad_token_id=self._tokenizer.pad_token_id,
            )
        rows = out[:, batch["input_ids"].shape[1] :].tolist()
        texts = [continuation(self._tokenizer, q.prompt, ids) for q, ids in zip(queries, rows, strict=True)]
        return [text.strip().split("\n")[0] if q.one_line else text for q, text in zip(queries, texts, strict=True)]

    def _padded(self, rows: list[list[int]]) -> Any:
        return self._tokenizer.pad({"input_ids": rows}, padding=True, return_tensors="pt").to(self._model.device)

    def _judged(self, query: Query, found: Iterator[tuple[Tensor, list[int]]]) -> tuple[str, tuple[float, ...]]:
        """``text`` and ``likelihoods`` of an answer from the next logits of ``found``, one for each text of ``query``."""
        if query.options:
            return "", tuple(_log_likelihood(*next(found)) for _ in query.options)
        decoded = NOT_ACCEPTED
        for text in query.accepted:
            row, answer = next(found)
            *chosen, last = row.argmax(dim=-1).tolist()
            if chosen == answer and last in self._ends:
                decoded = text.strip()
        return decoded, ()

    @functools.cached_property
    def _ends(self) -> set[int]:
        """Ids of tokens after which no more of a line comes."""
        vocabulary = range(len(self._tokenizer))
        decoded = self._tokenizer.batch_decode([[i] for i in vocabulary])
        ends = self._model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends, self._tokenizer.eos_token_id]
        return {*ends, *(i for i, text in zip(vocabulary, decoded, strict=True) if text.lstrip(" ").startswith("\n"))}

    def _logits(self, queries: Sequence[Query], prompts: list[list[int]], use: Use) -> Iterator[tuple[Tensor, list[int]]]:
        """For each option or accepted text of each query, logits ``[tokens + 1, vocabulary]`` and its tokens.

        Row i of the logits is before token i, the last one after the text.
        """
        texts = [(q.adapter, p, text) for q, p in zip(queries, prompts, strict=True) for text in q.options or q.accepted]
        keys = [adapter for adapter, _, _ in texts]
        answers = [answer_ids(self._tokenizer, text) for _, _, text in texts]
        rows = [prompt + answer for (_, prompt, _), answer in zip(texts, answers, strict=True)]
        common = 0
        if queries[0].accepted and len(rows) >= FEWEST_SHARED and len(set(keys)) == 1:
            common = len(os.path.commonprefix(prompts))
            common = min(common, min(map(len, prompts)) - 1) if common >= SHARED else 0
        batch = self._padded([row[common:] for row in rows])
        ids, mask, options = batch["input_ids"], batch["attention_mask"], {}
        if "position_ids" in inspect.signature(self._model.forward).parameters:  # otherwise GPT-2 would count padding
            options["position_ids"] = (mask.cumsum(dim=1) - 1).clamp_min(0) + common
        with use(keys[:1] if common else keys):  # one id is for every row, also for the prefix alone
            if common:
                prefix = torch.tensor([rows[0][:common]], device=ids.device)
                cache = self._model(input_ids=prefix, use_cache=True, logits_to_keep=1).past_key_values
                cache.batch_repeat_interleave(len(rows))
                options |= cache_argument(self._model, cache)
                mask = torch.cat((mask.new_ones(len(rows), common), mask), dim=1)
            options |= {"use_cache": bool(common), "logits_to_keep": max(map(len, answers)) + 1}
            logits = self._model(input_ids=ids, attention_mask=mask, **options).logits
        for row, answer in zip(logits, answers, strict=True):  # row by row, to bound the memory of float32 logits
            yield row[-len(answer) - 1 :], answer


def _log_likelihood(logits: Tensor, answer: list[int]) -> float:
    """The sum over the tokens of ``answer``."""
    chosen = torch.tensor(answer, device=logits.device)
    return -float(nn.functional.cross_entropy(logits[:-1].float(), chosen, reduction="sum"))
