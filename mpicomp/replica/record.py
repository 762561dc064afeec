"""What training reports every few steps: a `Record`, and the callbacks that take it on rank 0."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from mpicomp.timing import HIDDEN

PARTS = ("gradient", "compress", "exchange", "mix")
"""Where a step's seconds go; `mix` is what the others leave."""


def training_seconds(seconds: Mapping[str, float]) -> float:
    """Return the sum of the parts of a record's ``seconds``: those that are hidden are in the others."""
    return sum(value for part, value in seconds.items() if part != HIDDEN)


@dataclass(frozen=True)
class Record:
    """The state of a run after some step: means over ranks since the last record, unless it says otherwise.

    Attributes:
        step: steps done; of a rank on average, where ranks go at their own pace.
        epoch: epochs done, fractional; None where nobody counts them.
        loss: of the training batches; None where it is not known.
        lr: the learning rate of this step.
        bytes_sent: by all ranks together since the start; where some have died, by those that are left.
        seconds: of a rank since the last record, by part: gradient, compress, exchange, mix; for asynchronous methods
            also wait, when there was nothing to do; of `Distributed.metrics` also other, the caller's own time between
            two steps. ``exchange`` is what the rank has spent in exchanges: exposed.
            ``exchange_hidden``, of synchronous methods, is no part of the sum: for how long messages were under way
            while the rank did other work, from the end of `Exchange.start` until they were seen to be there, or to
            the begin of `Pending.wait`. An overlapped method looks between two layers of the model; where nobody looks
            (other methods; backward passes on a GPU), they may have been there earlier, and this is an upper bound.
        consensus_distance: ``sqrt(mean_i |x_i - xbar|^2)`` now; None where it was not measured.
        test_accuracy: of the averaged model, in [0, 1]; None where it was not evaluated, or the data set has none.
        diagnostics: further numbers of the algorithm.
        gradients: how many each rank has computed, where ranks go at their own pace.
        delays: by ``"rank<source"``, how many contributions of the source have been 0, 1, ... updates late since the
            start; where it was evaluated.
        test_loss: of the averaged model, the mean over the test samples; None where it was not evaluated.

    """

    step: int
    epoch: float | None
    loss: float | None
    lr: float
    bytes_sent: int
    seconds: dict[str, float]
    consensus_distance: float | None
    test_accuracy: float | None = None
    diagnostics: dict[str, float] = field(default_factory=dict)
    gradients: list[int] = field(default_factory=list)
    delays: dict[str, list[int]] = field(default_factory=dict)
    test_loss: float | None = None

    def scalars(self) -> dict[str, float]:
        """Return the numbers that are known, as loggers draw them: ``loss``, ``seconds/gradient``, ``gradients/0``.

        The names are those of the fields; without ``step``, to which they belong, and ``delays``, which are histograms.
        """
        return dict(_numbers({**dataclasses.asdict(self), "step": None, "delays": None}))


def _numbers(fields: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in fields.items():
        if isinstance(value, list):
            yield from _numbers({str(index): entry for index, entry in enumerate(value)}, f"{prefix}{name}/")
        elif isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{name}/")
        elif value is not None:
            yield prefix + name, value


class Callback(Protocol):
    """What is told of each record, on rank 0: a file, a logger, a display."""

    def on_record(self, record: Record) -> None:
        """Take in the next record; an error that is raised here ends the run."""


def report(record: Record, rank: int, callbacks: Sequence[Callback | None]) -> None:
    """Tell the callbacks that there are, in their order, if `rank` is 0."""
    if rank == 0:
        for callback in callbacks:
            if callback is not None:
                callback.on_record(record)
