"""What a rank reports to all others during training, and the means for the record of rank 0."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from mpicomp.replica.record import PARTS
from mpicomp.run.stopping import Status

ASYNCHRONOUS_PARTS = (*PARTS, "wait")
"""The parts of a rank's seconds; ``wait`` is the time in which it has nothing to do."""


@dataclass(frozen=True)
class Report:
    """What a rank reports to all others in a pulse; totals since the start.

    Attributes:
        gradients: the number of gradients computed.
        loss: the sum over its batches.
        bytes_sent: bytes of training messages.
        is_done: 1 if it has no batch left.
        status: whether it asks to stop or to store a checkpoint.
        seconds: by part, in the order of `ASYNCHRONOUS_PARTS`.

    """

    gradients: int
    loss: float
    bytes_sent: int
    is_done: int
    status: Status
    seconds: tuple[float, ...]

    def numbers(self) -> list[float]:
        """Return the fields as a flat list of numbers."""
        counts = (self.gradients, self.loss, self.bytes_sent, self.is_done)
        return [*counts, *dataclasses.astuple(self.status), *self.seconds]

    @classmethod
    def read(cls, numbers: Sequence[float]) -> Report:
        """Return the report that `numbers` has flattened."""
        gradients, loss, sent, is_done, stop, save, writing, *seconds = numbers
        status = Status(int(stop), int(save), int(writing))
        return cls(int(gradients), loss, int(sent), int(is_done), status, tuple(seconds))


def mean_loss(reports: Sequence[Report], before: Sequence[Report], last: float) -> float:
    """Return the mean loss over the batches of all ranks since the reports `before`; `last` if there were none."""
    computed = sum(report.gradients for report in reports) - sum(report.gradients for report in before)
    if not computed:
        return last
    return (sum(report.loss for report in reports) - sum(report.loss for report in before)) / computed


def mean_seconds(reports: Sequence[Report], before: Sequence[Report]) -> dict[str, float]:
    """Return a rank's seconds since `before`, by part."""
    return {
        part: fmean(new.seconds[i] - old.seconds[i] for new, old in zip(reports, before, strict=True))
        for i, part in enumerate(ASYNCHRONOUS_PARTS)
    }
