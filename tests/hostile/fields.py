"""Values that cannot be in JSON and YAML files: any value at any place, names that lead elsewhere, and contradictions."""

from __future__ import annotations

import json
from collections.abc import Iterator

import yaml

from t2l_specs import fixed
from t2l_specs.suite import FAMILIES
from tests.hostile.folders import FILES, Case, Workshop

TEXT, LIST, SURROGATE = "x" * 10_000, [[1]] * 2000, "\ud800"
#: Values of which a message could show the beginning of each part and still have no end.
KEYS, NESTED = {f"{i}" + "k" * 150: 1 for i in range(5000)}, [[["x" * 50] * 16] * 16] * 16
#: What is put in place of every value of a file.
VALUES = [None, True, False, 0, -1, 1, 3, 2**31, 2**63, 10**400, 0.5, 1e308, 1e-300, float("nan"), float("inf"), "", "4",
          "../../etc/passwd", "{layer.__class__}", "(a+)+$", ".*.*.*x", [[]], [0, 1 << 62], {"q_proj": 8}, "F64", "M",
          {}, [], SURROGATE, TEXT, LIST, KEYS, NESTED]  # fmt: skip
#: Files with named values, and what reads them.
STRUCTURED = [
    *(("native", "config.json", loader) for loader in ("hypernetwork", "describe", "encoder")),
    *((base, file, None) for base in ("L-sft", "M-recon-z") for file in ("args.yaml", "adapter_config.json")),
    ("adapter", "adapter_config.json", None),
    ("perceiver", "config.json", "documents"),
    *((base, file, None) for base, files in FILES.items() for file in files),
]  # fmt: skip
#: Fields of a hypernetwork that fit the file and not the tensors beside it.
CONTRADICTIONS = [
    {"variant": "L"}, {"variant": "S-rotary"}, {"out_features": [32, 64]}, {"embed_dim": 49}, {"num_layers": 4},
    {"num_layers": 10**9}, {"rank": 5}, {"rank": 10**9}, {"latent_size": 36}, {"head_in_size": 41}, {"head_bias": True},
    # Consistent with everything but the tensors: building it would take terabytes.
    {"in_features": [1 << 30] * 2, "out_features": [1 << 30] * 2, "rank": 1 << 10, "num_layers": 1 << 10},
    # Names of torch's modules; with paths any name will do.
    *({"paths": ["h.{layer}.q", "h.{layer}.v"], "modules": ["q_proj", n]} for n in ("_parameters", "training", "forward")),
]  # fmt: skip


def cases(shop: Workshop) -> Iterator[Case]:
    blocks = json.loads(shop.read("native", "config.json"))
    for changes in CONTRADICTIONS:
        content = json.dumps(blocks | {"hypernetwork": blocks["hypernetwork"] | changes}).encode()
        yield shop.case(f"contradiction {[*changes]}", "native", "config.json", content, contradiction=True)
    args = yaml.safe_load(shop.read("L-sft", "args.yaml"))
    for changes in ({"mt_lora_path": "somewhere"}, {"mt_lora_path": 3}, {"pred_z_score": "false"}):
        content = json.dumps(args | changes).encode()  # JSON is YAML
        yield shop.case(f"contradiction {changes}", "L-sft", "args.yaml", content, contradiction=True)
    for texts in (
        {},
        *({"copy": of} for of in ([], "Repeat.", ["  "], [3], [["a"]], None, ["Repeat.", SURROGATE], LIST)),
        *({name: ["Repeat."]} for name in ("../base/tasks/copy", "/etc/passwd", "", "..", "a\0b", SURROGATE, TEXT)),
    ):
        yield shop.case("descriptions", "tasks", "descriptions.json", json.dumps(texts).encode())
    yield from _manifests(shop)


def _manifests(shop: Workshop) -> Iterator[Case]:
    """Of many names and long values, of tasks and of specifications."""
    whole = json.loads(shop.read("manifest", "manifest.json"))
    task, specs = whole["tasks"]["copy"], fixed.build(len(FAMILIES))
    for changed, *mentions in (
        (whole | {"tasks": {TEXT: task}}, "tasks"),
        (whole | {"tasks": {"copy": task | {"skill": NESTED}}}, "copy"),
        (whole | KEYS,),
        (whole | {"tasks": {"copy": task | {"splits": {f"s{i}": "MTIzNDU=" for i in range(100_000)}}}},),
        (whole | {"tasks": {f"task{i}": task for i in range(10_000)} | {"copy": None}}, "copy"),
        *((specs | {"about": value},) for value in (KEYS, NESTED, LIST)),
        *((specs | {field: value},) for field, value in (("version", "4"), ("seed", TEXT), ("tiers", {"train": {}}))),
        (specs | {"tiers": {"train": {f"join-{i:06}": TEXT[:16] for i in range(100_000)}}},),
    ):
        yield shop.case("manifest", "manifest", "manifest.json", json.dumps(changed).encode(), *mentions)
