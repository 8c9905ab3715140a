"""Bytes that the hypernetwork's kernels move and operations that they do, beside closed forms of the sizes alone."""

from __future__ import annotations

from math import ceil

import pytest
import torch

from t2l_engine import ops
from t2l_engine.testing.cases import BF16, F16, F32, HYPER_CASES, HyperCase
from tests.emu.counts import NUM_SMS, Counts, counted, size

pytestmark = pytest.mark.emu

TILE = 128  # weight rows of a tile of the heads


def heads_counts(case: HyperCase, heads: dict) -> Counts:
    """The sum over modules of other sizes, with other steps."""
    w, counts = size(case.dtype), Counts()
    rows = case.tasks * case.latent_rows * case.layers
    tile, k_tiles = 128 if rows > 64 and case.dtype != F32 else 32, max(1, ceil(case.head_in * w / 128))
    # The weights of a tile stay for all latents, in 16 KiB a k-tile, beside rings of four stages of two times 64 latents.
    stationary = tile == 128 and case.sides * rows > tile and (k_tiles + 4) * 16 + 2 <= 227
    tile = 64 if stationary else tile
    per_latent = case.rank // case.latent_rows
    for module, widths in enumerate(case.features):
        stored = max(widths)
        weight_rows = per_latent * (stored if case.sides == 2 else sum(widths))
        for first in range(0, weight_rows, TILE):
            inside, loaded = min(TILE, weight_rows - first), False
            for side in range(case.sides):
                if case.sides == 2 and first % stored >= widths[side] and first % stored + TILE <= stored:
                    continue  # rows that this side leaves out
                for latent in range(0, rows, tile):
                    latents = min(tile, rows - latent)
                    steps = ceil(case.head_in * w / 128)
                    kept, loaded = stationary and loaded, True
                    counts.add(
                        read=((0 if kept else inside) + latents) * case.head_in * w,
                        flops=2 * TILE * tile * steps * (128 // w) * (3 if case.dtype == F32 else 1),
                    )
        for side, width in zip("AB", widths, strict=True):
            values = case.tasks * case.layers * case.rank * width
            steps = sum(heads[f"{step}_{side}"][module] is not None for step in ("mul", "add"))
            counts.add(read=values * 4 * steps, written=values * w)
        if case.bias:  # of the rows that are kept, for every tile of latents: four lanes of each warp along it need it
            counts.add(read=(1 if stationary else 2) * 4 * 4 * per_latent * sum(widths) * ceil(rows / tile))
    return counts


HEADS = ("L", "L_no_bias_affine", "M_affine_out_wider", "S_learnable", "odd_sizes", "many_tasks", "no_tasks", "L_bf16")
HEADS += ("M_bf16_affine", "S_rotary_bf16", "odd_sizes_bf16", "smollm2_L", "L_fp16", "nine_modules")
HEADS += ("nine_modules_out_wider", "deep_heads_bf16", "deep_shared_heads_bf16")


@pytest.mark.parametrize("num_sms", [NUM_SMS, 1])
@pytest.mark.parametrize("name", HEADS)
def test_heads(emulator, name, num_sms):
    """However many tiles a block has."""
    emulator.t2l_emu_set_num_sms(num_sms)
    case = next(case for case in HYPER_CASES if case.name == name)
    heads = case.make_heads()
    ops.hypernet_heads(**heads)
    assert counted(emulator) == heads_counts(case, heads)


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
    assert counted(emulator).read == sum(weight.nbytes for weight in heads["weight"]) + latent


def assert_reads_weights_once_a_tile(emulator, arguments, tiles):
    """Of the trunk; biases and LayerNorm's vectors are little beside them."""
    matrices = sum(t.nbytes for t in arguments["weights"] if t.dtype == BF16)
    assert 0 < counted(emulator).read - tiles * matrices < 0.2 * tiles * matrices


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
    expected = counted(emulator)
    emulator.t2l_emu_reset_counters()
    ops.hypernet_trunk(**arguments | {"z": torch.randn(case.tasks, e)}, encoder=encoder)
    cluster = emulator.t2l_emu_last_launch(b"cluster")
    rows, group = case.tasks * case.modules * case.layers, case.modules * case.layers
    tiles = [range(first, min(first + 16, rows)) for first in range(0, rows, 16)]
    for tile in tiles:
        tasks = len({row // group for row in tile})
        expected.add(read=tasks * t * (2 * e + 1) * 4)  # products and bias
        expected.add(read=len(tile) * (2 - 1) * t * 4, times=cluster)  # LayerNorm's two vectors, where z was read
    assert counted(emulator) == expected


def test_a_large_trunk_reads_its_weights_once_a_tile(emulator):
    """One description of Llama's or Gemma's hypernetwork: 64 rows are 4 clusters of 8 blocks, each with an eighth of the
    columns."""
    case = HyperCase("", tasks=1, modules=2, layers=32, task_width=64, width=512, head_in=512, dtype=BF16)
    arguments = case.make_trunk()
    ops.hypernet_trunk(**arguments)
    assert emulator.t2l_emu_last_launch(b"grid_x") == 4 * 8 + 16
    assert_reads_weights_once_a_tile(emulator, arguments, 4)
