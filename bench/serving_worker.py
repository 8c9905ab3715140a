"""One way to serve, in a process of its own, for :mod:`bench.suites.serving`: loads a model, generates when it is told to.

Reads a command as a line of JSON and answers with one: ``load`` (the fields of :class:`Vllm`), ``generate`` and ``logits``
(prompts as token ids, the adapter of every row or null).  The end of its input ends it; what else is printed goes to
standard error.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Prompts = Sequence[Sequence[int]]
Rows = Sequence[int | None]


class Vllm:
    """vLLM's engine in this process, without a prefix cache; ``modules``: what it wraps, None: every layer it can.

    Rows are decoded greedily; ``adapters``: of every row, None: the base model.
    """

    def __init__(self, model: str, folders: Sequence[str], *, lora: bool, modules: list[str] | None, eager: bool, rank: int):
        from vllm import LLM
        from vllm.lora.request import LoRARequest

        self.requests = [LoRARequest(f"adapter-{i}", 1 + i, folder) for i, folder in enumerate(folders)] if lora else []
        options: dict[str, Any] = {}
        if lora:
            options = {"enable_lora": True, "max_loras": len(folders), "max_lora_rank": rank, "lora_target_modules": modules}
        fixed = {"dtype": "bfloat16", "max_model_len": 256, "enable_prefix_caching": False, "seed": 0}
        logits = {"max_logprobs": -1, "logprobs_mode": "raw_logits"}
        self.llm = LLM(model, enforce_eager=eager, disable_log_stats=True, **fixed, **logits, **options)

    def wrapper(self) -> str | None:
        """The class that multiplies with the adapters; None without LoRA."""
        return self.llm.collective_rpc(_wrapper)[0] if self.requests else None

    def _run(self, prompts: Prompts, adapters: Rows, params: Any) -> list[Any]:
        chosen = [None if i is None else self.requests[i] for i in adapters] if self.requests else None
        tokens: Any = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        return self.llm.generate(tokens, params, lora_request=chosen, use_tqdm=False)

    def generate(self, prompts: Prompts, adapters: Rows, new: int) -> list[list[int]]:
        """``new`` tokens for each prompt."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True)
        return [list(one.outputs[0].token_ids) for one in self._run(prompts, adapters, params)]

    def logits(self, prompts: Prompts, adapters: Rows, rows: Sequence[int]) -> Tensor:
        """``[len(rows), vocabulary]`` after the prompts of ``rows``, with all prompts in one batch."""
        from vllm import SamplingParams

        few = {"temperature": 0.0, "max_tokens": 1, "detokenize": False}
        params = [SamplingParams(logprobs=-1 if i in rows else None, **few) for i in range(len(prompts))]
        outputs = self._run(prompts, adapters, params)
        found = []
        for i in rows:
            (values,) = outputs[i].outputs[0].logprobs
            found.append(torch.tensor([values[token].logprob for token in range(len(values))]))
        return torch.stack(found)


def _wrapper(worker: Any) -> str:
    mapping = worker.model_runner.lora_manager._adapter_manager.punica_wrapper_mapping
    return " ".join({type(wrapper).__name__ for wrapper in mapping.values()})


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what else is printed must not be taken for an answer
    server: Any = None
    for line in sys.stdin:
        asked = json.loads(line)
        todo, given = asked.pop("do"), asked
        try:
            if todo == "load":
                server = Vllm(**given)
                answer = {"wrapper": server.wrapper()}
            elif todo == "generate":
                start = time.perf_counter()
                tokens = server.generate(**given)
                answer = {"seconds": time.perf_counter() - start, "tokens": tokens}
            else:
                torch.save(server.logits(given["prompts"], given["adapters"], given["rows"]), given["path"])
                answer = {}
        except Exception as error:  # of a baseline is a reason to skip it
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"}
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main()
