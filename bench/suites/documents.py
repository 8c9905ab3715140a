"""Documents: Doc-to-LoRA's hypernetwork from hidden states to adapters, and rows that have a document's LoRA each."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import baselines, cases
from bench.cases import Case, Group, Layer, even
from bench.ceilings import apart, peak_bytes, resident_bytes
from bench.harness import OURS, Context, Record, Target, Task, record, row, verify
from bench.suites import apply, generate
from bench.suites.generate import COMPILED
from bench.timing import tolerant
from t2l_engine.hypernetwork.config import PerceiverConfig
from t2l_engine.hypernetwork.perceiver import PerceiverHyperNetwork

#: Layers, intermediate and hidden size of the model, latents, blocks; tokens of a context: of the checkpoint that SakanaAI
#: released for gemma-2-2b-it, and tiny ones.
FULL, TINY = ("gemma-2-2b", 26, 9216, 2304, 512, 9, 256), ("tiny", 2, 96, 48, 32, 2, 16)
GENERATED = Target(1.5)
#: Of A and B repeated for every token before two products, as in SakanaAI's code.
APPLIED = Target(0.1, of="gather bmm")


def plan(context: Context) -> list[Task]:
    context.only("cpu", "documents")
    generated = [Task.of(f"generate {count}", generation, context, count) for count in (1, 8)]
    return [Task.of("apply", applying, context), *generated]


def config(context: Context) -> tuple[str, PerceiverConfig, int]:
    """Its name; the configuration; tokens of a context."""
    name, layers, n_in, n_out, width, blocks, tokens = FULL if context.full else TINY
    sizes = {"modules": ("down_proj",), "in_features": (n_in,), "out_features": (n_out,), "num_layers": layers, "rank": 8}
    sizes |= {"feature_size": n_out, "latent_size": width, "num_latents": 8, "num_blocks": blocks, "num_mlps": 1}
    return name, PerceiverConfig(variant="perceiver-layers", lora_alpha=16.0, per_layer_mlps=True, **sizes), tokens


def make(config: PerceiverConfig) -> PerceiverHyperNetwork:
    """Random weights, all of them bfloat16 numbers; no norm, bias or scale is trivial."""
    torch.manual_seed(1)
    net = PerceiverHyperNetwork(config).set_dtype(torch.bfloat16).requires_grad_(False).eval()
    for p in net.parameters():
        if p.dtype != net.dtype:
            p.add_(torch.randn(p.shape), alpha=0.1 if p.dim() < 3 else 0.01).copy_(p.to(net.dtype))
    return net


def flops(config: PerceiverConfig, tokens: int) -> int:
    """Of matrix products of one context, as torch counts them."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        states = torch.empty(1, config.num_layers, tokens, config.feature_size)
        baselines.perceiver(PerceiverHyperNetwork(config))(states)
    return counter.get_total_flops()


@torch.no_grad()
def generation(context: Context, count: int) -> Iterator[Record]:
    """Adapters of ``count`` contexts of one chunk, from hidden states of all layers."""
    name, of, tokens = config(context)
    net, mask, skipped = make(of), torch.ones(count, tokens, dtype=torch.bool), {}
    ways = {OURS: lambda states: baselines.sides(net.generate(net.latents(states, mask).split(1)))}
    ways["eager"] = baselines.perceiver(net)
    size = count, of.num_layers, tokens, of.feature_size
    fresh, timed = (torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(net.dtype) for seed in (2, 3))
    with tolerant(COMPILED, skipped):  # whatever the compiler cannot do is a fact about it, and is reported
        ways[COMPILED] = torch.compile(ways["eager"], dynamic=False)
        ways[COMPILED](fresh)
    exact = baselines.perceiver(copy.deepcopy(net).set_dtype(torch.float64))
    errors = generate.adapter_errors(exact, ways, fresh, net.dtype, skipped, other="eager", chunk=1)
    del exact
    case = f"{name} bfloat16, {count} context{'s' if count > 1 else ''} of {tokens} tokens"
    calls, wrong = verify(case, {way: functools.partial(ways[way], timed) for way in errors}, errors)
    work = count * flops(of, tokens), timed.nbytes + generate.moved(net, 2 * count)  # a bias beside each chunk
    timings, least = generate.measured(context, calls, "bfloat16", context.threads, *work)
    shape = {"model": name, "variant": of.variant, "dtype": "bfloat16", "contexts": count, "tokens": tokens}
    yield row(context, case, "generate", shape, timings, errors[OURS], skipped=skipped | wrong, least=least, target=GENERATED)


def rows(context: Context) -> Case:
    """Rows of 64 tokens of ``down_proj``, each with an adapter of two chunks and a bias."""
    _, of, _ = config(context)
    layer = Layer("down_proj", (Group.packed(*of.in_features, down=of.out_features[0]),))
    return Case(layer, even(8 * 64, 8), rank=3 * of.rank, label="down_proj 8x64")


def applying(context: Context) -> Iterator[Record]:
    """The op beside products of torch, and the memory that each way takes beyond its operands."""
    case = rows(context)
    for one in apply.lora(context, case, "apply", ["warm"], context.threads):
        yield one | {"target": APPLIED._asdict() if context.full else None}
        ways = [way for way in one["times"] if way in apply.BUILDERS]
    yield record("memory", case=case.name, mib={way: round(apart(added, context.size, way) / 2**20, 1) for way in ways})


def added(size: str, way: str) -> int:
    """Bytes that this process holds at most beyond operands while ``way`` runs again."""
    call = cases.operands(rows(Context.of(size, 1)), apply.CPU, seed=0).one_by_one(apply.BUILDERS[way])
    call()
    before = resident_bytes("VmRSS")
    return peak_bytes(call) - before
