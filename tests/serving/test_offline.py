"""vLLM's LLM class with our adapters and kernels: right answers in mixed batches, from few slots, and without weight files.

Every engine is a process of its own (``run_llm``): vLLM keeps state of the whole process.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import t2l_engine as t2l
from t2l_engine.testing import numerics
from t2l_engine.text import packaged
from tests.serving import vllm_process

pytestmark = [pytest.mark.serving, pytest.mark.timeout(0)]
TEXTS = [
    "Return the last element of the comma separated list.",
    "Answer with the simple past of the given verb.",
    "Return the first letter of the word.",
    "Give the antonym of the word.",
]
TOKENS = 12


@pytest.fixture(scope="module")
def run_llm(tmp_path_factory):
    """Factory: what run_llm.py prints for a plan; ``environment`` replaces variables, ``folder`` is the store."""
    store = tmp_path_factory.mktemp("store")

    def run(plan, environment=None, folder=store):
        variables = {"T2L_VLLM_CHECKPOINT": "smollm2-135m-paper", "T2L_VLLM_STORE": str(folder), "T2L_VLLM_MODE": "disk"}
        variables |= environment or {}
        return vllm_process.llm({"texts": TEXTS, "tokens": TOKENS} | plan, variables)

    return run


@pytest.fixture(scope="module")
def prompts():
    """Token ids of five prompts of different lengths."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(100, 40_000, (n,), generator=generator).tolist() for n in (5, 9, 16, 7, 12)]


#: Adapters of the five rows; all of ours are used, so that with two slots every slot is filled.
MIXED = [0, None, 1, None, 1]
FLAGS = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 2, "max_cpu_loras": 2}


@pytest.fixture(scope="module")
def mixed(run_llm, prompts):
    """Our kernels under every linear, in batches whose slots are all full; adapters go round two slots, and come back."""
    calls = [MIXED, [2, 3, None, None, 2], MIXED, [None] * 5]
    return run_llm({"prompts": prompts, "calls": calls, "llm": FLAGS, "logprobs": 20})


def test_base_rows_equal_a_server_without_lora(run_llm, prompts, mixed):
    """Under our wrapper; and an adapter that is scaled, evicted and read again is the same, as are its neighbours."""
    base = run_llm({"prompts": prompts, "calls": [[None] * 5]}, {"T2L_VLLM_CHECKPOINT": "", "T2L_VLLM_KERNELS": "0"})
    assert mixed["wrapper"] == "PunicaWrapperT2L" and mixed["tokens"][2] == mixed["tokens"][0]
    for call, rows in ((0, [1, 3]), (1, [2, 3]), (3, range(5))):
        for row in rows:
            assert mixed["tokens"][call][row] == base["tokens"][0][row]


def test_log_probabilities_are_those_of_transformers(mixed, prompts):
    """Of the first new token: as near to ``attach`` in float64 as ``attach`` in bfloat16 is; another adapter's are not."""
    stack = t2l.TextToLoRA.from_pretrained("smollm2-135m-paper").generate(TEXTS)
    shown = {row: mixed["logprobs"][0][row] for row, adapter in enumerate(MIXED) if adapter is not None}  # the 20 likeliest

    def attached(dtype, adapters):
        model, _ = packaged.load(dtype)
        lora = t2l.attach(model, stack.to(dtype=dtype))
        found = []
        for row, likeliest in shown.items():
            with lora.use(adapters[row]), torch.inference_mode():
                logits = model(torch.tensor([prompts[row]])).logits[0, -1].double()
            found.append(logits.log_softmax(-1)[[int(token) for token in likeliest]])
        return torch.cat(found)

    got = torch.tensor([value for likeliest in shown.values() for value in likeliest.values()], dtype=torch.float64)
    exact = attached(torch.float64, MIXED)
    bound = numerics.logits_bound(exact, attached(torch.bfloat16, MIXED).to(torch.bfloat16))
    assert float((got - exact).norm()) <= bound
    others = attached(torch.float64, [adapter and 0 for adapter in MIXED]), attached(torch.float64, [2] * 5)
    assert all(float((got - other).norm()) > bound for other in others)


def test_memory_mode_gives_the_same_bits(run_llm, prompts, mixed, tmp_path):
    """Workers make the weights from 4 KB folders; nothing else is in the store.  Target modules change only the work."""
    flags = FLAGS | {"lora_target_modules": ["q_proj", "v_proj"]}
    plan = {"prompts": prompts, "calls": [MIXED, [2, 3, None, None, 2], MIXED], "llm": flags, "logprobs": 20}
    made = run_llm(plan, {"T2L_VLLM_MODE": "memory"}, tmp_path)
    assert made["tokens"] == mixed["tokens"][:3] and made["logprobs"] == mixed["logprobs"][:3]
    folders = [folder for folder in tmp_path.iterdir() if folder.is_dir()]
    assert len(folders) == len(TEXTS)
    assert all(sum(file.stat().st_size for file in folder.iterdir()) < 4096 for folder in folders)


def test_program_of_the_page_runs(tmp_path):
    """docs/vllm.md, as it is there, with the default checkpoint."""
    page = Path(__file__).parents[2] / "docs" / "vllm.md"
    (program,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    (tmp_path / "program.py").write_text(program)
    variables = vllm_process.VARIABLES | {"VLLM_CPU_CI_ENV": "1"}  # vLLM's own switch: traces the model, compiles no kernels
    variables |= {"T2L_VLLM_KERNELS": "1", "T2L_VLLM_STORE": str(tmp_path / "store")}
    done = subprocess.run(
        [sys.executable, tmp_path / "program.py"], env=os.environ | variables,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and "late" in done.stdout, done.stderr[-4000:]
