"""The probability of each of a few answers, from a server of vLLM or an attached model, and a temperature that fits it.

A score is the log-probability of an option's tokens after the prompt, the sum over tokens.  Options share their first
tokens: what comes before every token is read once.
"""

from __future__ import annotations

import json
import math
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from t2l_engine.lora.handle import LoRAHandle
from t2l_engine.text import choices
from t2l_engine.text.base_model import cache_argument
from t2l_engine.text.prompts import answer_ids, prompt_ids

Tokens = tuple[int, ...]
#: Tokens after the prompt -> token -> its log-probability there.
Read = Mapping[Tokens, Mapping[int, float]]


def choose(
    source: Attached | Server, name: Any, text: str, options: Sequence[str], *, temperature: float = 1.0
) -> dict[str, float]:
    """The probability of each of ``options`` as the answer to the prompt ``text``, given that it is one of them.

    ``softmax(scores / temperature)``, see the module.  An option that begins another counts as the answer's beginning.

    Args:
        source: :class:`Server` or :class:`Attached`.
        name: for a server the name of a model, such as ``t2l:<description>``; for an attached model the index of its
            adapter, -1: the base model.
        text: the whole prompt, as ``engine.prompt(tokenizer, input)`` makes it.
        options: as they go on after the prompt: with a first space after a raw one's "Output:".
        temperature: of :func:`fit_temperature`.

    Raises:
        ValueError: fewer than two options, equal ones or one without tokens; a temperature that is not positive; or an
            answer of the server that is none.
        OSError: no server answers.
    """
    if isinstance(options, str) or len(set(options)) < max(2, len(options)):
        raise ValueError(f"options: expected two or more different texts, got {options!r}")
    if not temperature > 0:
        raise ValueError(f"temperature: expected a positive number, got {temperature}")
    prompt, paths = source.tokens(name, text, options)
    if not all(paths) or len({*paths}) < len(paths):
        raise ValueError(f"options: expected different tokens for each, got {dict(zip(options, paths, strict=True))}")
    after = sorted({path[:i] for path in paths for i in range(len(path))}, key=lambda node: (len(node), node))
    found = source.read(name, prompt, after, sorted({token for path in paths for token in path}))
    scores = [math.fsum(found[path[:i]][token] for i, token in enumerate(path)) for path in paths]
    return dict(zip(options, choices.softmax(scores, temperature), strict=True))


def fit_temperature(labelled: Iterable[tuple[Mapping[str, float], str]]) -> float:
    """The temperature of :func:`.choices.fit_temperature` for pairs of what :func:`choose` gave at 1, and the right option.

    ValueError for none, or an option that is not among them.
    """
    rows = []
    for probabilities, right in labelled:
        if right not in probabilities:
            raise ValueError(f"labelled: expected one of {list(probabilities)} as the right option, got {right!r}")
        rows.append(([math.log(max(p, 1e-300)) for p in probabilities.values()], [*probabilities].index(right)))
    return choices.fit_temperature(rows)


class Attached:
    """A model with adapters, and its tokenizer."""

    def __init__(self, lora: LoRAHandle, model: torch.nn.Module, tokenizer: Any):
        self.lora, self.model, self.tokenizer = lora, model, tokenizer

    def tokens(self, name: int, prompt: str, options: Sequence[str]) -> tuple[list[int], list[Tokens]]:
        """The tokens of a prompt, and those of each option after it."""
        return prompt_ids(self.tokenizer, [prompt])[0], [tuple(answer_ids(self.tokenizer, option)) for option in options]

    @torch.inference_mode()
    def read(self, name: int, prompt: list[int], after: Sequence[Tokens], wanted: list[int]) -> Read:
        """Log-probabilities of the tokens ``wanted`` after the prompt and each of ``after``, of which the first is ()."""
        with self.lora.use(name):
            first = self.model(input_ids=self._row([prompt]), use_cache=True, logits_to_keep=1)
            found, cache = [first.logits[:, -1]], first.past_key_values
            for node in after[1:]:
                reads = cache_argument(self.model, cache) | {"use_cache": True, "logits_to_keep": 1}
                found.append(self.model(input_ids=self._row([node]), **reads).logits[:, -1])
                cache.crop(-len(node))
        logs = torch.cat(found).float().log_softmax(-1)[:, wanted].tolist()
        return {node: dict(zip(wanted, row, strict=True)) for node, row in zip(after, logs, strict=True)}

    def _row(self, ids: Any) -> torch.Tensor:
        return torch.tensor(ids, device=self.model.get_input_embeddings().weight.device)


class Server:
    """A server of vLLM at ``url``, such as ``http://127.0.0.1:8000``; ``key``: of --api-key."""

    def __init__(self, url: str, key: str = ""):
        self.url, self.headers = url.rstrip("/"), {"Content-Type": "application/json"}
        self.headers |= {"Authorization": f"Bearer {key}"} if key else {}

    def tokens(self, name: str, prompt: str, options: Sequence[str]) -> tuple[list[int], list[Tokens]]:
        """As :meth:`Attached.tokens`."""
        whole = self._ask("/tokenize", model=name, prompt=prompt)["tokens"]
        paths = []
        for option in options:  # as the prompt goes on, unless the last token of the prompt becomes another one
            ids = self._ask("/tokenize", model=name, prompt=prompt + option)["tokens"]
            if ids[: len(whole)] != whole:
                ids = whole + self._ask("/tokenize", model=name, prompt=option, add_special_tokens=False)["tokens"]
            paths.append(tuple(ids[len(whole) :]))
        return whole, paths

    def read(self, name: str, prompt: list[int], after: Sequence[Tokens], wanted: list[int]) -> Read:
        """As :meth:`Attached.read`."""
        read: dict[str, Any] = {"model": name, "max_tokens": 1, "temperature": 0, "return_tokens_as_token_ids": True}
        read |= {"logprobs": 0, "logprob_token_ids": wanted}
        answer = self._ask("/v1/completions", prompt=[[*prompt, *node] for node in after], **read)
        tops = [choice["logprobs"]["top_logprobs"][0] for choice in sorted(answer["choices"], key=lambda one: one["index"])]
        return {n: {t: top[f"token_id:{t}"] for t in wanted} for n, top in zip(after, tops, strict=True)}

    def _ask(self, path: str, **body: Any) -> Any:
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), self.headers)
        try:
            with urllib.request.urlopen(request) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")
            raise ValueError(f"{path}: expected an answer of {self.url}, got status {error.code}: {text[:500]}") from None
