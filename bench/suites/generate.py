"""Generating adapters: whole hypernetworks (on a card cold, beside cuBLAS), memory, where the time of a request goes."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import t2l_engine as t2l
from bench import baselines, cases
from bench.baselines import Adapters
from bench.cases import Case, Group, Layer, Operands
from bench.ceilings import apart, gemm_call, peak_bytes, resident_bytes
from bench.harness import OURS, Context, Error, Record, Target, Task, record, roofline, row, verify, worst
from bench.records import HOST, PAPER
from bench.suites.apply import lora_errors
from bench.timing import Call, Candidate, Timing, tolerant
from t2l_engine import ops
from t2l_engine.hypernetwork.network import HyperNetwork, hypernet_flops
from t2l_engine.research import costs
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
SLOW = "torch multiplies float32 faster on this CPU: the rows in float32 have its times"
#: Descriptions that the float64 oracle takes at a time: 64 at once would need gigabytes.
CHUNK = 8
#: Compiling takes a minute: the released Mistral form only, for one description.
COMPILED = "torch.compile"

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


def plan(context: Context) -> list[Task]:
    # Fail fast: cheapest checks first.
    if context.on_cpu:
        tasks = [Task.of(f"split {MODEL} bundled", bundled, context), Task.of("memory", memory, context)]
        for name, (variants, counts) in (FULL if context.full else TINY).items():
            for variant, dtype in itertools.product(variants, DTYPES):
                shape = dataclasses.replace(SHAPES[name], variant=variant)
                tasks.append(Task.of(f"{name} {variant} {dtype}", generation, context, shape, dtype, counts))
        return tasks
    tasks, counts = [], (1, 8, 64) if context.full else (1, 2)
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
    oracle: Generate,
    generators: Mapping[str, Generate],
    inputs: Tensor,
    dtype: torch.dtype,
    skipped: dict[str, str] | None = None,
    other: str = "reference",
    chunk: int = CHUNK,
) -> dict[str, Error]:
    """The worst error of each of ``generators``, of which ``other`` makes the bound; ``oracle``: that in float64."""
    results: dict[str, Adapters] = {}
    for name, generate in generators.items():
        with tolerant(name, skipped):
            made = generate(inputs)
            results[name] = generate.stacked(made) if isinstance(generate, baselines.Eager) else made
    errors: dict[str, list[Error]] = {name: [] for name in results}
    for start in range(0, len(inputs), chunk):
        rows = slice(start, start + chunk)
        for module, sides in oracle(inputs[rows].double()).items():
            for side, right in enumerate(sides):
                bound = numerics.trunk_bound(right, results[other][module][side][rows], dtype)
                for name, got in results.items():
                    errors[name].append(Error(numerics.relative_frobenius(got[module][side][rows], right), bound))
    return {name: worst(found) for name, found in errors.items()}


def weight_bytes(net: HyperNetwork) -> int:
    """All parameters of a hypernetwork."""
    return sum(p.nbytes for p in net.parameters())


def moved(net: HyperNetwork, count: int) -> int:
    """Bytes of weights and ``count`` adapters, each once."""
    return weight_bytes(net) + count * net.config.adapter_values * net.dtype.itemsize


def described(shape: HyperShape, dtype: str, count: int) -> tuple[str, Record]:
    """The case and the shape of a row."""
    case = f"{shape.name} {shape.variant} {dtype}, {count} description{'s' if count > 1 else ''}"
    return case, {"model": shape.name, "variant": shape.variant, "dtype": dtype, "descriptions": count}


def generation(context: Context, shape: HyperShape, dtype: str, counts: Sequence[int]) -> Iterator[Record]:
    """Rows of one hypernetwork at each number of descriptions: its ways in the same rounds, a matrix product among them."""
    net = shape.make(seed=1).set_dtype(getattr(torch, dtype))
    targeted = shape.name == TARGETED and context.full
    exact = copy.deepcopy(net).set_dtype(torch.float64)
    slow = context.ceilings.fastest(dtype) != dtype
    chosen = {n: candidates(net, exact, shape, n, targeted and shape.variant == "L", slow) for n in counts}
    del exact
    for threads in context.thread_counts if targeted else [context.threads]:
        for n in [n for n in counts if threads == context.threads or n == 1]:
            calls, skipped, error = chosen[n]
            # Each number apart: beside seconds of many descriptions one would have few rounds.
            flops = n * sum(hypernet_flops(net.config).values())
            timings, least = measured(context, calls, dtype, threads, flops, moved(net, n))
            target = {1: Target(ONE[shape.variant][DTYPES.index(dtype)]), 64: MANY}.get(n) if targeted else None
            case, fields = described(shape, dtype, n)
            given = {"count": threads, "skipped": skipped, "least": least, "target": target}
            yield row(context, case, "generate", fields, timings, error, **given)


def measured(
    context: Context, calls: Mapping[str, Call], dtype: str, threads: int, flops: int, num_bytes: int
) -> tuple[dict[str, Timing], Record]:
    """Times of ``calls``, and the roofline by a matrix product that took turns with them."""
    gemm, gemm_flops = gemm_call(getattr(torch, context.ceilings.fastest(dtype)), context.ceilings.gemm_size)
    timings = context.time({**calls, "gemm": gemm}, threads, factor=2)
    gflops = gemm_flops / 1e3 / timings.pop("gemm").median_us
    return timings, roofline(flops, num_bytes, gflops, context.ceilings.bandwidth_at(num_bytes, threads))


def candidates(
    net: HyperNetwork, exact: HyperNetwork, shape: HyperShape, count: int, compile_it: bool = False, slow: bool = False
) -> tuple[dict[str, Callable], dict[str, str], Error]:
    """Verified calls that generate ``count`` adapters; what is skipped and why; the error of ours."""
    ways, skipped = CPU_WAYS | ({BATCHED: baselines.careful} if shape.variant == "L" else {}), {}
    if slow:
        skipped = {name: SLOW for name in [*ways, *[COMPILED] * compile_it] if name != OURS}
        ways, compile_it = {name: way for name, way in ways.items() if name in (OURS, "reference")}, False
    generators = built(net, ways, None)
    if compile_it and count == 1:
        with tolerant(COMPILED, skipped):  # whatever the compiler cannot do is a fact about it, and is reported
            generators[COMPILED] = torch.compile(baselines.plain(net), dynamic=False)
            generators[COMPILED](shape.task_embeddings(count))
    elif compile_it:
        skipped[COMPILED] = "compiled for 1 description only"
    fresh, timed = (shape.task_embeddings(count, seed) for seed in (2, 3))
    errors = adapter_errors(baselines.plain(exact), generators, fresh, net.dtype)
    functions = {name: functools.partial(f, timed) for name, f in generators.items()}
    functions, wrong = verify(f"{shape.name} {shape.variant} {net.dtype}, {count}", functions, errors)
    functions = {name: f for name, f in functions.items() if name not in skipped}  # the reference, which bounds errors
    return functions, skipped | wrong, errors[OURS]


def build_and_generate(name: str, count: int) -> tuple[int, int, int]:
    """Bytes that this process holds at most, beyond before, while it makes a hypernetwork and adapters; bytes of both."""
    made: dict[str, Any] = {}

    def run() -> None:
        made["net"] = SHAPES[name].make(torch.bfloat16)
        made["stack"] = made["net"].generate(SHAPES[name].task_embeddings(count))

    before = resident_bytes("VmRSS")
    peak, stack = peak_bytes(run) - before, made["stack"]
    return peak, weight_bytes(made["net"]), sum(t.nbytes for of in (stack.lora_A, stack.lora_B) for t in of.values())


def memory(context: Context) -> Iterator[Record]:
    """The peak of a process that makes a hypernetwork and many adapters, beyond what it held before."""
    name, count = (TARGETED, 64) if context.full else ("smollm2-135m", 8)
    found = zip(("peak_mib", "weights_mib", "adapters_mib"), apart(build_and_generate, name, count), strict=True)
    sizes = {field: round(size / 2**20, 1) for field, size in found}
    target = MEMORY._asdict() if name == TARGETED else None  # beside a few megabytes, torch's own pages count
    yield record("memory", what=f"{name} L bfloat16, {count} descriptions", **sizes, target=target)


def preallocated(net: HyperNetwork, task_emb: Tensor) -> tuple[Call, t2l.AdapterStack]:
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
        return baselines.sides(out)

    return generate


def cuda_errors(net: HyperNetwork, task_emb: Tensor, ways: Mapping[str, Way], skipped: dict[str, str]) -> dict[str, Error]:
    """:func:`adapter_errors` of ours and of ``ways``; a baseline that throws goes to ``skipped``."""
    ways = {"reference": baselines.plain, **ways, OURS: into_used_memory}
    exact = copy.deepcopy(net).set_dtype(torch.float64)
    return adapter_errors(baselines.plain(exact), built(net, ways, skipped), task_emb, net.dtype, skipped)


def copies(context: Context, net: HyperNetwork) -> list[HyperNetwork]:
    """As many of it as exceed the caches."""
    return [net, *(copy.deepcopy(net) for _ in range(1, context.num_sets(weight_bytes(net)) if context.full else 2))]


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


# --- where the time of a request goes -----------------------------------------------------------------------------------

COUNTS = (1, 8, 64)
MODEL = "smollm2-135m"


class Part(NamedTuple):
    """A part of a request as ours does it: its call, its error, its roofline."""

    call: Callable[[], Any]
    error: Error
    least: Record


@torch.no_grad()
def bundled(context: Context) -> Iterator[Record]:
    """The paper's checkpoint, text encoder included."""
    engine = t2l.TextToLoRA.from_pretrained(PAPER)
    encoder = t2l.TextEncoder(engine.encoder.model, engine.encoder.tokenizer, engine.encoder.config, cache_size=0)
    net = engine.hypernetwork.requires_grad_(False)
    dtype = str(net.dtype).removeprefix("torch.")
    for count in COUNTS:
        drawn = torch.randn(count, net.config.embed_dim, generator=torch.Generator().manual_seed(6))
        task_emb = nn.functional.normalize(drawn, dim=-1) * net.config.embed_dim**0.5
        parts = {"encoder": encoded(context, encoder, count), **generated(context, net, task_emb)}
        parts |= {"put": put(context, net, net.generate(task_emb)), "apply": applied(context, net, count)}
        for part, (call, error, least) in parts.items():
            case = f"{MODEL} {dtype}, {count} description{'s' if count > 1 else ''}: {part}"
            calls, _ = verify(case, {OURS: call}, {OURS: error})
            shape = {"model": MODEL, "dtype": dtype, "descriptions": count, "part": part}
            yield row(context, case, "split", shape, context.time(calls, factor=2), error, least=least)


