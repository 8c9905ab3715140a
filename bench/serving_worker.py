"""A vLLM engine, or another system, in a process of its own, for :mod:`bench.suites.serving`.

Answers lines of JSON, ``[name, arguments]``: first "load" with the arguments of :class:`Vllm`, or the name of another system
and its arguments, then names of its methods.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Sequence
from typing import Any

Prompts = Sequence[Sequence[int]]
Rows = Sequence[int | None]


class Vllm:
    """vLLM's engine, greedy, without a prefix cache; ``modules``: what it wraps, None: all; an adapter None: the base."""

    def __init__(
        self, model: str, folders: Sequence[str], *,
        lora: bool, modules: list[str] | None, eager: bool, rank: int, dtype: str,
    ):  # fmt: skip
        from vllm import LLM
        from vllm.lora.request import LoRARequest

        self.requests = [LoRARequest(f"adapter-{i}", 1 + i, folder) for i, folder in enumerate(folders)] if lora else []
        options: dict[str, Any] = {}
        if lora:
            options = {"enable_lora": True, "max_loras": len(folders), "max_lora_rank": rank, "lora_target_modules": modules}
        fixed: dict[str, Any] = {"dtype": dtype, "max_model_len": 256, "enable_prefix_caching": False, "seed": 0}
        logits = {"max_logprobs": -1, "logprobs_mode": "raw_logits"}
        self.llm = LLM(model, enforce_eager=eager, disable_log_stats=True, **fixed, **logits, **options)

    def wrapper(self) -> str | None:
        """The class that multiplies with the adapters; None without LoRA."""
        return self.llm.collective_rpc(_wrapper)[0] if self.requests else None

    def _run(self, prompts: Prompts, adapters: Rows, each: Sequence[dict[str, Any]]) -> list[Any]:
        """The answers with the sampling parameters ``each``."""
        from vllm import SamplingParams

        chosen = [None if i is None else self.requests[i] for i in adapters] if self.requests else None
        tokens: Any = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        params = [SamplingParams(temperature=0.0, **of) for of in each]
        return [one.outputs[0] for one in self.llm.generate(tokens, params, lora_request=chosen, use_tqdm=False)]

    def generate(self, prompts: Prompts, adapters: Rows, new: int) -> tuple[float, list[list[int]]]:
        """Seconds, and ``new`` tokens for each prompt."""
        start = time.perf_counter()
        answers = self._run(prompts, adapters, [{"max_tokens": new, "ignore_eos": True}] * len(prompts))
        return time.perf_counter() - start, [list(answer.token_ids) for answer in answers]

    def logits(self, prompts: Prompts, adapters: Rows, rows: Sequence[int]) -> list[list[float]]:
        """``[len(rows), vocabulary]`` after the prompts of ``rows``, with all prompts in one batch."""
        few = {"max_tokens": 1, "detokenize": False}
        answers = self._run(prompts, adapters, [few | {"logprobs": -1 if i in rows else None} for i in range(len(prompts))])
        found = (answers[i].logprobs[0] for i in rows)
        return [[values[token].logprob for token in range(len(values))] for values in found]


def _wrapper(worker: Any) -> str:
    mapping = worker.model_runner.lora_manager._adapter_manager.punica_wrapper_mapping
    return " ".join({type(wrapper).__name__ for wrapper in mapping.values()})


def _made(*, system: str = "", **arguments: Any) -> Any:
    if not system:
        return Vllm(**arguments)
    from bench.serving_systems import SYSTEMS  # not beside vLLM: it imports this package

    return SYSTEMS[system](**arguments)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what else is printed must not be taken for an answer
    server: Any = None
    for line in sys.stdin:
        name, arguments = json.loads(line)
        try:
            if name == "load":
                server, answer = _made(**arguments), None
            else:
                answer = getattr(server, name)(**arguments)
            print(json.dumps({"answer": answer}), file=answers)
        except Exception as error:  # of a baseline is a reason to skip it
            traceback.print_exc()
            first = str(error).strip().partition("\n")[0][:200]
            print(json.dumps({"error": f"{type(error).__name__}: {first}"}), file=answers)


if __name__ == "__main__":
    main()
