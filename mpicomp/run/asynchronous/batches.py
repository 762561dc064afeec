"""The batches that a rank takes where ranks do not wait for each other."""

from __future__ import annotations

from mpicomp.exchange.base import World
from mpicomp.run.setup import Setup


class Batches:
    """The batches that a rank takes, by number: from one pile for all ranks, or its own.

    Args:
        setup: what to train on.
        world: the ranks; making this is collective on them.
        is_trainer: whether this rank takes any.
        start: the number after the last one that was taken, of the pile or of this rank.
        held: one that this rank has taken, and not begun.

    Attributes:
        held: the one that it has taken, and not begun.
        next: the number after the last one that it has taken.

    """

    def __init__(self, setup: Setup, world: World, is_trainer: bool, start: int, held: int | None) -> None:
        self.held = held
        self.next = start
        self._total = setup.steps
        self._counter = world.counter(start) if setup.assignment.size == 1 and setup.trainers > 1 else None
        self._is_trainer = is_trainer

    @property
    def is_over(self) -> bool:
        """Whether this rank knows that there is no batch left for it."""
        return not self._is_trainer or (self.held is not None and self.held >= self._total)

    def is_ready(self) -> bool:
        """Return whether a batch can be taken now."""
        if self._is_trainer and self.held is None:
            if self._counter is None:
                self.held = self.next
            elif self._counter.test():
                self.held = self._counter.take()
            if self.held is not None:
                self.next = self.held + 1
        return not self.is_over and self.held is not None

    def take(self) -> int:
        """Return the number of the batch that is ready, and begin to get the next one."""
        assert self.held is not None
        number, self.held = self.held, None
        if self._counter is not None:
            self._counter.prefetch()
        return number

    def hold(self) -> None:
        """Wait for the batch that is on its way, so that it can be stored."""
        while self._is_trainer and self.held is None:
            self.is_ready()

    def free(self) -> None:
        """Give the counter back (collective on all ranks)."""
        if self._counter is not None:
            self._counter.free()
