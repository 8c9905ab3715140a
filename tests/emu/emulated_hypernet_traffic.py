"""Bytes that the hypernetwork's kernels move, beside those of operands that are read once."""

from __future__ import annotations

from math import ceil

import pytest
import torch

from t2l_engine import ops
from t2l_engine.testing.cases import BF16, F16, F32, HYPER_CASES, HyperCase

pytestmark = pytest.mark.emu

TILE = 128  # weight rows of a tile of the heads


#: How many times their operands are read: rows of a head for every tile of latents, latents for every tile of rows.
HEADS = {
    "L": 1.3, "L_no_bias_affine": 1.4, "M_affine_out_wider": 2.3, "S_learnable": 2.4, "odd_sizes": 4.1, "many_tasks": 5.6,
    "L_bf16": 1.5, "M_bf16_affine": 2.8, "S_rotary_bf16": 1.3, "odd_sizes_bf16": 1.5, "smollm2_L": 3.9, "L_fp16": 1.5,
    "nine_modules": 1.5, "nine_modules_out_wider": 2.2, "deep_heads_bf16": 1.6, "deep_shared_heads_bf16": 2.4,
}  # fmt: skip


@pytest.mark.parametrize("num_sms", [132, 1])
@pytest.mark.parametrize("name", HEADS)
def test_heads(emulator, name, num_sms):
    """However many tiles a block has; results are written once."""
    emulator.t2l_emu_set_num_sms(num_sms)
    case = next(case for case in HYPER_CASES if case.name == name)
    heads = case.make_heads()
    ops.hypernet_heads(**heads)
    listed = [t for tensors in heads.values() if isinstance(tensors, list) for t in tensors if isinstance(t, torch.Tensor)]
    once = sum(t.nbytes for t in (heads["latent"], *listed))
    assert once <= emulator.t2l_emu_counter(b"read") <= HEADS[name] * once
    values = case.tasks * case.layers * case.rank * sum(map(sum, case.features))
    assert emulator.t2l_emu_counter(b"written") == values * case.dtype.itemsize


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_one_description_reads_the_head_weights_once(emulator, dtype):
    """What generation is bound by: 32 layers of a 7B model fit one tile of latent rows."""
    case = HyperCase(
        "", tasks=1, modules=2, layers=32, head_in=512, in_features=512, out_features=128, rank=8, bias=False, dtype=dtype
    )
    heads = case.make_heads()
    ops.hypernet_heads(**heads)
    tiles = sum(ceil(len(weight) / TILE) for weight in heads["weight"])
    latent = 32 * 512 * dtype.itemsize * tiles  # from L2, for every tile of weights
    assert emulator.t2l_emu_counter(b"read") == sum(weight.nbytes for weight in heads["weight"]) + latent


def assert_reads_weights_once_a_tile(emulator, arguments, tiles):
    """Of the trunk; biases and LayerNorm's vectors are little beside them."""
    matrices = sum(t.nbytes for t in arguments["weights"] if t.dtype == BF16)
    assert 0 < emulator.t2l_emu_counter(b"read") - tiles * matrices < 0.2 * tiles * matrices


@pytest.mark.parametrize("kib, tile_rows", [(227, 16), (99, 8), (40, 4)])
def test_tiles_of_the_trunk_fit_the_shared_memory_of_a_block(emulator, kib, tile_rows):
    case = HyperCase("", tasks=1, modules=2, layers=11, task_width=64, width=512, head_in=512, dtype=BF16)
    arguments = case.make_trunk()
    expected = ops.hypernet_trunk(**arguments)
    emulator.t2l_emu_set_max_cluster(1)
    emulator.t2l_emu_set_shared_bytes(kib * 1024)
    emulator.t2l_emu_reset_counters()
    assert torch.equal(ops.hypernet_trunk(**arguments), expected)
    assert kib * 1024 // 2 < emulator.t2l_emu_last_launch(b"shared_bytes") <= kib * 1024
    assert_reads_weights_once_a_tile(emulator, arguments, ceil(case.tasks * case.modules * case.layers / tile_rows))


@pytest.mark.parametrize("kib", [227, 196, 195, 99, 81, 40])
def test_heads_fit_the_shared_memory_of_a_block(emulator, kib):
    """Weights of a tile that stay, wide tiles of latents, narrow ones, or none: the same bits, or an error."""
    case = next(case for case in HYPER_CASES if case.name == "deep_heads_bf16")
    heads = case.make_heads()
    expected = ops.hypernet_heads(**heads)
    emulator.t2l_emu_set_shared_bytes(kib * 1024)
    if kib < 80:
        with pytest.raises(RuntimeError, match="more shared memory than this device has"):
            ops.hypernet_heads(**heads)
        return
    for made, wanted in zip(ops.hypernet_heads(**heads), expected, strict=True):
        assert all(map(torch.equal, made, wanted))
    assert emulator.t2l_emu_last_launch(b"shared_bytes") <= kib * 1024


@pytest.mark.parametrize("name", ["L", "M_bf16_affine", "S_learnable", "S_rotary", "L_fp16", "wide_bf16", "smollm2_L"])
def test_a_cluster_gives_the_bits_of_one_block(emulator, name):
    case = next(case for case in HYPER_CASES if case.name == name)
    made = []
    for most in (1, 2, 4, 8):
        emulator.t2l_emu_set_max_cluster(most)
        made.append(ops.hypernet_trunk(**case.make_trunk()))
        blocks = emulator.t2l_emu_last_launch(b"cluster")
        assert 1 < blocks <= most or most == 1
    assert all(torch.equal(latent, made[0]) for latent in made)


def test_the_encoder_reads_its_matrix_once_a_tile(emulator):
    """Of t = 64, e = 300: once for every task of a tile, whose embedding each column needs; the blocks share the columns."""
    case = next(case for case in HYPER_CASES if case.name == "smollm2_L")
    arguments, t, e = case.make_trunk(), case.task_width, 300
    encoder = [torch.randn(t, e), *torch.randn(3, t)]
    ops.hypernet_trunk(**arguments)
    without = emulator.t2l_emu_counter(b"read")
    emulator.t2l_emu_reset_counters()
    ops.hypernet_trunk(**arguments | {"z": torch.randn(case.tasks, e)}, encoder=encoder)
    cluster = emulator.t2l_emu_last_launch(b"cluster")
    rows, group = case.tasks * case.modules * case.layers, case.modules * case.layers
    more = 0
    for tile in (range(first, min(first + 16, rows)) for first in range(0, rows, 16)):
        more += len({row // group for row in tile}) * t * (2 * e + 1) * 4  # products and bias
        more += len(tile) * t * 4 * cluster  # LayerNorm's two vectors, where z was read
    assert emulator.t2l_emu_counter(b"read") == without + more


def test_a_large_trunk_reads_its_weights_once_a_tile(emulator):
    """One description of Llama's or Gemma's hypernetwork: 64 rows are 4 clusters of 8 blocks, each with an eighth of the
    columns."""
    case = HyperCase("", tasks=1, modules=2, layers=32, task_width=64, width=512, head_in=512, dtype=BF16)
    arguments = case.make_trunk()
    ops.hypernet_trunk(**arguments)
    assert emulator.t2l_emu_last_launch(b"grid_x") == 4 * 8 + 16
    assert_reads_weights_once_a_tile(emulator, arguments, 4)
