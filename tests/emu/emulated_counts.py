"""Bytes that the kernels move and operations that they do, beside closed forms of the sizes alone."""

from __future__ import annotations

import dataclasses
from math import ceil

import pytest
import torch

from t2l_engine import ops
from t2l_engine.testing import oracle
from t2l_engine.testing.cases import BF16, F16, F32, GROUP_CASES, HYPER_CASES, LORA_CASES, GroupCase, HyperCase, LoraCase

pytestmark = pytest.mark.emu

WARPS, TILE = 8, 128  # of a block; weight rows of a tile of the heads
NUM_SMS = 132


@dataclasses.dataclass
class Counts:
    read: int = 0
    written: int = 0
    flops: int = 0

    def add(self, read: int = 0, written: int = 0, flops: int = 0, times: int = 1) -> None:
        self.read += read * times
        self.written += written * times
        self.flops += flops * times


def counted(emulator) -> Counts:
    return Counts(*(emulator.t2l_emu_counter(name) for name in (b"read", b"written", b"flops")))


def size(dtype: torch.dtype) -> int:
    return dtype.itemsize


def products(rows: int, columns: int, depth: int, dtype: torch.dtype) -> int:
    """Of tensor cores: whole blocks of 64 bytes along the depth, three products for one of float32."""
    features = 64 // size(dtype)
    return 2 * rows * columns * ceil(depth / features) * features * (3 if dtype == F32 else 1)


