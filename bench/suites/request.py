"""Where the time of a request goes: text encoder, trunk, heads, putting adapters into a model, applying them to a token."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import t2l_engine as t2l
from bench import cases
from bench.cases import Case, Group, Layer, Operands
from bench.harness import OURS, Context, Error, Record, Task, roofline, row, verify, worst
from bench.suites.apply import BUILDERS, lora_errors
from t2l_engine import ops
from t2l_engine.hypernetwork.network import hypernet_flops
from t2l_engine.ops import reference
from t2l_engine.research import costs
from t2l_engine.testing import numerics

COUNTS = (1, 8, 64)
MODEL = "smollm2-135m"


class Part(NamedTuple):
    """The ways to do a part of a request, their errors, its roofline."""

    functions: dict[str, Callable[[], Any]]
    errors: dict[str, Error]
    least: Record


def plan(context: Context) -> list[Task]:
    """On a CPU alone."""
    return [Task.of(f"split {MODEL} bundled", bundled, context)] if context.on_cpu else []


@torch.no_grad()
def bundled(context: Context) -> Iterator[Record]:
    """The bundled checkpoint, text encoder included."""
    engine = t2l.TextToLoRA.from_pretrained(MODEL)
    encoder = t2l.TextEncoder(engine.encoder.model, engine.encoder.tokenizer, engine.encoder.config, cache_size=0)
    net = engine.hypernetwork.requires_grad_(False)
    dtype = str(net.dtype).removeprefix("torch.")
    for count in COUNTS:
        drawn = torch.randn(count, net.config.embed_dim, generator=torch.Generator().manual_seed(6))
        task_emb = nn.functional.normalize(drawn, dim=-1) * net.config.embed_dim**0.5
        (latent,) = trunk_of(net, task_emb)(ops)
        parts = {"encoder": encoded(context, encoder, count), **generated(context, net, task_emb, latent)}
        parts |= {"put": put(context, net, net.generate(task_emb)), "apply": applied(context, net, count)}
        for part, (functions, errors, least) in parts.items():
            case = f"{MODEL} {dtype}, {count} description{'s' if count > 1 else ''}: {part}"
            functions, skipped = verify(case, functions, errors)
            shape = {"model": MODEL, "dtype": dtype, "descriptions": count, "part": part}
            timings = context.time(functions, factor=2)
            yield row(context, case, "split", shape, timings, errors[OURS], skipped=skipped, least=least)


def encoded(context: Context, encoder: t2l.TextEncoder, count: int) -> Part:
    """As many texts at a time as there are descriptions; none is kept."""
    texts = [f"Return item {i:07d} of the comma separated list." for i in range(count)]
    exact = t2l.TextEncoder(copy.deepcopy(encoder.model).double(), encoder.tokenizer, encoder.config).encode(texts)
    functions = {OURS: lambda: encoder.encode(texts), "transformers": lambda: by_transformers(encoder, texts)}
    bound = numerics.EMBEDDING_FROBENIUS
    errors = {name: Error(numerics.relative_frobenius(f(), exact), bound) for name, f in functions.items()}
    tokens = sum(len(ids) for ids in encoder.tokenizer(encoder.prepare(texts))["input_ids"])
    num_bytes = sum(p.nbytes for p in encoder.model.encoder.layer.parameters())  # of a table, few rows are read
    flops = count * costs.count(encoder.model.config, head=False).flops(tokens // count)
    return Part(functions, errors, context.roofline(flops, num_bytes, encoder.config.dtype))


def by_transformers(encoder: t2l.TextEncoder, texts: list[str]) -> Tensor:
    """The embeddings of an encoder with mean pooling as its model's card computes them: a padded batch, transformers."""
    batch = encoder.tokenizer(texts, padding=True, truncation=True, max_length=encoder.max_length, return_tensors="pt")
    hidden, mask = encoder.model(**batch).last_hidden_state, batch["attention_mask"][..., None]
    pooled = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
    return nn.functional.normalize(pooled, dim=-1) * pooled.shape[-1] ** 0.5


