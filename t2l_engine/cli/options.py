"""Options of commands, declared once: as the fields of a dataclass, or of settings that another room declares."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable
from typing import Annotated, Any

import typer

from t2l_engine.cli.common import named


def takes(function: Callable[..., None]) -> Callable[..., None]:
    """A command whose options are the parameters of ``function``; in place of a dataclass among them, its fields.

    The type of a field is annotated as a parameter of a typer command is; or its metadata holds ``help`` and further
    arguments of ``typer.Option``.  An error that begins with the name of a parameter or field begins with its option.
    """
    hints = typing.get_type_hints(function, include_extras=True)
    groups: dict[str, list[inspect.Parameter]] = {}
    every: list[inspect.Parameter] = []
    for own in inspect.signature(function).parameters.values():
        hint = hints[own.name]
        if dataclasses.is_dataclass(hint):
            of = typing.get_type_hints(hint, include_extras=True)
            groups[own.name] = [_parameter(field, of[field.name]) for field in dataclasses.fields(hint)]
        every += groups.get(own.name, [own.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hint)])
    options = {p.name: p.annotation.__metadata__[0] for p in every}
    flags = {
        name: (option.param_decls or [f"--{name.replace('_', '-')}"])[0]
        for name, option in options.items()
        if isinstance(option, typer.models.OptionInfo)
    }

    @functools.wraps(function)
    def command(**values: Any) -> None:
        made = {name: hints[name](**{p.name: values.pop(p.name) for p in of}) for name, of in groups.items()}
        with named(flags):
            function(**made, **values)

    command.__signature__ = inspect.Signature(every)  # pyright: ignore[reportAttributeAccessIssue]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in every}
    return command


def _parameter(field: dataclasses.Field[Any], hint: Any) -> inspect.Parameter:
    if field.metadata:
        flag = [f"--{field.name.replace('_', '-')}"] if hint is bool else []  # without --no-...
        hint = Annotated[hint, typer.Option(*flag, **field.metadata)]
    default = inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)
