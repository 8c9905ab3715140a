"""A decode step of a whole 7B-shaped model: without adapters, and with 1, 8 and 64 among its rows."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import t2l_engine as t2l
from bench.gpu import llama, results
from bench.gpu.ceilings import Ceilings, begin
from bench.gpu.context import Context
from bench.gpu.lora import need_kernels
from bench.gpu.tables import AS_IT_COMES
from bench.gpu.timing import Candidate, measure
from bench.harness import OURS, Bar, Error, VerificationError, worst
from bench.rows import BASE
from t2l_engine.lora.layer import LoRALinear
from t2l_engine.ops import reference
from t2l_engine.research.costs import Decoder
from t2l_engine.testing import numerics

#: Tokens that a row has when the step ends: few, so that the base step is short and the adapters' share large.
CONTEXT = 128
_WIDTHS = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 61, "num_hidden_layers": 2}
TINY = Decoder.from_config({"model_type": "llama", **_WIDTHS, "num_attention_heads": 4, "num_key_value_heads": 2})
#: Modules of a set of adapters.
SETS = {
    "q,v": ("q_proj", "v_proj"),
    "all linears": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}
RANK = 8
#: (modules, rows, adapters): in order of worth.
FULL = (("q,v", 64, (1, 8, 64)), ("q,v", 1, (1,)), ("all linears", 64, (64,)), ("q,v", 8, (8,)))
TINY_STEPS = (("q,v", 4, (1, 4)), ("all linears", 2, (2,)))
BAR = Bar(1.08, of=BASE)


def run(context: Context) -> None:
    need_kernels(context, "lora_add_")
    ceilings = begin(context)
    for modules, rows, counts in FULL if context.on_card else TINY_STEPS:
        name = step_name(modules, rows)
        context.attempt(name, functools.partial(steps, context, ceilings, modules, rows, counts), needs=12.0)


def step_name(modules: str, rows: int, adapters: int = 0) -> str:
    """``adapters``: 0 for all numbers of them together."""
    of = f", {adapters} adapter{'s' if adapters > 1 else ''}" if adapters else ""
    return f"decode step, {rows} row{'s' if rows > 1 else ''}, {modules}{of}"


def has_bar(modules: str, adapters: int) -> bool:
    return (modules, adapters) == ("q,v", 64)


def barred() -> list[dict[str, Any]]:
    """The bars of a whole run."""
    all_of = [(modules, rows, n) for modules, rows, counts in FULL for n in counts if has_bar(modules, n)]
    return [results.expected("model", step_name(*one), AS_IT_COMES, BAR) for one in all_of]


def shared(model: nn.Module, own: tuple[str, ...] = ()) -> nn.Module:
    """The same model around the same weights: what is attached to it does not touch ``model``.

    ``own``: modules whose weights are copied, for what is merged into them.
    """
    copied = {id(t) for name, module in model.named_modules() if name.endswith(own) for t in module.parameters()}
    kept = (t for t in itertools.chain(model.parameters(), model.buffers()) if id(t) not in copied)
    return copy.deepcopy(model, {id(t): t for t in kept})


def verified(case: str, error: Error) -> Error:
    """``error``; raises VerificationError where it is beyond its bound."""
    if not error.value <= error.bound:
        raise VerificationError(f"{case}: {error}")
    return error


def random_adapters(model: llama.Llama, names: tuple[str, ...], count: int, seed: int) -> t2l.AdapterStack:
    """Adapters whose deltas are a tenth of a linear's output or so."""
    blocks = model.model.layers
    weight = blocks[0].self_attn.q_proj.weight
    generator = torch.Generator(weight.device).manual_seed(seed)

    def randn(*shape: int, scale: float) -> Tensor:
        drawn = torch.randn(count, len(blocks), *shape, generator=generator, device=weight.device, dtype=weight.dtype)
        return drawn * scale

    lora_A, lora_B = {}, {}
    for name in names:
        parent = blocks[0].mlp if hasattr(blocks[0].mlp, name) else blocks[0].self_attn
        n_out, n_in = getattr(parent, name).weight.shape
        lora_A[name] = randn(RANK, n_in, scale=n_in**-0.5)
        lora_B[name] = randn(RANK, n_out, scale=0.1 * RANK**-0.5).mT
    return t2l.AdapterStack(lora_A, lora_B, torch.ones(count, device=weight.device))


