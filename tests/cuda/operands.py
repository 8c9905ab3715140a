"""Operands of batched LoRA for one layer of a model, laid out as in the slots of an attached model."""

import torch

from t2l_engine import ops

#: (in features, (first column, out features) of each linear, columns): q, k and v of Llama-8B packed, its o; tiny ones.
SIZES = {
    True: {"group": (4096, ((0, 4096), (4096, 1024), (5120, 1024)), 6144), "single": (4096, ((0, 4096),), 4096)},
    False: {"group": (64, ((0, 64), (80, 16)), 96), "single": (48, ((0, 64),), 64)},
}
ADAPTERS, RANK = 8, 8


def operands(device, kind, ids, dtype=torch.bfloat16, seed=0):
    """Arguments of ``lora_add_group_`` by name: a token for each of ``ids``; ``kind``: a key of SIZES' values."""
    features, linears, columns = SIZES[device.on_gpu][kind]
    generator = torch.Generator(device.torch).manual_seed(seed)

    def randn(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator, device=device.torch) * scale).to(dtype)

    def integers(values):
        return torch.tensor(list(values), dtype=torch.int32, device=device.torch)

    return {
        "y": randn(len(ids), columns),
        "x": randn(len(ids), features),
        "lora_A": [randn(ADAPTERS, RANK, features, scale=features**-0.5) for _ in linears],
        "lora_B": [randn(ADAPTERS, RANK, width).mT for _, width in linears],
        "scaling": torch.linspace(0.5, 1.5, ADAPTERS, device=device.torch),
        "seg_indptr": integers(range(len(ids) + 1)),
        "seg_adapters": integers(ids),
        "max_seg_len": 1,
        "ranks": [integers([RANK] * ADAPTERS) for _ in linears],
        "offsets": [start for start, _ in linears],
    }


def apply(arguments):
    """``lora_add_group_``, or ``lora_add_`` for one linear."""
    if len(arguments["offsets"]) > 1:
        return ops.lora_add_group_(**arguments)
    one = {name: arguments[name][0] for name in ("lora_A", "lora_B", "ranks")}
    return ops.lora_add_(**{name: value for name, value in (arguments | one).items() if name != "offsets"})
