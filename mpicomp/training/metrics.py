"""What a run reports: a `Record` every few steps, a `Result` at the end, and the `Progress` that a user sees.

Records go to `Callback` objects, on rank 0: the run folder, a `TensorBoard`, and the progress, which is one live line
on a terminal, and plain lines now and then in a log file.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from types import TracebackType
from typing import Any, Protocol

from rich.console import Console
from rich.live import Live
from rich.text import Text

from mpicomp.timing import HIDDEN

LINE_S = 5.0
"""Seconds between lines in a log file."""

EVALUATION_S = 1.0
"""The same for lines that bring a new accuracy."""

BYTES_PER_PARAMETER = 4

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
        test_accuracy: of the averaged model, in [0, 1]; None where it was not evaluated.
        diagnostics: further numbers of the algorithm.
        gradients: how many each rank has computed, where ranks go at their own pace.
        delays: by ``"rank<source"``, how many contributions of the source have been 0, 1, ... updates late since the
            start; where it was evaluated.

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


@dataclass(frozen=True)
class Result:
    """What a whole run came to.

    Attributes:
        algorithm: ``algorithm.kind``.
        topology: ``topology.kind``.
        compressor: ``compression.kind``.
        ranks: how many.
        steps: steps done.
        seconds: of training, without evaluation.
        train_loss: of the last steps.
        test_accuracy: of the averaged model, in [0, 1].
        test_accuracy_local: of each rank's own model.
        bytes_sent: by each rank.
        consensus_distance: ``sqrt(mean_i |x_i - xbar|^2)`` at the end.
        parameters: trainable entries of the model.
        spectral_gap: of the topology.
        gradients: how many each rank has computed, where ranks go at their own pace.
        delays: as in `Record`.
        lost: the ranks that have died on the way; all other fields are of those that are left, numbered anew.

    """

    algorithm: str
    topology: str
    compressor: str
    ranks: int
    steps: int
    seconds: float
    train_loss: float
    test_accuracy: float
    test_accuracy_local: list[float]
    bytes_sent: list[int]
    consensus_distance: float
    parameters: int
    spectral_gap: float
    gradients: list[int] = field(default_factory=list)
    delays: dict[str, list[int]] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)

    @property
    def all_reduce_nbytes(self) -> int:
        """What a rank would have sent with an uncompressed ring all-reduce of the gradient in every step, in bytes."""
        return round(2 * (self.ranks - 1) / self.ranks * BYTES_PER_PARAMETER * self.parameters * self.steps)


def to_json(report: Record | Result, indent: int | None = None) -> str:
    """Return the fields as a JSON object; numbers that are not finite, which JSON lacks, become null."""
    return json.dumps(_finite(dataclasses.asdict(report)), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def summary(result: Result, folder: Path) -> list[str]:
    """Return the lines that close a run: accuracy, traffic against an all-reduce, where the results are."""
    local = result.test_accuracy_local
    ranks = f"{result.ranks} ranks" if result.ranks > 1 else "1 rank"
    accuracy = f"Test accuracy: {result.test_accuracy:.2%}"
    if result.ranks > 1 and local:
        model = "the hub's model" if 0 in result.gradients else "the averaged model"
        accuracy += f" of {model} ({min(local):.2%} to {max(local):.2%} of the ranks' own)"
    own = [f"{count}" if count else "none" for count in result.gradients]
    return [
        f"Trained {result.steps} steps on {ranks} in {result.seconds:.1f} s.",
        *([f"Lost on the way: {', '.join(result.lost)}."] if result.lost else []),
        *([f"Gradients by rank: {', '.join(own)}."] if own else []),
        accuracy + ".",
        _traffic(result),
        f"Results: {folder}",
    ]


def _traffic(result: Result) -> str:
    sent, dense = fmean(result.bytes_sent), result.all_reduce_nbytes
    if not sent:
        return "Nothing was sent."
    each = f"Each rank sent {readable_bytes(sent)}"
    if not math.isclose(min(result.bytes_sent), max(result.bytes_sent)):
        each += f" on average (at most {readable_bytes(max(result.bytes_sent))})"
    return (
        f"{each}; an uncompressed all-reduce would have sent {readable_bytes(dense)}, {dense / sent:.3g} times as much."
    )


def readable_bytes(count: float) -> str:
    """Return a number of bytes with a decimal unit, e.g. ``"12.3 MB"``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"


