"""Every op against its oracle: what tests and the self-check compare, by op and case.

A check runs an op on one case and returns the largest error of its results, as a fraction of the allowed one.
It raises RuntimeError for a result of another shape, dtype or layout, and for memory that was written beside the results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from t2l_engine import ops
from t2l_engine.ops import reference
from t2l_engine.testing import numerics, oracle
from t2l_engine.testing.cases import F32, F64, GROUP_CASES, HYPER_CASES, LORA_CASES, GroupCase, HyperCase, LoraCase


def error_ratio(got: Tensor, exact: Tensor, bound: Tensor | float) -> float:
    """The largest error over the allowed one; infinite if shapes differ or only one of two values is finite."""
    if got.shape != exact.shape:
        return float("inf")
    error = (got.double() - exact).abs()
    ratio = torch.where(error == 0, 0.0, error / bound)
    return float(ratio.nan_to_num(nan=float("inf")).max()) if ratio.numel() else 0.0


def _expect(holds: bool, what: str) -> None:
    if not holds:
        raise RuntimeError(f"expected {what}")


def _buffer(view: Tensor) -> Tensor:
    """The tensor that ``view`` is a part of."""
    return view if view._base is None else view._base


def _beside(view: Tensor) -> Tensor:
    """A copy of the buffer of ``view``, with zeros in place of ``view`` and of NaN."""
    copy = _buffer(view).clone()
    copy.as_strided(view.shape, view.stride(), view.storage_offset()).zero_()
    return copy.nan_to_num_()


# --- LoRA ------------------------------------------------------------------------------------------------------------


def lora_add_(case: LoraCase) -> float:
    """Also: rows of the base model keep their bits."""
    arguments = case.make(seed=1)
    exact, _, bound = oracle.lora(arguments)
    y = arguments["y"]
    before, beside = y.clone(), _beside(y)
    _expect(ops.lora_add_(**arguments) is y, "y itself")
    base_rows = torch.repeat_interleave(arguments["seg_adapters"] < 0, arguments["seg_indptr"].diff())
    _expect(torch.equal(y[base_rows], before[base_rows]), "rows of adapter -1 to keep their bits")
    _expect(torch.equal(_beside(y), beside), "nothing to be written beside y")
    return error_ratio(y, exact, bound)


def lora_add_group_(case: GroupCase) -> float:
    """Also: the bits of one linear after the other, and the columns between problems are left alone."""
    arguments, alone = case.make(seed=2), case.make(seed=2)
    exact = [oracle.lora(problem) for problem in oracle.problems_of(arguments)]
    _expect(ops.lora_add_group_(**arguments) is arguments["y"], "y itself")
    for problem in oracle.problems_of(alone):
        ops.lora_add_(**problem)
    same = torch.equal(_buffer(arguments["y"]), _buffer(alone["y"]))
    _expect(same, "the bits of lora_add_ for one problem after the other")
    problems = zip(oracle.problems_of(arguments), exact, strict=True)
    return max(error_ratio(problem["y"], y, bound) for problem, (y, _, bound) in problems)


def lora_delta(case: LoraCase) -> float:
    arguments = case.make(seed=3)
    y = torch.zeros_like(arguments.pop("y"))
    _, exact, bound = oracle.lora(arguments | {"y": y})
    got = ops.lora_delta(**arguments)
    _expect(got.dtype == case.x_dtype and got.is_contiguous(), "a contiguous result in the dtype of x")
    return error_ratio(got, exact, bound)


def lora_backward_(case: LoraCase) -> float:
    arguments = case.make(seed=4)
    grad = arguments.pop("y")
    exact = oracle.gradients(reference.lora_backward_, grad.double(), oracle.in_float64(arguments))
    got = oracle.gradients(torch.ops.t2l_engine.lora_backward_, grad, arguments)
    operands = [arguments[name] for name in ("x", "lora_A", "lora_B")]
    _expect([g.dtype for g in got] == [t.dtype for t in operands], "gradients in the dtypes of the operands")
    stored = (got[2].stride(1) == 1) == (operands[2].stride(1) == 1)
    _expect(stored, "the gradient of lora_B stored as lora_B is")
    return _gradients(got, exact)


def _gradients(got: Iterable[Tensor], exact: Iterable[Tensor]) -> float:
    pairs = zip(got, exact, strict=True)
    return max(error_ratio(g, e, numerics.gradient_bound(e, g.dtype)) for g, e in pairs)


# --- hypernetwork ----------------------------------------------------------------------------------------------------


def hypernet_trunk(case: HyperCase) -> float:
    arguments = case.make_trunk(seed=5)
    return trunk_error(case, arguments, case.make_trunk(seed=5, dtype=F64))


def trunk_error(case: HyperCase, arguments: dict[str, Any], in_float64: dict[str, Any]) -> float:
    """Of one call of the trunk, with an encoder too."""
    got, exact = ops.hypernet_trunk(**arguments), reference.hypernet_trunk(**in_float64)
    _expect(got.shape == exact.shape, f"shape {list(exact.shape)}, got {list(got.shape)}")
    _expect(got.dtype == case.dtype and got.is_contiguous(), "a contiguous result in the dtype of the matrices")
    if not exact.numel():
        return 0.0
    bound = numerics.trunk_bound(exact, reference.hypernet_trunk(**arguments), case.dtype)
    return numerics.relative_frobenius(got, exact) / bound


def hypernet_trunk_backward(case: HyperCase) -> float:
    arguments, exact = (case.make_trunk(seed=6, dtype=dtype) for dtype in (None, F64))
    grad = torch.ones_like(reference.hypernet_trunk(**arguments))
    got = torch.ops.t2l_engine.hypernet_trunk_backward(grad, *arguments.values())
    return _gradients(got, reference.hypernet_trunk_backward(grad.double(), *exact.values()))


def hypernet_heads(case: HyperCase) -> float:
    arguments, exact, magnitude = oracle.heads(case, seed=7)
    lora_A, lora_B = ops.hypernet_heads(**arguments)
    stored = all(a.is_contiguous() and b.mT.is_contiguous() for a, b in zip(lora_A, lora_B, strict=True))
    _expect(stored, "A contiguous, and B a transposed view of contiguous memory")
    _expect({t.dtype for t in (*lora_A, *lora_B)} == {case.dtype}, "results in the dtype of weight")
    return _heads_error((lora_A, lora_B), exact, magnitude, case, case.dtype)


def hypernet_heads_out_(case: HyperCase) -> float:
    """Into slots of other strides for every module, in float32."""
    arguments, exact, magnitude = oracle.heads(case, seed=8)
    slots = [[strided_slot(t.shape, i) for i, t in enumerate(exact[side::2])] for side in range(2)]
    ops.hypernet_heads_out_(*slots, **arguments, scale_B=2.0)
    _expect(not any(_beside(t).any() for side in slots for t in side), "nothing to be written beside the slots")
    scaled = [[t * (2.0 if i % 2 else 1.0) for i, t in enumerate(of)] for of in (exact, magnitude)]
    return _heads_error(slots, *scaled, case, F32)


def strided_slot(shape: torch.Size, module: int) -> Tensor:
    """An output of the heads inside a frame of NaN, with its dimensions stored in an order that differs by ``module``."""
    order = ((0, 1, 2, 3), (0, 1, 3, 2), (1, 0, 2, 3), (3, 2, 1, 0))[module % 4]
    frame = torch.full([shape[d] + 2 + module % 3 for d in order], float("nan"))
    inner = frame[tuple(slice(1, 1 + shape[d]) for d in order)]
    return inner.permute(*(order.index(d) for d in range(4)))


def _heads_error(sides: Any, exact: list[Tensor], magnitude: list[Tensor], case: HyperCase, dtype: torch.dtype) -> float:
    bounds = (numerics.head_bound(m, e, case.head_in, dtype) for m, e in zip(magnitude, exact, strict=True))
    got = (sides[i % 2][i // 2] for i in range(len(exact)))
    return max(map(error_ratio, got, exact, bounds))


def hypernet_heads_backward(case: HyperCase) -> float:
    arguments, exact = (case.make_heads(seed=9, dtype=dtype) for dtype in (None, F64))
    names = ("latent", "weight", "bias", "mul_A", "mul_B", "rank", "in_features", "out_features")

    def call(function: Callable, given: dict[str, Any]) -> list[Tensor]:
        grads = [torch.ones_like(side) for side in reference.hypernet_heads(**given)]
        return function(grads, *(given[name] for name in names))

    op = torch.ops.t2l_engine.hypernet_heads_backward
    return _gradients(call(op, arguments), call(reference.hypernet_heads_backward, exact))


_F32_HYPER = [case for case in HYPER_CASES if case.dtype == F32 and case.tasks]
#: Op -> its check, and its cases.
CHECKS: dict[str, tuple[Callable[[Any], float], list]] = {
    "hypernet_trunk": (hypernet_trunk, list(HYPER_CASES)),
    "hypernet_trunk_backward": (hypernet_trunk_backward, _F32_HYPER),
    "hypernet_heads": (hypernet_heads, list(HYPER_CASES)),
    "hypernet_heads_out_": (hypernet_heads_out_, list(HYPER_CASES)),
    "hypernet_heads_backward": (hypernet_heads_backward, [case for case in _F32_HYPER if case.bias]),
    "lora_delta": (lora_delta, list(LORA_CASES)),
    "lora_backward_": (lora_backward_, list(LORA_CASES)),
    "lora_add_": (lora_add_, list(LORA_CASES)),
    "lora_add_group_": (lora_add_group_, list(GROUP_CASES)),
}
