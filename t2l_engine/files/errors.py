"""ConfigError, short representations of values for its messages, and the bounds that files are checked against."""

from __future__ import annotations

import reprlib
from typing import Any

#: Bounds on what a file may ask for, so that refusing it costs little.
MAX_CONFIG_BYTES, MAX_MODULES, MAX_NAME, MAX_SIZE, MAX_RANK, MAX_LAYERS = 1 << 20, 64, 64, 1 << 31, 1 << 16, 4096
MAX_FEATURES = 1 << 20  # more than any vocabulary; with the others, parameters are within torch's tensor sizes
#: Bounds of LoRA scalings and of the numbers they are computed from, so that ratios and products stay within float32.
MIN_NUMBER, MAX_NUMBER = 1e-9, 1e9


class ConfigError(ValueError):
    """A configuration or checkpoint file cannot be used; the message names the field.

    >>> import t2l_engine as t2l
    >>> t2l.EncoderConfig(name="minilm", pooling="max")
    Traceback (most recent call last):
    t2l_engine.files.errors.ConfigError: encoder.pooling: expected one of ('cls', 'mean', 'last'), got 'max'
    """


_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 120
_repr.maxlist = _repr.maxtuple = _repr.maxdict = 16
_repr.maxlevel, MAX_SHOWN = 3, 400  # 16 strings of 120 characters would be too long for a message


def short_repr(value: Any) -> str:
    """``repr`` of a value read from a file, cut to MAX_SHOWN characters."""
    try:
        text = _repr.repr(value)
    except ValueError:  # an integer of more digits than Python prints
        return f"<{type(value).__name__} too large to print>"
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."


def expect(holds: object, name: str, expected: str, got: object) -> None:
    """ConfigError naming ``name``, the expected and the actual value, unless ``holds``."""
    if not holds:
        raise ConfigError(f"{name}: expected {expected}, got {short_repr(got)}")


def positive_number(name: str, value: Any) -> float:
    """``value`` as a float; ConfigError names it unless it is a number from MIN_NUMBER to MAX_NUMBER."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not MIN_NUMBER <= value <= MAX_NUMBER:
        raise ConfigError(f"{name}: expected a positive number in [{MIN_NUMBER}, {MAX_NUMBER}], got {short_repr(value)}")
    return float(value)


def one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """ConfigError naming ``name`` unless ``value`` is among ``allowed``."""
    expect(value in allowed, name, f"one of {allowed}", value)


def boolean(name: str, value: Any) -> bool:
    """``value``; ConfigError names it unless it is true or false."""
    expect(isinstance(value, bool), name, "true or false", value)
    return value


def non_empty_text(name: str, value: Any) -> None:
    """ConfigError naming ``name`` unless ``value`` is a non-empty string."""
    expect(isinstance(value, str) and value, name, "a non-empty string", value)


def positive_int(name: str, value: Any, most: int = MAX_SIZE - 1) -> None:
    """ConfigError naming ``name`` unless ``value`` is an integer from 1 to ``most``."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= most:
        raise ConfigError(f"{name}: expected a positive integer of at most {most}, got {short_repr(value)}")


def whole_number(name: str, value: Any, most: int = MAX_SIZE - 1) -> None:
    """ConfigError naming ``name`` unless ``value`` is an integer from 0 to ``most``."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
        raise ConfigError(f"{name}: expected 0 or more, at most {most}, got {short_repr(value)}")
