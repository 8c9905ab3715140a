"""Bytes that the LoRA kernels move, beside those of operands that are read once and results that are written once.

``cuts.cpp`` holds what launches are chosen; here is what they move.
"""

from __future__ import annotations

import dataclasses
from math import ceil

import pytest
import torch

from t2l_engine import ops
from t2l_engine.testing import oracle
from t2l_engine.testing.cases import BF16, F32, GROUP_CASES, LORA_CASES, GroupCase, LoraCase

pytestmark = pytest.mark.emu


def traffic(emulator) -> tuple[int, int]:
    """Bytes read and written."""
    return emulator.t2l_emu_counter(b"read"), emulator.t2l_emu_counter(b"written")


def moved_once(case: LoraCase, accumulate: bool) -> tuple[int, int]:
    """(read, written) where x, y and the used adapters at their true ranks are moved once."""
    ranks = [*(case.ranks or [case.rank] * case.adapters), 0]  # the last is adapter -1's
    adapted = sum(tokens for tokens, adapter in case.segments if ranks[adapter])
    weights = sum(ranks[adapter] for adapter in {adapter for _, adapter in case.segments})
    weights *= (case.in_features + case.out_features) * case.w_dtype.itemsize
    activations = adapted * (case.in_features + (case.out_features if accumulate else 0)) * case.x_dtype.itemsize
    return activations + weights, (adapted if accumulate else case.tokens) * case.out_features * case.x_dtype.itemsize


#: Case and SMs: with one, token tiles are larger.
LORA_LAUNCHES = (
    ("one_token", 132), ("mixed_rows", 132), ("base_beside_first_and_last", 132), ("many_adapters", 132), ("ragged", 132),
    ("ragged", 1), ("rank_3", 132), ("rank_12", 1), ("rank_64", 132), ("rank_64", 1), ("mixed_ranks", 132),
    ("odd_features", 1), ("wide_features", 132), ("out_r_odd", 132), ("bf16", 132), ("bf16_odd", 132), ("bf16_out_r", 132),
    ("bf16_rank_64", 132), ("bf16_rank_64", 1), ("bf16_long", 132), ("bf16_long", 1), ("bf16_mixed_ranks", 1),
    ("bf16_out_r_mixed_ranks", 132), ("bf16_x_fp32_adapters", 132), ("fp16", 132), ("fp16_rank_24", 132),
    ("fp16_rank_24", 1), ("serve_8x8_smollm2", 132), ("serve_64x64", 132), ("serve_64x1", 132), ("serve_512x8", 132),
    ("serve_512x8", 1), ("aligned", 132), ("aligned_fp32", 132), ("aligned_rows", 132), ("aligned_rows_fp16", 132),
    ("aligned_rows_mixed_ranks", 132),
)  # fmt: skip


@pytest.mark.parametrize("most", [8, 1], ids=["clusters", "alone"])
@pytest.mark.parametrize("accumulate", [True, False], ids=["add", "delta"])
@pytest.mark.parametrize("name, num_sms", LORA_LAUNCHES)
def test_lora(emulator, name, num_sms, accumulate, most):
    """Results are written once; N-tiles that share a cluster, or fill a large token tile, share what they read."""
    emulator.t2l_emu_set_num_sms(num_sms)
    emulator.t2l_emu_set_max_cluster(most)
    case = next(case for case in LORA_CASES if case.name == name)
    arguments = case.make()
    if accumulate:
        ops.lora_add_(**arguments)
    else:
        arguments.pop("y")
        ops.lora_delta(**arguments)
    assert emulator.t2l_emu_last_launch(b"pdl") == (most > 1)  # devices that have clusters have such launches
    (read, written), (least, expected) = traffic(emulator), moved_once(case, accumulate)
    assert written == expected and least <= read <= (2.5 if most == 8 else 10) * least


@pytest.mark.parametrize("num_sms, cluster", [(132, 8), (12, 2), (8, 2)])
def test_lora_group(emulator, num_sms, cluster):
    """One launch; a cluster with N-tiles of several problems reads x once for them."""
    emulator.t2l_emu_set_num_sms(num_sms)
    group = next(case for case in GROUP_CASES if case.name == "serve_phi3_qkv_8x8")
    ops.lora_add_group_(**group.make())
    assert emulator.t2l_emu_counter(b"launches") == 1 and emulator.t2l_emu_last_launch(b"cluster") == cluster
    least, expected, x = 0, 0, group.lora.tokens * group.lora.in_features * group.lora.x_dtype.itemsize
    for _, out_features, rank in group.problems:
        ranks = tuple(max(0, rank - i) for i in range(group.lora.adapters))
        one = moved_once(dataclasses.replace(group.lora, out_features=out_features, rank=rank, ranks=ranks), True)
        least, expected = least + one[0], expected + one[1]
    read, written = traffic(emulator)
    shared = least - (len(group.problems) - 1) * x
    assert written == expected and shared <= read <= (1.4 if cluster == 8 else 1) * shared


