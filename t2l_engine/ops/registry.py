"""Schema and typed wrapper of every op; registers all parts of an op with torch.

An op has a function of its name in :mod:`.reference` (plain torch, for all backends), :mod:`.flops` and, if it has results,
:mod:`.fake`; a differentiable one has a backward in :mod:`.gradients`.  The native library overrides the reference per
backend; :func:`has_kernel` says which one runs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from t2l_engine.ops import fake, flops, gradients, native, reference

NAMESPACE = "t2l_engine"

_LORA = (
    "Tensor x, Tensor lora_A, Tensor lora_B, Tensor scaling, Tensor seg_indptr, Tensor seg_adapters, "
    "SymInt max_seg_len, Tensor? ranks"
)
_TRUNK = "Tensor z, Tensor[] weights, Tensor? side_emb, Tensor? pos_emb, int rotary_ranks"
_HEADS = (
    "Tensor latent, Tensor[] weight, Tensor[] bias, Tensor?[] mul_A, Tensor?[] add_A, Tensor?[] mul_B, Tensor?[] add_B, "
    "int rank, int[] in_features, int[] out_features"
)

SCHEMAS = {
    "hypernet_trunk": f"({_TRUNK}, Tensor[] encoder) -> Tensor",
    "hypernet_trunk_backward": f"(Tensor grad, {_TRUNK}) -> Tensor[]",
    "hypernet_heads": f"({_HEADS}) -> Tensor[]",
    "hypernet_heads_out_": f"(Tensor(a!)[] lora_A, Tensor(b!)[] lora_B, {_HEADS}, float scale_B) -> ()",
    "hypernet_heads_backward": (
        "(Tensor[] grads, Tensor latent, Tensor[] weight, Tensor[] bias, Tensor?[] mul_A, Tensor?[] mul_B, "
        "int rank, int[] in_features, int[] out_features) -> Tensor[]"
    ),
    "lora_delta": f"({_LORA}) -> Tensor",
    "lora_backward_": f"(Tensor(a!) grad_x, Tensor grad, {_LORA}) -> (Tensor, Tensor)",
    "lora_add_": f"(Tensor(a!) y, {_LORA}, Tensor(b!)? bad_ids=None) -> ()",
    "lora_add_group_": (
        "(Tensor(a!) y, Tensor x, Tensor[] lora_A, Tensor[] lora_B, Tensor scaling, Tensor seg_indptr, Tensor seg_adapters, "
        "SymInt max_seg_len, Tensor[] ranks, int[] offsets, Tensor(b!)? bad_ids=None) -> ()"
    ),
}

#: Of the native library on a CPU alone, for servers: ``lora_add_group_`` on what was bound to a number (csrc/torch/bound.h).
BOUND = {
    "lora_bind_batch": (
        "(Tensor batch, Tensor seg_indptr, Tensor seg_adapters, Tensor row_indptr, Tensor row_adapters, int tokens, "
        "int max_seg_len) -> ()"
    ),
    "lora_bind_layer": (
        "(Tensor layer, Tensor[] lora_A, Tensor[] lora_B, Tensor scaling, Tensor[] ranks, int[] offsets, Tensor batch) -> ()"
    ),
    "lora_unbind": "(Tensor number) -> ()",
    "lora_add_bound_": "(Tensor(a!) y, Tensor x, Tensor layer) -> ()",
}

#: Ops that run their reference on every backend.
REFERENCE_OPS = ("hypernet_trunk_backward", "hypernet_heads_backward")
#: Ops with native kernels, which call ``<op>_reference`` for dtypes that they do not support.
NATIVE_OPS = tuple(name for name in SCHEMAS if name not in REFERENCE_OPS)

_library = torch.library.Library(NAMESPACE, "DEF")


def _define(name: str, schema: str, **options) -> None:
    """Define an op, or one's ``<op>_reference``, which runs the function of the op's name in ``reference``."""
    _library.define(name + schema, **options)
    function = reference.at_own_precision(getattr(reference, name.removesuffix("_reference")))
    _library.impl(name, function, "CompositeExplicitAutograd")


for _name, _schema in SCHEMAS.items():
    _define(_name, _schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"{NAMESPACE}::{_name}", getattr(fake, _name, fake.no_result))
    if _name in NATIVE_OPS:
        _define(f"{_name}_reference", _schema)
for _name, _schema in BOUND.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"{NAMESPACE}::{_name}", fake.no_result)
# Called by the native trunk where its kernel does not encode tasks.
_define("encode_task", "(Tensor task_emb, Tensor[] encoder) -> Tensor")

NATIVE = native.load()
for _name in SCHEMAS:
    register_flop_formula(getattr(torch.ops.t2l_engine, _name), get_raw=True)(getattr(flops, _name))
gradients.register()

# The ops without the checks of the wrappers below, looked up once: LoRALinear calls them for every linear of a decode step.
lora_delta_op = torch.ops.t2l_engine.lora_delta.default
lora_add_op = torch.ops.t2l_engine.lora_add_.default
lora_add_group_op = torch.ops.t2l_engine.lora_add_group_.default
lora_backward_op = torch.ops.t2l_engine.lora_backward_.default


def has_kernel(name: str, backend: str) -> bool:
    """Whether op ``name`` has a native kernel on ``backend`` ("CPU" or "CUDA"); otherwise the reference runs there.

    Raises ValueError for another name or backend.

    >>> has_kernel("hypernet_trunk_backward", "CPU")
    False
    """
    if name not in SCHEMAS:
        raise ValueError(f"name: expected one of {sorted(SCHEMAS)}, got {name!r}")
    if backend not in ("CPU", "CUDA"):
        raise ValueError(f"backend: expected 'CPU' or 'CUDA', got {backend!r}")
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", backend)


# --- wrappers ------------------------------------------------------------------------------------------------------


def _changed(*tensors: Tensor) -> None:
    """Has autograd refuse a backward pass that saved earlier values of ``tensors``, as after torch's in-place ops."""
    if not torch.compiler.is_compiling():  # which orders changes by the schema
        torch.autograd.graph.increment_version(tensors)


