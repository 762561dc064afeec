"""Checks of arguments that topologies have in common; error messages name the dotted configuration key."""

from __future__ import annotations

from numbers import Integral

from mpicomp.errors import TopologyError


def require_integer(key: str, value: object, minimum: int) -> int:
    """Return `value` as an int.

    Raises:
        TopologyError: `value` is not a whole number (a bool is not), or below `minimum`.

    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < minimum:
        raise TopologyError(f"{key} = {value!r} must be a whole number of at least {minimum}")
    return int(value)


def require_size(kind: str, size: object) -> int:
    """Return the number of ranks as an int.

    Raises:
        TopologyError: `size` is not a whole number of at least one.

    """
    if isinstance(size, bool) or not isinstance(size, Integral) or size < 1:
        raise TopologyError(f"topology.kind = {kind!r} needs a whole number of ranks, at least 1, not {size!r}")
    return int(size)


def require_bool(key: str, value: object) -> bool:
    """Return `value` if it is a bool.

    Raises:
        TopologyError: it is anything else.

    """
    if not isinstance(value, bool):
        raise TopologyError(f"{key} = {value!r} must be true or false")
    return value
