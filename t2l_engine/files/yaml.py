"""Reads an untrusted YAML file: plain values only, within bounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

from t2l_engine.files.errors import ConfigError
from t2l_engine.files.text import read_text

#: About ten times the nodes of the largest args.yaml known (479 task names); parsing a node takes 35 us and 1.2 kB.
MAX_NODES, MAX_DIGITS = 20_000, 400


class _PlainLoader(yaml.SafeLoader):
    """SafeLoader without merge keys, which can grow exponentially, and without duplicate keys, which are ambiguous.

    Nodes are counted while they are composed: a file of one megabyte can contain half a million.
    """

    def __init__(self, stream):
        super().__init__(stream)
        self._left = MAX_NODES

    def compose_node(self, parent, index):
        self._left -= 1
        if self._left < 0:
            raise ComposerError(None, None, f"more than {MAX_NODES} values", self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def resolve(self, kind, value, implicit):
        if kind is yaml.ScalarNode and len(value) > MAX_DIGITS:  # matching the patterns of numbers and dates would be slow
            return self.DEFAULT_SCALAR_TAG
        return super().resolve(kind, value, implicit)

    def construct_yaml_int(self, node):
        if len(node.value) > MAX_DIGITS:  # base-60 numbers take quadratic time
            raise ConstructorError(None, None, f"a number of over {MAX_DIGITS} characters", node.start_mark)
        return super().construct_yaml_int(node)

    def flatten_mapping(self, node):
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
            raise ConstructorError(None, None, "merge keys (<<) are not accepted", node.start_mark)
        super().flatten_mapping(node)

    def construct_mapping(self, node, deep=False):
        mapping = super().construct_mapping(node, deep)
        if len(mapping) != len(node.value):
            raise ConstructorError(None, None, "a key occurs twice in one mapping", node.start_mark)
        return mapping


_PlainLoader.add_constructor("tag:yaml.org,2002:int", _PlainLoader.construct_yaml_int)


def _count_nodes(value: Any, budget: int) -> int:
    """``budget`` minus the number of nodes of ``value`` with aliases expanded; stops as soon as it is negative."""
    budget -= 1
    if isinstance(value, (dict, list, tuple, set)):
        for item in value.values() if isinstance(value, dict) else value:
            budget = _count_nodes(item, budget)
            if budget < 0:
                break
    return budget


def read_yaml(path: Path) -> Any:
    """Parse a YAML file of plain values; ConfigError names a file that is not, or is too large or nested too deeply."""
    return parse_yaml(read_text(path), str(path))


def parse_yaml(text: str, where: str) -> Any:
    """As :func:`read_yaml`, from ``text``; ``where`` names the source in errors."""
    try:
        value = yaml.load(text, Loader=_PlainLoader)
        small = _count_nodes(value, MAX_NODES) >= 0
    except Exception as reason:  # constructors of dates, numbers and keys raise many kinds of errors
        text = " ".join(str(reason).split())  # YAML's messages have several lines
        raise ConfigError(f"{where}: not plain YAML: {text[:200]}") from None
    if not small:
        raise ConfigError(f"{where}: not plain YAML: its aliases expand to more than {MAX_NODES} values")
    return value
