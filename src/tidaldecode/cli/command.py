"""A command of a function that takes settings: each option is declared once, on the dataclass's field.

    @command
    def coherence(settings: CoherenceSettings, model: ModelOptions, json_output: Json = False) -> None:
        \"\"\"The command's help.\"\"\"

    app.command()(coherence)

A parameter is a settings dataclass, or one value whose type is `Annotated[int, Option(...)]`. A dataclass's fields that
have such a type become options; so do those of a dataclass in a dataclass; the other fields keep their defaults. A
default of the function's goes before the dataclass's own. The function gets the dataclasses, made of what was given:
what their `parse` and `__post_init__` refuse is told before it is called. Types must be there at run time (imported
outside of `TYPE_CHECKING`), and must not import PyTorch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from types import NoneType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from tidaldecode.options import Option

_REQUIRED, _KEYWORD = inspect.Parameter.empty, inspect.Parameter.KEYWORD_ONLY


@dataclass(frozen=True)
class _Setting:
    """A parameter of the function, or a field of a dataclass among them."""

    name: str
    type: Any
    default: Any

    @property
    def option(self) -> Option | None:
        """What it is on the command line, if it is there."""
        annotations = get_args(self.type)[1:] if get_origin(self.type) is Annotated else ()
        return next((annotation for annotation in annotations if isinstance(annotation, Option)), None)

    @property
    def parts(self) -> list[_Setting]:
        """The fields of a dataclass that hold options; nothing of another type."""
        if not is_dataclass(self.type):
            return []
        types, made = get_type_hints(self.type, include_extras=True), is_dataclass(self.default)
        parts = []
        for field in fields(self.type):
            default = getattr(self.default, field.name) if made else field.default
            if default is MISSING:
                default = _REQUIRED if field.default_factory is MISSING else field.default_factory()
            parts.append(_Setting(field.name, types[field.name], default))
        return [part for part in parts if part.option or part.parts]

    def parameters(self) -> Iterator[inspect.Parameter]:
        """The parameters that typer makes options of."""
        if self.option is not None:
            yield _parameter(self, self.option)
        for part in self.parts:
            yield from part.parameters()

    def value(self, given: dict[str, Any]) -> Any:
        """The value by what was given on the command line."""
        if self.option is None:
            values = {part.name: part.value(given) for part in self.parts}
            return self.type(**values) if self.default is _REQUIRED else replace(self.default, **values)
        value, parse = given[self.name], self.option.parse
        return value if parse is None or value is None else parse(_name(self, self.option), value)


def command(function: Callable[..., None]) -> Callable[..., None]:
    """The function as typer takes it; see above."""
    types = get_type_hints(function, include_extras=True)
    signature = inspect.signature(function)
    settings = [_Setting(name, types[name], parameter.default) for name, parameter in signature.parameters.items()]

    def run(**given: Any) -> None:
        function(**{setting.name: setting.value(given) for setting in settings})

    run.__name__, run.__doc__ = function.__name__, function.__doc__
    parameters = [parameter for setting in settings for parameter in setting.parameters()]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _parameter(setting: _Setting, option: Option) -> inspect.Parameter:
    kind, default = get_args(setting.type)[0], setting.default
    if option.parse is not None:
        kind = str | None if NoneType in get_args(kind) else str
        if default not in (None, _REQUIRED):
            default = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
    info: Any = typer.Argument(metavar=option.metavar, help=option.help)
    if not option.positional:
        limits = {"min": option.min, "max": option.max}
        info = typer.Option(_name(setting, option), metavar=option.metavar, help=option.help, **limits)  # type: ignore[arg-type]
    return inspect.Parameter(setting.name, _KEYWORD, default=default, annotation=Annotated[kind, info])


def _name(setting: _Setting, option: Option) -> str:
    return option.name or "--" + setting.name.replace("_", "-")