def _check_frozen(op: str, **arguments: Tensor | Sequence[Tensor]) -> None:
    """RuntimeError where gradients of ``arguments`` are recorded: an in-place op has none, and they would be missing."""
    if torch.is_grad_enabled():
        for name, tensors in arguments.items():
            if any(t.requires_grad for t in ([tensors] if isinstance(tensors, Tensor) else tensors)):
                other = "hypernet_heads" if op == "hypernet_heads_out_" else "lora_delta"
                reference.fail(op, name, f"no gradients to record (no_grad(), or {other})", "requires_grad=True")


def _listed(op: str, latent: Tensor, **lists: Sequence | None) -> list[list]:
    """``lists``, each with one entry for every module of ``latent``; RuntimeError for another length.

    None becomes a list of None, for ``bias`` an empty one, which is allowed.
    """
    if latent.dim() != 6:
        reference.fail(op, "latent", "shape [*, *, *, *, *, *]", list(latent.shape))
    count, made = latent.shape[1], []
    for name, given in lists.items():
        entries = list(given) if given is not None else [] if name == "bias" else [None] * count
        if count == 0 or len(entries) != count and (entries or name != "bias"):
            expected = "one entry for each module of latent (dimension 1), at least one"
            reference.fail(op, name, expected, f"{len(entries)} for {count} modules")
        made.append(entries)
    return made