@torch.inference_mode()
def steps(
    context: Context, ceilings: Ceilings, modules: str, rows: int, counts: tuple[int, ...]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """A row for every number of adapters, all beside the same base step."""
    device = context.device
    shape, dtype = (llama.MISTRAL if context.on_card else TINY), torch.bfloat16
    model = llama.make(shape, rows, CONTEXT if context.on_card else 6, device.torch, dtype)
    tokens = torch.randint(shape.vocabulary, (rows, 1), device=device.torch)
    stack = random_adapters(model, SETS[modules], max(counts), seed=9)
    adapted, errors = {}, {}
    for count in counts:
        adapted[count] = shared(model)
        t2l.attach(adapted[count], stack[:count]).set([row % count for row in range(rows)])
        errors[count] = verified(step_name(modules, rows, count), layer_error(adapted[count], tokens))
    adapter_bytes = stack.num_parameters * dtype.itemsize
    del stack
    calls = {BASE: functools.partial(model, tokens)} | {n: functools.partial(m, tokens) for n, m in adapted.items()}
    seconds = 2.0 * len(calls) if context.on_card else 0.05
    timings = measure(device, {str(name): Candidate([call]) for name, call in calls.items()}, seconds)
    # What a step reads: every matrix and the cache once, and of the embeddings a few rows.
    read = sum(t.nbytes for t in (*model.parameters(), *model.buffers())) - model.model.embed_tokens.weight.nbytes
    flops = 2 * sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    for count in counts:
        fields = {"model": "7B-shaped, random", "rows": rows, "adapters": count, "modules": modules, "rank": RANK}
        mine = {OURS: timings[str(count)], BASE: timings[BASE]}
        bar = BAR if has_bar(modules, count) else None
        least = results.floor(ceilings, flops * rows, read + count * adapter_bytes, dtype)
        given = {"cache": AS_IT_COMES, "absent": {}, "least": least, "bar": bar, "unit_us": timings[BASE].median_us}
        yield results.row(context, step_name(modules, rows, count), "model", fields, mine, errors[count], **given)


def layer_error(model: nn.Module, tokens: Tensor) -> Error:
    """The worst error over the adapted linears of the first and last layer, in one step, on the inputs they get there.

    Against the base linear's own output, to which the adapters are added in float64.  ``tokens``: as the model takes them.
    """
    seen: list[tuple[LoRALinear, Tensor, Tensor]] = []

    def note(layer: LoRALinear, inputs: tuple[Tensor], output: Tensor) -> None:
        seen.append((layer, inputs[0].clone(), output.clone()))

    blocks = model.model.layers
    found = [m for block in (blocks[0], blocks[-1]) for m in block.modules() if isinstance(m, LoRALinear)]
    hooks = [layer.register_forward_hook(note) for layer in found]
    model(tokens)
    for hook in hooks:
        hook.remove()
    errors = []
    for layer, x, y in seen:
        (member,) = layer._members
        segments = layer._routing.segments(*tokens.shape)
        exact = layer.base(x).double().flatten(0, 1)
        operands = (x.double().flatten(0, 1), member.lora_A.double(), member.lora_B.double(), member.scaling.double())
        routing = segments.seg_indptr, segments.seg_adapters, segments.max_seg_len, member.ranks
        reference.lora_add_(exact, *operands, *routing)
        errors.append(Error(numerics.relative_frobenius(y.flatten(0, 1), exact), numerics.lora_frobenius(y.dtype)))
    return worst(errors)
