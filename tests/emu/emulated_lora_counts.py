"""Bytes that the LoRA kernels move and operations that they do, beside closed forms of the sizes alone."""

from __future__ import annotations

import dataclasses
from math import ceil

import pytest
import torch

from t2l_engine import ops
from t2l_engine.testing import oracle
from t2l_engine.testing.cases import BF16, F32, GROUP_CASES, LORA_CASES, GroupCase, LoraCase
from tests.emu.counts import NUM_SMS, Counts, counted, products, size

pytestmark = pytest.mark.emu

WARPS = 8  # of a block


def decode_products(n_tiles: int, depth: int) -> int:
    """Of the kernel of decode steps: 16 ranks and 8 columns, and k-blocks in rounds of those that a warp has in flight."""
    features, in_flight = 32, 4 if n_tiles <= 2 else 2
    part = 4 * WARPS * features * ceil(depth / (16 * WARPS * features))
    blocks = [min(part, depth - begin) // features for begin in range(0, depth, part)]  # of each part
    rounds = sum(ceil((n - warp) / (WARPS * in_flight)) for n in blocks for warp in range(min(WARPS, n)))
    return products(16, 8 * ceil(n_tiles / 2), rounds * in_flight * features, BF16)


def token_tiles_of(case: LoraCase, tokens_a_tile: int, accumulate: bool) -> list[tuple[int, int]]:
    """(adapter, tokens) of every token tile: tokens of an adapter wherever they are, ``tokens_a_tile`` at a time."""
    totals: dict[int, int] = {}
    for tokens, adapter in case.segments:
        totals[adapter] = totals.get(adapter, 0) + tokens
    return [
        (adapter, min(tokens_a_tile, total - start))
        for adapter, total in totals.items()
        for start in range(0, total, tokens_a_tile)
        if adapter >= 0 or not accumulate
    ]


def is_decode(case: LoraCase, accumulate: bool) -> bool:
    """Whether the kernel of decode steps takes it: rows of 16 bits at 16-byte boundaries."""
    aligned = case.pad % 8 == 0 and case.in_features % 32 == 0 and case.out_features % 8 == 0 and case.b_layout == "r_out"
    return accumulate and aligned and case.w_dtype == case.x_dtype != F32 and one_token(case)


Problems = list[tuple[LoraCase, list[int]]]  # and outputs of each of its N-tiles


def lora_counts(
    problems: Problems, m_tiles: int, n_tiles: int, accumulate: bool, cluster: int = 1, decode: bool = False
) -> Counts:
    """Of token tiles of ``16 * m_tiles`` tokens and ``8 * n_tiles`` ranks a pass; ``cluster``: N-tiles that share them;
    ``decode``: of the kernel of decode steps."""
    case, counts = problems[0][0], Counts()
    x, w = size(case.x_dtype), size(case.w_dtype)
    dtype = case.x_dtype if case.x_dtype == case.w_dtype else F32
    rank_of = lambda case, adapter: 0 if adapter < 0 else case.rank if case.ranks is None else case.ranks[adapter]  # noqa: E731
    output_tiles = [(case, outputs) for case, cut in problems for outputs in cut]
    for adapter, tokens in token_tiles_of(case, 16 * m_tiles if m_tiles else 1, accumulate):
        tiles = ceil(tokens / 16)
        for start in range(0, len(output_tiles), cluster):
            shared = output_tiles[start : start + cluster]
            ranks = {id(problem): rank_of(problem, adapter) for problem, _ in shared}
            passes, rows = ceil(sum(ceil(rank / 8) for rank in ranks.values()) / n_tiles), 16 * max(m_tiles, 1)
            depth = case.in_features
            counts.add(
                read=passes * tokens * case.in_features * x  # x for every pass over the ranks
                + sum(ranks.values()) * case.in_features * w,  # A once
                flops=passes * (decode_products(n_tiles, depth) if decode else products(rows, 8 * n_tiles, depth, dtype)),
            )
            for problem, outputs in shared:
                rank, result = ranks[id(problem)], tokens * outputs * x
                if rank == 0:
                    counts.add(written=0 if accumulate else result)
                    continue
                counts.add(
                    read=tiles * rank * outputs * w + (result if accumulate else 0),  # B for every 16 tokens
                    written=result,
                    # outputs by 64 a warp, ranks by 8; the rank vector is split in two, float32 weights too
                    flops=tiles * 2 * 16 * 64 * ceil(outputs / 64) * 8 * ceil(rank / 8) * (3 if dtype == F32 else 2),
                )
    return counts


#: Case, SMs, m tiles (0: one token per block), n tiles.
LORA_LAUNCHES = (
    ("one_token", 132, 0, 1), ("mixed_rows", 132, 0, 1), ("base_beside_first_and_last", 132, 0, 1),
    ("many_adapters", 132, 0, 1), ("ragged", 132, 1, 1), ("ragged", 1, 2, 1), ("rank_3", 132, 1, 1), ("rank_12", 1, 2, 2),
    ("rank_64", 132, 1, 4), ("rank_64", 1, 1, 4), ("mixed_ranks", 132, 1, 2), ("odd_features", 1, 2, 1),
    ("wide_features", 132, 0, 1), ("out_r_odd", 132, 1, 2), ("bf16", 132, 1, 1), ("bf16_odd", 132, 1, 1),
    ("bf16_out_r", 132, 0, 1), ("bf16_rank_64", 132, 1, 4), ("bf16_rank_64", 1, 2, 4), ("bf16_long", 132, 1, 1),
    ("bf16_long", 1, 2, 1), ("bf16_mixed_ranks", 1, 2, 2), ("bf16_out_r_mixed_ranks", 132, 1, 1),
    ("bf16_x_fp32_adapters", 132, 1, 1), ("fp16", 132, 1, 1), ("fp16_rank_24", 132, 1, 4), ("fp16_rank_24", 1, 2, 4),
    ("serve_8x8_smollm2", 132, 0, 1), ("serve_64x64", 132, 0, 1), ("serve_64x1", 132, 1, 1), ("serve_512x8", 132, 1, 1),
    ("serve_512x8", 1, 2, 1), ("aligned", 132, 1, 4), ("aligned_fp32", 132, 1, 1),
    ("aligned_rows", 132, 0, 1), ("aligned_rows_fp16", 132, 0, 4), ("aligned_rows_mixed_ranks", 132, 0, 4),
)  # fmt: skip


def token_tiles_at_most(case: LoraCase, m_tiles: int, accumulate: bool) -> int:
    used = min(case.adapters + (not accumulate), len(case.segments))
    return min(case.tokens, case.tokens // (16 * m_tiles) + used) if m_tiles else case.tokens


def cut(outs: list[int], token_tiles: int, slots: int) -> list[list[int]]:
    """Outputs of each N-tile of each linear: whole 512, the finest with which all blocks run at once."""
    whole = ceil(max(outs) / 512) * 512
    sizes = range(512, whole + 1, 512)
    size = next((n for n in sizes if token_tiles * sum(ceil(out / n) for out in outs) <= slots), whole)
    return [[min(size, out - start) for start in range(0, out, size)] for out in outs]


def dtype_of(case: LoraCase) -> torch.dtype:
    return case.x_dtype if case.x_dtype == case.w_dtype else F32


def slots_of(case: LoraCase, m_tiles: int, num_sms: int) -> int:
    return (2 if size(dtype_of(case)) == 2 and m_tiles <= 1 else 1) * num_sms


def cluster_of_tiles(case: LoraCase, token_tiles: int, output_tiles: int, slots: int, most: int) -> int:
    """Blocks that share rank vectors, some perhaps without outputs, if the features have split-K slices to share."""
    if output_tiles < 2 or case.in_features * size(dtype_of(case)) <= 4 * WARPS * 64:
        return 1
    for n in (8, 4, 2):
        room = slots - slots // 8 if n == 8 else slots
        if n <= most and n < 2 * output_tiles and token_tiles * ceil(output_tiles / n) * n <= room:
            return n
    return 2 if output_tiles % 2 == 0 and most >= 2 else 1


@pytest.mark.parametrize("most", [8, 1], ids=["clusters", "alone"])
@pytest.mark.parametrize("accumulate", [True, False], ids=["add", "delta"])
@pytest.mark.parametrize("name, num_sms, m_tiles, n_tiles", LORA_LAUNCHES)
def test_lora(emulator, name, num_sms, m_tiles, n_tiles, accumulate, most):
    emulator.t2l_emu_set_num_sms(num_sms)
    emulator.t2l_emu_set_max_cluster(most)
    case = next(case for case in LORA_CASES if case.name == name)
    arguments = case.make()
    if accumulate:
        ops.lora_add_(**arguments)
    else:
        arguments.pop("y")
        ops.lora_delta(**arguments)
    token_tiles, slots = token_tiles_at_most(case, m_tiles, accumulate), slots_of(case, m_tiles, num_sms)
    (output_tiles,) = cut([case.out_features], token_tiles, slots)
    cluster = cluster_of_tiles(case, token_tiles, len(output_tiles), slots, most)
    assert emulator.t2l_emu_last_launch(b"grid_x") == token_tiles * ceil(len(output_tiles) / cluster) * cluster
    assert emulator.t2l_emu_last_launch(b"cluster") == cluster
    assert emulator.t2l_emu_last_launch(b"pdl") == (most > 1)  # devices that have clusters have such launches
    assert counted(emulator) == lora_counts(
        [(case, output_tiles)], m_tiles, n_tiles, accumulate, cluster, is_decode(case, accumulate)
    )


@pytest.mark.parametrize("most", [8, 1], ids=["clusters", "alone"])
@pytest.mark.parametrize("num_sms", [132, 12, 8])
def test_lora_group(emulator, num_sms, most):
    """One launch; a cluster with N-tiles of several problems reads x once for them."""
    emulator.t2l_emu_set_max_cluster(most)
    emulator.t2l_emu_set_num_sms(num_sms)
    group = next(case for case in GROUP_CASES if case.name == "serve_phi3_qkv_8x8")
    ops.lora_add_group_(**group.make())
    assert emulator.t2l_emu_counter(b"launches") == 1
    token_tiles, slots, problems = group.lora.tokens, slots_of(group.lora, 0, num_sms), []
    output_tiles = cut([out for _, out, _ in group.members], token_tiles, slots)
    for (_, out_features, rank), own in zip(group.members, output_tiles, strict=True):
        ranks = tuple(max(0, rank - i) for i in range(group.lora.adapters))
        problems.append((dataclasses.replace(group.lora, out_features=out_features, rank=rank, ranks=ranks), own))
    cluster = cluster_of_tiles(group.lora, token_tiles, sum(map(len, output_tiles)), slots, most)
    assert emulator.t2l_emu_last_launch(b"cluster") == cluster
    assert cluster == (1 if most == 1 else {132: 8, 12: 2, 8: 2}[num_sms])
    together = len(output_tiles[0]) % cluster != 0  # else the clusters lie within problems
    assert counted(emulator) == lora_counts(problems, 0, 2 if together else 1, True, cluster, is_decode(group.lora, True))


def test_a_decode_step_reads_every_weight_once(emulator):
    """64 adapters, four N-tiles: A and x once a token, whose blocks share them."""
    shared = []
    for pad in (3, 8):
        case = LoraCase("", tuple((1, i) for i in range(64)), 4096, 2048, adapters=64, x_dtype=BF16, w_dtype=BF16, pad=pad)
        emulator.t2l_emu_reset_counters()
        ops.lora_add_(**case.make())
        assert emulator.t2l_emu_last_launch(b"cluster") == 4 and emulator.t2l_emu_last_launch(b"grid_x") == 64 * 4
        weights, activations = 64 * 8 * (4096 + 2048) * 2, 64 * (4096 + 2048) * 2
        assert counted(emulator).read == weights + activations and counted(emulator).written == 64 * 2048 * 2
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


# --- gradients of batched LoRA ---------------------------------------------------------------------------------------


def one_token(case: LoraCase) -> bool:
    """Whether every block takes one token."""
    return all(tokens == 1 for tokens, _ in case.segments) and case.tokens <= 64


def backward_counts(case: LoraCase, output_tiles: list[int]) -> Counts:
    """Two launches; ``output_tiles``: those of the gradient of x in the first, of token tiles of 16 tokens."""
    x, w = size(case.x_dtype), size(case.w_dtype)
    # B^T and A^T as A and B, and A x without B; both leave the rank vectors.
    transposed = dataclasses.replace(case, in_features=case.out_features, out_features=case.in_features)
    n_tiles = 1 if case.rank <= 8 else 2 if case.rank <= 16 else 4
    counts = Counts()
    for problem, cut in ((transposed, output_tiles), (case, [0])):
        counts.add(**dataclasses.asdict(lora_counts([(problem, cut)], 0 if one_token(case) else 1, n_tiles, True)))
    ranks = case.ranks or (case.rank,) * case.adapters
    exact = case.x_dtype == case.w_dtype != F32
    for tokens, adapter in case.segments:
        rank = ranks[adapter] if adapter >= 0 else 0
        counts.add(written=2 * tokens * rank * 4)
        tiles = ceil(case.in_features / 64) + ceil(case.out_features / 64)
        rank_tiles = ceil(rank / 16)
        counts.add(
            read=rank_tiles * tokens * (case.in_features + case.out_features) * x + tiles * tokens * rank * 4,
            # turns of 8 tokens, 16 ranks and 64 columns; the rank vectors are split in two, float32 rows too
            flops=rank_tiles * tiles * ceil(tokens / 8) * 2 * 16 * 8 * 64 * (2 if exact else 3),
        )
    counts.add(written=case.adapters * case.rank * (case.in_features + case.out_features) * w)
    return counts


BACKWARD = ("one_token", "mixed_rows", "ragged", "rank_12", "rank_64", "mixed_ranks", "odd_features", "bf16", "bf16_odd")
BACKWARD += ("bf16_rank_64", "bf16_mixed_ranks", "bf16_x_fp32_adapters", "fp16_rank_24", "serve_64x1")


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
    m_tiles = 0 if one_token(case) else 1
    token_tiles, slots = token_tiles_at_most(case, m_tiles, True), slots_of(case, m_tiles, NUM_SMS)
    (output_tiles,) = cut([case.in_features], token_tiles, slots - token_tiles)  # beside one without outputs
    assert counted(emulator) == backward_counts(case, output_tiles)
