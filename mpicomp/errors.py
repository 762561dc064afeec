"""The errors of this package; each has the exit code with which the program ends."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MpicompError(Exception):
    """Base of all errors raised on purpose: the message names what is wrong and the remedy."""

    exit_code = 1


class ConfigError(MpicompError):
    """A configuration that cannot be run: names the dotted key, the rule and the value."""

    exit_code = 2


class TopologyError(ConfigError):
    """A graph that does not exist at this size, or that an algorithm cannot use."""


class DataError(MpicompError):
    """A data file that is missing, damaged or too small."""

    exit_code = 3


class ExchangeError(MpicompError):
    """A failure of the transport: a lost rank, a wrong launcher, a message that does not fit."""

    exit_code = 4


class RankLost(ExchangeError):
    """Ranks whose processes have died while others live on.

    Attributes:
        ranks: their numbers, ascending.

    """

    def __init__(self, message: str, ranks: tuple[int, ...]) -> None:
        super().__init__(message)
        self.ranks = ranks


class DivergenceError(MpicompError):
    """Training that diverges: a loss of NaN or infinity, or public copies far from the models."""

    exit_code = 5


class CheckpointError(MpicompError):
    """A stored state that is missing, damaged, or of another run."""

    exit_code = 6


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the known name closest to `name`, or ``""``."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def unknown_name(key: str, name: str, known: Iterable[str]) -> ConfigError:
    """Build the error for a name that is not in a registry: key, value, nearest and all known names."""
    known = sorted(known)
    return ConfigError(f"{key} = {name!r} is unknown.{nearest(name, known)} Known: {', '.join(known)}.")
