"""Checks of the arguments that data sets, partitions and models share; every message names the dotted key."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable

from mpicomp.errors import ConfigError, nearest


def arguments(factory: Callable[..., object]) -> list[str]:
    """Return the names of the arguments of `factory` that a user may set: those that have a default."""
    parameters = inspect.signature(factory).parameters.values()
    return [parameter.name for parameter in parameters if parameter.default is not inspect.Parameter.empty]


def require_known(key: str, kind: str, factory: Callable[..., object], names: Iterable[str]) -> None:
    """Check that `names` are arguments of `factory`.

    Args:
        key: the dotted key that chose the factory, e.g. ``"model.kind"``.
        kind: its value.
        factory: what is going to be called.
        names: the keys that stand beside it.

    Raises:
        ConfigError: a name that the factory does not take.

    """
    known = arguments(factory)
    for name in names:
        if name not in known:
            section = key.split(".")[0]
            raise ConfigError(
                f"{section}.{name} does not belong to {key} = {kind!r}.{nearest(name, known)} "
                f"Known: {', '.join(known) or 'none'}."
            )


def require_positive(section: str, **values: int) -> None:
    """Check that each of `values`, a whole number named by its key in `section`, is at least 1.

    Raises:
        ConfigError: a value that is not.

    """
    for name, value in values.items():
        if value < 1:
            raise ConfigError(f"{section}.{name} = {value}: must be at least 1.")