def encoded(context: Context, encoder: t2l.TextEncoder, count: int) -> Part:
    """As many texts at a time as there are descriptions; none is kept."""
    texts = [f"Return item {i:07d} of the comma separated list." for i in range(count)]
    exact = t2l.TextEncoder(copy.deepcopy(encoder.model).double(), encoder.tokenizer, encoder.config).encode(texts)
    error = Error(numerics.relative_frobenius(encoder.encode(texts), exact), numerics.EMBEDDING_FROBENIUS)
    tokens = sum(len(ids) for ids in encoder.tokenizer(encoder.prepare(texts))["input_ids"])
    num_bytes = sum(p.nbytes for p in encoder.model.encoder.layer.parameters())  # of a table, few rows are read
    flops = count * costs.count(encoder.model.config, head=False).flops(tokens // count)
    least = context.roofline(flops, num_bytes, encoder.config.dtype)
    return Part(lambda: encoder.encode(texts), error, least)


def generated(context: Context, net: t2l.HyperNetwork, task_emb: Tensor) -> dict[str, Part]:
    """The two ops of a hypernetwork; their error is that of the adapters, which they make together."""
    c, folded, exact = net.config, net.folded(), copy.deepcopy(net).set_dtype(torch.float64)
    rotary, cast = c.rank if c.rotary else 0, task_emb.to(folded["weights"][1].dtype)

    def trunk() -> Tensor:
        """Task encoder and trunk."""
        z = net.task_encoder(cast)
        return ops.hypernet_trunk(z, folded["weights"], folded["side_emb"], folded["pos_emb"], rotary)

    def heads(latent: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The heads of all modules: all A, then all B."""
        return ops.hypernet_heads(latent, *folded["heads"], c.rank, c.in_features, c.out_features, **folded["offsets"])

    latent = trunk()
    made = dict(zip(c.modules, zip(*heads(latent), strict=True), strict=True))
    ways = {"reference": baselines.plain(net), OURS: lambda _: made}
    error = adapter_errors(baselines.plain(exact), ways, task_emb, net.dtype)[OURS]
    head_bytes = sum(p.nbytes for p in net.heads.parameters())
    moved = {"trunk": weight_bytes(net) - head_bytes + latent.nbytes}
    moved["heads"] = head_bytes + latent.nbytes + sum(t.nbytes for both in made.values() for t in both)
    parts, flops = {}, hypernet_flops(c)
    for name, call in (("trunk", trunk), ("heads", functools.partial(heads, latent))):
        least = context.roofline(len(task_emb) * flops[name], moved[name], str(net.dtype).removeprefix("torch."))
        parts[name.removesuffix("s")] = Part(call, error, least)
    return parts


def put(context: Context, net: t2l.HyperNetwork, made: t2l.AdapterStack) -> Part:
    """Every adapter into its slot of an attached model, which is nothing but the adapted linears."""
    c = net.config
    sizes = list(zip(c.modules, c.in_features, c.out_features, strict=True))
    model = nn.ModuleList(nn.ModuleDict({name: nn.Linear(*of) for name, *of in sizes}) for _ in range(c.num_layers))
    stack = t2l.AdapterStack(made.lora_A, made.lora_B, made.scaling, made.ranks)
    handle = t2l.attach(model, stack)

    def run() -> None:
        for i in range(len(stack)):
            handle.put(i, stack[i])

    with handle.borrow_slots(0, stack) as slots:  # views, which stay
        held, given = ([*of.lora_A.values(), *of.lora_B.values()] for of in (slots, stack))
    for tensor in held:
        tensor.fill_(float("nan"))
    run()
    bound = numerics.lora_frobenius(stack.dtype)
    error = worst(Error(numerics.relative_frobenius(*pair), bound) for pair in zip(held, given, strict=True))
    num_bytes, ceilings, dtype = 2 * sum(t.nbytes for t in given), context.ceilings, str(net.dtype).removeprefix("torch.")
    rates = ceilings.gemm_at(dtype, context.threads), ceilings.copy_at(num_bytes, context.threads)
    return Part(run, error, roofline(0, num_bytes, *rates))


def applied(context: Context, net: t2l.HyperNetwork, count: int) -> Part:
    """One token of every adapter through all adapted linears, the linears' own products left out."""
    c, device = net.config, context.device.torch
    groups = [Group.packed(n_in, q=n_out) for n_in, n_out in zip(c.in_features, c.out_features, strict=True)]
    case = Case(Layer(MODEL, tuple(groups * c.num_layers)), cases.rows(*range(count)), rank=c.rank, dtype=net.dtype)
    error = lora_errors(case, {OURS: Operands.grouped}, device, None)[OURS]
    call = cases.operands(case, device, seed=7).grouped()
    return Part(call, error, context.roofline(case.flops, case.bytes, case.dtype_name))
