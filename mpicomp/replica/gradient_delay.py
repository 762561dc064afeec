"""Delays of gradients: ranks that are slow on purpose, and ranks in simulated time.

With delays, one can measure on equal machines what a method gains with ranks of unequal speed. Random times depend on
(seed, rank, number of the gradient), so a run that continues from a checkpoint gets the same times.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

import numpy as np

Spread = Literal["fixed", "jitter", "uniform", "exponential"]
"""The distribution of a time with a given mean: constant, uniform within 5 % of the mean, uniform between zero and
twice the mean, or exponential."""

JITTER = 0.05
"""Of the mean, to both sides."""


SLICE_S = 2e-3
"""Seconds between two checks of its messages while a rank that is slow on purpose sleeps in real time."""


class GradientDelay:
    """Makes the gradients of a rank take longer. The process sleeps meanwhile, so other ranks may use its core.

    Args:
        factor: the factor by which a gradient takes longer, >= 1.
        seconds: seconds by which each gradient takes longer in addition.
        spread: the distribution of the additional time.
        seed: of the random numbers, together with `rank`.
        rank: the rank that computes the gradients.
        gradient_s: the mean time of a gradient on an ordinary rank, in simulated seconds; None for the real time.
        gradient_spread: the distribution of this time.

    Attributes:
        sleep: the function that sleeps for so many seconds.
        rest: the function that sleeps for so many seconds at most, between two calls of `meanwhile`, and returns what
            is left of them.
        gradients: the number of gradients so far.

    """

    def __init__(
        self,
        factor: float = 1.0,
        seconds: float = 0.0,
        spread: Spread = "fixed",
        seed: int = 0,
        rank: int = 0,
        gradient_s: float | None = None,
        gradient_spread: Spread = "fixed",
    ) -> None:
        self.sleep: Callable[[float], None] = time.sleep
        self.rest: Callable[[float], float] = self._sleep_for_a_slice
        self.gradients = 0
        self._factor = factor
        self._seconds = seconds
        self._spread = spread
        self._key = (seed, rank)
        self._gradient_s = gradient_s
        self._gradient_spread = gradient_spread

    def keep(self, computed_s: float, meanwhile: Callable[[], bool] | None = None) -> None:
        """Sleep for the additional time of a gradient that took `computed_s` seconds.

        `meanwhile` is called now and then until it returns true.
        """
        random = np.random.default_rng([*self._key, self.gradients])
        self.gradients += 1
        longer_s = 0.0
        if self._gradient_s is not None:
            longer_s = computed_s = self._gradient_s * _draw(self._gradient_spread, random)
        longer_s += ((self._factor - 1) * computed_s + self._seconds) * _draw(self._spread, random)
        while longer_s > 0 and meanwhile is not None and not meanwhile():
            longer_s = self.rest(longer_s)
        if longer_s > 0:
            self.sleep(longer_s)

    def _sleep_for_a_slice(self, seconds: float) -> float:
        self.sleep(min(seconds, SLICE_S))
        return seconds - SLICE_S


def _draw(spread: Spread, random: np.random.Generator) -> float:
    """Return a random number >= 0 with mean 1, from the distribution `spread`."""
    if spread == "fixed":
        return 1.0
    if spread == "exponential":
        return float(random.exponential())
    width = JITTER if spread == "jitter" else 1.0
    return float(random.uniform(1 - width, 1 + width))
