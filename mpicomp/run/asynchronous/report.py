"""What a rank tells all others while they train, and the record that rank 0 makes of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from mpicomp.replica.record import PARTS
from mpicomp.run.stopping import Status

ASYNCHRONOUS_PARTS = (*PARTS, "wait")
"""Where a rank's seconds go if it waits for nobody but when it has nothing to do."""


@dataclass(frozen=True)
class Report:
    """What a rank tells all others in a pulse; totals since the start.

    Attributes:
        gradients: how many it has computed.
        loss: the sum over its batches.
        bytes_sent: in training messages.
        is_done: 1 if it has no batch left.
        status: what it asks for.
        seconds: by part, in the order of `ASYNCHRONOUS_PARTS`.

    """

    gradients: int
    loss: float
    bytes_sent: int
    is_done: int
    status: Status
    seconds: tuple[float, ...]

    def numbers(self) -> list[float]:
        """Return the fields, one behind the other."""
        counts = (self.gradients, self.loss, self.bytes_sent, self.is_done)
        return [*counts, *dataclasses.astuple(self.status), *self.seconds]

    @classmethod
    def read(cls, numbers: Sequence[float]) -> Report:
        """Take apart what `numbers` gave."""
        gradients, loss, sent, is_done, stop, save, writing, *seconds = numbers
        status = Status(int(stop), int(save), int(writing))
        return cls(int(gradients), loss, int(sent), int(is_done), status, tuple(seconds))


def mean_loss(reports: Sequence[Report], before: Sequence[Report]) -> float:
    """Return the mean loss of the batches that all ranks have done since `before`."""
    computed = sum(report.gradients for report in reports) - sum(report.gradients for report in before)
    return (sum(report.loss for report in reports) - sum(report.loss for report in before)) / max(computed, 1)


def mean_seconds(reports: Sequence[Report], before: Sequence[Report]) -> dict[str, float]:
    """Return a rank's seconds since `before`, by part."""
    return {
        part: fmean(new.seconds[i] - old.seconds[i] for new, old in zip(reports, before, strict=True))
        for i, part in enumerate(ASYNCHRONOUS_PARTS)
    }
