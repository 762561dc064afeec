"""Which samples a rank visits at which step, also in a run that continues with another number of ranks.

When the number of ranks changes within an epoch, the samples not yet visited are dealt to the new ranks in turn. From
the next epoch on, the partition is that of a run started with the new number of ranks. ``training.epochs`` still counts
passes over the data, and ``training.steps`` the steps from the start of the run.
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
    """A part of an epoch: the number of ranks, and the number of steps that they made."""

    size: int
    steps: int


@dataclass(frozen=True)
class ResizeHistory:
    """The position in the data of a run whose number of ranks has changed.

    The step counter continues without a jump, but an epoch now has another number of steps. Step s corresponds to step
    ``s - offset`` of a run started with the present number of ranks.

    Attributes:
        offset: see above.
        epoch: the last epoch begun with another number of ranks; -1 if there is none.
        divisions: the parts of that epoch before the last change.

    """

    offset: int = 0
    epoch: int = -1
    divisions: tuple[Division, ...] = ()

    @classmethod
    def from_json(cls, text: str) -> ResizeHistory:
        """Return the history in `text`, which `to_json` made."""
        offset, epoch, divisions = json.loads(text)
        return cls(offset, epoch, tuple(Division(*division) for division in divisions))

    def to_json(self) -> str:
        """Return the history as JSON, for the checkpoint."""
        return json.dumps([self.offset, self.epoch, [dataclasses.astuple(division) for division in self.divisions]])


@dataclass(frozen=True)
class BatchAssignment:
    """The samples that a rank visits at each step; a pure function of the arguments.

    Attributes:
        split: returns the partition for a number of ranks.
        samples: the number of samples in an epoch, of all ranks together.
        size: the number of ranks.
        batch_size: samples per rank and step.
        seed: of the run.
        history: the changes of the number of ranks.

    """

    split: Callable[[int], list[Indices]]
    samples: int
    size: int
    batch_size: int
    seed: int
    history: ResizeHistory = ResizeHistory()

    @property
    def per_epoch(self) -> int:
        """The number of steps in a whole epoch."""
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
        """Return the assignment to `size` ranks from `step` on."""
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
        """The samples of ``history.epoch`` that were not visited yet, in the order in which they are dealt."""
        first, *later = self.history.divisions
        was = dataclasses.replace(self, size=first.size, history=ResizeHistory())
        orders = [was.order(self.history.epoch, rank) for rank in range(first.size)]
        rest: Indices = np.stack([order[first.steps * self.batch_size :] for order in orders], axis=1).reshape(-1)
        for division in later:
            rest = rest[division.size * division.steps * self.batch_size :]
        return rest

    @property
    def _left(self) -> int:
        """The number of steps left in ``history.epoch``."""
        return len(self._rest) // (self.size * self.batch_size)
