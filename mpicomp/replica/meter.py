"""Losses and seconds of a rank's steps since the last record, and the record of their means over ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from mpicomp.replica.record import PARTS, Record, training_seconds
from mpicomp.replica.replica import Replica, root_mean_square
from mpicomp.state import SCRATCH
from mpicomp.timing import HIDDEN, now, recorder, take_seconds, traced

_Row = tuple[float | None, int, dict[str, float], dict[str, float]]
"""Of a rank: its loss, the bytes that it has sent, its seconds by part, its diagnostics."""

MEASURED = (*PARTS, HIDDEN)
"""The seconds of a step."""

OTHER = "other"
"""The seconds between two steps."""

SAMPLED_ENTRIES = 4096
"""The number of parameters sampled for a record's consensus distance; `Replica.consensus_distance` is exact."""


@dataclass
class Meter:
    """Adds up losses and seconds since the last `take`, or since the start if `take` is not called.

    A loop in which steps have a begin and an end enters the meter for each step. A loop in which all time is either
    work or waiting calls `work` and `wait` after each.

    Attributes:
        loss: the sum over the steps whose loss is known, a scalar.
        steps: the number of these steps.
        parts: the names of the parts of the seconds.
        seconds: of all steps and meetings, in the order of `parts`.
        total_seconds: their sum since the start, without hidden seconds.
        other: the seconds between steps.
        start: when the present step began.
        since: the time up to which seconds are counted; None before the first step.

    """

    loss: Tensor
    steps: int = 0
    parts: tuple[str, ...] = field(default=MEASURED, metadata=SCRATCH)
    seconds: list[float] = field(init=False)
    total_seconds: float = 0.0
    other: float = field(default=0.0, metadata=SCRATCH)
    start: float = field(default=0.0, metadata=SCRATCH)
    since: float | None = field(default=None, metadata=SCRATCH)

    def __post_init__(self) -> None:
        self.seconds = [0.0] * len(self.parts)

    def __enter__(self) -> None:
        self._book_other()
        self.start = now()

    def __exit__(self, *error: object) -> None:
        self._end_work(self.start, is_step=True)

    def work(self, is_step: bool = False) -> None:
        """Count the time since the last call as work; `is_step` if it included a gradient."""
        assert self.since is not None
        self._end_work(self.since, is_step)

    def wait(self) -> None:
        """Count the time since the last call as waiting; for meters with this part."""
        assert self.since is not None
        begun = self.since
        self.skip()
        if taker := recorder():
            taker.add_idle(begun, self.since)
        self._book({"wait": self.since - begun})
        self.total_seconds += self.since - begun

    def add(self, loss: Tensor) -> None:
        """Add the loss of a step, a scalar."""
        self.loss += loss.reshape(())
        self.steps += 1

    @contextmanager
    def meeting(self) -> Iterator[None]:
        """Count the time within the block, in which this rank waits for others, as exchange."""
        self._book_other()
        begun = now()
        yield
        seconds = now() - begun
        if taker := recorder():
            taker.add("meet", "exchange", begun, begun + seconds)
        self.seconds[self.parts.index("exchange")] += seconds
        self.total_seconds += seconds
        self.skip()

    def skip(self) -> None:
        """Do not count the time since the last call."""
        take_seconds()
        self.since = now()

    def take(self) -> tuple[float | None, dict[str, float]]:
        """Return the mean loss, None if none is known, and the seconds by part since the last call."""
        mean = float(self.loss) / self.steps if self.steps else None
        seconds = dict(zip(self.parts, self.seconds, strict=True)) | {OTHER: self.other}
        self.loss.zero_()
        self.steps, self.seconds, self.other = 0, [0.0] * len(self.parts), 0.0
        return mean, seconds

    @traced("record", "")
    def record(self, replica: Replica, loss: Tensor | float | None = None) -> Record:
        """Return the means over ranks since the last call; collective on all ranks.

        Ranks that are ahead of others wait for them here, which counts as exchange. The rest of the time spent here is
        not counted.

        Args:
            replica: the model that was trained.
            loss: of this rank, instead of the mean over the steps whose loss is known.

        Raises:
            DivergenceError: a loss is not finite.

        """
        own = None if loss is None else float(loss.detach() if isinstance(loss, Tensor) else loss)
        if self.steps:
            replica.check_finite()
        world = replica.world
        with self.meeting():
            world.barrier()
        mean, seconds = self.take()
        step = replica.steps_of_all()
        distance = sampled_consensus_distance(replica, step)
        rows = world.all_gather(
            (
                mean if own is None else own,
                replica.bytes_sent,
                seconds,
                replica.algorithm.diagnostics(replica.part, replica.state),
            )
        )
        # Computed once: a thousand ranks of a loopback would each take the means of a thousand rows.
        means = world.broadcast(_means(rows) if world.rank == 0 else {})
        record = Record(step=step, epoch=None, lr=replica.local.lr, consensus_distance=distance, **deepcopy(means))
        self.skip()
        return record

    def _end_work(self, begun: float, is_step: bool) -> None:
        """Count the time since `begun`, by part; ``mix`` gets the rest."""
        end, parts = now(), take_seconds()
        if taker := recorder():
            (taker.end_step if is_step else taker.add_rest)(begun, end)
        parts["mix"] = end - begun - training_seconds(parts)
        self._book(parts)
        self.total_seconds += end - begun
        self.since = end

    def _book_other(self) -> None:
        """Count the time since the last call as between steps, except exchanges that made progress in it."""
        parts = take_seconds()
        if self.since is not None:
            self._book(parts)
            self.other += now() - self.since - training_seconds(parts)

    def _book(self, parts: dict[str, float]) -> None:
        self.seconds = [total + parts.get(part, 0.0) for total, part in zip(self.seconds, self.parts, strict=True)]


def _means(rows: Sequence[_Row]) -> dict[str, Any]:
    """Return the fields of a `Record` that come from the rows of all ranks."""
    losses, sent, parts, diagnostics = zip(*rows, strict=True)
    known = [value for value in losses if value is not None]
    return {
        "loss": fmean(known) if known else None,
        "bytes_sent": sum(sent),
        "seconds": {part: fmean(of_rank[part] for of_rank in parts) for part in parts[0]},
        "diagnostics": {
            key: fmean(numbers[key] for numbers in diagnostics if key in numbers)
            for key in dict.fromkeys(key for numbers in diagnostics for key in numbers)
        },
    }


def sampled_consensus_distance(replica: Replica, step: int) -> float:
    """Estimate ``sqrt(mean_i |x_i - xbar|^2)`` from some parameters, so that a record costs no dense exchange.

    The choice of parameters depends on `step` only, and is the same on all ranks.
    """
    x = replica.local.x
    if len(x) > SAMPLED_ENTRIES:
        generator = torch.Generator().manual_seed(step)
        x = x[torch.randint(len(x), (SAMPLED_ENTRIES,), generator=generator).to(x.device)]
    mean = x.clone()
    replica.world.mean_(mean)
    scale = (len(replica.local.x) / len(x)) ** 0.5
    return root_mean_square(replica.world, scale * float((x - mean).norm()))
