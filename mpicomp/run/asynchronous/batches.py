"""The batches that a rank takes in an asynchronous run."""

from __future__ import annotations

from mpicomp.exchange.base import World
from mpicomp.run.setup import Setup


class Batches:
    """The numbers of the batches that a rank takes, from a queue that all ranks share or from its own.

    Args:
        setup: the assignment of samples, and the number of steps.
        world: the ranks; making this is collective on them.
        is_trainer: whether this rank takes batches.
        start: the first number that is still free in the queue.
        held: a batch that this rank has taken before, but not begun; None if there is none.

    Attributes:
        held: the batch that this rank has taken, but not begun; None if there is none.
        next: the number after that of the last batch taken.

    """

    def __init__(self, setup: Setup, world: World, is_trainer: bool, start: int, held: int | None) -> None:
        self.held = held
        self.next = start
        self._total = setup.steps
        self._counter = world.counter(start) if setup.assignment.size == 1 and setup.trainers > 1 else None
        self._is_trainer = is_trainer

    @property
    def is_over(self) -> bool:
        """Whether there is no batch left for this rank, as far as it knows."""
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
        """Return the number of the batch that is ready, and begin to take the next one."""
        assert self.held is not None
        number, self.held = self.held, None
        if self._counter is not None:
            self._counter.prefetch()
        return number

    def hold(self) -> None:
        """Wait until this rank holds a batch, so that a checkpoint can store its number."""
        while self._is_trainer and self.held is None:
            self.is_ready()

    def free(self) -> None:
        """Free the shared counter (collective on all ranks)."""
        if self._counter is not None:
            self._counter.free()
