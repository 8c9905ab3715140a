"""How alike adapters are in what they add to the weights, and a map of them in two dimensions."""

from __future__ import annotations

import torch
from torch import Tensor

from t2l_engine.adapters.stack import AdapterStack
from t2l_engine.files.errors import short_repr
from t2l_engine.ops.reference import accumulation_dtype


def inner_products(a: AdapterStack, b: AdapterStack) -> Tensor:
    """``[len(a), len(b)]`` float64: sums over all entries of the weight changes ``s B A`` of one times those of the other.

    The changes are never formed: ``<B A, B' A'>`` is the sum of ``B^T B' * A A'^T``, two matrices of rank times rank, which
    are computed in float32, or in float64 where a stack has that dtype.

    Raises ValueError if the stacks differ in modules, layers or features.
    """
    if a.sizes != b.sizes:
        raise ValueError(f"b: expected modules of (layers, in, out) {short_repr(a.sizes)}, got {short_repr(b.sizes)}")
    a, b = a.zero_padded(), b.zero_padded()
    total = torch.zeros(len(a), len(b), dtype=torch.float64)
    for name in a.lora_A:
        inputs = _grams(a.lora_A[name], b.lora_A[name])
        outputs = _grams(a.lora_B[name].mT, b.lora_B[name].mT)
        total += (inputs * outputs).sum(dim=(0, 2, 4)).double().cpu()
    return a.scaling.double().cpu()[:, None] * total * b.scaling.double().cpu()


def _grams(a: Tensor, b: Tensor) -> Tensor:
    """``[n, N, r, M, s]`` of ``[N, n, r, features]`` and ``[M, n, s, features]``: all inner products of rows of a layer."""
    dtype = accumulation_dtype(a, b)
    left, right = (x.to(dtype).transpose(0, 1).flatten(1, 2) for x in (a, b))
    return (left @ right.mT).view(a.shape[1], a.shape[0], a.shape[2], b.shape[0], b.shape[2])


def norms(stack: AdapterStack) -> Tensor:
    """``[N]``: the Frobenius norm of each adapter's weight changes."""
    return torch.stack([inner_products(stack[i], stack[i]).squeeze() for i in range(len(stack))]).clamp(min=0).sqrt()


class AdapterMap:
    """Adapters on a plane, on which those whose weight changes point alike lie near each other.

    Classical multidimensional scaling of the cosines between ``landmarks``; others are placed by their cosines with these.

    Args:
        landmarks: three or more adapters, kept as they are.
    """

    def __init__(self, landmarks: AdapterStack):
        if len(landmarks) < 3:
            raise ValueError(f"landmarks: expected at least 3 adapters, got {len(landmarks)}")
        self._landmarks, self._norms = landmarks, norms(landmarks)
        known = self.cosines(landmarks)
        self._means = known.mean(dim=0)
        values, vectors = torch.linalg.eigh(known - self._means - self._means[:, None] + self._means.mean())
        self._axes = vectors[:, -2:].flip(1) / values[-2:].flip(0).clamp(min=1e-12).sqrt()
        self.coordinates = self._place(known)

    def cosines(self, stack: AdapterStack) -> Tensor:
        """``[N, landmarks]``: cosines of the weight changes; 0 for an adapter that changes nothing."""
        length = norms(stack)[:, None] * self._norms
        return (inner_products(stack, self._landmarks) / length.clamp(min=1e-30)).clamp(-1, 1)

    def place(self, stack: AdapterStack) -> Tensor:
        """``[N, 2]``: where the adapters lie."""
        return self._place(self.cosines(stack))

    def _place(self, cosines: Tensor) -> Tensor:
        centred = cosines - cosines.mean(dim=1, keepdim=True) - self._means + self._means.mean()
        return centred @ self._axes
