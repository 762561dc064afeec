"""Checks of the values that data sets and models share; every message names the dotted key."""

from __future__ import annotations

from mpicomp.errors import ConfigError


def require_positive(section: str, **values: int) -> None:
    """Check that each of `values`, a whole number named by its key in `section`, is at least 1.

    Raises:
        ConfigError: a value is not.

    """
    for name, value in values.items():
        if value < 1:
            raise ConfigError(f"{section}.{name} = {value}: must be at least 1.")
