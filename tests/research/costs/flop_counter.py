"""FLOPs of whole models by ``torch.utils.flop_counter`` with corrections, to verify the closed forms.

The stock counter counts no FLOPs for the CPU's fused attention and all query-key pairs for fused GPU kernels and plain
products, although a causal mask removes about half.  Here attention counts unmasked pairs for every kernel.  Batched
products with an inner dimension of one (rotary embeddings in some releases of transformers) are not counted.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode


def counted(function: Callable[[], object]) -> int:
    """FLOPs of ``function`` (run without gradients): matrix products, two per multiply-add, and this package's ops.

    Masks are only known in ``scaled_dot_product_attention``; eager attention counts all pairs.
    """
    formulas = {torch.ops.aten._grouped_mm: _grouped_mm, torch.ops.aten.bmm: _bmm}
    counter = FlopCounterMode(display=False, custom_mapping=formulas)
    with torch.no_grad(), counter, _Attention(counter) as attention:
        function()
    return counter.get_total_flops() + attention.unmasked - attention.counted


class _Attention(TorchFunctionMode):
    """``unmasked``: FLOPs of unmasked pairs; ``counted``: FLOPs that ``counter`` counted for the same calls."""

    def __init__(self, counter: FlopCounterMode):
        self.counter, self.unmasked, self.counted = counter, 0, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        before = self.counter.get_total_flops()
        out = func(*args, **kwargs)
        self.counted += self.counter.get_total_flops() - before
        self.unmasked += _attention(*args, **kwargs)
        return out


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p=0.0, is_causal: bool = False, **_
) -> int:
    """FLOPs of the two products over unmasked pairs, for every row and head of ``query``.

    ``is_causal`` as in torch: query i attends to keys 0 to i, even if there are more keys than queries.
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
    """Grouped products of mixtures of experts, for which torch has no formula."""
    rows, inner = x_shape
    return 2 * rows * inner * weight_shape[-1]
