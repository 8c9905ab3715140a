"""The reference of every op in plain torch: defines it, is the oracle of its tests, and runs where no native kernel does.

Numerics: products accumulate in ``acc = promote(operands, float32)``; inputs of a hypernetwork product are first rounded to
the dtype of its weight matrix, so that a bfloat16 reference rounds where a bfloat16 kernel rounds.  With float64 operands
the same code is the oracle: nothing is rounded to a narrower dtype.

An op's function has the arguments of its schema, in ``registry``, whose wrappers say what they are.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from t2l_engine.ops.segments import check_segments

#: Order of the ``weights`` of ``hypernet_trunk``.  Matrices may be float32, bfloat16, ...; vectors are float32 (or
#: float64).  t: task width, m: trunk width, K: modules, n: layers, h: head input width.
TRUNK_WEIGHTS = (
    "mixer_task_weight",  # [4m, t]   the columns of the first mixer matrix for the encoded task
    "mixer_table",  # [K, n, 4m] its product with depth and module embeddings, plus its bias: constants
    "mixer_weight2",  # [m, 4m]
    "mixer_bias2",  # [m]
    *(
        f"mlp{i}_{name}"  # norm [m], [m]; weight1 [4m, m]; bias1 [4m]; weight2 [m, 4m] ([h, 4m] in mlp3); bias2
        for i in (1, 2, 3)
        for name in ("norm_weight", "norm_bias", "weight1", "bias1", "weight2", "bias2")
    ),
)

#: Dtypes that matrices and results may have.
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

LAYER_NORM_EPS = 1e-5
ROPE_BASE = 10000.0


def fail(op: str, argument: str, expected: str, got: object) -> NoReturn:
    """Raise RuntimeError with the message of the native kernels."""
    raise RuntimeError(f"t2l_engine::{op}: {argument}: expected {expected}, got {got}")


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Ops in the block have the dtypes of their operands on ``device``, also where the caller has autocast on."""
    on = device.type in ("cpu", "cuda") and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else contextlib.nullcontext()


