"""The parameters of a factory that a configuration may set: those whose types TOML can express."""

from __future__ import annotations

import dataclasses
import inspect
import json
import types
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from mpicomp.errors import ConfigError
from mpicomp.plugins import Factory


@dataclasses.dataclass(frozen=True)
class Choice:
    """A key that names a factory.

    Attributes:
        registry: the factories of this package by name.
        given: how many leading parameters of a factory the package passes itself.
        beside: names of further parameters that the user does not set here, because other sections do.

    """

    registry: Mapping[str, Factory]
    given: int = 0
    beside: tuple[str, ...] = ()

    def parameters(self, target: Factory) -> dict[str, tuple[Any, FieldInfo]]:
        """Return type and default of each parameter of `target` that a configuration may set.

        Raises:
            ConfigError: a required parameter cannot be set in a configuration, or type hints cannot be read.

        """
        return parameters(target, self.given, self.beside)


@lru_cache
def parameters(target: Factory, given: int, beside: tuple[str, ...]) -> dict[str, tuple[Any, FieldInfo]]:
    """Return type and default of each parameter of `target` that a configuration may set; see `Choice`."""
    hints = _type_hints(target)
    parameters: dict[str, tuple[Any, FieldInfo]] = {}
    for parameter in list(inspect.signature(target).parameters.values())[given:]:
        if parameter.name in beside or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        required = parameter.default is parameter.empty
        annotation = _plain(hints.get(parameter.name, Any if required else type(parameter.default)))
        if required and (annotation is None or parameter.kind is parameter.POSITIONAL_ONLY):
            raise ConfigError(
                f"its parameter {parameter.name!r} has no default, but TOML cannot set it: it must be a keyword, and a "
                "number, a text, true or false, a path, or a list of these"
            )
        if annotation is None or not (required or _is_plain(parameter.default)):
            continue
        try:
            field = Field() if required else Field(default=_as_read(annotation, parameter.default))
        except ValidationError as error:
            raise ConfigError(
                f"the default of its parameter {parameter.name!r}, {parameter.default!r}, is not of its type"
            ) from error
        parameters[parameter.name] = (annotation, field)
    return parameters


def _as_read(annotation: Any, default: Any) -> Any:
    """Return a default as reading it from a file would give it: for a float 0.0 instead of 0, for a list a list."""
    if default is None:
        return None
    return TypeAdapter(annotation, config=ConfigDict(strict=True)).validate_json(json.dumps(default, default=str))


def _type_hints(target: Factory) -> dict[str, Any]:
    if isinstance(target, type):
        target = target if dataclasses.is_dataclass(target) else target.__init__  # type: ignore[misc]
    elif not inspect.isroutine(target):
        target = getattr(target, "func", type(target).__call__)  # a functools.partial, or an object that can be called
    try:
        return get_type_hints(target, include_extras=True)
    except NameError as error:
        raise ConfigError(f"its type hints cannot be read: {error}; import it outside of TYPE_CHECKING") from error


def _plain(annotation: Any) -> Any:
    """Return the part of a type that TOML can express, or None."""
    if annotation in (bool, int, float, str, Path, Any):
        return annotation
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return annotation
    if origin is Annotated:
        return annotation if _plain(arguments[0]) is not None else None
    if origin in (Union, types.UnionType):
        members = [m if m is types.NoneType else _plain(m) for m in arguments]
        if all(m in (None, types.NoneType) for m in members):
            return None
        return Union[tuple(m for m in members if m is not None)]  # noqa: UP007
    if origin in (list, tuple, Sequence):
        members = [m if m is Ellipsis else _plain(m) for m in arguments]
        return None if None in members else origin[tuple(members)]
    return None


def _is_plain(value: Any) -> bool:
    """Return whether a default can be written as TOML; a default of None is left out of the file."""
    if isinstance(value, list | tuple):
        return all(entry is not None and _is_plain(entry) for entry in value)
    return value is None or isinstance(value, bool | int | float | str | Path)
