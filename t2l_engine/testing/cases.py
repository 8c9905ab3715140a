"""The op cases: one table for tests, gradient checks and benchmarks.

A case has shapes, dtypes and layout; ``make`` draws its operands from a seed.  They are slices of larger buffers, so that
strides are not contiguous; outputs are poisoned, padding beyond the true rank is NaN.  Values are drawn on the CPU, equal
for all backends, and placed on torch's default device.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor


def mapped(function, value):
    """``function`` of every tensor in ``value``, in lists and dicts too."""
    if isinstance(value, dict):
        return {key: mapped(function, entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(mapped(function, entry) for entry in value)
    return function(value) if isinstance(value, Tensor) else value


def placed(value, device: torch.device | None = None):
    """Copy of tensors (in lists and dicts too) on ``device`` (None: torch's default), strides and base storage kept."""
    device = device or torch.get_default_device()

    def of(tensor: Tensor) -> Tensor:
        if tensor.device.type == device.type:
            return tensor
        if tensor._base is None:
            return tensor.to(device)
        return of(tensor._base).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    return mapped(of, value)


def drawn_on_cpu(make):
    """Decorator: draw operands on the CPU, then place them on the default device."""

    @functools.wraps(make)
    def wrapped(*args, **kwargs):
        with torch.device("cpu"):
            operands = make(*args, **kwargs)
        return placed(operands)

    return wrapped


F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
#: Inputs and adapters.
_BF16, _F16 = ({"x_dtype": dtype, "w_dtype": dtype} for dtype in (BF16, F16))


@dataclasses.dataclass(frozen=True)
class LoraCase:
    """``segments``: (tokens, adapter) pairs; ``ranks``: true ranks, None: all ``rank``; ``b_layout``: "out_r" (PEFT) or
    "r_out" (slots of the engine)."""

    name: str
    segments: tuple[tuple[int, int], ...]
    in_features: int = 64
    out_features: int = 48
    rank: int = 8
    adapters: int = 4
    ranks: tuple[int, ...] | None = None
    x_dtype: torch.dtype = F32
    w_dtype: torch.dtype = F32
    b_layout: str = "r_out"
    pad: int = 3  # features beyond x, before y and beyond B in their buffers; 8: rows at 16-byte boundaries

    @property
    def tokens(self) -> int:
        return sum(n for n, _ in self.segments)

    @drawn_on_cpu
    def make(self, seed: int = 0) -> dict:
        """Arguments of ``ops.lora_add_`` by name."""
        g = torch.Generator().manual_seed(seed)
        r, pad = self.rank, self.pad
        x = torch.randn(self.tokens, self.in_features + pad, generator=g).to(self.x_dtype)[:, : self.in_features]
        y = torch.randn(self.tokens, self.out_features + 2 * pad, generator=g).to(self.x_dtype)
        y = y[:, pad : pad + self.out_features]
        a = torch.randn(self.adapters, r + 1, self.in_features, generator=g) / self.in_features**0.5
        a = a.to(self.w_dtype)[:, :r]
        b = torch.randn(self.adapters, r, self.out_features + pad, generator=g).to(self.w_dtype)[..., : self.out_features]
        b = b.mT if self.b_layout == "r_out" else b.mT.contiguous()
        ranks = None
        if self.ranks is not None:
            ranks = torch.tensor(self.ranks, dtype=torch.int32)
            for i, rank in enumerate(self.ranks):
                a[i, rank:] = float("nan")
                b[i, :, rank:] = float("nan")
        lengths = torch.tensor([0] + [n for n, _ in self.segments])
        return {
            "y": y,
            "x": x,
            "lora_A": a,
            "lora_B": b,
            "scaling": torch.rand(self.adapters, generator=g) + 0.5,
            "seg_indptr": lengths.cumsum(0).to(torch.int32),
            "seg_adapters": torch.tensor([i for _, i in self.segments], dtype=torch.int32),
            "max_seg_len": max((n for n, _ in self.segments), default=0),
            "ranks": ranks,
        }


def _rows(*ids: int, tokens: int = 1) -> tuple[tuple[int, int], ...]:
    return tuple((tokens, i) for i in ids)


_MIXED = _rows(0, -1, 3, 3, 1, -1, 2, 0)
_RAGGED = ((5, 1), (0, 2), (17, 0), (1, -1), (40, 3), (0, -1), (3, 1))

#: (tokens x adapters, segments, adapters): decode steps with one and many adapters, a shared adapter, a prefill.
_SERVE = (
    ("1x1", _rows(0), 1),
    ("8x8", _rows(*range(8)), 8),
    ("64x64", _rows(*range(64)), 64),
    ("64x1", _rows(0, tokens=64), 1),
    ("512x8", _rows(*range(8), tokens=64), 8),
)

LORA_CASES = (
    LoraCase("no_tokens", ()),
    LoraCase("empty_segments", ((0, 1), (0, -1), (0, 0))),
    LoraCase("all_base", _rows(-1, -1, -1)),
    LoraCase("one_token", _rows(0), adapters=1),
    LoraCase("mixed_rows", _MIXED),
    LoraCase("base_beside_first_and_last", _rows(-1, 0, -1, 3)),
    LoraCase("ragged", _RAGGED),
    LoraCase("skewed", ((1, 0), (130, 1))),
    LoraCase("unsorted_repeats", _rows(3, 0, 3, 0, 2, 2, 3)),
    LoraCase("many_adapters", _rows(*range(64)), adapters=64),
    *(LoraCase(f"rank_{r}", _RAGGED, rank=r) for r in (1, 3, 4, 12, 16, 64, 128)),
    LoraCase("mixed_ranks", _RAGGED, rank=16, ranks=(16, 3, 0, 8)),
    LoraCase("odd_features", _RAGGED, in_features=111, out_features=500),
    LoraCase("narrow_features", _RAGGED, in_features=7, out_features=5, rank=3),
    LoraCase("wide_features", _MIXED, in_features=2049, out_features=2304),
    LoraCase("out_r_layout", _RAGGED, b_layout="out_r"),
    LoraCase("out_r_odd", _RAGGED, in_features=111, out_features=77, rank=12, b_layout="out_r"),
    LoraCase("out_r_mixed_ranks", _RAGGED, out_features=600, rank=16, ranks=(16, 3, 0, 8), b_layout="out_r"),
    LoraCase("out_r_long", ((130, 1), (3, 0), (20, 1)), in_features=320, out_features=600, b_layout="out_r"),
    LoraCase("bf16", _RAGGED, **_BF16),
    LoraCase("bf16_odd", _RAGGED, in_features=111, out_features=77, rank=5, **_BF16),
    LoraCase("bf16_out_r", _MIXED, **_BF16, b_layout="out_r"),
    LoraCase("bf16_mixed_ranks", _RAGGED, rank=16, ranks=(16, 3, 0, 8), **_BF16),
    LoraCase("bf16_out_r_mixed_ranks", _RAGGED, out_features=600, rank=8, ranks=(8, 3, 0, 8), **_BF16, b_layout="out_r"),
    LoraCase("bf16_x_fp32_adapters_out_r", _RAGGED, out_features=600, x_dtype=BF16, b_layout="out_r"),
    LoraCase("bf16_x_fp32_adapters", _RAGGED, x_dtype=BF16),
    LoraCase("fp32_x_bf16_adapters", _RAGGED, w_dtype=BF16),
    LoraCase("serve_8x8_smollm2", _rows(*range(8)), in_features=576, out_features=576, adapters=8),
    LoraCase("prefill_8x64_smollm2", _rows(*range(8), tokens=64), in_features=576, out_features=576, adapters=8),
    LoraCase("serve_64x64", _rows(*range(64)), 4096, 4096, adapters=64, **_BF16),
    *(
        LoraCase(name, segments, 4096, 4096, adapters=adapters, **_BF16, b_layout=layout)
        for size, segments, adapters in _SERVE
        for name, layout in ((f"serve_{size}", "r_out"), (f"serve_{size}_out_r", "out_r"))
        if name != "serve_64x64"
    ),
    LoraCase("bf16_rank_64", _RAGGED, in_features=320, rank=64, **_BF16),
    LoraCase("bf16_long", ((130, 1), (3, 0), (20, 1)), in_features=320, **_BF16),
    LoraCase("fp16_rank_24", _RAGGED, rank=24, **_F16, b_layout="out_r"),
    LoraCase("fp16", _RAGGED, **_F16),
    LoraCase("fp16_out_r_odd", _RAGGED, in_features=111, out_features=77, rank=12, **_F16, b_layout="out_r"),
    LoraCase("fp16_x_bf16_adapters", _MIXED, x_dtype=F16, w_dtype=BF16),
    # As attached models have them: rows at 16-byte boundaries, which have a CUDA kernel of their own for decode steps.
    LoraCase("aligned_rows", _MIXED, 1056, 1032, **_BF16, pad=8),
    LoraCase("aligned_rows_fp16", _MIXED, 1056, 264, rank=20, **_F16, pad=8),
    LoraCase("aligned_rows_mixed_ranks", _MIXED, 1056, 264, 41, ranks=(41, 8, 0, 20), **_BF16, pad=8),
    LoraCase("aligned", _RAGGED, 1056, 264, rank=20, **_BF16, pad=8),
    LoraCase("aligned_fp32", _RAGGED, 1056, 264, pad=8),
    LoraCase("aligned_bf16_x_fp32_adapters", _RAGGED, 1056, 264, x_dtype=BF16, pad=8),
    LoraCase("serve_8x8_aligned", _rows(*range(8)), 4096, 4096, adapters=8, **_BF16, pad=8),
    LoraCase("fp64_by_reference", _RAGGED, x_dtype=F64, w_dtype=F64),
)


@dataclasses.dataclass(frozen=True)
class GroupCase:
    """A packed projection.  ``lora``: tokens, adapters, dtypes, layout and in features of all problems;
    ``problems``: (first column, out features, rank); ``columns``: of the whole output."""

    name: str
    lora: LoraCase
    problems: tuple[tuple[int, int, int], ...]
    columns: int

    @drawn_on_cpu
    def make(self, seed: int = 0) -> dict:
        """Arguments of ``ops.lora_add_group_`` by name."""
        sizes = [dataclasses.replace(self.lora, out_features=out, rank=rank, ranks=None) for _, out, rank in self.problems]
        made = [case.make(seed + i) for i, case in enumerate(sizes)]
        pad = self.lora.pad
        y = torch.randn(self.lora.tokens, self.columns + 2 * pad, generator=torch.Generator().manual_seed(seed))
        shared = ("x", "scaling", "seg_indptr", "seg_adapters", "max_seg_len")
        ranks = [[max(0, rank - i) for i in range(self.lora.adapters)] for _, _, rank in self.problems]
        for m, widths in zip(made, ranks, strict=True):
            for i, width in enumerate(widths):
                m["lora_A"][i, width:] = float("nan")
                m["lora_B"][i, :, width:] = float("nan")
        return {
            "y": y.to(self.lora.x_dtype)[:, pad : pad + self.columns],
            "lora_A": [m["lora_A"] for m in made],
            "lora_B": [m["lora_B"] for m in made],
            "ranks": [torch.tensor(widths, dtype=torch.int32) for widths in ranks],
            "offsets": [start for start, _, _ in self.problems],
            **{k: made[0][k] for k in shared},
        }


_QKV = ((0, 48, 8), (48, 16, 4), (64, 16, 1))
_PHI3_QV = ((0, 3072, 8), (6144, 3072, 8))
_PAST_A_PASS = ((0, 1056, 24), (1056, 264, 16), (1320, 264, 8))  # 48 ranks are more than one pass has
GROUP_CASES = (
    GroupCase("qkv", LoraCase("", _RAGGED), _QKV, 80),
    GroupCase("q_and_v", LoraCase("", _MIXED), (_QKV[0], _QKV[2]), 80),
    GroupCase("one_problem_with_gaps", LoraCase("", _MIXED, in_features=111), ((7, 77, 3),), 99),
    GroupCase("no_tokens", LoraCase("", ()), _QKV, 80),
    GroupCase("all_base", LoraCase("", _rows(-1, -1)), _QKV, 80),
    GroupCase("out_r_layout", LoraCase("", _RAGGED, b_layout="out_r"), _QKV, 80),
    GroupCase("bf16", LoraCase("", _RAGGED, **_BF16), _QKV, 83),
    GroupCase("bf16_x_fp32_adapters", LoraCase("", _MIXED, x_dtype=BF16), _QKV, 80),
    GroupCase("fp16", LoraCase("", _RAGGED, **_F16), _QKV, 80),
    GroupCase("aligned_rows", LoraCase("", _MIXED, 1056, **_BF16, pad=8), _PAST_A_PASS, 1584),
    GroupCase("nine_problems", LoraCase("", _RAGGED), tuple((20 * i, 9 + i, 1 + i) for i in range(9)), 180),
    GroupCase("serve_phi3_qkv_8x8", LoraCase("", _rows(*range(8)), 3072, **_BF16, adapters=8), _PHI3_QV, 9216),
)


#: Modules with each offset of an affine case, by their index modulo three.
_OFFSETS = {"mul_A": (0, 2), "add_A": (0, 1), "mul_B": (0, 1), "add_B": (0,)}


@dataclasses.dataclass(frozen=True)
class HyperCase:
    """Operands of the hypernetwork ops: the trunk, and the heads of modules of different sizes (:attr:`features`)."""

    name: str
    sides: int = 1
    rank: int = 4
    position: str = "none"  # "none", or "learned" or "rotary" with one latent per rank
    tasks: int = 3
    modules: int = 3
    layers: int = 5
    task_width: int = 16
    width: int = 32
    head_in: int = 40
    in_features: int = 64  # of the first module
    out_features: int = 48
    bias: bool = True
    affine: bool = False  # mul and add offsets for some modules
    dtype: torch.dtype = F32

    @property
    def latent_rows(self) -> int:
        """Latent rows of a side: one for each rank, or one for all."""
        return 1 if self.position == "none" else self.rank

    def _cast(self, arguments: dict, dtype: torch.dtype | None) -> dict:
        dtype = F64 if self.dtype == F64 else dtype  # float64 matrices go with float64 vectors
        return mapped(lambda tensor: tensor.to(dtype or tensor.dtype), arguments)

    @drawn_on_cpu
    def make_trunk(self, seed: int = 0, dtype: torch.dtype | None = None) -> dict:
        """Arguments of ``ops.hypernet_trunk`` by name; ``dtype`` upcasts every operand after rounding (the oracle)."""
        g = torch.Generator().manual_seed(seed)
        m, t, h = self.width, self.task_width, self.head_in

        def randn(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.randn(shape, generator=g) * scale

        def matrix(rows: int, cols: int) -> Tensor:
            return randn(rows, cols, scale=cols**-0.5).to(self.dtype)

        def mlp(out: int) -> list[Tensor]:
            norm = [randn(m) * 0.1 + 1, randn(m, scale=0.1)]
            return [*norm, matrix(4 * m, m), randn(4 * m, scale=0.1), matrix(out, 4 * m), randn(out, scale=0.1)]

        weights = [matrix(4 * m, t), randn(self.modules, self.layers, 4 * m), matrix(m, 4 * m), randn(m, scale=0.1)]
        weights += mlp(m) + mlp(m) + mlp(h)
        arguments = {
            "z": randn(self.tasks, t),
            "weights": weights,
            "side_emb": randn(self.modules, 2, m) if self.sides == 2 else None,
            "pos_emb": randn(self.rank, m) if self.position == "learned" else None,
            "rotary_ranks": self.rank if self.position == "rotary" else 0,
        }
        return self._cast(arguments, dtype)

    @property
    def features(self) -> list[tuple[int, int]]:
        """(in, out) features of every module: growing from the case's own, in and out alternating."""
        sizes = [(self.in_features + 8 * i, self.out_features + 3 * i) for i in range(self.modules)]
        return [(n_out, n_in) if i % 2 else (n_in, n_out) for i, (n_in, n_out) in enumerate(sizes)]

    @drawn_on_cpu
    def make_heads(self, seed: int = 0, dtype: torch.dtype | None = None) -> dict:
        """Arguments of ``ops.hypernet_heads`` by name; ``dtype`` upcasts every operand after rounding (the oracle)."""
        g = torch.Generator().manual_seed(seed + 1)
        n, r, h = self.layers, self.rank, self.head_in
        per_latent = r // self.latent_rows
        latent = torch.randn(self.tasks, self.modules + 1, self.sides, self.latent_rows, n, h + 8, generator=g)
        latent[:, 0] = latent[..., h:] = float("nan")  # around the operand, a slice of the larger buffer
        arguments = {
            "latent": latent.to(self.dtype)[:, 1:, ..., :h],
            "weight": [],
            "bias": [] if self.bias else None,
            "rank": r,
            "in_features": [n_in for n_in, _ in self.features],
            "out_features": [n_out for _, n_out in self.features],
            **{name: [] for name in _OFFSETS},
        }
        for i, (n_in, n_out) in enumerate(self.features):
            rows = per_latent * (max(n_in, n_out) if self.sides == 2 else n_in + n_out)
            arguments["weight"].append((torch.randn(rows, h, generator=g) * h**-0.5).to(self.dtype))
            if self.bias:
                arguments["bias"].append(torch.randn(rows, generator=g))
            for name, present in _OFFSETS.items():
                shape = (n, r, n_in) if name.endswith("A") else (n, n_out, r)
                drawn = torch.rand(shape, generator=g) + 0.5 if name.startswith("mul") else torch.randn(shape, generator=g)
                arguments[name].append(drawn if self.affine and i % 3 in present else None)
        return self._cast(arguments, dtype)


HYPER_CASES = (
    HyperCase("L"),
    HyperCase("L_no_bias_affine", bias=False, affine=True),
    HyperCase("M", sides=2),
    HyperCase("M_affine_out_wider", sides=2, affine=True, bias=False, in_features=24, out_features=88),
    HyperCase("S_learnable", sides=2, position="learned"),
    HyperCase("S_rotary", sides=2, position="rotary"),
    HyperCase("unshared_autoregressive", position="learned"),
    HyperCase("one_task_one_layer", tasks=1, layers=1, modules=1),
    HyperCase("odd_sizes", task_width=9, width=34, head_in=37, in_features=65, out_features=3, layers=33, rank=3),
    HyperCase("many_tasks", tasks=19, layers=7),
    HyperCase("no_tasks", tasks=0),
    HyperCase("nine_modules", modules=9, layers=2, head_in=24, affine=True),
    HyperCase(
        "nine_modules_out_wider", sides=2, modules=9, layers=2, head_in=24, in_features=8, out_features=300, dtype=BF16
    ),
    HyperCase("L_bf16", dtype=BF16),
    HyperCase("M_bf16_affine", sides=2, affine=True, dtype=BF16),
    HyperCase("S_rotary_bf16", sides=2, position="rotary", dtype=BF16, layers=17),
    HyperCase("odd_sizes_bf16", task_width=9, width=34, head_in=37, in_features=65, out_features=3, dtype=BF16),
    HyperCase("smollm2_L", task_width=64, width=128, head_in=112, layers=30, in_features=576, out_features=576, rank=8),
    HyperCase("wide_bf16", sides=2, position="learned", modules=1, width=128, head_in=100, dtype=BF16),
    HyperCase("deep_heads_bf16", tasks=9, modules=2, layers=16, head_in=260, in_features=40, out_features=24, dtype=BF16),
    HyperCase(
        "deep_shared_heads_bf16",
        sides=2,
        tasks=9,
        modules=1,
        layers=16,
        head_in=260,
        in_features=40,
        out_features=200,
        dtype=BF16,
    ),
    *(
        HyperCase(
            f"aligned_heads_{k}", tasks=9, modules=2, layers=16, head_in=k, in_features=40, out_features=24, dtype=BF16
        )
        for k in (128, 136, 256, 264)
    ),
    HyperCase("L_fp16", dtype=F16),
    HyperCase("S_learnable_fp64_by_reference", sides=2, position="learned", dtype=F64),
)
