"""A linear with its adapters, as a layer of an attached model: its own product is in the time, and PEFT beside it."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

import t2l_engine as t2l
from bench.baselines import PEFT_ABSENT, peft_linear, token_ids
from bench.gpu import cases, results
from bench.gpu.cases import LAYERS, Arguments, Case, Group, Layer, even, rows
from bench.gpu.context import Context
from bench.gpu.lora import need_kernels
from bench.gpu.tables import AS_IT_COMES, EAGER
from bench.gpu.timing import Call, Candidate, first_line, measure, tolerant
from bench.harness import OURS, Error, admit
from bench.rows import BASE
from t2l_engine.ops import reference
from t2l_engine.testing import numerics
from t2l_engine.testing.oracle import in_float64

TINY = Layer("tiny linear", (Group.packed(64, q=64),))


def run(context: Context) -> None:
    need_kernels(context, "lora_add_")
    layer = LAYERS["linear"] if context.on_card else TINY
    sizes = [rows(*range(64)), rows(0), rows(*range(8)), rows(*[0] * 64), even(512, 8)] if context.on_card else [rows(0, 1)]
    for segments in sizes:
        case = Case(layer, segments, "")
        context.attempt(f"linear, {case.name}", functools.partial(compare, context, case), needs=4.0)


def attached(linear: nn.Linear, member: Arguments) -> nn.Module:
    """What ``attach`` makes of ``linear``, with the adapters and segments of ``member`` in use."""
    model = nn.ModuleList([nn.ModuleDict({"q_proj": linear})])
    lora_A, lora_B = ({"q_proj": member[name][:, None]} for name in ("lora_A", "lora_B"))
    handle = t2l.attach(model, t2l.AdapterStack(lora_A, lora_B, member["scaling"]))
    handle.set(t2l.AdapterBatch(member["seg_indptr"], member["seg_adapters"], member["max_seg_len"]))
    return model[0]["q_proj"]


def ways(case: Case, linear: nn.Linear, member: Arguments) -> tuple[dict[str, Call], dict[str, str]]:
    """Calls that give ``[T, out]``; why others cannot."""
    x, ours = member["x"], attached(linear, member)
    calls: dict[str, Call] = {OURS: lambda: ours(x), EAGER: lambda: ours(x), BASE: lambda: linear(x)}
    if PEFT_ABSENT:
        return calls, dict.fromkeys(("PEFT mixed", "PEFT single"), PEFT_ABSENT)
    try:
        peft, names = peft_linear(linear, member), [str(i) for i in token_ids(member).tolist()]
    except Exception as error:  # whatever this version of it cannot do
        why = f"{type(error).__name__}: {first_line(error)}"
        return calls, dict.fromkeys(("PEFT mixed", "PEFT single"), why)
    calls["PEFT mixed"] = lambda: peft(x, adapter_names=names)
    if case.adapters > 1:
        return calls, {"PEFT single": "holds one adapter; the batch has several"}
    return calls | {"PEFT single": lambda: peft(x)}, {}


@torch.inference_mode()
def compare(context: Context, case: Case) -> list[tuple[str, dict[str, Any]]]:
    """One row, of one set of operands."""
    device = context.device
    n_in, n_out = case.layer.groups[0].n_in, case.layer.groups[0].out
    linear = nn.Linear(n_in, n_out, bias=False, dtype=case.dtype, device=device.torch).requires_grad_(False)
    linear.weight.normal_(0, n_in**-0.5)
    calls, absent = ways(case, linear, cases.operands(case, device.torch, seed=2).members[0])
    errors = _errors(context, case, linear, absent)
    calls, wrong = admit(case.name, {name: call for name, call in calls.items() if name in errors}, errors)
    # What works on the host between launches is called from the host: PEFT looks up its adapters there.
    candidates = {name: Candidate([call], graph=name not in (EAGER, "PEFT mixed")) for name, call in calls.items()}
    seconds = max(0.3, min(2.0, context.left / 8)) if context.on_card else 0.1
    timings = measure(device, candidates, seconds, absent)
    hot = linear.weight.nbytes + case.working_set <= device.l2_bytes
    given = {"cache": "hot" if hot else AS_IT_COMES, "absent": absent | wrong}
    return [results.row(context, case.name, "linear", case.shape(), timings, errors[OURS], **given)]


def _errors(context: Context, case: Case, linear: nn.Linear, absent: dict[str, str]) -> dict[str, Error]:
    """Against the linear's own output in its dtype, to which the adapters are added in float64.

    A rival that throws goes to ``absent``.
    """
    member = cases.operands(case, context.device.torch, seed=1).members[0]
    base = linear(member["x"]).double()
    wide = in_float64(member)
    reference.lora_add_(**(wide | {"y": (exact := base.clone())}))
    calls, _ = ways(case, linear, member)
    bound, errors = numerics.lora_frobenius(case.dtype), {}
    for name, call in calls.items():
        with tolerant(name, absent):
            errors[name] = Error(numerics.relative_frobenius(call(), base if name == BASE else exact), bound)
    return errors
