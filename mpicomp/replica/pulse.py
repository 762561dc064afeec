"""The pulse: a non-blocking all-gather of a few numbers, repeated all the time, for asynchronous training."""

from __future__ import annotations

from collections.abc import Callable

from mpicomp.exchange.base import Gather, World

PULSE_S = 0.05
"""The least number of seconds between two pulses; rank 0 waits for it, and the others follow."""


class Pulse:
    """Gathers numbers of all ranks again and again, without waiting."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._pending: Gather | None = None
        self._last = world.now()

    def beat(self, numbers: Callable[[], list[float]]) -> list[list[float]] | None:
        """Return the numbers of all ranks by rank, or None if they are not complete; each round is returned once."""
        if self._pending is None:
            now = self._world.now()
            if self._world.rank == 0 and now - self._last < PULSE_S:
                return None
            self._pending, self._last = self._world.start_gather(numbers()), now
        if not self._pending.test():
            return None
        rows: list[list[float]] = self._pending.wait().tolist()
        self._pending = None
        return rows
