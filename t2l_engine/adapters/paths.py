"""Where adapted modules live in a base model: dotted paths in which ``{layer}`` stands for the layer index."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

LAYER = "{layer}"
MAX_PATH = 256
_COMPONENT = re.compile(r"[A-Za-z0-9_-]+")

#: Where a module lives inside a decoder layer, for adapters that were not read from a file that says so.
DEFAULT_PATHS = {
    name: f"model.layers.{{layer}}.{block}.{name}"
    for block, names in {
        "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj"),
        "mlp": ("gate_proj", "up_proj", "down_proj", "gate_up_proj"),
    }.items()
    for name in names
}


def path_template(path: str) -> str:
    """``path`` of one module with ``{layer}`` in the place of its layer index."""
    return ".".join(LAYER if part.isdecimal() else part for part in path.split("."))


def path_error(path: str) -> str | None:
    """What is wrong with a module path in which ``{layer}`` stands for the layer index, if there is one; None if nothing."""
    parts = path.split(".")
    if len(path) > MAX_PATH:
        return f"expected at most {MAX_PATH} characters"
    if parts.count(LAYER) > 1:
        return "expected one layer index at most (experts of a mixture are not supported)"
    plain = all(part == LAYER or (_COMPONENT.fullmatch(part) and not part.isdecimal()) for part in parts)
    if not plain or parts[-1] == LAYER:
        return "expected names of letters, digits, '_' and '-' joined by dots, the last one below the layer index"
    return None


def nondefault_paths(paths: Mapping[str, str]) -> tuple[str, ...] | None:
    """The paths of modules, by name, in order; None where all are those of :data:`DEFAULT_PATHS`."""
    usual = all(DEFAULT_PATHS.get(name) == path for name, path in paths.items())
    return None if usual else tuple(paths.values())


def layer_list(path: str) -> str | None:
    """The path in front of ``{layer}``, or None for a module outside the layers."""
    return path.partition(LAYER)[0] if LAYER in path else None


def module_names(paths: Iterable[str]) -> dict[str, str]:
    """Path -> module name: the last component, or the shortest dotted suffix that no other path ends with."""
    parts = {path: path.split(".") for path in dict.fromkeys(paths)}
    suffixes = Counter(tuple(p[-n:]) for p in parts.values() for n in range(1, len(p) + 1))
    lengths = {
        path: next((n for n in range(1, len(p)) if suffixes[tuple(p[-n:])] == 1), len(p)) for path, p in parts.items()
    }
    return {path: ".".join(p[-lengths[path] :]) for path, p in parts.items()}
