"""Writes a hypernetwork as one file that the C++ library memory-maps (``csrc/lib/network.h``, docs/cpp.md).

Little-endian: HEADER, one MODULE per module, then the tensors of :func:`_tensors` in order, each aligned to ALIGNMENT bytes.
Their shapes follow from the header, so the file contains no offsets.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from t2l_engine.files.weights import check_weights, replacing
from t2l_engine.hypernetwork.folder import CheckpointError
from t2l_engine.hypernetwork.network import HyperNetwork
from t2l_engine.ops.reference import TRUNK_WEIGHTS

MAGIC, VERSION, ALIGNMENT = b"T2L-NET\n", 1, 64
#: Magic, version, CRC-32 of all bytes after it, size of the file in bytes, variant, LoRA scaling; then DTYPES code of the
#: matrices, embed_dim, task width, trunk width, head_in_size, layers, rank, sides, POSITIONS code, whether heads have a
#: bias, number of modules.
HEADER = struct.Struct("<8sIIQ24sd11q")
#: in_features, out_features, bit mask of its OFFSETS (bit i: the i-th), name, path; strings end with a zero byte.
MODULE = struct.Struct("<3q264s264s")
OFFSETS = ("mul_A", "add_A", "mul_B", "add_B")
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
POSITIONS = {"L": 0, "M": 0, "S-learnable": 1, "S-rotary": 2}  # positions of the ranks: none, learned (pos_emb), rotary


@torch.no_grad()
def export(net: HyperNetwork, path: str | Path) -> None:
    """Write ``net`` as the file ``path`` for the C++ library; an existing file is replaced by a complete one.

    Tensors that do not depend on the task are folded (:meth:`HyperNetwork.folded`).  Python does not read the file back.

    Args:
        net: of variant L, M, S-learnable or S-rotary, with the linear task encoder and weight matrices ``[out, in]`` in
            float32 or bfloat16 (``HyperNetwork.from_pretrained(folder, dtype=...)`` casts others).
        path: of the file; its folder is created.

    Raises:
        CheckpointError: ``net`` has another variant, task encoder or dtype, or folding gives NaN or infinite values; the
            message names it.
        OSError: the file cannot be written.

    Source: the folded terms are those of SakanaAI's forward pass that do not depend on the task.

    >>> import tempfile, t2l_engine as t2l
    >>> net = t2l.TextToLoRA.from_pretrained("smollm2-135m-paper").hypernetwork
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     export(net, Path(folder) / "smollm2.t2l")
    """
    path, c = Path(path), net.config
    for name, got, known in (
        ("variant", c.variant, POSITIONS),
        ("task_encoder", c.task_encoder, ("linear",)),
        ("dtype", net.dtype, DTYPES),
    ):
        if got not in known:
            raise CheckpointError(f"{name}: the C++ library computes {', '.join(map(str, known))}, got {got}")
    folded = net.folded()
    tensors = {}
    for name, tensor, dtype in _tensors(net, folded):
        if tensor.dtype != dtype:
            raise CheckpointError(f"{name}: expected {dtype} beside matrices in {net.dtype}, got {tensor.dtype}")
        tensors[name] = tensor.detach().cpu().contiguous()
    check_weights(path, tensors, CheckpointError)

    modules = b""
    for i, (name, module_path) in enumerate(c.module_paths.items()):
        if not name.isascii():
            raise CheckpointError(f"modules: the C++ library reads names in ASCII, got {name!r}")
        present = sum(1 << bit for bit, step in enumerate(OFFSETS) if folded["offsets"][step][i] is not None)
        modules += MODULE.pack(c.in_features[i], c.out_features[i], present, name.encode(), module_path.encode())
    parts, size = [modules], HEADER.size + len(modules)
    for tensor in tensors.values():
        parts += [bytes(-size % ALIGNMENT), tensor.reshape(-1).view(torch.uint8).numpy()]
        size += sum(map(len, parts[-2:]))
    sizes = (c.embed_dim, c.task_width, c.width, c.head_in_size, c.num_layers, c.rank, c.num_sides)
    codes = (POSITIONS[c.variant], c.head_bias, len(c.modules))
    rest = (size, c.variant.encode(), net.scaling, DTYPES[net.dtype], *sizes, *codes)
    start = len(MAGIC) + 8  # of the bytes that the checksum covers
    parts.insert(0, HEADER.pack(MAGIC, VERSION, 0, *rest)[start:])
    checksum = 0
    for part in parts:
        checksum = zlib.crc32(part, checksum)
    with replacing(path.parent, path.name) as folder, (folder / path.name).open("wb") as file:
        file.write(HEADER.pack(MAGIC, VERSION, checksum, *rest)[:start])
        file.writelines(parts)


def _tensors(net: HyperNetwork, folded: dict) -> Iterator[tuple[str, Tensor, torch.dtype]]:
    """Name, tensor and dtype of all tensors, in the order of the file; t, m, ... as in ``reference.TRUNK_WEIGHTS``."""
    encoder, vector = net.task_encoder, torch.float32
    yield "task_encoder.linear.weight", encoder.linear.weight.to(vector), vector  # [t, embed_dim]
    for name, tensor in (("linear.bias", encoder.linear.bias), *encoder.norm.named_parameters("norm")):
        yield f"task_encoder.{name}", tensor, vector  # [t] each: bias; weight and bias of the norm
    for name, tensor in zip(TRUNK_WEIGHTS, folded["weights"], strict=True):
        yield name, tensor, net.dtype if tensor.dim() == 2 else vector
    for name in ("side_emb", "pos_emb"):  # [modules, sides, m] with two sides; [rank, m] with positions of code 1
        if folded[name] is not None:
            yield name, folded[name], vector
    weights, biases = folded["heads"]
    for i, module in enumerate(net.config.modules):
        yield f"heads.{module}.weight", weights[i], net.dtype  # [rows, h]
        if biases:
            yield f"heads.{module}.bias", biases[i], vector
        for step in OFFSETS:  # those that the module has: A [layers, rank, in_features], B [layers, rank, out_features]
            tensor = folded["offsets"][step][i]
            if tensor is not None:
                yield f"offsets.{module}.{step}", tensor.mT if step.endswith("B") else tensor, vector
