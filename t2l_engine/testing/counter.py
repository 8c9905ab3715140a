"""What torch's counter makes of whole models: the measure that closed forms are held to.

The stock counter takes attention as it finds it: nothing for the fused kernel of the CPU, all pairs of queries and keys for
the fused kernels of a GPU and for plain products, though a causal mask keeps about half.  Here attention counts the pairs
that are kept, whichever kernel runs it.  It also takes positions times frequencies for matrix products, as some releases of
transformers write rotary embeddings: batched products over one term add nothing up, and do not count.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

#: A closed form may differ from the counter by this share, where it is not equal: less than what two runs of one measurement
#: differ by, so that no comparison of costs turns on it.
COUNT_RTOL = 0.01


def counted(function: Callable[[], object]) -> int:
    """Operations of ``function``, which runs without gradients: products (two a multiply-add), and our ops.

    Attention is what ``scaled_dot_product_attention`` is called for.  A model that multiplies queries and keys itself (eager
    attention) counts the full square, mask or not.

    >>> q = torch.zeros(1, 2, 5, 4)  # one row, two heads: causal, each keeps 15 of 25 pairs
    >>> counted(lambda: F.scaled_dot_product_attention(q, q, q, is_causal=True)) == 2 * 15 * 2 * (4 + 4)
    True
    """
    formulas = {torch.ops.aten._grouped_mm: _grouped_mm, torch.ops.aten.bmm: _bmm}
    counter = FlopCounterMode(display=False, custom_mapping=formulas)
    with torch.no_grad(), counter, _Attention(counter) as attention:
        function()
    return counter.get_total_flops() + attention.kept - attention.as_found


class _Attention(TorchFunctionMode):
    """``kept``: operations of the pairs that masks kept; ``as_found``: what ``counter`` took the same calls for."""

    def __init__(self, counter: FlopCounterMode):
        self.counter, self.kept, self.as_found = counter, 0, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        before = self.counter.get_total_flops()
        out = func(*args, **kwargs)
        self.as_found += self.counter.get_total_flops() - before
        self.kept += _attention(*args, **kwargs)
        return out


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p=0.0, is_causal: bool = False, **_
) -> int:
    """Two products for every pair that is kept, in every row and head of ``query``, whose heads may share keys.

    ``is_causal`` is torch's: query i sees keys 0 to i, also where there are more keys than queries.
    """
    queries, keys = query.shape[-2], key.shape[-2]
    if attn_mask is not None:
        keep = attn_mask if attn_mask.dtype == torch.bool else attn_mask > torch.finfo(attn_mask.dtype).min
        pairs = int(keep.broadcast_to(*query.shape[:-1], keys).sum())
    else:
        seen = sum(min(i + 1, keys) for i in range(queries)) if is_causal else queries * keys
        pairs = query.shape[:-2].numel() * seen
    return 2 * pairs * (query.shape[-1] + value.shape[-1])


def _bmm(left_shape, right_shape, *_, **__) -> int:
    batch, rows, inner = left_shape
    return 2 * batch * rows * inner * right_shape[-1] if inner > 1 else 0


def _grouped_mm(x_shape, weight_shape, *_, **__) -> int:
    """Rows times the matrix of their group, as mixtures of experts multiply; torch has no formula for it."""
    rows, inner = x_shape
    return 2 * rows * inner * weight_shape[-1]
