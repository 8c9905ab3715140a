"""Module patterns read from PEFT configurations: regular expressions, matched as PEFT does, with bounded work."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from t2l_engine.files.errors import short_repr

MAX_PATTERNS, MAX_PATTERN, MAX_QUANTIFIERS = 4096, 256, 3
MAX_CLASSES = 256  # character classes in all patterns together: Python compiles them slowly
#: Matching steps over all patterns and paths, about ten nanoseconds each.
MAX_STEPS = 200_000_000

_TOKEN = re.compile(
    r"""(?P<open>\((?:\?:|(?!\?))) | (?P<close>\)) | (?P<branch>\|) | (?P<quantifier>[*+?][?+]? | \{[^}]*\}[?+]?)
      | (?P<plain>\\[^0-9] | \[\^?(?:\\.|[^\\])(?:\\.|[^\\\]])*\] | [^\\\[({*+?])""",
    re.VERBOSE | re.DOTALL,
)


class Patterns:
    """Values by module pattern; a pattern matches a module when it matches the whole path, or its end after a dot.

    ``values``: pattern -> value.  ``paths``: all module paths that :meth:`find` will be called with.

    Raises:
        ValueError: a pattern is not a regular expression, or matching it could take too long; the message names it.
    """

    def __init__(self, values: Mapping[str, Any], paths: Collection[str]):
        if len(values) > MAX_PATTERNS:
            raise ValueError(f"expected at most {MAX_PATTERNS} patterns, got {len(values)}")
        length, parts = max(map(len, paths)), max(path.count(".") + 1 for path in paths)
        self._values, steps, classes = [], 0, 0
        for pattern, value in values.items():
            classes += pattern.count("[")
            if classes > MAX_CLASSES:
                raise ValueError(f"{short_repr(pattern)}: expected at most {MAX_CLASSES} character classes in all patterns")
            steps += len(paths) * parts * (16 + _ways(pattern, length))
            if steps > MAX_STEPS:
                raise ValueError(
                    f"{short_repr(pattern)}: too much work for {len(paths)} modules; use simpler or fewer patterns"
                )
            try:
                self._values.append((re.compile(rf"(?:.*\.)?(?:{pattern})"), value))
            except (re.error, OverflowError, RecursionError) as error:
                raise ValueError(f"{short_repr(pattern)}: not a regular expression: {error}") from None

    def find(self, path: str, default: Any) -> Any:
        """The value of the first pattern that matches ``path``."""
        return next((value for regex, value in self._values if regex.fullmatch(path)), default)


def _ways(pattern: str, length: int) -> int:
    """Upper bound on the backtracking of ``pattern`` over ``length`` characters: in how many ways it can match them."""
    if len(pattern) > MAX_PATTERN:
        raise ValueError(f"{short_repr(pattern)}: expected at most {MAX_PATTERN} characters, got {len(pattern)}")
    groups = [[0, 1]]  # open groups: ways of the branches before, ways of the current branch
    quantifiers, at, before = 0, 0, None
    while at < len(pattern):
        token = _TOKEN.match(pattern, at)
        kind, end = (token.lastgroup, token.end()) if token else (None, at)
        if kind == "open":
            groups.append([0, 1])
        elif kind == "close" and len(groups) > 1:
            ways = sum(groups.pop())
            groups[-1][1] *= ways
        elif kind == "branch":
            groups[-1] = [sum(groups[-1]), 1]
        elif kind == "quantifier" and before != "close" and quantifiers < MAX_QUANTIFIERS:
            quantifiers += 1
            groups[-1][1] *= length + 1
        elif kind != "plain":
            raise ValueError(
                f"{short_repr(pattern)}: expected a pattern with at most {MAX_QUANTIFIERS} quantifiers, none on a group, "
                f"and no look-around or back-reference, got {short_repr(pattern[at : at + 16])} at {at}"
            )
        at, before = end, kind
    return sum(map(sum, groups))
