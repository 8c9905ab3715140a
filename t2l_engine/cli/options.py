"""Options of commands, declared once: as the fields of a dataclass, or of settings that another room declares."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable
from typing import Annotated, Any

import typer


def takes(*groups: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate a function of an instance of each dataclass in ``groups``: a command whose options are their fields.

    The type of a field is annotated as a parameter of a typer command is; or its metadata holds ``help`` and further
    arguments of ``typer.Option``.
    """
    parameters = {group: [_parameter(field, hint) for field, hint in _fields(group)] for group in groups}

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def command(**values: Any) -> None:
            function(*(group(**{p.name: values[p.name] for p in of}) for group, of in parameters.items()))

        every = [parameter for of in parameters.values() for parameter in of]
        command.__signature__ = inspect.Signature(every)  # pyright: ignore[reportAttributeAccessIssue]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in every}
        return command

    return decorate


def _fields(group: type) -> list[tuple[dataclasses.Field[Any], Any]]:
    hints = typing.get_type_hints(group, include_extras=True)
    return [(field, hints[field.name]) for field in dataclasses.fields(group)]


def _parameter(field: dataclasses.Field[Any], hint: Any) -> inspect.Parameter:
    if field.metadata:
        flag = [f"--{field.name.replace('_', '-')}"] if hint is bool else []  # without --no-...
        hint = Annotated[hint, typer.Option(*flag, **field.metadata)]
    default = inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)
