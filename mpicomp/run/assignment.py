"""Which samples a rank visits when, also in a run that goes on with another number of ranks.

The samples of the epoch that no old rank has visited go to the new ranks in turn. From the next epoch on the partition
is the one that a run with so many ranks has from its start. ``training.epochs`` and ``training.steps`` keep their
meaning: passes over the data, and steps from the start of the run.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mpicomp.data.partition import Indices, epoch_indices, steps_per_epoch


@dataclass(frozen=True)
class Division:
    """A part of an epoch: how many ranks there were, and how many steps they made."""

    size: int
    steps: int


@dataclass(frozen=True)
class ResizeHistory:
    """Where a run is in its data, if its number of ranks has changed.

    Steps are counted on without a jump, while an epoch has another number of steps now: step s is step ``s - offset``
    of a run that has had the present number of ranks from its start.

    Attributes:
        offset: see above.
        epoch: the last one that was begun with another number of ranks; -1 if there is none.
        divisions: its parts before the last change.

    """

    offset: int = 0
    epoch: int = -1
    divisions: tuple[Division, ...] = ()

    @classmethod
    def from_json(cls, text: str) -> ResizeHistory:
        """Read what `to_json` gave."""
        offset, epoch, divisions = json.loads(text)
        return cls(offset, epoch, tuple(Division(*division) for division in divisions))

    def to_json(self) -> str:
        """Return this as text, for the checkpoint."""
        return json.dumps([self.offset, self.epoch, [dataclasses.astuple(division) for division in self.divisions]])


@dataclass(frozen=True)
class BatchAssignment:
    """Which samples a rank visits when; everything follows from the arguments.

    Attributes:
        split: gives the partition over a number of ranks.
        samples: in an epoch, of all ranks together.
        size: the number of ranks.
        batch_size: samples a rank and step.
        seed: of the run.
        history: of the changes of the number of ranks.

    """

    split: Callable[[int], list[Indices]]
    samples: int
    size: int
    batch_size: int
    seed: int
    history: ResizeHistory = ResizeHistory()

    @property
    def per_epoch(self) -> int:
        """The steps of a whole epoch."""
        return steps_per_epoch(self.samples, self.size, self.batch_size)

    def position(self, step: int) -> tuple[int, int]:
        """Return the epoch of a step and the step's place in it."""
        return divmod(step - self.history.offset, self.per_epoch)

    def order(self, epoch: int, rank: int) -> Indices:
        """Return the samples that `rank` visits in `epoch`, (per_epoch * batch_size,); -1 before the divisions' end."""
        if epoch != self.history.epoch:
            return epoch_indices(self.split(self.size), self.seed, epoch, rank, self.per_epoch, self.batch_size)
        left = self._left * self.batch_size
        visited = np.full(self.per_epoch * self.batch_size - left, -1, dtype=np.int64)
        return np.concatenate([visited, self._rest[rank :: self.size][:left]])

    def resized(self, step: int, size: int) -> BatchAssignment:
        """Return how the samples are dealt to `size` ranks from `step` on."""
        epoch, place = self.position(step)
        if place == 0:
            fresh = dataclasses.replace(self, size=size)
            return dataclasses.replace(fresh, history=ResizeHistory(offset=step - epoch * fresh.per_epoch))
        earlier = self.history.divisions if epoch == self.history.epoch else ()
        begun = self.per_epoch - self._left if earlier else 0
        divisions = (*earlier, Division(self.size, place - begun))
        dealt = dataclasses.replace(self, size=size, history=ResizeHistory(0, epoch, divisions))
        resumed = (epoch + 1) * dealt.per_epoch - dealt._left
        return dataclasses.replace(dealt, history=dataclasses.replace(dealt.history, offset=step - resumed))

    @cached_property
    def _rest(self) -> Indices:
        """The samples of ``history.epoch`` that no division has visited, in the order in which they are dealt."""
        first, *later = self.history.divisions
        was = dataclasses.replace(self, size=first.size, history=ResizeHistory())
        orders = [was.order(self.history.epoch, rank) for rank in range(first.size)]
        rest: Indices = np.stack([order[first.steps * self.batch_size :] for order in orders], axis=1).reshape(-1)
        for division in later:
            rest = rest[division.size * division.steps * self.batch_size :]
        return rest

    @property
    def _left(self) -> int:
        """The steps that ``history.epoch`` still has."""
        return len(self._rest) // (self.size * self.batch_size)
