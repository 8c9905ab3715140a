"""Values that cannot be in JSON and YAML files: any value at any place, names that lead elsewhere, and contradictions."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator

import yaml

from t2l_engine.research.tasks.specs import fixed
from t2l_engine.research.tasks.specs.suite import FAMILIES
from tests.hostile.folders import FILES, Case, Workshop

TEXT, LIST, SURROGATE = "x" * 10_000, [[1]] * 2000, "\ud800"
#: Values of which a message could show the beginning of each part and still have no end.
KEYS, NESTED = {f"{i}" + "k" * 150: 1 for i in range(5000)}, [[["x" * 50] * 16] * 16] * 16
#: What is put in place of every value of a file.
VALUES = [None, True, False, 0, -1, 1, 3, 2**31, 2**63, 10**400, 0.5, 1e308, 1e-300, float("nan"), float("inf"), "", "4",
          "../../etc/passwd", "{layer.__class__}", "(a+)+$", ".*.*.*x", [[]], [0, 1 << 62], {"q_proj": 8}, "F64", "M",
          {}, [], SURROGATE, TEXT, LIST, KEYS, NESTED]  # fmt: skip
#: Names that are none of a task.
TASK_NAMES = ["../base/tasks/copy", "/etc/passwd", "", "..", ".copy", "a\0b", "a\nb", SURROGATE, TEXT, "\u65e5" * 128]
#: Files with named values, and what reads them.
STRUCTURED = [
    *(("native", "config.json", loader) for loader in ("hypernetwork", "describe", "encoder")),
    *((base, file, None) for base in ("L-sft", "M-recon-z") for file in ("args.yaml", "adapter_config.json")),
    ("adapter", "adapter_config.json", None),
    *((base, file, None) for base, files in FILES.items() for file in files),
]  # fmt: skip
#: Values that fit the file and not the tensors beside it.
CONTRADICTIONS = {
    "variant": ["L", "S-rotary"], "out_features": [[32, 64]], "embed_dim": [49], "num_layers": [4, 10**9],
    "rank": [5, 10**9], "latent_size": [36], "head_in_size": [41], "head_bias": [True],
}  # fmt: skip


def every_value(shop: Workshop) -> Iterator[Case]:
    """Each of VALUES at each place of each file; many of them may be loaded."""
    for base, file, loader in STRUCTURED:
        whole = shop.read(base, file)
        values = VALUES[:-3] if file.endswith(".yaml") else VALUES  # YAML takes seconds for the largest
        for path in places(_parsed(whole, file)):
            for value in values:
                content = _with(whole, file, path, value)
                name = f"{base} {file} {path}"
                yield shop.case(name, base, file, content, loader=loader, contradiction=True)


def places(node: object, path: tuple = ()) -> Iterator[tuple]:
    """Paths of all values below ``node``."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield (*path, key)
        yield from places(value, (*path, key))


def cases(shop: Workshop) -> Iterator[Case]:
    yield from _contradictions(shop)
    yield from _task_names(shop)


def _parsed(whole: bytes, file: str) -> dict:
    """The values of a file; of JSON Lines those of the first line."""
    return (
        yaml.safe_load(whole) if file.endswith(".yaml") else json.loads(whole.splitlines()[0] if "jsonl" in file else whole)
    )


def _with(whole: bytes, file: str, path: tuple, value: object) -> bytes:
    """The file with ``value`` at ``path``; of a JSON Lines file a further line with it."""
    top = copy.deepcopy(_parsed(whole, file))
    node = top
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return (whole if file.endswith(".jsonl") else b"") + json.dumps(top).encode()


