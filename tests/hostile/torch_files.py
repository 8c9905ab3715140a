"""Broken ``hypermod.pt``: the objects in the pickle, the tensors, their values, bytes that were cut or flipped."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from t2l_engine.hypernetwork.d2l import D2L_NAME
from tests.hostile.archive import Persistent, Stored, dumps, pack, parts, save
from tests.hostile.folders import Case, Workshop
from tests.hostile.payloads import CALLS, RAW, legacy, tar

PT = "hypermod.pt"
KEY = "mixer.4.bias"  # the tensor that most cases replace: [32]
#: Claims that a reader may ignore, by the beginning of the case's name.
HARMLESS = ("location", "stride-short")

State = dict[str, torch.Tensor]
Contents = Iterator[tuple[str, Any]]


def cases(shop: Workshop) -> Iterator[Case]:
    state = torch.load(shop.good["L-sft"] / PT, weights_only=True)
    yield from calls(shop)
    for group in (_opcodes, _objects, _claims, _expanded, _modules):
        for name, content in group(state):
            yield shop.case(f"{group.__name__}-{name}", "L-sft", PT, content, harmless=name.startswith(HARMLESS))
    for name, value in _tensors(state[KEY]).items():
        yield shop.case(f"tensor-{name}", "L-sft", PT, save(state | {KEY: value}), KEY if name in NAMED else "")
    yield from _values(shop)


def calls(shop: Workshop) -> Iterator[Case]:
    """Pickles that would run code."""
    claims, records = parts(torch.load(shop.good["L-sft"] / PT, weights_only=True))
    system, stored = CALLS["os-system"], partial(Stored, "0", 32, (32,))
    objects = {
        **{name: claims | {KEY: call} for name, call in CALLS.items()}, "key": {system: 0}, "in-list": [system],
        "in-metadata": claims | {"_metadata": system}, "in-offset": claims | {KEY: stored(offset=system)},
        "storage-key": claims | {KEY: Stored(system, 32, (32,))}, "storage-kind": claims | {KEY: stored(kind=system)},
        "storage-location": claims | {KEY: stored(location=system)},
    }  # fmt: skip
    files = {
        **{name: pack(dumps(value), records) for name, value in objects.items()},
        **{f"zip-protocol-{n}": pack(dumps(system, n)) for n in range(pickle.HIGHEST_PROTOCOL + 1)},
        **{f"plain-protocol-{n}": pickle.dumps(system, n) for n in range(pickle.HIGHEST_PROTOCOL + 1)},
        "after-stop": pack(dumps({}) + dumps(system)),
        "nested-zip": pack(dumps(claims), records | {"0": pack(dumps(system))}),
        "legacy": legacy({KEY: system}),
        "legacy-top": legacy(system),
        "tar": tar(pickle.dumps(system, 2)),
    }
    for name, content in files.items():
        yield shop.case(f"call-{name}", "L-sft", PT, content)
        yield shop.case(f"call-{name}", "documents", D2L_NAME, content)


def _opcodes(state: State) -> Contents:
    yield from ((name, pack(content)) for name, content in RAW.items())
    yield "plain-deep", RAW["top-deep"]
    yield "text", b"This is no tensor file.\n" * 1000
    yield "zeros", bytes(100_000)


def _objects(state: State) -> Contents:
    tensor = state[KEY]
    for name, obj in {
        "list": list(state.values()), "pairs": list(state.items()), "tensor": tensor, "none": None, "empty": {},
        "counter": Counter("aab"), "nested": {"state_dict": state}, "int-keys": dict(enumerate(state.values())),
        "none-key": state | {None: tensor}, "tuple-key": state | {("mixer", 4): tensor}, "module": torch.nn.Identity(),
        "bytes-key": {k.encode(): v for k, v in state.items()},
        "10000-keys": state | {f"surprise.{i}": tensor for i in range(10_000)},
    }.items():  # fmt: skip
        yield name, save(obj)
    for value in (0.5, tensor.tolist(), None, "x" * 100_000, tensor.size(), torch.float32, tensor.untyped_storage()):
        yield f"value-{type(value).__name__}", save(state | {KEY: value})
    for name in ("sparse-huge", "expanded", "meta"):
        yield f"extra-{name}", save(state | {"surprise": _tensors(tensor)[name]})
    yield "all-one-storage", save({k: torch.zeros(1).expand(t.shape) for k, t in state.items()})
    yield "all-meta", save({k: torch.empty_like(t, device="meta") for k, t in state.items()})
    yield "all-int", save({k: t.long() for k, t in state.items()})


#: Of the tensors below: the message names their key.  Others are refused in the pickle, which knows none.
NAMED = {"int", "scalar", "none-left", "wide", "short", "expanded", "expanded-long"}


def _tensors(tensor: torch.Tensor) -> State:
    """Tensors that none of a checkpoint is."""
    return {
        "sparse": tensor.to_sparse(),
        "sparse-huge": torch.sparse_coo_tensor(torch.zeros(1, 1, dtype=torch.long), torch.ones(1), (1 << 40,)),
        "sparse-csr": torch.ones(4, 8).to_sparse_csr(),
        "quantized": torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8),
        "meta": torch.empty(32, device="meta"),
        "complex": tensor.to(torch.complex64), "negated-view": torch._neg_view(tensor), "int": tensor.long(),
        "bool": tensor.bool(), "scalar": tensor[0], "none-left": tensor[:0], "wide": tensor[None],
        "short": tensor[1:].clone(), "expanded": torch.zeros(1).expand(10**9),
        "expanded-long": torch.zeros(1).expand(1 << 20, 1 << 20),
    }  # fmt: skip


def _claims(state: State) -> Contents:
    """One tensor whose claim does not fit its record."""
    claims, records = parts(state)
    here = records | {"x": state[KEY].numpy().tobytes()}
    good = {"key": "x", "numel": 32, "size": (32,), "stride": (1,)}
    for name, lies in {
        **{f"offset-{value}": {"offset": value} for value in (1, 1 << 62, -4, "0")},
        "size-beyond": {"size": (33,)},
        "size-negative": {"size": (-32,)},
        "size-float": {"size": (32.0,)},
        "size-product-wraps": {"size": (1 << 33, 1 << 31, 32), "stride": (0, 0, 0)},
        "size-none-of-huge": {"size": (0, 1 << 62), "stride": (1, 1)},
        "size-many-dimensions": {"size": (1,) * 100_000, "stride": (1,) * 100_000},
        "size-none": {"size": None},
        "size-digits": {"size": (10**400,)},
        "stride-negative": {"stride": (-1,), "offset": 31},
        "stride-beyond": {"stride": (2,)},
        "stride-zero": {"numel": 1, "stride": (0,)},
        "stride-short": {"stride": ()},
        "stride-huge": {"stride": (1 << 62,)},
        **{f"numel-{value}": {"numel": value} for value in (64, 16, 1 << 40, 1 << 62, -32, "32")},
        **{f"record-{str(value)[:9]}": {"key": value} for value in ("y", "../../../../etc/passwd", 7, "y" * 100_000)},
        **{f"location-{str(value)[:9]}": {"location": value} for value in ("cuda:7", "meta", "y" * 10_000, 5)},
        **{f"kind-{kind.__name__}": {"kind": kind} for kind in (torch.IntStorage, torch.UntypedStorage, torch.Tensor)},
    }.items():
        yield name, pack(dumps(claims | {KEY: Stored(**good | lies)}), here)
    neighbours = claims | {"mixer.1.bias": Stored("x", 128, (128,))}  # as wide as the model wants it, wider than its record
    yield "reads-neighbours", pack(dumps(neighbours), here)
    for persistent in (("module", 1), ("storage",) * 9, (((),),)):
        bad = Stored(**good)
        bad.storage = Persistent(persistent)
        yield "persistent", pack(dumps(claims | {KEY: bad}), here)


def _expanded(state: State) -> Contents:
    """Small files that claim large tensors, consistently: only the bytes give them away."""
    wide = {}
    for key, tensor in state.items():
        grown = [10**8 if n == 64 else n for n in tensor.shape]
        grown = [4 * (2 * 10**8 if "q_proj" in key else 10**8 + 32), *grown[1:]] if key.startswith("heads.") else grown
        wide[key] = torch.zeros(1).expand(grown)
    yield "features", save(wide)
    yield "layers", save({k: torch.zeros(1).expand([10**6 if n == 3 else n for n in t.shape]) for k, t in state.items()})
    shared = torch.zeros(max(t.numel() for t in state.values()))
    yield "overlapping-views", save({k: torch.as_strided(shared, t.shape, t.stride()) for k, t in state.items()})
    row = torch.as_strided(torch.zeros(40 + 39), (40, 128), (1, 0))
    yield "overlap-inside-a-tensor", save(state | {"mlp3.4.weight": row})


def _modules(state: State) -> Contents:
    """Names of tensors, and of modules on which both files agree."""
    for key in ("x" * 100_000, "\x1b[2J\x07", "", "." * 1000):
        yield f"key-{key[:5]!r}", save(state | {key: state[KEY]})
    for module in ("../../etc/passwd", "{layer.__class__}", "", "q\nproj", "q" * 100_000):
        yield f"module-{module[:9]!r}", partial(_with_module, state, module)


def _with_module(state: State, module: str, path: Path) -> None:
    """A file whose q_proj is called ``module``, beside an ``adapter_config.json`` that agrees."""
    path.write_bytes(save({k.replace("q_proj", module): v for k, v in state.items()}))
    config = path.with_name("adapter_config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"target_modules": [module, "v_proj"]}))


def _values(shop: Workshop) -> Iterator[Case]:
    """NaN and infinity in a tensor, and a negative standard deviation."""
    for base, key, value in (
        ("L-sft", KEY, float("nan")), ("L-sft", "heads.q_proj.weight", float("-inf")),
        ("S-pos-sft", "pos_emb.0.weight", float("inf")), ("M-recon-z", "std_recon_target.A.q_proj", float("nan")),
        ("M-recon-z", "mean_recon_target.B.v_proj", float("nan")), ("M-recon-z", "std_recon_target.B.v_proj", -1.0),
    ):  # fmt: skip
        state = torch.load(shop.good[base] / PT, weights_only=True)
        state[key].view(-1)[-1] = value
        yield shop.case(f"{value}-{base}-{key}", base, PT, save(state), key)
