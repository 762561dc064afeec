"""Ranks that are made slow on purpose: what a method gains where ranks are unequal can be tried on equal ones."""

from __future__ import annotations

import time
from typing import Literal

import numpy as np

Spread = Literal["fixed", "exponential"]


class Slowness:
    """How much longer the gradients of a rank take: its process sleeps, and takes no core from others.

    Args:
        factor: how many times as long as without, >= 1; the time is the host's, so give `seconds` where a GPU computes.
        seconds: by which each takes longer beside.
        spread: whether the extra time is the same in each step, or has an exponential distribution with that mean.
        seed: of the random numbers; together with `rank`.
        rank: whose slowness it is.

    """

    def __init__(
        self, factor: float = 1.0, seconds: float = 0.0, spread: Spread = "fixed", seed: int = 0, rank: int = 0
    ) -> None:
        self._factor = factor
        self._seconds = seconds
        self._random = np.random.default_rng([seed, rank]) if spread == "exponential" else None

    def sleep(self, computed_s: float) -> None:
        """Sleep for as long as a gradient that took `computed_s` seconds is to take longer."""
        longer_s = (self._factor - 1) * computed_s + self._seconds
        if self._random is not None:
            longer_s *= self._random.exponential()
        if longer_s > 0:
            time.sleep(longer_s)
