"""Fake kernels: shapes, dtypes and strides of the ops' results, for tracing.  In-place ops without results have none."""

from __future__ import annotations

from t2l_engine.ops.reference import stored_as


def no_result(*_, **__) -> None:
    """The fake kernel of an op that only writes into its arguments."""


def hypernet_trunk(z, weights, side_emb, pos_emb, rotary_ranks, encoder):
    num_modules, num_layers, _ = weights[1].shape
    sides = 1 if side_emb is None else side_emb.shape[1]
    latent_rows = rotary_ranks or (1 if pos_emb is None else pos_emb.shape[0])
    return weights[0].new_empty(z.shape[0], num_modules, sides, latent_rows, num_layers, weights[-1].shape[0])


def hypernet_trunk_backward(grad, z, weights, side_emb, pos_emb, rotary_ranks):
    return [t.new_empty(t.shape) for t in (z, *weights, side_emb, pos_emb) if t is not None]


def hypernet_heads(latent, weight, bias, mul_A, add_A, mul_B, add_B, rank, in_features, out_features):
    shape = (latent.shape[0], latent.shape[4], rank)
    sizes = zip(weight, in_features, out_features, strict=True)
    return [t for w, n_in, n_out in sizes for t in (w.new_empty(*shape, n_in), w.new_empty(*shape, n_out).mT)]


def hypernet_heads_backward(grads, latent, weight, bias, mul_A, mul_B, rank, in_features, out_features):
    return [t.new_empty(t.shape) for t in (latent, *weight, *bias)]


def lora_delta(x, lora_A, lora_B, scaling, seg_indptr, seg_adapters, max_seg_len, ranks):
    return x.new_empty(*x.shape[:-1], lora_B.shape[1])


def lora_backward_(grad_x, grad, x, lora_A, lora_B, scaling, seg_indptr, seg_adapters, max_seg_len, ranks):
    return lora_A.new_empty(lora_A.shape), stored_as(lora_B, lora_B.new_empty)
