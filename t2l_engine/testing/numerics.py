"""All tolerances of the project, with their error models.

The oracle of an op is its reference function in float64 on the same rounded inputs; ``u`` below is the unit roundoff of a
dtype.  ``lora_bound`` and ``head_bound`` are per element and hold for any order of summation; the others are norms.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Relative Frobenius error of a generated adapter against the reference implementation's, float32.
PARITY_FROBENIUS = 1e-5
#: Relative Frobenius error of the C++ library's adapters and products against the Python package's, float32: the same
#: kernels, but folded constants and the task encoder are summed in another order, which changes adapters by about 2^-22.
CPP_FROBENIUS = 1e-6
#: Relative error of a text's embedding between batch compositions (alone, in a padded batch), float32.
EMBEDDING_FROBENIUS = 1e-5
#: Largest difference of an entry of MiniLM's embedding (norm sqrt(384)) between our forward pass and transformers', float32.
EMBEDDING_ATOL = 1e-5
#: Logits of our layers against PEFT with the same folder, float32 (two orders of summation through a whole model).
LOGITS_ATOL = 1e-4
#: Where float32 rounding of the model itself reaches LOGITS_ATOL (SmolLM2: logits of 41, 1e-4 against float64), the error
#: against the float64 model may be this many times PEFT's own.
ERROR_RATIO = 2.0
#: A row of a mixed batch against the same row with its adapter alone in the same batch shape, float32.
ROW_ATOL = 1e-5
#: Gradients of an op against autograd through the float64 reference, relative to the largest entry, float32.
GRADIENT_RTOL = 1e-4
#: Relative Frobenius error of a gradient through a whole model, float32, against the same step with the adapters applied by
#: other products: rounding differences of a layer are amplified by the following ones, forward and backward (to about 1e-5
#: in the 30 layers of SmolLM2-135M).
MODEL_GRADIENT_FROBENIUS = 1e-4
#: Cross-entropy of an answer against that from the model's own logits, float32: a difference of two values, each with at
#: most the error of the logits.
LOSS_ATOL = 2 * LOGITS_ATOL
#: A mean or a count of random draws against its expectation, in standard errors (two of 10^9 means are further away).
STANDARD_ERRORS = 6.0
#: Losses of a training run, relative, at every step, against the same run divided differently (accumulation, processes,
#: waves): gradients are float32 sums in another order, and AdamW accumulates the differences over steps (5e-6 after 20 steps
#: of a tiny model at a large learning rate).
TRAINING_RTOL = 1e-5
#: Relative Frobenius error of a trained parameter after such runs: AdamW normalises gradients, so that entries whose
#: gradient is mostly rounding error differ more than losses.
TRAINED_FROBENIUS = 1e-4
#: Relative Frobenius error of generated A and B (or their product) against the small library that tests train on: the
#: training error after a few hundred steps (at most 0.03 in the tests).
RECONSTRUCTED_FROBENIUS = 0.15

UNIT_ROUNDOFF = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
#: vdpbf16ps and BFDOT flush denormal inputs and sums to zero: the absolute error of one sum of products, if the depth times
#: the largest other operand is at most 2^26.
FLUSH = 2.0**-100


def u(dtype: torch.dtype) -> float:
    """Unit roundoff of ``dtype`` (half the distance from 1 to the next number)."""
    return UNIT_ROUNDOFF[dtype]


def lora_bound(
    x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, y: Tensor, delta: Tensor, out_dtype: torch.dtype
) -> Tensor:
    """Allowed error of one segment's ``y0 + s B A x``, float64 ``[T, out]``: rounding of the result, of the float32
    rank vector, and of both accumulations (in + r terms).

    ``y``: the exact result; ``delta``: what was added.  All operands are the rounded ones, in float64.
    """
    steps = x.shape[1] + lora_A.shape[0] + 4
    magnitude = (x.abs() @ lora_A.abs().mT) @ lora_B.abs().mT * abs(scaling)
    return u(out_dtype) * (y.abs() + u(out_dtype)) + steps * u(torch.float32) * (magnitude + delta.abs() + y.abs()) + FLUSH


def gradient_bound(exact: Tensor, dtype: torch.dtype) -> float:
    """Allowed absolute error of a gradient in ``dtype``: (GRADIENT_RTOL + one rounding) times the largest entry."""
    return (GRADIENT_RTOL + u(dtype)) * float(exact.abs().max()) if exact.numel() else 0.0


def lora_frobenius(dtype: torch.dtype) -> float:
    """Allowed relative Frobenius error of a whole ``lora_add_`` or ``lora_delta`` result: the rounding of the result, and
    float32 accumulation in both products, whose errors grow as the square root of the number of terms at most (8 covers
    in = 4096)."""
    return u(dtype) + 2 * 8 * u(torch.float32)


def head_bound(magnitude: Tensor, y: Tensor, depth: int, out_dtype: torch.dtype) -> Tensor:
    """Allowed error of a head output: ``magnitude`` = sum |latent w| + |bias| (times |mul|, plus |add|) in float64."""
    return u(out_dtype) * y.abs() + (depth + 4) * u(torch.float32) * magnitude + FLUSH


def trunk_bound(oracle: Tensor, reference: Tensor, dtype: torch.dtype) -> float:
    """Allowed relative Frobenius error of a trunk, or of adapters: twice that of a plain low-precision ``reference`` (which
    rounds at the same points), plus one rounding of the result and eight float32 roundings a stage."""
    reference_error = float((reference.double() - oracle).norm() / oracle.norm())
    return 2 * reference_error + u(dtype) + 8 * 7 * u(torch.float32)


def logits_bound(exact: Tensor, other: Tensor) -> float:
    """Allowed Frobenius error of low-precision logits against those of the float64 model with the same weights, ``exact``:
    ERROR_RATIO times the error of ``other``, another implementation in the same dtype (both round after every layer, with
    errors of similar size), plus one rounding of the logits."""
    return ERROR_RATIO * float((other.double() - exact).norm()) + u(other.dtype) * float(exact.norm())


def model_gradient_bound(exact: Tensor, other: Tensor, dtype: torch.dtype) -> float:
    """Allowed relative Frobenius error of a gradient through a whole model in ``dtype`` against ``exact``, that of the
    float32 model with the same weights: ERROR_RATIO times the error of ``other``, another implementation in ``dtype`` (both
    round after every layer, with errors of similar size), one rounding of the gradient, and
    MODEL_GRADIENT_FROBENIUS.  In float32 ``other`` is ``exact``."""
    return ERROR_RATIO * relative_frobenius(other, exact) + u(dtype) + MODEL_GRADIENT_FROBENIUS


def relative_frobenius(got: Tensor, expected: Tensor) -> float:
    """``||got - expected|| / ||expected||`` in float64."""
    return float((got.double() - expected.double()).norm() / expected.double().norm())
