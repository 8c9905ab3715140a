"""Many adapters in one batch inside vLLM on a CPU: its own LoRA kernels, ours in their place, and none at all.

Every way is a process of its own (:mod:`bench.serving_worker`), which waits while another generates: all in one order, then
in the other.  Before, first-token logits are held to the float64 model, and rows without an adapter to vLLM without LoRA.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import os
import shutil
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import t2l_engine as t2l
from bench import harness, models
from bench.ceilings import resident_bytes
from bench.compare import Process
from bench.harness import OURS, BenchError, Context, Error, Record, Target, Task, VerificationError, record, row
from bench.records import BASE, COMPILED, ROOT
from bench.serving_methods import FULL, METHODS, TINY, Case, Load, sentences
from bench.suites import serving_life
from bench.timing import Timing, tolerant
from t2l_engine.text import dtypes, packaged

#: Rows whose logits are verified, the first ones that have an adapter.
CHECKED = 8
#: Two likely tokens may be nearer than the dtype tells apart.
MOST_WRONG = 0.25
MEASURE = "logits against float64, root mean square over rows of error / bound"
WRAPPER = "PunicaWrapperT2L"
NO_VLLM = "serving: vllm is not installed for this Python; run: make serve && .venv-serve/bin/python -m bench serving"


def plan(context: Context) -> list[Task]:
    context.only("cpu", "serving")
    if importlib.util.find_spec("vllm") is None:
        raise BenchError(NO_VLLM)
    loads = FULL if context.full else TINY
    return [*(Task.of(load.name, measured, context, load) for load in loads), *serving_life.tasks(context)]


def measured(context: Context, load: Load) -> Iterator[Record]:
    """The rows and methods of all cases of a load, whose processes are started anew a few times."""
    with tempfile.TemporaryDirectory(prefix="t2l-serving-") as scratch:
        inputs = Inputs.of(Path(scratch), load)
        cases = [Measured(case, load.tokens) for case in load.cases]
        skipped: dict[str, str] = {}
        for start in range(load.starts):
            with contextlib.ExitStack() as stack:
                servers = {}
                wanted = {name for case in load.cases for name in case.methods} - skipped.keys()
                for name in (name for name in METHODS if name in wanted):
                    with tolerant(_as(name), skipped):
                        servers[name] = stack.enter_context(contextlib.closing(Server(name, context.threads, inputs)))
                if start == 0:
                    skipped |= _verified(inputs, cases, servers, Oracle(inputs))
                for one in cases:
                    mine = {n: servers[n] for n in one.case.methods if n in servers and n not in skipped}
                    one.time(mine, inputs, load.passes)
        for one in cases:
            yield from one.records(context, {n: why for n, why in skipped.items() if n in one.case.methods}, inputs)


def _as(name: str) -> str:
    """How a method is judged: ours and what the others are compared with may not fail, baselines are then left out."""
    return OURS if METHODS[name].kernels or name in (BASE, COMPILED) else name


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Adapters of sentences, their PEFT folders, and prompts at random; ``dtype``: of the model, as servers choose it."""

    scratch: Path
    stack: t2l.AdapterStack
    folders: tuple[str, ...]
    prompts: Tensor  # [requests, prompt]
    eager: bool
    dtype: torch.dtype = dataclasses.field(default_factory=dtypes.preferred)

    @staticmethod
    def of(scratch: Path, load: Load) -> Inputs:
        engine = t2l.TextToLoRA.from_pretrained(packaged.LANGUAGE_MODEL)
        stack = engine.generate(sentences(load.adapters))
        folders = [scratch / f"adapter-{i}" for i in range(load.adapters)]
        for i, folder in enumerate(folders):
            stack.save_pretrained(folder, adapter=i)
        most = max(case.requests for case in load.cases)
        prompts = torch.randint(5, 40_000, (most, load.tokens), generator=torch.Generator().manual_seed(0))
        return Inputs(scratch, stack, tuple(map(str, folders)), prompts, load.eager)

    @functools.cached_property
    def merged(self) -> Path:
        """Folder of the model with adapter 0 in its weights."""
        folder = self.scratch / "merged"
        shutil.copytree(packaged.convert(), folder)
        models.merged(packaged.load(self.dtype)[0], self.stack, 0).save_pretrained(folder)
        return folder

    @property
    def modules(self) -> list[str]:
        return [*self.stack.lora_A]

    @functools.cached_property
    def rank(self) -> int:
        return next(iter(self.stack.lora_A.values())).shape[2]


