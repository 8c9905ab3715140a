"""Broken ``hypermod.pt``: the objects in the pickle, the tensors, their values, bytes that were cut or flipped."""

from __future__ import annotations

import json
import pickle
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from tests.hostile.archive import Persistent, Stored, dumps, pack, parts, save
from tests.hostile.folders import Case, Workshop
from tests.hostile.payloads import CALLS, RAW, legacy, tar

PT = "hypermod.pt"
KEY = "mixer.4.bias"  # the tensor that most cases replace: [32]

State = dict[str, torch.Tensor]


class OrderedSubclass(OrderedDict):
    pass


def cases(shop: Workshop) -> Iterator[Case]:
    state = torch.load(shop.good["L-sft"] / PT, weights_only=True)
    case = _maker(shop)
    yield from calls(shop)
    yield from _opcodes(case)
    yield from _objects(case, state)
    yield from _claims(case, state)
    yield from _spellings(case, state)
    yield from _values(case, shop)


def _maker(shop: Workshop) -> Callable[..., Case]:
    def case(name: str, content: bytes, *mentions: str, base: str = "L-sft", harmless: bool = False) -> Case:
        return shop.case(f"pt-{name}", base, PT, content, *mentions, harmless=harmless)

    return case


def calls(shop: Workshop) -> Iterator[Case]:
    """Pickles that would run code."""
    case = _maker(shop)
    claims, records = parts(torch.load(shop.good["L-sft"] / PT, weights_only=True))
    for name, call in CALLS.items():
        yield case(f"call-{name}", pack(dumps(claims | {KEY: call}), records))
    system = CALLS["os-system"]
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        yield case(f"zip-protocol-{protocol}", pack(dumps(system, protocol)))
        yield case(f"plain-protocol-{protocol}", pickle.dumps(system, protocol))
    for name, obj in {
        "key": {system: 0},
        "in-list": [system],
        "in-metadata": claims | {"_metadata": system},
        "in-hooks": claims | {KEY: Stored("0", 32, (32,), offset=system)},
        "storage-key": claims | {KEY: Stored(system, 32, (32,))},
        "storage-kind": claims | {KEY: Stored("0", 32, (32,), kind=system)},
        "storage-location": claims | {KEY: Stored("0", 32, (32,), location=system)},
    }.items():
        yield case(f"call-as-{name}", pack(dumps(obj), records))
    yield case("after-stop", pack(dumps({}) + dumps(system)))
    yield case("nested-zip", pack(dumps(claims), records | {"0": pack(dumps(system))}))
    yield case("nested-zip-alone", pack(pack(dumps(system))))
    yield case("legacy", legacy({KEY: system}))
    yield case("legacy-top", legacy(system))
    yield case("tar", tar(pickle.dumps(system, 2)))


def _opcodes(case: Callable[..., Case]) -> Iterator[Case]:
    for name, content in RAW.items():
        yield case(f"opcodes-{name}", pack(content))
    yield case("plain-deep", RAW["top-deep"])
    yield case("text", b"This is no tensor file.\n" * 1000)
    yield case("zeros", bytes(100_000))
    yield case(
        "git-lfs-pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 334202\n"
    )


