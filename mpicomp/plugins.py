"""Factories for the kinds of a configuration, from this package or from others.

A name is looked up in this order:

1. in the registry of this package, so that an installed package cannot change the meaning of such a name;
2. as an import path, ``module:attribute``; the current folder is searched, too;
3. among the entry points of installed packages, in the group that `GROUPS` gives.

The name stands for a factory: a class or function. `make` calls it with the arguments of this package by position, and
with the user's parameters by keyword.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from operator import attrgetter
from pathlib import Path
from typing import Any

from mpicomp.errors import ConfigError, nearest, unknown_name

Factory = Callable[..., Any]

GROUPS = {
    "algorithm.inner": "mpicomp.algorithms",
    "algorithm.kind": "mpicomp.algorithms",
    "compression.kind": "mpicomp.compressors",
    "data.kind": "mpicomp.data",
    "downlink.kind": "mpicomp.compressors",
    "model.kind": "mpicomp.models",
    "schedule.kind": "mpicomp.schedules",
    "topology.kind": "mpicomp.topologies",
}
"""The group of entry points in which packages offer values of a key."""


def names(key: str, registry: Iterable[str]) -> list[str]:
    """Return the known values of `key`: those of `registry`, then those of installed packages."""
    own = list(registry)
    return own + sorted(set(_offered(key)) - set(own))


def find(key: str, name: str, registry: Mapping[str, Factory]) -> Factory:
    """Return the factory `name`.

    Args:
        key: the dotted key that chooses it, e.g. ``"model.kind"``.
        name: a name in `registry`, an import path, or a name that a package offers.
        registry: the factories of this package by name.

    Raises:
        ConfigError: the name is unknown, two packages offer it, or it cannot be imported.

    """
    if name in registry:
        return registry[name]
    if ":" in name:
        if (here := str(Path.cwd())) not in sys.path:  # as python -m does
            sys.path.insert(0, here)
        return _imported(f"{key} = {name!r}", name)
    entries = _offered(key).get(name, [])
    if not entries:
        raise unknown_name(key, name, names(key, registry))
    if len(entries) > 1:
        raise ConfigError(
            f"{key} = {name!r} is offered by {len(entries)} packages, {' and '.join(map(_package, entries))}: take one "
            f"by its import path, {' or '.join(repr(entry.value) for entry in entries)}"
        )
    return _imported(f"{key} = {name!r} of the package {_package(entries[0])}", entries[0].value)


def make(
    key: str, name: str, registry: Mapping[str, Factory], kind: type | tuple[type, ...], *given: object, **own: object
) -> Any:
    """Return the object that the factory `name` makes.

    Args:
        key: the dotted key that chooses it, e.g. ``"model.kind"``.
        name: as for `find`.
        registry: as for `find`.
        kind: the type that the object must have.
        given: the arguments of this package, by position.
        own: the parameters that the user sets next to `key`.

    Raises:
        ConfigError: as `find`; or the factory does not take a parameter, lacks one, refuses a value, or makes an object
            that is no `kind`.

    """
    factory = find(key, name, registry)
    section = key.partition(".")[0]
    known = _check(f"{key} = {name!r}", section, factory, len(given), own)
    try:
        made = factory(*given, **own)
    except ConfigError as error:
        message = str(error)
        begins = re.match(r"\w+(?= = )", message)
        if begins is None or begins[0] not in known:
            raise
        raise type(error)(f"{section}.{message}") from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{key} = {name!r}: {error}") from error
    if not isinstance(made, kind):
        wanted = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise ConfigError(f"{key} = {name!r} makes a {type(made).__name__}, not a {wanted}")
    return made


def _check(chosen: str, section: str, factory: Factory, given: int, own: Mapping[str, object]) -> list[str]:
    """Return the parameters of `factory` after the first `given`; raise ConfigError unless `own` fits them."""
    every = _parameters(factory)
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if sum(p.kind in by_position for p in every[:given]) < given and all(p.kind is not p.VAR_POSITIONAL for p in every):
        raise ConfigError(f"{chosen} must take {given} argument{'s' * (given > 1)} by position, before its parameters")
    known = [p for p in every[given:] if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    takes = [parameter.name for parameter in known]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in every)
    for name in own:
        if name not in takes and not takes_any:
            raise ConfigError(
                f"{section}.{name} is no parameter of {chosen}.{nearest(name, takes)} "
                f"Known: {', '.join(takes) or 'none'}."
            )
    for parameter in known:
        if parameter.default is parameter.empty and parameter.name not in own:
            raise ConfigError(f"{section}.{parameter.name} is missing: {chosen} needs it")
    return takes


@lru_cache
def _parameters(factory: Factory) -> list[inspect.Parameter]:
    """Return the parameters of `factory`; found once, because every rank of a loopback asks."""
    return list(inspect.signature(factory).parameters.values())


def _offered(key: str) -> dict[str, list[EntryPoint]]:
    """Return the entry points of installed packages for `key`, by name."""
    found: dict[str, list[EntryPoint]] = {}
    if key in GROUPS:
        for entry in entry_points(group=GROUPS[key]):
            found.setdefault(entry.name, []).append(entry)
    return found


def _package(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist else "?"


def _imported(chosen: str, path: str) -> Factory:
    """Import the factory ``module:attribute``."""
    module, _, attribute = path.partition(":")
    try:
        found = importlib.import_module(module)
    except Exception as error:  # whatever a module of the user's does when it is imported
        raise ConfigError(f"{chosen}: {module!r} cannot be imported: {error!r}") from error
    try:
        factory: Factory = attrgetter(attribute)(found)
    except AttributeError as error:
        raise ConfigError(f"{chosen}: {error}") from error
    try:
        inspect.signature(factory)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{chosen} is no class or function whose parameters can be read") from error
    return factory
