"""The record that training reports every few steps, and the callbacks that get it on rank 0."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from mpicomp.timing import HIDDEN

PARTS = ("gradient", "compress", "exchange", "mix")
"""The parts of a step's seconds; `mix` is the rest."""


def training_seconds(seconds: Mapping[str, float]) -> float:
    """Return the sum of a record's ``seconds``, without hidden ones, which other parts include."""
    return sum(value for part, value in seconds.items() if part != HIDDEN)


@dataclass(frozen=True)
class Record:
    """The state of a run after some step: means over ranks since the last record, unless it says otherwise.

    Attributes:
        step: the number of steps done; for asynchronous methods the mean over ranks.
        epoch: epochs done, fractional; None if they are not counted.
        loss: of the training batches; None if it is unknown.
        lr: the learning rate of this step.
        bytes_sent: by all ranks together since the start; if ranks have died, by the remaining ones.
        seconds: of a rank since the last record, by part: gradient, compress, exchange, mix; for asynchronous methods
            also wait, the time with nothing to do; from `Distributed.metrics` also other, the caller's own time between
            two steps. ``exchange`` is the time that the rank has spent in exchanges: the exposed time.
            ``exchange_hidden``, of synchronous methods, is not part of the sum. It is how long messages were on their
            way while the rank did other work: from the end of `Exchange.start` until the rank saw that they had
            arrived, or until the begin of `Pending.wait`. A method with overlap checks this between two layers of the
            model. Without checks (other methods; backward passes on a GPU) it is an upper bound.
        consensus_distance: ``sqrt(mean_i |x_i - xbar|^2)`` now; None if it was not measured.
        test_accuracy: of the averaged model, in [0, 1]; None if it was not evaluated, or the data set has none.
        diagnostics: further numbers of the algorithm.
        gradients: how many gradients each rank has computed; for asynchronous methods only.
        delays: by ``"rank<source"``, how many contributions of the source have been 0, 1, ... updates late since the
            start; only in records with an evaluation.
        test_loss: of the averaged model, the mean over the test samples; None if it was not evaluated.
        test_perplexity: ``exp(test_loss)`` of a language model; None for others, and if it was not evaluated.

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
    test_perplexity: float | None = None

    def scalars(self) -> dict[str, float]:
        """Return the known numbers by name, for loggers: ``loss``, ``seconds/gradient``, ``gradients/0``.

        The names are those of the fields, without ``step`` and without ``delays``, which are histograms.
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
    """Gets each record on rank 0: a file, a logger or a display."""

    def on_record(self, record: Record) -> None:
        """Process the next record; an error raised here ends the run."""


def report(record: Record, rank: int, callbacks: Sequence[Callback | None]) -> None:
    """Tell the callbacks that there are, in their order, if `rank` is 0."""
    if rank == 0:
        for callback in callbacks:
            if callback is not None:
                callback.on_record(record)
