"""Paths of adapted modules in a base model: dotted names, with ``{layer}`` for the layer index."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

LAYER = "{layer}"
MAX_PATH = 256
_COMPONENT = re.compile(r"[A-Za-z0-9_-]+")

#: Llama's module name -> path, for adapters that do not state paths.
DEFAULT_PATHS = {
    name: f"model.layers.{{layer}}.{block}.{name}"
    for block, names in {
        "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj"),
        "mlp": ("gate_proj", "up_proj", "down_proj", "gate_up_proj"),
    }.items()
    for name in names
}


def path_template(path: str) -> str:
    """``path`` with ``{layer}`` instead of the layer index."""
    return ".".join(LAYER if part.isdecimal() else part for part in path.split("."))


def path_error(path: str) -> str | None:
    """What is wrong with a path template, or None; a template without ``{layer}`` is a module outside the layers."""
    parts = path.split(".")
    if len(path) > MAX_PATH:
        return f"expected at most {MAX_PATH} characters"
    if parts.count(LAYER) > 1:
        return "expected one layer index at most (experts of a mixture are not supported)"
    plain = all(part == LAYER or (_COMPONENT.fullmatch(part) and not part.isdecimal()) for part in parts)
    if not plain or parts[-1] == LAYER:
        return "expected names of letters, digits, '_' and '-' joined by dots, the last one below the layer index"
    return None


def layer_list(path: str) -> str | None:
    """The path up to ``{layer}``, or None for a module outside the layers."""
    return path.partition(LAYER)[0] if LAYER in path else None


def module_names(paths: Iterable[str]) -> dict[str, str]:
    """Path -> module name: the shortest dotted suffix, of one component or more, that no other path ends with."""
    parts = {path: path.split(".") for path in dict.fromkeys(paths)}
    suffixes = Counter(tuple(p[-n:]) for p in parts.values() for n in range(1, len(p) + 1))
    lengths = {
        path: next((n for n in range(1, len(p)) if suffixes[tuple(p[-n:])] == 1), len(p)) for path, p in parts.items()
    }
    return {path: ".".join(p[-lengths[path] :]) for path, p in parts.items()}