def at_own_precision(function: Callable) -> Callable:
    """``function`` with autocast off on the device of its first tensor: an op rounds as it says, wherever it is called."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        listed = (value if isinstance(value, (list, tuple)) else [value] for value in (*args, *kwargs.values()))
        first = next(t for values in listed for t in values if isinstance(t, Tensor))
        with without_autocast(first.device):
            return function(*args, **kwargs)

    return run


def accumulation_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any operand is float64, else float32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` with ``x`` rounded to the weight's dtype and accumulation in float32 or float64."""
    acc = accumulation_dtype(x, weight)
    if weight.dtype.itemsize < 4:
        x = x.to(weight.dtype)
    # Flattened: matmul would broadcast (copy) the weight over the leading dimensions of x.
    y = (x.to(acc).flatten(0, -2) @ weight.to(acc).mT).unflatten(0, x.shape[:-1])
    return y if bias is None else y + bias


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """LayerNorm over the last dimension, eps 1e-5."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, LAYER_NORM_EPS)


def mlp(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """``silu(W2 silu(W1 LN(x) + b1) + b2)``: the branch of a residual block, and all of mlp3."""
    hidden = F.silu(linear(layer_norm(x, norm_weight, norm_bias), w1, b1))
    return F.silu(linear(hidden, w2, b2))


def rope(x: Tensor, num_positions: int) -> Tensor:
    """Rotate ``x [..., m]`` to positions 0 .. ``num_positions`` - 1: ``[..., num_positions, m]`` (half-split, base 1e4)."""
    m = x.shape[-1]
    inv_freq = ROPE_BASE ** (-torch.arange(0, m, 2, dtype=x.dtype, device=x.device) / m)
    angles = torch.arange(num_positions, dtype=x.dtype, device=x.device)[:, None] * inv_freq
    angles = torch.cat((angles, angles), dim=-1)
    rotated = torch.cat((-x[..., m // 2 :], x[..., : m // 2]), dim=-1)
    return x.unsqueeze(-2) * angles.cos() + rotated.unsqueeze(-2) * angles.sin()


def _trunk_base(z: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]:
    """``x [N, K, n, m]`` after mixer and mlp1, and the weights of mlp2 and mlp3."""
    w_task, table, w2, b2 = weights[:4]
    mlp1, mlp2, mlp3 = (weights[4 + 6 * i : 10 + 6 * i] for i in range(3))
    first = linear(z, w_task)[:, None, None, :] + table  # [N, K, n, 4m]
    x = F.silu(linear(F.silu(first), w2, b2))
    return x + mlp(x, *mlp1), mlp2, mlp3


def encode_task(task_emb: Tensor, encoder: Sequence[Tensor]) -> Tensor:
    """The linear task encoder ``LN(W e + b)`` of ``[N, e]``, as the argument ``encoder`` of :func:`hypernet_trunk`."""
    weight, bias, norm_weight, norm_bias = encoder
    return layer_norm(F.linear(task_emb, weight, bias), norm_weight, norm_bias)


def hypernet_trunk(z, weights, side_emb, pos_emb, rotary_ranks, encoder=()) -> Tensor:
    z = encode_task(z, encoder) if len(encoder) else z
    x, mlp2, mlp3 = _trunk_base(z, weights)
    x = x[:, :, None] if side_emb is None else x[:, :, None] + side_emb[None, :, :, None, :]  # [N, K, S, n, m]
    x = x + mlp(x, *mlp2)
    if rotary_ranks:
        x = rope(x, rotary_ranks)  # [N, K, S, n, R, m]
        x = (x + mlp(x, *mlp2)).transpose(3, 4)
    elif pos_emb is not None:
        x = x[:, :, :, None] + pos_emb[:, None, :]
    else:
        x = x[:, :, :, None]
    return mlp(x, *mlp3).to(weights[0].dtype)  # [N, K, S, R, n, h]


def autoregressive_trunk(z: Tensor, weights: Sequence[Tensor], pos_emb: Tensor | None, rotary_ranks: int) -> Tensor:
    """The trunk of the variants with unshared autoregressive heads, ``[N, K, 1, R, n, h]``; no released checkpoint has them.

    The rank's position is applied before mlp2: ``pos_emb [R, m]`` is added, or, if that is None, a rotation to
    ``rotary_ranks`` positions.  Other arguments as in :func:`hypernet_trunk`.
    """
    x, mlp2, mlp3 = _trunk_base(z, weights)
    x = rope(x, rotary_ranks) if pos_emb is None else x[..., None, :] + pos_emb  # [N, K, n, R, m]
    x = x + mlp(x, *mlp2)
    return mlp(x, *mlp3).to(weights[0].dtype).transpose(2, 3)[:, :, None]


@contextlib.contextmanager
def _recording() -> Iterator[None]:
    """Enable autograd for a recomputation.  Under a dispatch mode, such as torch's FLOP counter, an op runs with autograd's
    dispatch keys excluded, where ``enable_grad`` alone records nothing."""
    allow, keys = torch._C._SetExcludeDispatchKeyGuard, torch._C.DispatchKey
    with torch.enable_grad(), allow(keys.AutogradFunctionality, False), allow(keys.ADInplaceOrView, False):
        yield


def hypernet_trunk_backward(grad, z, weights, side_emb, pos_emb, rotary_ranks) -> list[Tensor]:
    """Gradients of ``z``, every weight, and ``side_emb`` and ``pos_emb`` unless None, by recomputation."""
    with _recording():
        inputs = [t.detach().requires_grad_() for t in (z, *weights, side_emb, pos_emb) if t is not None]
        rest = inputs[1 + len(weights) :]
        side = rest.pop(0) if side_emb is not None else None
        pos = rest.pop(0) if pos_emb is not None else None
        out = hypernet_trunk(inputs[0], inputs[1 : 1 + len(weights)], side, pos, rotary_ranks)
        grads = torch.autograd.grad(out, inputs, grad)
    return [g.clone() if g._is_view() else g for g in grads]


def head_sides(weight: Tensor, bias: Tensor | None, sides: int, ranks_per_row: int, in_features: int, out_features: int):
    """Views of a head's A and B parts: two pairs of weight ``[p, width, h]`` and bias ``[p, width]`` (or None).

    A shared head (two sides) uses the first ``width`` of every ``max(in, out)`` rows for both sides; an unshared one has
    all rows of A, then all rows of B.
    """
    p, h = ranks_per_row, weight.shape[1]
    parts = []
    for width, start in ((in_features, 0), (out_features, p * in_features)):
        if sides == 2:
            stride, start = max(in_features, out_features), 0
        else:
            stride = width
        rows = slice(start, start + p * stride)
        parts.append(
            (
                weight[rows].view(p, stride, h)[:, :width],
                None if bias is None else bias[rows].view(p, stride)[:, :width],
            )
        )
    return parts


def _heads(
    latent, weight, bias, mul_A, add_A, mul_B, add_B, rank, in_features, out_features
) -> Iterator[tuple[Tensor, Tensor]]:
    """A ``[N, n, r, in]`` and B transposed ``[N, n, r, out]`` of each module, not yet rounded to the result's dtype."""
    num_tasks, num_modules, sides, latent_rows, num_layers, _ = latent.shape
    p = rank // latent_rows
    muls, adds = zip(mul_A, mul_B, strict=True), zip(add_A, add_B, strict=True)
    modules = zip(weight, bias or [None] * num_modules, muls, adds, in_features, out_features, strict=True)
    for i, (w, b, mul, add, n_in, n_out) in enumerate(modules):
        out = []
        for side, (rows, row_bias) in enumerate(head_sides(w, b, sides, p, n_in, n_out)):
            width = rows.shape[1]
            y = linear(latent[:, i, side if sides == 2 else 0], rows.reshape(p * width, -1))  # [N, R, n, p * width]
            y = y.view(num_tasks, latent_rows, num_layers, p, width)
            if row_bias is not None:
                y = y + row_bias
            y = y.permute(0, 2, 1, 3, 4).reshape(num_tasks, num_layers, rank, width)
            if (factor := mul[side]) is not None:
                y = y * (factor.mT if side else factor)
            if (offset := add[side]) is not None:
                y = y + (offset.mT if side else offset)
            out.append(y)
        yield out[0], out[1]


