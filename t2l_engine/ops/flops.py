"""FLOP formulas of the ops by name, with which ``torch.utils.flop_counter.FlopCounterMode`` counts them.

Useful work is counted, as in ``docs/ops.md`` under FLOPs, a multiply-add as two operations: LoRA segments at the true rank
of their adapter, tokens of adapter -1 as zero.  A native kernel and the reference count the same.

Ids and ranks are read on the host, which synchronises with a CUDA device: do not count during graph capture.  For fake and
meta tensors, which have no values, every token counts, at the padded rank of A.

>>> import torch
>>> from torch.utils.flop_counter import FlopCounterMode
>>> from t2l_engine import AdapterBatch, ops
>>> x, A, B = torch.randn(3, 16), torch.randn(2, 4, 16), torch.randn(2, 8, 4)
>>> batch = AdapterBatch.from_rows([1, -1, 0], seq_len=1)  # two of three tokens have an adapter
>>> with FlopCounterMode(display=False) as counter:
...     delta = ops.lora_delta(x, A, B, torch.ones(2), batch.seg_indptr, batch.seg_adapters, batch.max_seg_len)
>>> counter.get_total_flops() == 2 * 2 * 4 * (16 + 8)
True
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from torch import Tensor


def _known(tensor: Tensor) -> bool:
    """Whether the values of ``tensor`` can be read: it is not a meta, fake, functional or otherwise wrapped tensor."""
    return type(tensor) is Tensor and not tensor.is_meta


def _rank_tokens(x: Tensor, lora_A: Tensor, seg_indptr: Tensor, seg_adapters: Tensor, ranks: Tensor | None) -> int:
    """Sum of tokens times true rank over the segments that have an adapter."""
    width = lora_A.shape[1]
    if not all(_known(tensor) for tensor in (seg_indptr, seg_adapters, ranks) if tensor is not None):
        return math.prod(x.shape[:-1]) * width
    widths = [width] * lora_A.shape[0] if ranks is None else ranks.tolist()
    lengths = (end - first for first, end in itertools.pairwise(seg_indptr.tolist()))
    segments = zip(lengths, seg_adapters.tolist(), strict=True)
    return sum(length * widths[adapter] for length, adapter in segments if 0 <= adapter < len(widths))


def lora_delta(x, lora_A, lora_B, scaling, seg_indptr, seg_adapters, max_seg_len, ranks, **_) -> int:
    """``2 * sum(len_s * rank_s) * (in + out)``."""
    return 2 * _rank_tokens(x, lora_A, seg_indptr, seg_adapters, ranks) * (lora_A.shape[2] + lora_B.shape[1])


def lora_add_(y, x, lora_A, lora_B, scaling, seg_indptr, seg_adapters, max_seg_len, ranks, bad_ids=None, **_) -> int:
    return lora_delta(x, lora_A, lora_B, scaling, seg_indptr, seg_adapters, max_seg_len, ranks)


def lora_add_group_(
    y, x, lora_A, lora_B, scaling, seg_indptr, seg_adapters, max_seg_len, ranks, offsets, bad_ids=None, **_
) -> int:
    linears = zip(lora_A, lora_B, ranks, strict=True)
    return sum(lora_delta(x, A, B, scaling, seg_indptr, seg_adapters, max_seg_len, r) for A, B, r in linears)


def lora_backward_(grad_x, grad, x, lora_A, lora_B, scaling, seg_indptr, seg_adapters, max_seg_len, ranks, **_) -> int:
    """``2 * sum(len_s * rank_s) * (3*in + 2*out)``: A x is recomputed, then the products of three gradients."""
    work = _rank_tokens(x, lora_A, seg_indptr, seg_adapters, ranks)
    return 2 * work * (3 * lora_A.shape[2] + 2 * lora_B.shape[1])


def hypernet_trunk(z, weights, side_emb, pos_emb, rotary_ranks, encoder=(), **_) -> int:
    """``2*N*t*4m + N*K*n*m * (24*m + 16*m*S + 8*(m + h)*S*R)``, plus ``16*m*m * N*K*n*S*R`` with rotary positions, plus
    ``2*N*e*t`` with an encoder."""
    (tasks, width), (modules, layers, hidden), h, t = z.shape, weights[1].shape, weights[-1].shape[0], weights[0].shape[1]
    m, sides = hidden // 4, 1 if side_emb is None else side_emb.shape[1]
    latent_rows = rotary_ranks or (1 if pos_emb is None else pos_emb.shape[0])
    row = 24 * m + 16 * m * sides + 8 * (m + h) * sides * latent_rows + (16 * m * sides * latent_rows if rotary_ranks else 0)
    encoding = 2 * tasks * width * t if len(encoder) else 0
    return encoding + 2 * tasks * t * hidden + tasks * modules * layers * m * row


def hypernet_heads(
    latent, weight, bias, mul_A, add_A, mul_B, add_B, rank: int, in_features: Sequence[int], out_features: Sequence[int], **_
) -> int:
    """``2*N*n*r*h*(in + out)`` per module."""
    tasks, *_, layers, h = latent.shape
    return 2 * tasks * layers * rank * h * (sum(in_features) + sum(out_features))


def hypernet_heads_out_(lora_A, lora_B, *args, out_val=None) -> int:
    *heads, _scale_B = args
    return hypernet_heads(*heads)


def hypernet_trunk_backward(grad, *args, **kwargs) -> int:
    """Three times the forward op: it is recomputed, and each of its products has two in the backward."""
    return 3 * hypernet_trunk(*args, **kwargs)


def hypernet_heads_backward(grads, latent, weight, bias, mul_A, mul_B, *sizes, **_) -> int:
    """Twice the forward op: each product has two in the backward, and none is recomputed."""
    return 2 * hypernet_heads(latent, weight, bias, mul_A, None, mul_B, None, *sizes)
