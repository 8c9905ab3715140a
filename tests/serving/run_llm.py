"""One engine of vLLM: ``python run_llm.py PLAN``, a JSON object; prints the answers as one.

PLAN: ``prompts``, lists of token ids; ``calls``, for each call an adapter a prompt, an index in ``texts`` or null; ``llm``,
arguments of LLM; ``tokens``; ``logprobs`` of the first new token, 0: none; ``model``: the folder, by default SmolLM2;
``folders``: of PEFT adapters, before those of ``texts``; ``refused``: of PEFT adapters that are to be refused before.
A call of fewer adapters has the first prompts.  ``frames``: functions that torch has compiled, after each call.
"""

import json
import sys

from torch._dynamo.utils import counters
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

import t2l_engine as t2l
from t2l_engine.serving.vllm.offline import lora_requests
from t2l_engine.text import packaged


def main(plan):
    model = plan.get("model") or str(packaged.convert())
    options = {"dtype": "bfloat16", "enforce_eager": True, "max_model_len": 128, "enable_prefix_caching": False, "seed": 0}
    llm = LLM(model, **options | plan.get("llm", {}))
    used = any(adapter is not None for call in plan["calls"] for adapter in call)
    requests, made = [], {"tokens": [], "logprobs": [], "wrapper": None, "refused": [], "frames": []}
    for i, folder in enumerate(plan.get("folders", ())):
        requests.append(LoRARequest(f"adapter-{i}", i + 1, folder))
    if used and "texts" in plan:
        engine = t2l.TextToLoRA.from_pretrained(plan.get("checkpoint", "smollm2-135m-paper"))
        requests += lora_requests(engine, plan["texts"], model)
    for i, folder in enumerate(plan.get("refused", ())):
        made["refused"].append(_refusal(llm, LoRARequest(f"refused-{i}", 1000 + i, folder)))
    logprobs = plan.get("logprobs") or None
    sampling = SamplingParams(temperature=0, max_tokens=plan["tokens"], ignore_eos=True, logprobs=logprobs)
    prompts = [{"prompt_token_ids": tokens} for tokens in plan["prompts"]]
    for call in plan["calls"]:
        chosen = [None if adapter is None else requests[adapter] for adapter in call]
        outputs = llm.generate(prompts[: len(call)], sampling, lora_request=chosen if used else None, use_tqdm=False)
        made["tokens"].append([list(output.outputs[0].token_ids) for output in outputs])
        made["frames"].append(counters["frames"]["total"])
        if logprobs:
            first = [output.outputs[0].logprobs[0] for output in outputs]
            made["logprobs"].append([{token: value.logprob for token, value in row.items()} for row in first])
    if plan.get("llm", {}).get("enable_lora"):
        made["wrapper"] = llm.collective_rpc(_wrapper)[0]
    print(json.dumps(made))


def _refusal(llm, request):
    """What is said of an adapter; empty where it is taken."""
    try:
        llm.llm_engine.add_lora(request)
    except ValueError as error:
        return str(error)
    return ""


def _wrapper(worker):
    """Class of the wrapper under the layers of a worker."""
    manager = worker.model_runner.lora_manager._adapter_manager
    return type(next(iter(manager.punica_wrapper_mapping.values()))).__name__


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