def _contradictions(shop: Workshop) -> Iterator[Case]:
    whole = shop.read("native", "config.json")

    def contradict(base: str, file: str, content: bytes) -> Case:
        return shop.case(f"contradiction {file}", base, file, content, contradiction=True)

    for field, values in CONTRADICTIONS.items():
        for value in values:
            yield contradict("native", "config.json", _with(whole, "config.json", ("hypernetwork", field), value))
    blocks = json.loads(whole)
    for name in ("_parameters", "_modules", "training", "forward", "items", "T_destination"):
        places = {"paths": ["h.{layer}.q", "h.{layer}.v"], "modules": ["q_proj", name]}  # so that any name will do
        changed = json.dumps(blocks | {"hypernetwork": blocks["hypernetwork"] | places}).encode()
        yield contradict("native", "config.json", changed)
    # Everything consistent with everything but the tensors: building it would take terabytes.
    big = {"in_features": [1 << 30] * 2, "out_features": [1 << 30] * 2, "rank": 1 << 10, "num_layers": 1 << 10}
    yield contradict("native", "config.json", json.dumps(blocks | {"hypernetwork": blocks["hypernetwork"] | big}).encode())
    args = shop.read("L-sft", "args.yaml")
    for field, value in (("mt_lora_path", "somewhere"), ("mt_lora_path", 3), ("pred_z_score", "false")):
        yield contradict("L-sft", "args.yaml", _with(args, "args.yaml", (field,), value))
    whole = shop.read("settings", "run.yaml")
    for field, value in {"mix_descriptions": True, "held_out_descriptions": 2, "embedding_noise": 0.5}.items():
        one_hot = _with(_with(whole, "run.yaml", ("encoder",), "one-hot"), "run.yaml", (field,), value)
        yield shop.case(f"one-hot {field}", "settings", "run.yaml", one_hot, field)


def _task_names(shop: Workshop) -> Iterator[Case]:
    """Names of tasks, texts of descriptions, and suites of specifications."""
    whole = json.loads(shop.read("manifest", "manifest.json"))
    task = whole["tasks"]["copy"]

    def listed(name: str, changes: dict, *mentions: str) -> Case:
        content = json.dumps(whole | changes).encode()
        return shop.case(f"manifest {name}", "manifest", "manifest.json", content, *mentions)

    def described(value: object) -> Case:
        return shop.case("descriptions", "tasks", "descriptions.json", json.dumps(value).encode())

    for name in TASK_NAMES:
        yield listed("name", {"tasks": {name: task}}, "tasks")
        yield described({name: ["Repeat."]})
    for texts in ([], "Repeat the input.", ["  "], [3], [["a"]], None, ["Repeat.", SURROGATE], LIST):
        yield described({"copy": texts})
    yield described({})
    for value in [*VALUES, *({k: v for k, v in task.items() if k != field} for field in task)]:
        yield listed("entry", {"tasks": {"good": task, "copy": value}}, "copy")
    for name in ("../train", "t" * 65, ""):
        yield listed(
            "split", {"tasks": {"copy": task | {"splits": {"test": "MTIzNDU=", name: "YWJjZGU="}}}}, "copy", "splits"
        )
    yield listed("surprises", KEYS)
    yield listed("many-splits", {"tasks": {"copy": task | {"splits": {f"s{i}": "MTIzNDU=" for i in range(100_000)}}}})
    yield listed("many-tasks", {"tasks": {f"task{i}": task for i in range(10_000)} | {"copy": None}}, "copy")
    specs = fixed.build(len(FAMILIES))
    wrong = {"about": VALUES[-6:], "version": VALUES, "seed": [True, "0", 1, TEXT],
             "tiers": [*VALUES, {"train": {}}], "surprise": [1]}  # fmt: skip
    for field, values in wrong.items():
        for value in values:
            yield listed(f"specs {field}", specs | {field: value})
    yield listed("specs-many", specs | {"tiers": {"train": {f"join-{i:06}": TEXT[:16] for i in range(100_000)}}})
    for name in ("task001_a b", "task001_~"):
        yield shop.case(
            f"sni {name}", "sni", f"{name}.json", shop.read("sni", "task001_colours.json"), "expected task names"
        )