def hypernet_trunk(
    z: Tensor,
    weights: Sequence[Tensor],
    side_emb: Tensor | None = None,
    pos_emb: Tensor | None = None,
    rotary_ranks: int = 0,
    encoder: Sequence[Tensor] = (),
) -> Tensor:
    """The hypernetwork up to its heads: mixer and three MLP blocks for all rows (paper section 3, appendix).

    Args:
        z: encoded tasks ``[num_tasks, t]``, float32.
        weights: in the order of :data:`t2l_engine.ops.reference.TRUNK_WEIGHTS`; matrices in float32, bfloat16, ..., vectors
            in float32.  ``weights[1]``, the constant table ``[K, n, 4m]``, is the product of the first mixer matrix with
            depth and module embeddings, plus its bias.
        side_emb: ``[K, 2, m]`` float32, normalised embeddings of the sides A and B (shared heads: M, S), or None.
        pos_emb: ``[r, m]`` float32, added for each rank after mlp2 (S-learnable), or None.
        rotary_ranks: r for S-rotary (rank k is rotated to position k, then mlp2 is applied again), else 0.
        encoder: the linear task encoder, for inference: W ``[t, e]``, b, LN weight and bias ``[t]``, float32.  ``z`` is then
            the task embeddings ``[num_tasks, e]``, and ``LN(W z + b)`` a part of the op (on CUDA of its one launch).

    Returns:
        ``latent [num_tasks, K, sides, ranks, n, h]`` in the dtype of the matrices; differentiable.

    Raises:
        RuntimeError: the message names the argument, what was expected and what was given.

    >>> from t2l_engine.testing.cases import HyperCase
    >>> hypernet_trunk(**HyperCase("M", sides=2, tasks=3, modules=2, layers=5, head_in=40).make_trunk()).shape
    torch.Size([3, 2, 2, 1, 5, 40])
    """
    if len(weights) != len(reference.TRUNK_WEIGHTS):
        reference.fail("hypernet_trunk", "weights", f"{len(reference.TRUNK_WEIGHTS)} tensors", len(weights))
    if len(encoder) not in (0, 4):
        reference.fail("hypernet_trunk", "encoder", "none or 4 tensors", len(encoder))
    return torch.ops.t2l_engine.hypernet_trunk.default(z, list(weights), side_emb, pos_emb, rotary_ranks, list(encoder))


def hypernet_heads(
    latent: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor] | None,
    rank: int,
    in_features: Sequence[int],
    out_features: Sequence[int],
    *,
    mul_A: Sequence[Tensor | None] | None = None,
    add_A: Sequence[Tensor | None] | None = None,
    mul_B: Sequence[Tensor | None] | None = None,
    add_B: Sequence[Tensor | None] | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """The heads of all modules, tasks and layers: ``latent @ weight.T + bias``, then ``* mul + add``, as A and B.

    Every list has one entry for each of the K modules; None for a list, or in one of the last four, skips that step.

    Args:
        latent: ``[num_tasks, K, sides, ranks, n, h]``, the trunk's result; last stride 1, others arbitrary.
        weight: ``[p*(in+out), h]`` with one side, ``[p*max(in, out), h]`` with two, ``p = rank // ranks``; contiguous.
        bias: ``[rows of weight]`` float32.
        mul_A, add_A: ``[n, r, in]`` float32; mul_B, add_B: ``[n, out, r]`` float32.

    Returns:
        ``lora_A [num_tasks, n, r, in]`` and ``lora_B [num_tasks, n, out, r]`` of each module, unscaled, in the dtype of
        ``weight``; ``lora_B`` is a transposed view of ``[num_tasks, n, r, out]`` storage.  Differentiable in ``latent``,
        ``weight`` and ``bias``.

    Raises:
        RuntimeError: the message names the argument, what was expected and what was given.

    >>> latent = torch.randn(3, 2, 1, 1, 5, 40)  # variant L: one side, one latent for all ranks
    >>> weight = [torch.randn(4 * (64 + out), 40) for out in (48, 16)]
    >>> lora_A, lora_B = hypernet_heads(latent, weight, None, 4, [64, 64], [48, 16])
    >>> lora_A[0].shape, lora_B[1].shape
    (torch.Size([3, 5, 4, 64]), torch.Size([3, 5, 16, 4]))
    """
    lists = {"weight": weight, "bias": bias, "mul_A": mul_A, "add_A": add_A, "mul_B": mul_B, "add_B": add_B}
    *tensors, n_in, n_out = _listed("hypernet_heads", latent, **lists, in_features=in_features, out_features=out_features)
    made = torch.ops.t2l_engine.hypernet_heads.default(latent, *tensors, rank, n_in, n_out)
    return made[::2], made[1::2]