def generated(context: Context, net: t2l.HyperNetwork, task_emb: Tensor, latent: Tensor) -> dict[str, Part]:
    """The two ops of a hypernetwork, each on the same input as its float64 oracle."""
    exact = copy.deepcopy(net).set_dtype(torch.float64)
    runs = {"trunk": (trunk_of(net, task_emb), trunk_of(exact, task_emb))}
    runs |= {"heads": (heads_of(net, latent), heads_of(exact, latent.double()))}
    head_bytes = sum(p.nbytes for p in net.heads.parameters())
    weights = {"trunk": sum(p.nbytes for p in net.parameters()) - head_bytes, "heads": head_bytes + latent.nbytes}
    parts = {}
    for name, (run, wide) in runs.items():
        right, plain = wide(reference), run(reference)
        bounds = [numerics.trunk_bound(*pair, net.dtype) for pair in zip(right, plain, strict=True)]
        functions = {OURS: functools.partial(run, ops), "reference": functools.partial(run, reference)}
        errors = {}
        for way, function in functions.items():
            values = map(numerics.relative_frobenius, function(), right)
            errors[way] = worst(map(Error, values, bounds))
        flops = len(task_emb) * hypernet_flops(net.config)[name]
        least = context.roofline(flops, weights[name] + sum(t.nbytes for t in plain), str(net.dtype).removeprefix("torch."))
        parts[name.removesuffix("s")] = Part(functions, errors, least)
    return parts


Run = Callable[[Any], list[Tensor]]  # of a backend


def trunk_of(net: t2l.HyperNetwork, task_emb: Tensor) -> Run:
    """Task encoder and trunk."""
    folded, rotary = net.folded(), net.config.rank if net.config.rotary else 0
    task_emb = task_emb.to(folded["weights"][1].dtype)

    def run(backend: Any) -> list[Tensor]:
        z = net.task_encoder(task_emb)
        return [backend.hypernet_trunk(z, folded["weights"], folded["side_emb"], folded["pos_emb"], rotary)]

    return run


def heads_of(net: t2l.HyperNetwork, latent: Tensor) -> Run:
    """The heads of all modules: all A, then all B."""
    c, folded = net.config, net.folded()
    sizes = c.rank, c.in_features, c.out_features

    def run(backend: Any) -> list[Tensor]:
        if backend is ops:
            lora_A, lora_B = ops.hypernet_heads(latent, *folded["heads"], *sizes, **folded["offsets"])
            return lora_A + lora_B
        made = reference.hypernet_heads(latent, *folded["heads"], *folded["offsets"].values(), *sizes)
        return made[::2] + made[1::2]

    return run


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
    errors = (
        Error(numerics.relative_frobenius(*pair), numerics.lora_frobenius(stack.dtype))
        for pair in zip(held, given, strict=True)
    )
    num_bytes, ceilings, dtype = 2 * sum(t.nbytes for t in given), context.ceilings, str(net.dtype).removeprefix("torch.")
    rates = ceilings.gemm_at(dtype, context.threads), ceilings.copy_at(num_bytes, context.threads)
    return Part({OURS: run}, {OURS: worst(errors)}, roofline(0, num_bytes, *rates))


def applied(context: Context, net: t2l.HyperNetwork, count: int) -> Part:
    """One token of every adapter through all adapted linears, the linears' own products left out."""
    c, device = net.config, context.device.torch
    groups = [Group.packed(n_in, q=n_out) for n_in, n_out in zip(c.in_features, c.out_features, strict=True)]
    case = Case(Layer(MODEL, tuple(groups * c.num_layers)), cases.rows(*range(count)), rank=c.rank, dtype=net.dtype)
    ways = {way: functools.partial(Operands.one_by_one, build=BUILDERS[way]) for way in (OURS, "reference", "mm loop")}
    timed = cases.operands(case, device, seed=7)
    functions = {name: build(timed) for name, build in ways.items()}
    return Part(functions, lora_errors(case, ways, device, None), context.roofline(case.flops, case.bytes, case.dtype_name))