class Server(Process):
    """The process of a method, with its model loaded; BenchError where that fails or vLLM multiplies by other kernels."""

    def __init__(self, name: str, threads: int, inputs: Inputs):
        method = METHODS[name]
        without = ("T2L_VLLM_", "VLLM_PLUGINS", "OMP_NUM_THREADS")  # vLLM counts threads by the CPUs that it is bound to
        environment = {key: value for key, value in os.environ.items() if not key.startswith(without)}
        environment |= {
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0))[:threads])),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
            **({"T2L_VLLM_KERNELS": "1"} if method.kernels else {}),
        }
        super().__init__(name, [sys.executable, "-m", "bench.serving_worker"], ROOT, environment)
        try:
            if not method.vllm:
                self._call("load", system=name, folders=inputs.folders, threads=threads)
                return
            model = str(inputs.merged if method.merged else packaged.convert())
            given = {
                "lora": method.lora,
                "modules": inputs.modules if method.targets else None,
                "eager": method.eager or inputs.eager,
                "dtype": str(inputs.dtype).removeprefix("torch."),
            }
            self._call("load", model=model, folders=inputs.folders, rank=inputs.rank, **given)
            wrapper = self._call("wrapper")
            if method.lora and (wrapper == WRAPPER) != method.kernels:
                expected = f"{WRAPPER}, by the plugin of an installed t2l_engine" if method.kernels else "vLLM's own kernels"
                raise BenchError(f"{name}: expected {expected}; got {wrapper}")
        except BaseException:
            self.close()
            raise

    def _call(self, method: str, **arguments: Any) -> Any:
        answer = self.ask([method, arguments])
        if "error" in answer:
            raise BenchError(f"{self.name}: {answer['error']}")
        return answer["answer"]

    def generate(self, case: Case, inputs: Inputs, new: int, **options: bool) -> tuple[float, list[list[int]], float]:
        """Seconds, the tokens of every row, and MiB that the process then holds."""
        prompts, rows = inputs.prompts[: case.requests].tolist(), case.rows(self.name)
        seconds, tokens = self._call("generate", prompts=prompts, adapters=rows, new=new, **options)
        return seconds, tokens, resident_bytes("VmRSS", self._process.pid) / 2**20

    def logits(self, case: Case, inputs: Inputs, rows: Sequence[int]) -> Tensor:
        prompts = inputs.prompts[: case.requests].tolist()
        return torch.tensor(self._call("logits", prompts=prompts, adapters=case.rows(self.name), rows=rows))


# --- verification ----------------------------------------------------------------------------------------------------


class Oracle:
    """Logits after a prompt from the float64 model, and from one in the dtype, with an adapter merged by hand."""

    def __init__(self, inputs: Inputs):
        self.inputs = inputs
        self.other: nn.Module = packaged.load(inputs.dtype)[0]
        self.wide: nn.Module = packaged.load(torch.float32)[0].double()

    @functools.cache  # noqa: B019  # an oracle lives as long as its logits
    def __call__(self, request: int, adapter: int | None) -> tuple[Tensor, Tensor]:
        tokens = self.inputs.prompts[request : request + 1]
        stack = None if adapter is None else self.inputs.stack
        ids = [adapter or 0]
        with torch.inference_mode():
            exact, other = (models.exact_logits(m, stack, tokens, ids)["decode"][0] for m in (self.wide, self.other))
        return exact, other

    def error(self, got: Tensor, requests: Sequence[int], adapters: Sequence[int | None]) -> Error:
        """Over the rows the root mean square of error / bound: some amplify rounding ten times as others do."""
        shares = []
        for logits, request, adapter in zip(got, requests, adapters, strict=True):
            exact, other = self(request, adapter)
            of = harness.logits_error(logits.to(other.dtype), exact, other)
            shares.append(of.value / of.bound)
        return Error(float(torch.tensor(shares).square().mean().sqrt()), 1.0, MEASURE)

    def wrong(self, got: Sequence[Sequence[int]], adapters: Sequence[int | None]) -> Error:
        """Of systems that give no logits: the share of rows whose first token is not the float64 model's."""
        likeliest = [int(self(i, adapter)[0].argmax()) for i, adapter in enumerate(adapters)]
        wrong = sum(tokens[0] != right for tokens, right in zip(got, likeliest, strict=True))
        return Error(wrong / len(adapters), MOST_WRONG, "share of rows with another first token than float64")


def _verified(inputs: Inputs, cases: Iterable[Measured], servers: Mapping[str, Server], oracle: Oracle) -> dict[str, str]:
    """Fill in the errors of all methods; the baselines that are wrong, and why.  Raises VerificationError where ours is."""
    skipped: dict[str, str] = {}
    for one in cases:
        for name in (name for name in one.case.methods if name in servers):
            error = _error_of_logits if METHODS[name].vllm else _error_of_tokens
            with tolerant(_as(name), skipped):
                one.errors[name] = error(one, servers[name], inputs, oracle)
                skipped |= harness.verify(f"{one.case.name}, {name}", {_as(name): None}, {_as(name): one.errors[name]})[1]
    return skipped