def _objects(case: Callable[..., Case], state: State) -> Iterator[Case]:
    tensor = state[KEY]
    for name, obj in {
        "list": list(state.values()), "pairs": list(state.items()), "tensor": tensor, "none": None, "text": "state_dict",
        "empty": {}, "empty-list": [], "counter": Counter("aab"), "subclass": OrderedSubclass(state),
        "nested": {"state_dict": state}, "nested-by-module": {k: {k: v} for k, v in state.items()},
        "int-keys": dict(enumerate(state.values())), "none-key": state | {None: tensor},
        "tuple-key": state | {("mixer", 4): tensor}, "bytes-key": {k.encode(): v for k, v in state.items()},
        "module": torch.nn.Identity(),
    }.items():  # fmt: skip
        yield case(f"object-{name}", save(obj))
    for name, value in {
        "number": 0.5, "list": tensor.tolist(), "none": None, "text": "x" * 100_000, "size": tensor.size(),
        "dtype": torch.float32, "storage": tensor.untyped_storage(),
    }.items():  # fmt: skip
        yield case(f"value-{name}", save(state | {KEY: value}))
    with torch.device("meta"):
        meta = torch.empty(32)
    values = {
        "sparse": tensor.to_sparse(),
        "sparse-huge": torch.sparse_coo_tensor(torch.zeros(1, 1, dtype=torch.long), torch.ones(1), (1 << 40,)),
        "sparse-csr": torch.ones(4, 8).to_sparse_csr(),
        "quantized": torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8),
        "meta": meta,
        "complex": tensor.to(torch.complex64), "negated-view": torch._neg_view(tensor), "int": tensor.long(),
        "uint8": tensor.byte(), "bool": tensor.bool(), "scalar": tensor[0], "none-left": tensor[:0], "wide": tensor[None],
        "short": tensor[1:].clone(), "expanded": torch.zeros(1).expand(10**9),
        "expanded-long": torch.zeros(1).expand(1 << 20, 1 << 20),
    }  # fmt: skip
    for name, value in values.items():
        plain = value.layout == torch.strided and value.dtype in (torch.float32, torch.int64)
        plain = plain and not value.is_meta and not value.is_neg()  # others are refused in the pickle, which names no key
        yield case(f"tensor-{name}", save(state | {KEY: value}), *([KEY] if plain else []))
    extra = ("sparse-huge", "expanded", "expanded-long", "meta")
    for name in extra:
        yield case(f"extra-{name}", save(state | {"surprise": values[name]}))
    yield case("all-one-storage", save({k: torch.zeros(1).expand(t.shape) for k, t in state.items()}))
    yield case("all-meta", save({k: torch.empty_like(t, device="meta") for k, t in state.items()}))
    yield case("all-int", save({k: t.long() for k, t in state.items()}))
    yield case("all-double-int", save({k: t.to(torch.int8) for k, t in state.items()}))
    yield case("10000-keys", save(state | {f"surprise.{i}": tensor for i in range(10_000)}))
    yield case("500-keys", save(state | {f"surprise.{i}": tensor for i in range(500)}), "surprise.")
    for name, key in {"long": "x" * 100_000, "control": "\x1b[2J\x07", "empty": "", "dots": "." * 1000}.items():
        yield case(f"key-{name}", save(state | {key: tensor}))
    for name, module in {
        "path": "../../etc/passwd",
        "braces": "{layer.__class__}",
        "empty": "",
        "newline": "q\nproj",
        "space": "q proj",
        "long": "q" * 100_000,
    }.items():
        yield case(f"module-{name}", partial(_with_module, state, module))


def _with_module(state: State, module: str, path: Path) -> None:
    """A file whose q_proj is called ``module``, beside an ``adapter_config.json`` that agrees."""
    path.write_bytes(save({k.replace("q_proj", module): v for k, v in state.items()}))
    config = path.with_name("adapter_config.json")
    values = json.loads(config.read_text()) | {"target_modules": [module, "v_proj"]}
    config.unlink()  # it may be a link to the good one
    config.write_text(json.dumps(values))


