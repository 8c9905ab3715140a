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
from tests import networks

#: Of a context.
TOKENS = 256
#: The target of applying: SakanaAI's code repeats A and B for every token before two products.
GENERATED, APPLIED = Target(1.5), Target(0.1, of="gather bmm")


def plan(context: Context) -> list[Task]:
    context.only("cpu", "documents")
    generated = [Task.of(f"generate {count}", generation, context, count) for count in (1, 8)]
    return [Task.of("apply", applying, context), *generated]


def flops(config: PerceiverConfig) -> int:
    """Of the matrix products of one context, as torch counts them."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        states = torch.empty(1, config.num_layers, TOKENS, config.feature_size)
        baselines.perceiver(PerceiverHyperNetwork(config))(states)
    return counter.get_total_flops()


@torch.no_grad()
def generation(context: Context, count: int) -> Iterator[Record]:
    """Adapters of ``count`` contexts of one chunk, from hidden states of all layers."""
    name, config = ("gemma-2-2b", networks.PERCEIVER) if context.full else ("tiny", networks.TINY_PERCEIVER)
    net, mask, skipped = networks.perceiver(config), torch.ones(count, TOKENS, dtype=torch.bool), {}
    ways = {OURS: lambda states: baselines.sides(net.generate(net.latents(states, mask).split(1)))}
    ways["eager"] = baselines.perceiver(net)
    size = count, config.num_layers, TOKENS, config.feature_size
    fresh, timed = (torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(net.dtype) for seed in (2, 3))
    with tolerant(COMPILED, skipped):
        if context.full:  # compiling takes longer than all that is tiny
            ways[COMPILED] = torch.compile(ways["eager"], dynamic=False)
            ways[COMPILED](fresh)
    exact = baselines.perceiver(copy.deepcopy(net).set_dtype(torch.float64))
    errors = generate.adapter_errors(exact, ways, fresh, net.dtype, skipped, other="eager", chunk=1)
    del exact
    case = f"{name} bfloat16, {count} context{'s' if count > 1 else ''} of {TOKENS} tokens"
    calls, wrong = verify(case, {way: functools.partial(ways[way], timed) for way in errors}, errors)
    work = count * flops(config), timed.nbytes + generate.moved(net, 2 * count)  # a bias beside each chunk
    timings, least = generate.measured(context, calls, "bfloat16", context.threads, *work)
    shape = {"model": name, "variant": config.variant, "dtype": "bfloat16", "contexts": count, "tokens": TOKENS}
    given = {"skipped": skipped | wrong, "least": least, "target": GENERATED}
    yield row(context, case, "generate", shape, timings, errors[OURS], **given)


def rows(full: bool) -> Case:
    """Rows of 64 tokens, each with the adapter of two chunks and a bias."""
    of = networks.PERCEIVER if full else networks.TINY_PERCEIVER
    layer = Layer("down_proj", (Group.packed(*of.in_features, down=of.out_features[0]),))
    return Case(layer, even(8 * 64, 8), rank=3 * of.rank, label="down_proj 8x64")


def applying(context: Context) -> Iterator[Record]:
    """The op beside products of torch; MiB that each way takes beyond its operands."""
    case, found = rows(context.full), {}
    for one in apply.lora(context, case, "apply", ["warm"], context.threads):
        yield one | {"target": APPLIED._asdict() if context.full else None}
        found = {way: apart(added, context.full, way) for way in one["times"]}
    yield record("memory", case=case.name, mib={way: round(size / 2**20, 1) for way, size in found.items()})


def added(full: bool, way: str) -> int:
    """Bytes that this process holds at most beyond what it held before while ``way`` runs for the second time."""
    call = cases.operands(rows(full), apply.CPU, seed=0).one_by_one(apply.BUILDERS[way])
    call()
    before = resident_bytes("VmRSS")
    return peak_bytes(call) - before
