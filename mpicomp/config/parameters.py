"""What a configuration may set on a function or class: its own parameters, as far as TOML can express them."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import sys
import types
from collections.abc import Callable, MutableMapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, Field, TypeAdapter
from pydantic.fields import FieldInfo

from mpicomp.errors import ConfigError, unknown_name

Factory = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Choice:
    """A key that names an entry of a registry.

    Attributes:
        registry: the entries; one from outside the package joins it under its import path.
        given: how many leading parameters of an entry are not the user's to set.

    """

    registry: MutableMapping[str, Any]
    given: int = 0

    def find(self, key: str, name: str) -> Factory:
        """Return the entry `name`; `key` is for the error.

        Raises:
            ConfigError: no such entry, or an import path that leads nowhere.

        """
        if name not in self.registry:
            if ":" not in name:
                raise unknown_name(key, name, self.registry)
            self.registry[name] = _imported(key, name)
        found: Factory = self.registry[name]
        return found


@lru_cache
def parameters(target: Factory, given: int) -> dict[str, tuple[Any, FieldInfo]]:
    """Return type and default of each parameter of `target` that a configuration may set, without the first `given`."""
    hints = _type_hints(target)
    parameters: dict[str, tuple[Any, FieldInfo]] = {}
    for parameter in list(inspect.signature(target).parameters.values())[given:]:
        required = parameter.default is parameter.empty
        annotation = _plain(hints.get(parameter.name, Any if required else type(parameter.default)))
        if annotation is None or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if not required and not _is_plain(parameter.default):
            continue
        field = Field() if required else Field(default=_as_read(annotation, parameter.default))
        parameters[parameter.name] = (annotation, field)
    return parameters


def _as_read(annotation: Any, default: Any) -> Any:
    """Return a default as it would come out of a file: a 0 of a float as 0.0, a sequence as the type says."""
    if default is None:
        return None
    return TypeAdapter(annotation, config=ConfigDict(strict=True)).validate_json(json.dumps(default, default=str))


def _type_hints(target: Factory) -> dict[str, Any]:
    if dataclasses.is_dataclass(target) or not isinstance(target, type):
        return get_type_hints(target, include_extras=True)
    initialize: Factory = target.__init__  # type: ignore[misc]
    return get_type_hints(initialize, include_extras=True)


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
    """Whether a default can be written as TOML; None by itself is left out."""
    if isinstance(value, list | tuple):
        return all(entry is not None and _is_plain(entry) for entry in value)
    return value is None or isinstance(value, bool | int | float | str | Path)


def _imported(key: str, path: str) -> Factory:
    """Return ``module:name``; the current folder is searched as it is by ``python -m``."""
    module, _, name = path.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Factory = getattr(importlib.import_module(module), name)
        inspect.signature(found)
    except AttributeError as error:
        raise ConfigError(f"{key} = {path!r}: {error}") from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{key} = {path!r} is no class or function whose parameters can be read") from error
    except Exception as error:  # whatever a module of the user's does when it is imported
        raise ConfigError(f"{key} = {path!r}: {module!r} cannot be imported: {error!r}") from error
    return found