def _claims(case: Callable[..., Case], state: State) -> Iterator[Case]:
    """One tensor whose claim does not fit its record."""
    claims, records = parts(state)
    here = records | {"x": state[KEY].numpy().tobytes()}

    def one(name: str, *args, harmless: bool = False, **kwargs) -> Case:
        return case(f"claim-{name}", pack(dumps(claims | {KEY: Stored(*args, **kwargs)}), here), harmless=harmless)

    shape = (32,)
    for name, offset in {"beyond": 1, "huge": 1 << 62, "negative": -4, "text": "0"}.items():
        yield one(f"offset-{name}", "x", 32, shape, offset=offset)
    for name, size, stride in (
        ("beyond", (33,), (1,)), ("negative", (-32,), (1,)), ("minus-one", (-1,), (1,)), ("float", (32.0,), (1,)),
        ("overflow", (1 << 32, 1 << 32), (0, 0)), ("product-wraps", (1 << 33, 1 << 31, 32), (0, 0, 0)), ("text", "32", (1,)),
        ("none-of-huge", (0, 1 << 62), (1, 1)), ("many-dimensions", (1,) * 100_000, (1,) * 100_000), ("none", None, (1,)),
        ("big-int", (10**400,), (1,)),
    ):  # fmt: skip
        yield one(f"size-{name}", "x", 32, size, stride)
    yield one("stride-negative", "x", 32, shape, (-1,), offset=31)
    yield one("stride-beyond", "x", 32, shape, (2,))
    yield one("stride-zero", "x", 1, shape, (0,))
    yield one("stride-short", "x", 32, shape, (), harmless=True)
    yield one("stride-huge", "x", 32, shape, (1 << 62,))
    numels = {"larger": 64, "smaller": 16, "huge": 1 << 40, "overflow": 1 << 62, "negative": -32, "text": "32"}
    for name, numel in numels.items():
        yield one(f"numel-{name}", "x", numel, shape)
    for name, record in {"missing": "y", "parent": "../../../../etc/passwd", "int": 7, "long": "y" * 100_000}.items():
        yield one(f"record-{name}", record, 32, shape)
    for name, location in {"cuda": "cuda:7", "meta": "meta", "unknown": "y" * 10_000, "int": 5}.items():
        yield one(f"location-{name}", "x", 32, shape, location=location, harmless=True)
    kinds = {"int": torch.IntStorage, "double": torch.DoubleStorage, "untyped": torch.UntypedStorage, "class": torch.Tensor}
    for name, kind in kinds.items():
        yield one(f"kind-{name}", "x", 32, shape, kind=kind)
    beyond = claims | {"mixer.1.bias": Stored("x", 128, (128,))}  # as wide as the model wants it, wider than its record
    yield case("claim-reads-neighbours", pack(dumps(beyond), here))
    for name, persistent in {"module": ("module", 1), "long": ("storage",) * 9, "none": None, "nested": (((),),)}.items():
        bad = Stored("x", 32, shape)
        bad.storage = Persistent(persistent) if persistent else None
        yield case(f"claim-persistent-{name}", pack(dumps(claims | {KEY: bad}), here))
    # Small files that claim large tensors, consistently: only the bytes give them away.
    wide = {}
    for key, tensor in state.items():
        grown = [10**8 if n == 64 else n for n in tensor.shape]
        grown = [4 * (2 * 10**8 if "q_proj" in key else 10**8 + 32), *grown[1:]] if key.startswith("heads.") else grown
        wide[key] = torch.zeros(1).expand(grown)
    yield case("expanded-features", save(wide))
    deep = {k: torch.zeros(1).expand([10**6 if n == 3 else n for n in t.shape]) for k, t in state.items()}
    yield case("expanded-layers", save(deep))
    shared = torch.zeros(max(t.numel() for t in state.values()))
    overlapping = {k: torch.as_strided(shared, t.shape, t.stride()) for k, t in state.items()}
    yield case("overlapping-views", save(overlapping))
    row = torch.as_strided(torch.zeros(40 + 39), (40, 128), (1, 0))
    yield case("overlap-inside-a-tensor", save(state | {"mlp3.4.weight": row}))


def _spellings(case: Callable[..., Case], state: State) -> Iterator[Case]:
    """One large record under keys that differ in case only: torch reads it once for each."""
    claims, records = parts(state)
    keys = {"".join(c.upper() if i >> j & 1 else c for j, c in enumerate("aaaaaaaaa")) for i in range(400)}
    many = {f"surprise.{key}": Stored(key, 1 << 18, (1 << 18,)) for key in sorted(keys)}
    yield case("keys-in-many-spellings", pack(dumps(claims | many), records | {"aaaaaaaaa": bytes(1 << 20)}))


def _values(case: Callable[..., Case], shop: Workshop) -> Iterator[Case]:
    for base in ("L-sft", "M-recon-z", "S-pos-sft"):
        state = torch.load(shop.good[base] / PT, weights_only=True)
        used = [k for k in state if base == "M-recon-z" or not k.startswith(("mean_", "std_"))]
        for value in (float("nan"), float("inf"), float("-inf")):
            key = shop.random.choice(used)
            used.remove(key)
            tensor = state[key].clone()
            tensor.view(-1)[shop.random.randrange(tensor.numel())] = value
            yield case(f"{value}-{base}-{key}", save(state | {key: tensor}), key, base=base)
    state = torch.load(shop.good["M-recon-z"] / PT, weights_only=True)
    for key in ("std_recon_target.A.q_proj", "mean_recon_target.B.v_proj"):
        yield case(f"nan-{key}", save(state | {key: state[key] * float("nan")}), key, base="M-recon-z")
    negative = {"std_recon_target.B.v_proj": -state["std_recon_target.B.v_proj"].abs() - 1}
    yield case("negative-std", save(state | negative), "std_recon_target", base="M-recon-z")