def hypernet_heads(latent, weight, bias, mul_A, add_A, mul_B, add_B, rank, in_features, out_features) -> list[Tensor]:
    """``[A_0, B_0, A_1, B_1, ...]``; ``bias`` may be empty."""
    sides, dtype = _heads(latent, weight, bias, mul_A, add_A, mul_B, add_B, rank, in_features, out_features), weight[0].dtype
    return [t for A, B in sides for t in (A.to(dtype).contiguous(), B.to(dtype).contiguous().mT)]


def hypernet_heads_backward(grads, latent, weight, bias, mul_A, mul_B, rank, in_features, out_features) -> list[Tensor]:
    """Gradients of ``latent``, every ``weight`` and every ``bias``, one module at a time.

    ``grads``: of the results of :func:`hypernet_heads`, in its order.  With G the gradients of a head's output rows, those
    of ``latent`` are G W, of ``weight`` G^T latent, of ``bias`` the sum of G.  Products accumulate in float32 or float64;
    of operands in a narrower dtype each is rounded to it, for ``latent`` one a side, which are then added up.
    """
    acc = accumulation_dtype(latent, *weight)
    num_tasks, _, sides, latent_rows, num_layers, h = latent.shape
    p = rank // latent_rows
    grad_latent = torch.zeros(latent.shape, dtype=acc, device=latent.device)
    grad_weight, grad_bias = [], []
    for i, (w, *muls, n_in, n_out) in enumerate(zip(weight, mul_A, mul_B, in_features, out_features, strict=True)):
        dtype = w.dtype if sides == 1 and muls == [None, None] else acc
        of_weight, of_bias = torch.zeros_like(w, dtype=acc), torch.zeros(len(w), dtype=acc, device=w.device)
        parts, made = (head_sides(*of, sides, p, n_in, n_out) for of in ((w, None), (of_weight, of_bias)))
        for side, (mul, (part, _), (made_weight, made_bias)) in enumerate(zip(muls, parts, made, strict=True)):
            at, grad = (side if sides == 2 else 0), grads[2 * i + side]
            grad = grad.mT if side else grad  # [N, n, r, width]
            if mul is not None:
                grad = grad.to(acc) * (mul.mT if side else mul)
            width = part.shape[1]
            G = grad.reshape(num_tasks, num_layers, latent_rows, p * width).transpose(1, 2).reshape(-1, p * width)
            x = latent[:, i, at].reshape(-1, h).to(w.dtype)  # as the forward op rounds it
            grad_latent[:, i, at] += (G.to(dtype) @ part.reshape(p * width, h).to(dtype)).view(latent[:, i, at].shape)
            made_weight += (G.to(dtype).mT @ x.to(dtype)).view(p, width, h)
            made_bias += G.sum(dim=0, dtype=acc).view(p, width)
        grad_weight.append(of_weight.to(w.dtype))
        grad_bias += [of_bias.to(b.dtype) for b in bias[i : i + 1]]
    return [grad_latent.to(latent.dtype), *grad_weight, *grad_bias]


