"""Reading a YAML file that nobody vouches for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from t2l_engine.files.errors import ConfigError
from t2l_engine.files.text import read_text

#: Some ten times those of the largest arguments seen (479 task names); parsing one takes 35 us and 1.2 kB.
MAX_NODES, MAX_DIGITS = 20_000, 400


class _PlainLoader(yaml.SafeLoader):
    """No merge keys: nested ones multiply without bound.  No doubled keys: which one counts would be a guess.

    Nodes are counted while they are made: a file of a megabyte can hold half a million.
    """

    def __init__(self, stream):
        super().__init__(stream)
        self._left = MAX_NODES

    def compose_node(self, parent, index):
        self._left -= 1
        if self._left < 0:
            raise yaml.composer.ComposerError(None, None, f"more than {MAX_NODES} values", self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def resolve(self, kind, value, implicit):
        if kind is yaml.ScalarNode and len(value) > MAX_DIGITS:  # patterns of numbers and dates are dear to try on it
            return self.DEFAULT_SCALAR_TAG
        return super().resolve(kind, value, implicit)

    def construct_yaml_int(self, node):
        if len(node.value) > MAX_DIGITS:  # numbers of base 60 take quadratic time
            raise yaml.constructor.ConstructorError(None, None, f"a number of over {MAX_DIGITS} characters", node.start_mark)
        return super().construct_yaml_int(node)

    def flatten_mapping(self, node):
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
            raise yaml.constructor.ConstructorError(None, None, "merge keys (<<) are not accepted", node.start_mark)
        super().flatten_mapping(node)

    def construct_mapping(self, node, deep=False):
        mapping = super().construct_mapping(node, deep)
        if len(mapping) != len(node.value):
            raise yaml.constructor.ConstructorError(None, None, "a key occurs twice in one mapping", node.start_mark)
        return mapping


_PlainLoader.add_constructor("tag:yaml.org,2002:int", _PlainLoader.construct_yaml_int)


def _count_nodes(value: Any, budget: int) -> int:
    """``budget`` less the nodes of ``value`` with every alias written out; negative as soon as it is spent."""
    budget -= 1
    if isinstance(value, (dict, list, tuple, set)):
        for item in value.values() if isinstance(value, dict) else value:
            budget = _count_nodes(item, budget)
            if budget < 0:
                break
    return budget


def read_yaml(path: Path) -> Any:
    """Parse a YAML file safely: plain values only; ConfigError names the file when it is none, too large or too deep."""
    return parse_yaml(read_text(path), str(path))


def parse_yaml(text: str, where: str) -> Any:
    """As :func:`read_yaml`, of text; ConfigError says ``where`` it stands."""
    try:
        value = yaml.load(text, Loader=_PlainLoader)
        small = _count_nodes(value, MAX_NODES) >= 0
    except Exception as reason:  # constructors of dates, numbers and keys raise many kinds
        raise ConfigError(f"{where}: not plain YAML: {str(reason)[:200]}") from None
    if not small:
        raise ConfigError(f"{where}: not plain YAML: its aliases stand for more than {MAX_NODES} values")
    return value