def decode_products(n_tiles: int, depth: int) -> int:
    """Of the kernel of decode steps: 16 ranks and 8 columns, and k-blocks in rounds of those that a warp has in flight."""
    features, in_flight = 32, 4 if n_tiles <= 2 else 2
    part = 4 * WARPS * features * ceil(depth / (16 * WARPS * features))
    blocks = [min(part, depth - begin) // features for begin in range(0, depth, part)]  # of each part
    rounds = sum(ceil((n - warp) / (WARPS * in_flight)) for n in blocks for warp in range(min(WARPS, n)))
    return products(16, 8 * ceil(n_tiles / 2), rounds * in_flight * features, BF16)


# --- batched LoRA ----------------------------------------------------------------------------------------------------


def chunks_of(case: LoraCase, chunk: int, accumulate: bool) -> list[tuple[int, int]]:
    """(adapter, tokens) of every chunk: tokens of an adapter wherever they are, ``chunk`` at a time."""
    totals: dict[int, int] = {}
    for tokens, adapter in case.segments:
        totals[adapter] = totals.get(adapter, 0) + tokens
    return [
        (adapter, min(chunk, total - start))
        for adapter, total in totals.items()
        for start in range(0, total, chunk)
        if adapter >= 0 or not accumulate
    ]


def is_decode(case: LoraCase, accumulate: bool) -> bool:
    """Whether the kernel of decode steps takes it: rows of 16 bits at 16-byte boundaries."""
    aligned = case.pad % 8 == 0 and case.in_features % 32 == 0 and case.out_features % 8 == 0 and case.b_layout == "r_out"
    return accumulate and aligned and case.w_dtype == case.x_dtype != F32 and one_token(case)


Members = list[tuple[LoraCase, list[int]]]  # and outputs of each of its slices


def lora_counts(
    members: Members, m_tiles: int, n_tiles: int, accumulate: bool, cluster: int = 1, decode: bool = False
) -> Counts:
    """Of chunks of ``16 * m_tiles`` tokens and ``8 * n_tiles`` ranks a pass; ``cluster``: slices that share rank vectors;
    ``decode``: of the kernel of decode steps."""
    case, counts = members[0][0], Counts()
    x, w = size(case.x_dtype), size(case.w_dtype)
    dtype = case.x_dtype if case.x_dtype == case.w_dtype else F32
    rank_of = lambda case, adapter: 0 if adapter < 0 else case.rank if case.ranks is None else case.ranks[adapter]  # noqa: E731
    slices = [(case, outputs) for case, cut in members for outputs in cut]
    for adapter, tokens in chunks_of(case, 16 * m_tiles if m_tiles else 1, accumulate):
        tiles = ceil(tokens / 16)
        for start in range(0, len(slices), cluster):
            shared = slices[start : start + cluster]
            ranks = {id(member): rank_of(member, adapter) for member, _ in shared}
            passes, rows = ceil(sum(ceil(rank / 8) for rank in ranks.values()) / n_tiles), 16 * max(m_tiles, 1)
            depth = case.in_features
            counts.add(
                read=passes * tokens * case.in_features * x  # x for every pass over the ranks
                + sum(ranks.values()) * case.in_features * w,  # A once
                flops=passes * (decode_products(n_tiles, depth) if decode else products(rows, 8 * n_tiles, depth, dtype)),
            )
            for member, outputs in shared:
                rank, result = ranks[id(member)], tokens * outputs * x
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


def chunks_at_most(case: LoraCase, m_tiles: int, accumulate: bool) -> int:
    used = min(case.adapters + (not accumulate), len(case.segments))
    return min(case.tokens, case.tokens // (16 * m_tiles) + used) if m_tiles else case.tokens


def cut(outs: list[int], chunks: int, slots: int) -> list[list[int]]:
    """Outputs of each slice of each linear: whole 512, the finest with which all chunks' slices run at once."""
    whole = ceil(max(outs) / 512) * 512
    sizes = range(512, whole + 1, 512)
    size = next((n for n in sizes if chunks * sum(ceil(out / n) for out in outs) <= slots), whole)
    return [[min(size, out - start) for start in range(0, out, size)] for out in outs]


def dtype_of(case: LoraCase) -> torch.dtype:
    return case.x_dtype if case.x_dtype == case.w_dtype else F32


def slots_of(case: LoraCase, m_tiles: int, num_sms: int) -> int:
    return (2 if size(dtype_of(case)) == 2 and m_tiles <= 1 else 1) * num_sms


def cluster_of_slices(case: LoraCase, chunks: int, slices: int, slots: int, most: int) -> int:
    """Blocks that share rank vectors, filled up with blocks without outputs, if the features have parts to share."""
    if slices < 2 or case.in_features * size(dtype_of(case)) <= 4 * WARPS * 64:
        return 1
    for n in (8, 4, 2):
        room = slots - slots // 8 if n == 8 else slots
        if n <= most and n < 2 * slices and chunks * ceil(slices / n) * n <= room:
            return n
    return 2 if slices % 2 == 0 and most >= 2 else 1


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
    chunks, slots = chunks_at_most(case, m_tiles, accumulate), slots_of(case, m_tiles, num_sms)
    (slices,) = cut([case.out_features], chunks, slots)
    cluster = cluster_of_slices(case, chunks, len(slices), slots, most)
    assert emulator.t2l_emu_last_launch(b"grid_x") == chunks * ceil(len(slices) / cluster) * cluster
    assert emulator.t2l_emu_last_launch(b"cluster") == cluster
    assert emulator.t2l_emu_last_launch(b"early") == (most > 1)  # devices that have clusters have such launches
    assert counted(emulator) == lora_counts(
        [(case, slices)], m_tiles, n_tiles, accumulate, cluster, is_decode(case, accumulate)
    )


@pytest.mark.parametrize("most", [8, 1], ids=["clusters", "alone"])
@pytest.mark.parametrize("num_sms", [132, 12, 8])
def test_lora_group(emulator, num_sms, most):
    """One launch; a cluster with slices of several members reads x once for them."""
    emulator.t2l_emu_set_max_cluster(most)
    emulator.t2l_emu_set_num_sms(num_sms)
    group = next(case for case in GROUP_CASES if case.name == "serve_phi3_qkv_8x8")
    ops.lora_add_group_(**group.make())
    assert emulator.t2l_emu_counter(b"launches") == 1
    chunks, slots, members = group.lora.tokens, slots_of(group.lora, 0, num_sms), []
    slices = cut([out for _, out, _ in group.members], chunks, slots)
    for (_, out_features, rank), own in zip(group.members, slices, strict=True):
        ranks = tuple(max(0, rank - i) for i in range(group.lora.adapters))
        members.append((dataclasses.replace(group.lora, out_features=out_features, rank=rank, ranks=ranks), own))
    cluster = cluster_of_slices(group.lora, chunks, sum(map(len, slices)), slots, most)
    assert emulator.t2l_emu_last_launch(b"cluster") == cluster
    assert cluster == (1 if most == 1 else {132: 8, 12: 2, 8: 2}[num_sms])
    together = len(slices[0]) % cluster != 0  # else the clusters lie within members
    assert counted(emulator) == lora_counts(members, 0, 2 if together else 1, True, cluster, is_decode(group.lora, True))


def test_a_decode_step_reads_every_weight_once(emulator):
    """64 adapters, four slices of the outputs: A and x once a token, whose blocks share them."""
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
    """Members of several tiles and passes, of which one lacks some adapters, in one cluster."""
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


def backward_counts(case: LoraCase, slices: list[int]) -> Counts:
    """Two launches; ``slices``: those of the gradient of x in the first, of chunks of 16 tokens and 8 ranks a pass."""
    x, w = size(case.x_dtype), size(case.w_dtype)
    # B^T and A^T as A and B, and A x without B; both leave the rank vectors.
    transposed = dataclasses.replace(case, in_features=case.out_features, out_features=case.in_features)
    n_tiles = 1 if case.rank <= 8 else 2 if case.rank <= 16 else 4
    counts = Counts()
    for member, cut in ((transposed, slices), (case, [0])):
        counts.add(**dataclasses.asdict(lora_counts([(member, cut)], 0 if one_token(case) else 1, n_tiles, True)))
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
    chunks, slots = chunks_at_most(case, m_tiles, True), slots_of(case, m_tiles, NUM_SMS)
    (slices,) = cut([case.in_features], chunks, slots - chunks)  # beside one without outputs
    assert counted(emulator) == backward_counts(case, slices)


# --- hypernetwork ----------------------------------------------------------------------------------------------------


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


def cluster_of(case: HyperCase, blocks: int, num_sms: int, most: int) -> int:
    """Blocks that share the columns of a tile: a power of two, 16 columns each or more, in seven eighths of the SMs."""
    cluster = 1
    while case.width % 16 == 0 and 2 * cluster <= min(most, case.width // 16):
        if 2 * cluster * blocks > num_sms - num_sms // 8:
            break
        cluster *= 2
    return cluster


def trunk_counts(case: HyperCase, tile_rows: int, spread: bool, cluster: int) -> Counts:
    """``spread``: blocks take one side and one rank each, and make what comes before anew.  Each block of a cluster has
    the same activations, and columns of its own of every linear."""
    w, m, hidden, counts = size(case.dtype), case.width, 4 * case.width, Counts()
    rows = case.tasks * case.modules * case.layers
    ranks = case.latent_rows

    def linear(count: int, columns: int, depth: int) -> None:
        counts.add(read=columns * depth * w, flops=products(16, 16 * ceil(columns / 16), depth, case.dtype))
        counts.add(read=count * columns * 4)  # its bias, or the constant table

    def mlp(count: int, out: int) -> None:
        counts.add(read=count * m * 8, times=cluster)  # LayerNorm
        linear(count, hidden, m)
        linear(count, out, hidden)

    for first in range(0, rows, tile_rows):
        count = min(tile_rows, rows - first)
        for side in range(case.sides):
            for rank in range(ranks):
                if spread or side == rank == 0:
                    counts.add(read=count * case.task_width * 4, times=cluster)
                    linear(count, hidden, case.task_width)
                    linear(count, m, hidden)
                    mlp(count, m)
                if spread or rank == 0:
                    counts.add(read=count * m * 4 if case.sides == 2 else 0, times=cluster)
                    mlp(count, m)
                if case.position == "rotary":
                    mlp(count, m)
                if case.position == "learned":
                    counts.add(read=count * m * 4, times=cluster)
                mlp(count, case.head_in)
                counts.add(written=count * case.head_in * w)
    return counts


@pytest.mark.parametrize("num_sms, most", [(NUM_SMS, 8), (NUM_SMS, 1), (1, 8)])
@pytest.mark.parametrize("name", [*HEADS, "S_rotary", "one_task_one_layer", "wide_bf16"])
def test_trunk(emulator, name, num_sms, most):
    """``most``: blocks of a cluster; 1 on a card without clusters."""
    emulator.t2l_emu_set_num_sms(num_sms)
    emulator.t2l_emu_set_max_cluster(most)
    case = next(case for case in HYPER_CASES if case.name == name)
    ops.hypernet_trunk(**case.make_trunk())
    tiles = ceil(case.tasks * case.modules * case.layers / 16)
    spread = tiles * case.sides * case.latent_rows <= num_sms
    blocks = tiles * (case.sides * case.latent_rows if spread else 1)
    cluster = cluster_of(case, blocks, num_sms, most)
    if case.tasks:
        prefetch_blocks = max(0, min(16, num_sms - cluster * blocks)) // cluster * cluster  # they only prefetch
        assert emulator.t2l_emu_last_launch(b"grid_x") == cluster * blocks + prefetch_blocks
        assert emulator.t2l_emu_last_launch(b"cluster") == cluster
        assert not emulator.t2l_emu_last_launch(b"early")  # it reads weights from the start
    assert counted(emulator) == trunk_counts(case, 16, spread, cluster)


@pytest.mark.parametrize("kib, tile_rows", [(227, 16), (99, 8), (40, 4)])
def test_tiles_of_the_trunk_fit_the_shared_memory_of_a_block(emulator, kib, tile_rows):
    case = HyperCase("", tasks=1, modules=2, layers=11, task_width=64, width=512, head_in=512, dtype=BF16)
    expected = ops.hypernet_trunk(**case.make_trunk())
    emulator.t2l_emu_set_max_cluster(1)
    emulator.t2l_emu_set_shared_bytes(kib * 1024)
    emulator.t2l_emu_reset_counters()
    assert torch.equal(ops.hypernet_trunk(**case.make_trunk()), expected)
    assert kib * 1024 // 2 < emulator.t2l_emu_last_launch(b"shared_bytes") <= kib * 1024
    tiles = ceil(case.tasks * case.modules * case.layers / tile_rows)
    assert counted(emulator) == trunk_counts(case, tile_rows, tiles * case.sides * case.latent_rows <= NUM_SMS, 1)


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
    ops.hypernet_trunk(**arguments | {"z": torch.randn(case.tasks, e)}, encoder=encoder)
    cluster = emulator.t2l_emu_last_launch(b"cluster")
    rows, group = case.tasks * case.modules * case.layers, case.modules * case.layers
    tiles = [range(first, min(first + 16, rows)) for first in range(0, rows, 16)]
    expected = trunk_counts(case, 16, False, cluster)
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
    matrices = sum(t.nbytes for t in arguments["weights"] if t.dtype == BF16)
    vectors = counted(emulator).read - 4 * matrices
    assert 0 < vectors < 0.2 * 4 * matrices
