"""The search for the settings of a method: the best point of a geometric grid that grows where the optimum lies.

A point gives every axis a whole number of steps from its start; its value is ``start * factor ** steps``. The search

    1. runs the start;
    2. runs the neighbors of the best point, one step up and one down along every axis, and moves on as soon as one is
       better. So the best point of a search that has come this far is never at an edge;
    3. when all neighbors are worse, halves the steps and goes back to 2, until the budget of runs is used up, or the
       steps are finer than short runs can tell apart;
    4. where the start and all its neighbors diverge, goes down along all axes at once until a run does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction

Values = Mapping[str, float]
FINEST = 1.05
"""The factor from a value to the next that is the finest; a search with finer steps would follow the noise."""

Point = tuple[Fraction, ...]


@dataclass(frozen=True)
class Axis:
    """One setting that is searched for.

    Attributes:
        key: of the configuration, e.g. ``"algorithm.gamma"``.
        start: the first value.
        factor: from a value to the next, above 1.

    """

    key: str
    start: float
    factor: float

    def value(self, steps: Fraction) -> float:
        """Return the value after `steps` steps, to three significant digits."""
        return float(f"{self.start * self.factor ** float(steps):.3g}")


def values_of(axes: tuple[Axis, ...], point: Point) -> dict[str, float]:
    """Return the settings of a point."""
    return {axis.key: axis.value(steps) for axis, steps in zip(axes, point, strict=True)}


def neighbors(point: Point, step: Fraction) -> list[Point]:
    """Return the points one step up and down along every axis."""
    return [(*point[:i], place + sign * step, *point[i + 1 :]) for i, place in enumerate(point) for sign in (1, -1)]


def search(axes: tuple[Axis, ...], budget: int, score: Callable[[Values], float]) -> tuple[list[Values], bool]:
    """Return all points that were run, the best first, and whether others enclose the best one on every axis.

    Args:
        axes: what is searched for; with none, the only point is run.
        budget: how many runs there may be.
        score: runs a point; the larger the better, ``-inf`` for a run that diverged.

    """
    best: Point = (Fraction(0),) * len(axes)
    scores = {best: score(values_of(axes, best))}
    step = Fraction(1)
    while axes and len(scores) < budget:
        if scores[best] == -math.inf and len(scores) > 2 * len(axes):
            best = tuple(place - step for place in best)
            if best not in scores:  # with one axis, the first is a neighbor of the start
                scores[best] = score(values_of(axes, best))
            continue
        following = next((near for near in neighbors(best, step) if near not in scores), None)
        if following is None:
            step /= 2
            if all(axis.factor ** float(step) < FINEST for axis in axes):
                break
            continue
        scores[following] = score(values_of(axes, following))
        if scores[following] > scores[best]:
            best = following
    is_inside = all(
        min(point[i] for point in scores) < best[i] < max(point[i] for point in scores) for i in range(len(axes))
    )
    ranked = sorted(scores, key=lambda point: scores[point], reverse=True)
    return [values_of(axes, point) for point in ranked], is_inside
