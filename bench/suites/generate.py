"""Generating adapters: whole hypernetworks, memory, what bfloat16 weights cost; on a card cold, beside torch and cuBLAS."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from bench import baselines
from bench.baselines import Adapters
from bench.ceilings import gemm_call, peak_memory
from bench.harness import OURS, Context, Error, Record, Target, Task, record, roofline, row, verify, worst
from bench.records import HOST
from bench.suites import request
from bench.timing import Call, Candidate, tolerant
from t2l_engine import AdapterStack
from t2l_engine.hypernetwork.config import HyperNetworkConfig
from t2l_engine.hypernetwork.network import HyperNetwork, hypernet_flops
from t2l_engine.testing import numerics
from tests import networks
from tests.networks import SHAPES, VARIANTS, HyperShape

DTYPES = ("float32", "bfloat16")
#: model -> variants, numbers of descriptions.
FULL = {
    "mistral-7b": (VARIANTS, (1, 8, 64)),
    "llama-3.1-8b": (("L",), (1, 8)),
    "gemma-2-2b": (("L",), (1, 8)),
    "smollm2-135m": (VARIANTS, (1, 8, 64)),
}
TINY = {"smollm2-135m": (VARIANTS, (1, 8))}
#: The model that targets are stated for, by variant and dtype at one description; and at many.
TARGETED = "mistral-7b"
ONE = {"L": (1.25, 1.35), "M": (1.35, 1.5), "S-learnable": (1.35, 1.5)}
MANY, MEMORY = Target(1.2), Target(1.2, of="weights + adapters")
#: Descriptions that the float64 oracle takes at a time: 64 at once would need gigabytes.
CHUNK = 8
#: Compiling takes a minute: the released Mistral form only, at this number of descriptions.
COMPILED = "torch.compile"
COMPILED_AT = (1,)

#: On a card: (model, dtype) in order of worth; numbers of descriptions.
CUDA_FULL = tuple((name, dtype) for dtype in DTYPES[::-1] for name in ("mistral-7b", "llama-3.1-8b", "gemma-2-2b"))
CUDA_TINY = HyperShape("tiny", 2, 32, 32, 16, embed_dim=24, latent_size=16, head_in_size=24)
#: Descriptions up to which a graph holds what runs one at a time: more would be tens of thousands of launches.
CAPTURED = 8
#: All rows of variant L at once, in torch's own products: what a careful author writes.
BATCHED = "batched"
#: On a card, of one description by model, and of several.
CUDA_ONE = {"mistral-7b": Target(1.3)}
CUDA_OTHERS, CUDA_SEVERAL = Target(1.5), Target(1.1, of="cuBLAS")

Generate = Callable[[Tensor], Adapters]
Way = Callable[[HyperNetwork], Generate | baselines.Eager]
#: Ways to do the same on a card.
WAYS: dict[str, Way] = {"cuBLAS": baselines.careful, "reference": baselines.plain, "eager": baselines.Eager}
CPU_WAYS: dict[str, Way] = {OURS: baselines.of_stack, "reference": baselines.plain, "eager": baselines.Eager}


def cpu_ways(shape: HyperShape) -> dict[str, Way]:
    """Ways to do the same on a CPU."""
    return CPU_WAYS | ({BATCHED: baselines.careful} if shape.variant == "L" else {})


def plan(context: Context) -> list[Task]:
    # Fail fast: cheapest checks first.
    tasks = request.plan(context)
    if context.on_cpu:
        tasks.append(Task.of("memory", memory, context))
        for name, (variants, counts) in (FULL if context.full else TINY).items():
            for variant, dtype in itertools.product(variants, DTYPES):
                shape = dataclasses.replace(SHAPES[name], variant=variant)
                tasks.append(Task.of(f"{name} {variant} {dtype}", generation, context, shape, dtype, counts))
        return tasks
    counts = (1, 8, 64) if context.full else (1, 2)
    for name, dtype in CUDA_FULL if context.full else (("tiny", "float32"), ("tiny", "bfloat16")):
        tasks.append(Task.of(f"{name} L {dtype}", cuda, context, name, dtype, counts))
    return tasks


def built(net: HyperNetwork, ways: Mapping[str, Way], skipped: dict[str, str] | None) -> dict[str, Generate]:
    """What ``ways`` make of ``net``; a baseline that throws goes to ``skipped``."""
    made = {}
    for name, way in ways.items():
        with tolerant(name, skipped):
            made[name] = way(net)
    return made


@torch.no_grad()
def adapter_errors(
    exact: HyperNetwork,
    generators: Mapping[str, Generate],
    task_emb: Tensor,
    dtype: torch.dtype,
    skipped: dict[str, str] | None = None,
) -> dict[str, Error]:
    """The worst error of each of ``generators`` over modules, sides and chunks of descriptions.

    ``exact``: the same weights in float64.  "reference" is among the generators: its error in ``dtype`` makes the bound.
    """
    results: dict[str, Adapters] = {}
    for name, generate in generators.items():
        with tolerant(name, skipped):
            made = generate(task_emb)
            results[name] = generate.stacked(made) if isinstance(generate, baselines.Eager) else made
    errors: dict[str, list[Error]] = {name: [] for name in results}
    oracle = baselines.plain(exact)
    for start in range(0, len(task_emb), CHUNK):
        rows = slice(start, start + CHUNK)
        for module, sides in oracle(task_emb[rows].double()).items():
            for side, right in enumerate(sides):
                bound = numerics.trunk_bound(right, results["reference"][module][side][rows], dtype)
                for name, got in results.items():
                    errors[name].append(Error(numerics.relative_frobenius(got[module][side][rows], right), bound))
    return {name: worst(found) for name, found in errors.items()}


def adapter_bytes(config: HyperNetworkConfig, count: int, dtype: torch.dtype) -> int:
    """A and B of ``count`` adapters."""
    return count * config.num_layers * config.rank * sum(config.in_features + config.out_features) * dtype.itemsize


def weight_bytes(net: HyperNetwork) -> int:
    """All parameters of a hypernetwork."""
    return sum(p.nbytes for p in net.parameters())


def moved(net: HyperNetwork, count: int) -> int:
    """Bytes of weights and adapters, each once."""
    return weight_bytes(net) + adapter_bytes(net.config, count, net.dtype)


def described(shape: HyperShape, dtype: str, count: int) -> tuple[str, Record]:
    """The case and the shape of a row."""
    case = f"{shape.name} {shape.variant} {dtype}, {count} description{'s' if count > 1 else ''}"
    return case, {"model": shape.name, "variant": shape.variant, "dtype": dtype, "descriptions": count}


def generation(context: Context, shape: HyperShape, dtype: str, counts: Sequence[int]) -> Iterator[Record]:
    """Rows of one hypernetwork at each number of descriptions: its ways in the same rounds, a matrix product among them."""
    net = shape.make(seed=1).set_dtype(getattr(torch, dtype))
    targeted = shape.name == TARGETED and context.full
    exact = copy.deepcopy(net).set_dtype(torch.float64)
    chosen = {n: candidates(net, exact, shape, n, targeted and shape.variant == "L") for n in counts}
    del exact
    for threads in context.thread_counts if targeted else [context.threads]:
        gemm, gemm_flops = gemm_call(getattr(torch, dtype), context.ceilings.gemm_size)
        for n in [n for n in counts if threads == context.threads or n == 1]:
            calls, skipped, error = chosen[n]
            # Each number apart: beside seconds of many descriptions one would have few rounds.
            timings = context.time({**calls, "gemm": gemm}, threads, factor=2)
            gflops = gemm_flops / 1e3 / timings["gemm"].median_us
            gbps = context.ceilings.bandwidth_at(moved(net, n), threads)
            least = roofline(n * sum(hypernet_flops(net.config).values()), moved(net, n), gflops, gbps)
            target = {1: Target(ONE[shape.variant][DTYPES.index(dtype)]), 64: MANY}.get(n) if targeted else None
            case, fields = described(shape, dtype, n)
            timings = {name: timings[name] for name in calls}
            given = {"count": threads, "skipped": skipped, "least": least, "target": target}
            yield row(context, case, "generate", fields, timings, error, **given)


def candidates(
    net: HyperNetwork, exact: HyperNetwork, shape: HyperShape, count: int, compile_it: bool = False
) -> tuple[dict[str, Callable], dict[str, str], Error]:
    """Verified calls that generate ``count`` adapters; what is skipped and why; the error of ours."""
    generators, skipped = built(net, cpu_ways(shape), None), {}
    if compile_it and count in COMPILED_AT:
        with tolerant(COMPILED, skipped):  # whatever the compiler cannot do is a fact about it, and is reported
            generators[COMPILED] = baselines.compiled(net, shape.task_embeddings(count))
    elif compile_it:
        skipped[COMPILED] = "compiled for 1 description only"
    fresh, timed = (shape.task_embeddings(count, seed) for seed in (2, 3))
    errors = adapter_errors(exact, generators, fresh, net.dtype)
    functions = {name: functools.partial(f, timed) for name, f in generators.items()}
    functions, wrong = verify(f"{shape.name} {shape.variant} {net.dtype}, {count}", functions, errors)
    return functions, skipped | wrong, errors[OURS]


def build_and_generate(name: str, dtype: str, count: int) -> tuple[int, int]:
    """Bytes of the weights and of the adapters of a hypernetwork that is made, and used, here."""
    shape = SHAPES[name]
    net = shape.make(getattr(torch, dtype))
    stack = net.generate(shape.task_embeddings(count))
    return weight_bytes(net), sum(t.nbytes for side in (stack.lora_A, stack.lora_B) for t in side.values())


def memory(context: Context) -> Iterator[Record]:
    """The peak of a process that makes a hypernetwork and many adapters, beyond what it held before."""
    name, count = (TARGETED, 64) if context.full else ("smollm2-135m", 8)
    peak, (weights, adapters) = peak_memory(build_and_generate, name, "bfloat16", count)
    yield record(
        "memory",
        what=f"{name} L bfloat16, {count} descriptions",
        peak_mib=round(peak / 2**20, 1),
        weights_mib=round(weights / 2**20, 1),
        adapters_mib=round(adapters / 2**20, 1),
        target=MEMORY._asdict() if name == TARGETED else None,  # beside a few megabytes, torch's own pages count
    )


def preallocated(net: HyperNetwork, task_emb: Tensor) -> tuple[Call, AdapterStack]:
    """Ours: the public call over earlier adapters, and where it writes."""
    out = net.generate(task_emb)
    return functools.partial(net.generate, task_emb, out=out), out


def one_net(context: Context, name: str, dtype: str) -> tuple[HyperShape, HyperNetwork]:
    """A hypernetwork as :meth:`HyperShape.make` makes it, but for its weights, which are drawn where they stay."""
    shape, device = (SHAPES[name] if context.full else CUDA_TINY), context.device.torch
    with torch.device("meta"):
        net = HyperNetwork(shape.config())
    networks.fill(net.to_empty(device=device), torch.Generator(device).manual_seed(1))
    return shape, net.requires_grad_(False).eval().set_dtype(getattr(torch, dtype))


def into_used_memory(net: HyperNetwork) -> Generate:
    """:func:`preallocated` into outputs that hold NaN before."""

    def generate(task_emb: Tensor) -> Adapters:
        call, out = preallocated(net, task_emb)
        for tensor in (*out.lora_A.values(), *out.lora_B.values()):
            tensor.fill_(float("nan"))
        call()
        return {name: (out.lora_A[name], out.lora_B[name]) for name in out.lora_A}

    return generate


def cuda_errors(net: HyperNetwork, task_emb: Tensor, ways: Mapping[str, Way], skipped: dict[str, str]) -> dict[str, Error]:
    """:func:`adapter_errors` of ours and of ``ways``; a baseline that throws goes to ``skipped``."""
    ways = {"reference": baselines.plain, **ways, OURS: into_used_memory}
    exact = copy.deepcopy(net).set_dtype(torch.float64)
    return adapter_errors(exact, built(net, ways, skipped), task_emb, net.dtype, skipped)


def copies(context: Context, net: HyperNetwork) -> list[HyperNetwork]:
    """As many of it as exceed the caches."""
    count = context.num_sets(weight_bytes(net)) if context.full else 2
    return [net, *(copy.deepcopy(net) for _ in range(count - 1))]


@torch.inference_mode()
def cuda(context: Context, name: str, dtype: str, counts: Sequence[int]) -> Iterator[Record]:
    """Rows of one hypernetwork, cold: as many copies of it as exceed the caches take turns."""
    shape, net = one_net(context, name, dtype)
    device, nets = context.device, copies(context, net)
    for count in counts:
        case, fields = described(shape, dtype, count)
        fresh, timed = (shape.task_embeddings(count, seed).to(device.torch) for seed in (2, 3))
        skipped: dict[str, str] = {}
        errors = cuda_errors(net, fresh, WAYS, skipped)
        verified, wrong = verify(case, dict.fromkeys(errors), errors)
        calls = [preallocated(one, timed)[0] for one in nets]
        candidates = baselines.copies(device, moved(net, count), len(nets))
        candidates |= {OURS: Candidate(calls), HOST: Candidate(calls, graph=False)}
        for way in [way for way in WAYS if way in verified]:
            with tolerant(way, skipped):
                candidates[way] = Candidate([functools.partial(WAYS[way](one), timed) for one in nets])
        if eager := candidates.get("eager"):
            candidates["eager"] = Candidate(eager.calls[:1], graph=False)
            if count <= CAPTURED:
                candidates["eager, captured"] = eager
            else:
                skipped["eager, captured"] = f"one description at a time: timed up to {CAPTURED}"
        timings = baselines.with_best_copy(context.time(candidates, factor=2, skipped=skipped))
        given = {"cache": "cold", "skipped": skipped | wrong}
        given["least"] = context.roofline(count * sum(hypernet_flops(net.config).values()), moved(net, count), dtype)
        if count == 1:
            given["target"] = CUDA_ONE.get(name, CUDA_OTHERS)
        elif CUDA_SEVERAL.of in timings:
            given["target"] = CUDA_SEVERAL
        yield row(context, case, "generate", fields, timings, errors[OURS], **given)