def _check_output(name: str, t: Tensor) -> None:
    if t.dtype not in FLOATING:
        got = str(t.dtype).removeprefix("torch.")
        fail("hypernet_heads_out_", name, "float32, bfloat16, float16 or float64", got)
    reach = 1  # elements that smaller strides span
    for stride, d in sorted((stride, d) for d, stride in enumerate(t.stride()) if t.shape[d] > 1):
        if stride < reach:
            got = f"stride {stride} at dimension {d}, where smaller ones span {reach}"
            fail("hypernet_heads_out_", name, "strides that do not overlap", got)
        reach += stride * (t.shape[d] - 1)


def hypernet_heads_out_(
    lora_A, lora_B, latent, weight, bias, mul_A, add_A, mul_B, add_B, rank, in_features, out_features, scale_B
) -> None:
    for name, tensors in (("lora_A", lora_A), ("lora_B", lora_B)):
        for i, t in enumerate(tensors):
            _check_output(f"{name}[{i}]", t)
    sides = _heads(latent, weight, bias, mul_A, add_A, mul_B, add_B, rank, in_features, out_features)
    for A, B, (made_A, made_B) in zip(lora_A, lora_B, sides, strict=True):
        A.copy_(made_A)
        B.copy_((made_B * scale_B).mT)


def _tokens(x: Tensor) -> Tensor:
    """A view ``[T, features]`` of ``[..., features]``."""
    return x.view(math.prod(x.shape[:-1]), x.shape[-1])


def _segments(
    seg_indptr: Tensor, seg_adapters: Tensor, max_seg_len: int, ranks: Tensor | None, lora_A: Tensor, num_tokens: int
):
    """(first token, end token, adapter, rank) of every segment that is not empty and has an adapter of rank > 0."""
    bounds, adapters = seg_indptr.tolist(), seg_adapters.tolist()
    num_adapters, width = lora_A.shape[:2]
    check_segments(bounds, len(adapters), max_seg_len)
    if bounds[-1] != num_tokens:
        raise RuntimeError(f"seg_indptr: expected the number of tokens {num_tokens} last, got {bounds[-1]}")
    widths = [width] * num_adapters if ranks is None else ranks.tolist()
    if len(widths) != num_adapters:
        raise RuntimeError(f"ranks: expected shape [{num_adapters}], got [{len(widths)}]")
    for values, low, high, expected, unit in (
        (widths, 0, width, f"ranks: expected values in [0, {width}]", "adapter"),
        (adapters, -1, num_adapters - 1, f"seg_adapters: expected ids in [-1, {num_adapters})", "segment"),
    ):
        wrong = [i for i, value in enumerate(values) if not low <= value <= high]
        if wrong:
            raise RuntimeError(f"{expected}, got {values[wrong[0]]} at {unit} {wrong[0]}")
    for i, adapter in enumerate(adapters):
        if adapter >= 0 and widths[adapter] > 0 and bounds[i + 1] > bounds[i]:
            yield bounds[i], bounds[i + 1], adapter, widths[adapter]