def test_a_decode_step_reads_every_weight_once(emulator):
    """64 adapters, four N-tiles: A and x once a token, whose blocks share them."""
    shared = []
    for pad in (3, 8):
        case = LoraCase("", tuple((1, i) for i in range(64)), 4096, 2048, adapters=64, x_dtype=BF16, w_dtype=BF16, pad=pad)
        emulator.t2l_emu_reset_counters()
        ops.lora_add_(**case.make())
        assert emulator.t2l_emu_last_launch(b"cluster") == 4 and emulator.t2l_emu_last_launch(b"grid_x") == 64 * 4
        weights, activations = 64 * 8 * (4096 + 2048) * 2, 64 * (4096 + 2048) * 2
        assert traffic(emulator) == (weights + activations, 64 * 2048 * 2)
        shared.append(emulator.t2l_emu_last_launch(b"shared_bytes"))
    assert shared[0] > shared[1], "with rows at 16-byte boundaries the kernel of decode steps, which sorts no tokens"


def same_bits(emulator, call) -> None:
    """``call`` gives the same with clusters of at most 8, 3 and 1 blocks."""
    results, found = [], set()
    for most in (8, 3, 1):
        emulator.t2l_emu_set_max_cluster(most)
        results.append(call())
        found.add(emulator.t2l_emu_last_launch(b"cluster"))
    assert all(torch.equal(y, results[0]) for y in results) and {1, 2} <= found


@pytest.mark.parametrize("name", ["wide_features", "serve_64x1", "serve_512x8", "bf16_rank_64", "out_r_odd"])
@pytest.mark.parametrize("in_features", [2080, 4100, 5120])
def test_clusters_of_lora_give_the_bits_of_one_block(emulator, name, in_features):
    case = next(case for case in LORA_CASES if case.name == name)
    case = dataclasses.replace(case, in_features=in_features, out_features=2100)

    def call():
        arguments = case.make()
        ops.lora_add_(**arguments)
        return arguments["y"]

    same_bits(emulator, call)


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("one_token", [True, False])
def test_clusters_of_groups_give_the_bits_of_one_block(emulator, dtype, one_token):
    """Problems of several tiles and passes, of which one lacks some adapters, in one cluster."""
    segments = tuple((1 if one_token else 3 + i, i % 4 - 1) for i in range(6))
    lora = LoraCase("", segments, in_features=2080, adapters=3, x_dtype=dtype, w_dtype=dtype)
    group = GroupCase("", lora, ((0, 520, 20), (520, 512, 2), (1032, 1100, 41)), 2132)

    def call():
        arguments = group.make()
        ops.lora_add_group_(**arguments)
        return arguments["y"]

    same_bits(emulator, call)


BACKWARD = ("one_token", "mixed_rows", "ragged", "rank_12", "rank_64", "mixed_ranks", "odd_features", "bf16", "bf16_odd")
BACKWARD += ("bf16_rank_64", "bf16_mixed_ranks", "bf16_x_fp32_adapters", "fp16_rank_24")


@pytest.mark.parametrize("name", BACKWARD)
def test_lora_backward(emulator, name):
    """Every row of x and of the gradient once for 16 ranks, beside what the first launch reads."""
    case = next(case for case in LORA_CASES if case.name == name)
    arguments = {k: v for k, v in case.make().items() if k != "y"}
    if arguments["lora_B"].stride(1) != 1:  # copied before, by torch
        arguments["lora_B"] = arguments["lora_B"].mT.contiguous().mT
    grad = torch.randn(case.tokens, case.out_features).to(case.x_dtype)
    emulator.t2l_emu_reset_counters()
    oracle.gradients(torch.ops.t2l_engine.lora_backward_, grad, arguments)
    assert emulator.t2l_emu_counter(b"launches") == 2
    operands, rows = moved_once(case, True)
    grad_x = rows // case.out_features * case.in_features  # is added to
    grads = case.adapters * case.rank * (case.in_features + case.out_features) * case.w_dtype.itemsize
    read, written = traffic(emulator)
    assert operands + grad_x <= read <= (1.5 + ceil(case.rank / 16)) * (operands + grad_x)
    assert grad_x + grads <= written <= 1.5 * (grad_x + grads)  # and the rank vectors between the launches
