"""What the compressors that keep a fraction of the entries share."""

from __future__ import annotations

from mpicomp.errors import ConfigError


def check_ratio(ratio: float) -> None:
    """Raise ConfigError unless `ratio` is in (0, 1]."""
    if not 0 < ratio <= 1:
        raise ConfigError(f"compression.ratio = {ratio} must be in (0, 1]: it is the fraction of entries that are kept")


def kept(n: int, ratio: float) -> int:
    """Return how many of `n` entries are kept: at least one, unless there are none."""
    # 0.29 * 100 is 28.999999999999996 in floating point, and 29 is meant
    return min(n, max(1, int(n * ratio + 1e-9)))