def _error_of_logits(one: Measured, server: Server, inputs: Inputs, oracle: Oracle) -> Error:
    rows = one.case.rows(server.name)
    checked = [i for i, adapter in enumerate(rows) if adapter is not None] or list(range(len(rows)))
    checked = checked[:CHECKED]
    got = server.logits(one.case, inputs, checked)
    others = [rows[i] for i in (*checked[1:], checked[0])]
    if len(set(others)) > 1 and (control := oracle.error(got, checked, others)).value <= control.bound:
        raise BenchError(f"{one.case.name}, {server.name}: logits do not tell the adapters of two rows apart")
    return oracle.error(got, checked, [rows[i] for i in checked])


def _error_of_tokens(one: Measured, server: Server, inputs: Inputs, oracle: Oracle) -> Error:
    """Also finds whether the rows are right in one batch."""
    rows = one.case.rows(server.name)
    together = oracle.wrong(server.generate(one.case, inputs, 1, together=True)[1], rows)
    one.together[server.name] = together.value <= together.bound
    return oracle.wrong(server.generate(one.case, inputs, 1)[1], rows)


# --- timing ----------------------------------------------------------------------------------------------------------


class Measured:
    """What is known of a case: by method the error, seconds of calls, seconds a step, memory, and rows as without LoRA."""

    def __init__(self, case: Case, new: int):
        self.case, self.new = case, new
        self.errors: dict[str, Error] = {}
        self.together: dict[str, bool] = {}  # whether all rows are right that are given in one batch
        self.seconds, self.steps, self.rss_mib, self.alike = (defaultdict[str, list](list) for _ in range(4))

    def time(self, servers: Mapping[str, Server], inputs: Inputs, passes: int) -> None:
        """An untimed call of every method, whose tokens are compared, then passes in each order, one with shorter calls."""
        tokens = {name: server.generate(self.case, inputs, self.new)[1] for name, server in servers.items()}
        for name in servers:
            plain = [i for i, adapter in enumerate(self.case.rows(name)) if adapter is None and METHODS[name].vllm]
            alike = [tokens[name][i] == tokens[METHODS[name].reference][i] for i in plain]
            self.alike[name] += alike
            # Around an embedding's own op the compiler sums the first norm in another order: rounding, not an adapter.
            if METHODS[name].kernels and METHODS[name].targets and not all(alike):
                what = f"{alike.count(False)} of {len(plain)} rows without an adapter have other tokens than without LoRA"
                raise VerificationError(f"{self.case.name}, {name}: {what}")
        for _ in range(passes):
            for name in servers:
                half, whole = (self._timed(servers[name], inputs, new) for new in (self.new // 2, self.new))
                self.steps[name].append((whole - half) / (self.new - self.new // 2))
                self.seconds[name].append(whole)
            for name in reversed(servers):
                self.seconds[name].append(self._timed(servers[name], inputs, self.new))

    def _timed(self, server: Server, inputs: Inputs, new: int) -> float:
        seconds, _, rss_mib = server.generate(self.case, inputs, new)
        self.rss_mib[server.name].append(rss_mib)
        return seconds

    def records(self, context: Context, skipped: Mapping[str, str], inputs: Inputs) -> Iterator[Record]:
        """The row, and what else is known of each method."""
        seconds = {name: self.seconds[name] for name in self.case.methods if name not in skipped}
        timings = {name: Timing.of([1e6 * one for one in of]) for name, of in seconds.items()}
        shape = {"model": "SmolLM2-135M", "dtype": str(inputs.dtype).removeprefix("torch.")}
        shape |= {"requests": self.case.requests}
        shape |= {"adapters": len({i for i in self.case.rows(OURS) if i is not None}), "prompt": inputs.prompts.shape[1]}
        of_one = sum(side[name][0].numel() for side in (inputs.stack.lora_A, inputs.stack.lora_B) for name in side)
        shape |= {"adapter_bytes": of_one * inputs.dtype.itemsize}
        shape |= {"new": self.new, "modules": ",".join(inputs.modules), "rank": inputs.rank, "slots": len(inputs.folders)}
        target = Target(*self.case.target) if self.case.target else None
        error = self.errors[OURS]
        yield row(context, self.case.name, "serving", shape, timings, error, skipped=skipped, target=target)
        for name in timings:
            step_us, rss_mib = 1e6 * statistics.median(self.steps[name]), max(self.rss_mib[name])
            known = {"step_us": round(step_us, 1), "rss_mib": round(rss_mib, 1)}
            known |= {"plain_rows": len(self.alike[name]), "plain_rows_alike": sum(self.alike[name])}
            known |= {"one_batch": self.together[name]} if name in self.together else {}
            yield record("arm", case=self.case.name, arm=name, **known)