def lora_delta(x, lora_A, lora_B, scaling, seg_indptr, seg_adapters, max_seg_len, ranks) -> Tensor:
    delta = x.new_zeros(*x.shape[:-1], lora_B.shape[1], dtype=accumulation_dtype(x, lora_A))
    _add(x, [(delta, lora_A, lora_B, ranks)], scaling, seg_indptr, seg_adapters, max_seg_len, None)
    return delta.to(x.dtype)


def lora_add_(y, x, lora_A, lora_B, scaling, seg_indptr, seg_adapters, max_seg_len, ranks, bad_ids=None) -> None:
    _add(x, [(y, lora_A, lora_B, ranks)], scaling, seg_indptr, seg_adapters, max_seg_len, bad_ids)


def lora_add_group_(
    y, x, lora_A, lora_B, scaling, seg_indptr, seg_adapters, max_seg_len, ranks, offsets, bad_ids=None
) -> None:
    columns = [y[..., start : start + B.shape[1]] for B, start in zip(lora_B, offsets, strict=True)]
    linears = list(zip(columns, lora_A, lora_B, ranks, strict=True))
    _add(x, linears, scaling, seg_indptr, seg_adapters, max_seg_len, bad_ids)


def _add(x, linears, scaling, seg_indptr, seg_adapters, max_seg_len, bad_ids) -> None:
    """``linears``: y, A, B and ranks of each.  Nothing is written or counted before all are checked."""
    x, bad = _tokens(x), (seg_adapters < -1) | (seg_adapters >= len(linears[0][1]))
    if bad_ids is not None:
        seg_adapters = seg_adapters.masked_fill(bad, -1)
    segments = seg_indptr, seg_adapters, max_seg_len
    used = [list(_segments(*segments, ranks, lora_A, len(x))) for _, lora_A, _, ranks in linears]
    if bad_ids is not None:
        bad_ids += bad.sum()
    for (y, lora_A, lora_B, _), of in zip(linears, used, strict=True):
        acc, y = accumulation_dtype(x, lora_A), _tokens(y)
        for lo, hi, a, r in of:
            v = (x[lo:hi].to(acc) @ lora_A[a, :r].to(acc).mT) * scaling[a].to(acc)
            y[lo:hi] = (y[lo:hi].to(acc) + v @ lora_B[a, :, :r].to(acc).mT).to(y.dtype)


def stored_as(lora_B: Tensor, new: Callable[..., Tensor]) -> Tensor:
    """A tensor made by ``new`` with the shape and memory order of ``lora_B``: transposed ``[.., r, out]``, or contiguous."""
    num_adapters, out_features, rank = lora_B.shape
    if lora_B.stride(1) == 1:
        return new((num_adapters, rank, out_features)).mT
    return new(lora_B.shape)


def lora_backward_(
    grad_x, grad, x, lora_A, lora_B, scaling, seg_indptr, seg_adapters, max_seg_len, ranks
) -> tuple[Tensor, Tensor]:
    """Gradients of ``lora_A`` and ``lora_B`` (in its memory order), zero for adapters that no segment uses.

    ``grad_x``, of the shape and dtype of ``x`` and contiguous, gets the gradient of ``x`` added.
    """
    acc = accumulation_dtype(x, lora_A)
    grad_x, grad, x = _tokens(grad_x), _tokens(grad), _tokens(x)
    grad_A = torch.zeros(lora_A.shape, dtype=acc, device=x.device)
    grad_B = stored_as(lora_B, functools.partial(torch.zeros, dtype=acc, device=x.device))
    for lo, hi, a, r in _segments(seg_indptr, seg_adapters, max_seg_len, ranks, lora_A, len(x)):
        g, xs, A, B = grad[lo:hi].to(acc), x[lo:hi].to(acc), lora_A[a, :r].to(acc), lora_B[a, :, :r].to(acc)
        s = scaling[a].to(acc)
        v = (xs @ A.mT) * s
        grad_v = (g @ B) * s
        grad_x[lo:hi] = (grad_x[lo:hi].to(acc) + grad_v @ A).to(x.dtype)
        grad_A[a, :r] += grad_v.mT @ xs
        grad_B[a, :, :r] += g.mT @ v
    return grad_A.to(lora_A.dtype), grad_B.to(lora_B.dtype)