def readable_time(seconds: float) -> str:
    """Return a duration as ``m:ss`` or ``h:mm:ss``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Progress:
    """Shows a run on rank 0; use it as a context manager, so that the terminal is restored after an error.

    Args:
        steps: the length of the run, or None if it is given in epochs.
        epochs: the length of the run, or None if it is given in steps.
        console: where to write; standard output by default.

    """

    def __init__(self, steps: int | None, epochs: float | None, console: Console | None = None) -> None:
        self._steps = steps
        self._epochs = epochs
        # Open MPI gives rank 0 a terminal as standard output even where the output goes to a file.
        self._console = console or Console(highlight=False, force_terminal=None if sys.stderr.isatty() else False)
        self._live: Live | None = None
        self._started = self._last_time = self._last_line = time.monotonic()
        self._last_bytes = 0
        self._begun = 0.0
        self._accuracy: float | None = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def start(self, header: Sequence[str], begun: float = 0.0) -> None:
        """Print `header` and begin to count time; `begun` is the part of the run that an earlier start has done."""
        self._begun = begun
        self._print(*header)
        self._started = self._last_time = self._last_line = time.monotonic()
        if self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()

    def on_record(self, record: Record) -> None:
        """Show `record`: in place on a terminal, as a line now and then elsewhere."""
        if record.test_accuracy is not None:
            self._accuracy = record.test_accuracy
        now = time.monotonic()
        line = self._line(record, now)
        is_new = record.test_accuracy is not None
        if self._live is not None:
            self._live.update(Text(line), refresh=True)
        wait = EVALUATION_S if is_new else math.inf if self._live is not None else LINE_S
        if now - self._last_line >= wait or self._done(record) >= 1:
            self._print(line)
            self._last_line = now
        self._last_time, self._last_bytes = now, record.bytes_sent

    def warn(self, line: str) -> None:
        """Print `line` at once, to be noticed."""
        self._print(f"mpicomp: warning: {line}")

    def finish(self, summary: Sequence[str]) -> None:
        """End the live line and print `summary`."""
        self._stop()
        self._print(*summary)

    def _stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _print(self, *lines: str) -> None:
        for line in lines:
            self._console.print(line, markup=False, soft_wrap=True)
        self._console.file.flush()

    def _done(self, record: Record) -> float:
        """Return the part of the run that is done."""
        if self._steps is not None:
            return record.step / self._steps
        return record.epoch / self._epochs if self._epochs and record.epoch is not None else 0.0

    def _line(self, record: Record, now: float) -> str:
        epoch = f"epoch {record.epoch:6.2f}  " if record.epoch is not None else ""
        loss = f"{record.loss:7.4f}" if record.loss is not None else "      -"
        accuracy = f"{self._accuracy:7.2%}" if self._accuracy is not None else "      -"
        rate = (record.bytes_sent - self._last_bytes) / max(now - self._last_time, 1e-9) / 1e6
        done = self._done(record)
        left = (now - self._started) * max(1 - done, 0) / max(done - self._begun, 1e-9)
        sent = f"{readable_bytes(record.bytes_sent):>8} ({rate:.3g} MB/s)"
        trained = [count for count in record.gradients if count]
        ranks = f"gradients a rank {min(trained)}-{max(trained)}  " if trained else ""
        distance = record.consensus_distance
        consensus = f"consensus {distance:8.2e}  " if distance is not None else ""
        return (
            f"{epoch}step {record.step:6}  loss {loss}  accuracy {accuracy}  "
            f"sent {sent}  {ranks}{consensus}{readable_time(left)} left"
        )