def hypernet_heads_out_(
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    latent: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor] | None,
    rank: int,
    in_features: Sequence[int],
    out_features: Sequence[int],
    *,
    mul_A: Sequence[Tensor | None] | None = None,
    add_A: Sequence[Tensor | None] | None = None,
    mul_B: Sequence[Tensor | None] | None = None,
    add_B: Sequence[Tensor | None] | None = None,
    scale_B: float = 1.0,
) -> None:
    """:func:`hypernet_heads` with preallocated outputs, such as the slots of a model; B is multiplied by ``scale_B``.

    ``lora_A[i] [num_tasks, n, r, in]`` and ``lora_B[i] [num_tasks, n, out, r]`` may have any strides that do not overlap,
    and share one dtype: float32, bfloat16, float16 or float64.  Not differentiable: an error where gradients of an input are
    recorded.  Raises as :func:`hypernet_heads`.

    >>> lora_A, lora_B = [torch.empty(3, 5, 4, 64)], [torch.empty(3, 5, 48, 4)]
    >>> latent, weight = torch.zeros(3, 1, 1, 1, 5, 40), [torch.zeros(4 * (64 + 48), 40)]
    >>> hypernet_heads_out_(lora_A, lora_B, latent, weight, None, 4, [64], [48])
    >>> bool(lora_A[0].any() or lora_B[0].any())
    False
    """
    op, lists = "hypernet_heads_out_", {"weight": weight, "bias": bias}
    lists |= {"mul_A": mul_A, "add_A": add_A, "mul_B": mul_B, "add_B": add_B}
    lists |= {"in_features": in_features, "out_features": out_features, "lora_A": lora_A, "lora_B": lora_B}
    *tensors, n_in, n_out, A, B = _listed(op, latent, **lists)
    _check_frozen(op, latent=latent, weight=weight, bias=bias or ())
    torch.ops.t2l_engine.hypernet_heads_out_.default(A, B, latent, *tensors, rank, n_in, n_out, scale_B)
    _changed(*A, *B)


def lora_delta(
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: Tensor,
    seg_indptr: Tensor,
    seg_adapters: Tensor,
    max_seg_len: int,
    ranks: Tensor | None = None,
) -> Tensor:
    """The LoRA update of a linear: ``scaling[a] * (x @ A[a].T) @ B[a].T`` with ``a`` the adapter of each segment.

    Args:
        x: tokens ``[..., in]``, T of them in the order of the leading dimensions; last stride 1, tokens at one distance.
        lora_A: ``[num_adapters, r, in]``, last stride 1; lora_B: ``[num_adapters, out, r]``, any strides.
        scaling: ``[num_adapters]`` float32, applied in float32 to the rank vector.
        seg_indptr: ``[S+1]`` int32, non-decreasing from 0 to T: segment s is tokens ``seg_indptr[s] : seg_indptr[s+1]``.
        seg_adapters: ``[S]`` int32 in ``[-1, num_adapters)``; -1 is the base model: its rows get zero.
        max_seg_len: length of the longest segment (a host integer: no device synchronisation).
        ranks: ``[num_adapters]`` int32, the true rank of each adapter; 0 means it lacks this module; memory beyond the
            rank is never read.  None: rank ``r`` for all.

    Returns:
        ``[..., out]`` in the dtype of ``x``; differentiable in ``x``, ``lora_A`` and ``lora_B``.

    Raises:
        RuntimeError: the message names the argument, what was expected and what was given.

    >>> A, B, one = torch.ones(1, 2, 3), torch.ones(1, 4, 2), torch.ones(1)
    >>> segments = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([0], dtype=torch.int32)
    >>> lora_delta(torch.ones(1, 3), A, B, one, *segments, max_seg_len=1)
    tensor([[6., 6., 6., 6.]])
    """
    return lora_delta_op(x, lora_A, lora_B, scaling, seg_indptr, seg_adapters, max_seg_len, ranks)


