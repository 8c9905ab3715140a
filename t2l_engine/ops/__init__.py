"""The ops: schema, plain-torch reference, fake kernel, autograd, FLOP formula and native kernel of each.

May be imported: the ops, :func:`has_kernel`, :class:`AdapterBatch`; the modules ``reference``, ``gradients``,
``native``, ``flops`` and ``segments``.  Imports no other room.

>>> import torch
>>> from t2l_engine import ops
>>> x, A, B = torch.randn(5, 16), torch.randn(2, 4, 16), torch.randn(2, 8, 4)  # 5 tokens, 2 adapters of rank 4
>>> segments = torch.tensor([0, 3, 5], dtype=torch.int32), torch.tensor([1, -1], dtype=torch.int32)
>>> delta = ops.lora_delta(x, A, B, torch.ones(2), *segments, max_seg_len=3)
>>> torch.allclose(delta[:3], x[:3] @ A[1].T @ B[1].T, atol=1e-5), bool(delta[3:].any())
(True, False)
"""

from t2l_engine.ops.registry import (
    NAMESPACE,
    NATIVE,
    NATIVE_OPS,
    SCHEMAS,
    has_kernel,
    hypernet_heads,
    hypernet_heads_out_,
    hypernet_trunk,
    lora_add_,
    lora_add_group_,
    lora_delta,
)
from t2l_engine.ops.segments import AdapterBatch

__all__ = [
    "NAMESPACE",
    "NATIVE",
    "NATIVE_OPS",
    "SCHEMAS",
    "AdapterBatch",
    "has_kernel",
    "hypernet_heads",
    "hypernet_heads_out_",
    "hypernet_trunk",
    "lora_add_",
    "lora_add_group_",
    "lora_delta",
]