def lora_add_(
    y: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: Tensor,
    seg_indptr: Tensor,
    seg_adapters: Tensor,
    max_seg_len: int,
    ranks: Tensor | None = None,
    bad_ids: Tensor | None = None,
) -> Tensor:
    """``y += lora_delta(x, ...)`` in place with one rounding, for serving; rows of adapter -1 are not written.

    ``y``: ``[..., out]``, dtype of ``x``, last stride 1, may be a column slice of a wider tensor.  ``bad_ids``: ``[1]``
    int32, to which the number of segments is added whose id is out of range; they use the base model.  None: such an id is
    an error, on CUDA one that ends the process's use of the device.  Other arguments as in :func:`lora_delta`.  Not
    differentiable: an error where gradients of ``x``, A or B are recorded.  Returns ``y``.

    Raises:
        RuntimeError: the message names the argument, what was expected and what was given.

    >>> A, B, one = torch.ones(1, 2, 3), torch.ones(1, 4, 2), torch.ones(1)
    >>> segments = torch.tensor([0, 1, 2], dtype=torch.int32), torch.tensor([0, -1], dtype=torch.int32)
    >>> lora_add_(torch.ones(2, 4), torch.ones(2, 3), A, B, one, *segments, max_seg_len=1)
    tensor([[7., 7., 7., 7.],
            [1., 1., 1., 1.]])
    """
    _check_frozen("lora_add_", x=x, lora_A=lora_A, lora_B=lora_B)
    lora_add_op(y, x, lora_A, lora_B, scaling, seg_indptr, seg_adapters, max_seg_len, ranks, bad_ids)
    _changed(y)
    return y


def lora_add_group_(
    y: Tensor,
    x: Tensor,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scaling: Tensor,
    seg_indptr: Tensor,
    seg_adapters: Tensor,
    max_seg_len: int,
    ranks: Sequence[Tensor],
    offsets: Sequence[int],
    bad_ids: Tensor | None = None,
) -> Tensor:
    """:func:`lora_add_` for the linears of a packed projection, such as q, k and v in one ``y``; ``x`` is read once.

    Linear i adds to columns ``offsets[i] : offsets[i] + out_i`` of ``y [..., columns]``, in ascending order without overlap.
    ``lora_A[i] [num_adapters, r_i, in]``, ``lora_B[i] [num_adapters, out_i, r_i]``, ``ranks[i] [num_adapters]`` int32.
    ``bad_ids`` as in :func:`lora_add_`, other arguments as in :func:`lora_delta`.  Not differentiable, as that.
    Returns ``y``.

    Raises:
        RuntimeError: the message names the argument, what was expected and what was given.

    >>> A, one, rank = torch.ones(1, 2, 3), torch.ones(1), torch.tensor([2], dtype=torch.int32)
    >>> B = [torch.ones(1, 2, 2), torch.ones(1, 1, 2)]  # q has 2 outputs, v has 1; k, between them, is not adapted
    >>> segments = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([0], dtype=torch.int32)
    >>> lora_add_group_(torch.zeros(1, 4), torch.ones(1, 3), [A, A], B, one, *segments, 1, [rank, rank], [0, 3])
    tensor([[6., 6., 0., 6.]])
    """
    for name, entries in (("lora_B", lora_B), ("ranks", ranks), ("offsets", offsets)):
        if len(entries) != len(lora_A) or not lora_A:
            expected = "one entry a problem, as many as lora_A and at least one"
            reference.fail("lora_add_group_", name, expected, f"{len(entries)} for {len(lora_A)} entries of lora_A")
    _check_frozen("lora_add_group_", x=x, lora_A=lora_A, lora_B=lora_B)
    lora_add_group_op(y, x, lora_A, lora_B, scaling, seg_indptr, seg_adapters, max_seg_len, ranks, offsets, bad_ids)
    _changed(y)
    return y
