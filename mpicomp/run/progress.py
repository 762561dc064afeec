"""The display of a run: one live line on a terminal, or plain lines now and then in a log file."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.text import Text

from mpicomp.replica.record import Record, training_seconds
from mpicomp.run.result import readable_bytes, readable_time

LINE_S = 5.0
"""Seconds between lines in a log file."""

WIDE, MEDIUM = 120, 90
"""Columns of a terminal that has room for all figures of a line, and for all but rate, gradients and consensus."""

EVALUATION_S = 1.0
"""Seconds between lines in a log file if the line has a new test result."""


def stdout(width: int | None = None) -> Console:
    """Return a console on standard output; `width` is its columns, by default those of the terminal."""
    # Open MPI gives rank 0 a terminal as standard output even if the output goes to a file.
    return Console(highlight=False, width=width, force_terminal=None if sys.stderr.isatty() else False)


class Progress:
    """Shows a run on rank 0; use it as a context manager, so that the terminal is restored after an error.

    Args:
        steps: the length of the run in steps; None if it is given in epochs.
        epochs: the length of the run in epochs; None if it is given in steps.
        console: where to write; standard output by default.

    """

    def __init__(self, steps: int | None, epochs: float | None, console: Console | None = None) -> None:
        self._steps = steps
        self._epochs = epochs
        self._console = console or stdout()
        self._live: Live | None = None
        self._started = self._last_line = time.monotonic()
        self._last_bytes: int | None = 0
        self._begun = 0.0
        self._test = "not yet tested"

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def start(self, header: Sequence[str], begun: float = 0.0) -> None:
        """Print `header` and start the clock; `begun` is the fraction of the run that earlier starts have done."""
        self._begun = begun
        if begun:
            self._last_bytes = None  # those of earlier starts are not known
        self._print(*header)
        self._started = self._last_line = time.monotonic()
        if self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()

    def on_record(self, record: Record) -> None:
        """Show `record`: in the live line on a terminal, or now and then as a line."""
        if record.test_accuracy is not None:
            self._test = f"accuracy {record.test_accuracy:7.2%}"
        elif record.test_loss is not None:
            self._test = f"test loss {record.test_loss:7.4f}"
            if record.test_perplexity is not None:
                self._test += f"  perplexity {record.test_perplexity:7.5g}"
        now = time.monotonic()
        line = self._line(record, now)
        is_new = record.test_accuracy is not None or record.test_loss is not None
        if self._live is not None:
            self._live.update(Text(line, no_wrap=True, overflow="ellipsis"), refresh=True)
        wait = EVALUATION_S if is_new else math.inf if self._live is not None else LINE_S
        if now - self._last_line >= wait or self._done(record) >= 1:
            self._print(line)
            self._last_line = now
        self._last_bytes = record.bytes_sent

    def warn(self, line: str) -> None:
        """Print the warning `line` at once."""
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
            self._console.print(line, markup=False, soft_wrap=not self._console.is_terminal)
        self._console.file.flush()

    def _done(self, record: Record) -> float:
        """Return the fraction of the run that is done."""
        if self._steps is not None:
            return record.step / self._steps
        return record.epoch / self._epochs if self._epochs and record.epoch is not None else 0.0

    def _line(self, record: Record, now: float) -> str:
        """Return the line of a record; on a terminal that is narrow, without some of the figures."""
        width = self._console.width if self._console.is_terminal else math.inf
        epoch = f"epoch {record.epoch:6.2f}  " if record.epoch is not None else ""
        step = f"step {record.step:6}  " if width >= MEDIUM or not epoch else ""
        loss = "      -" if record.loss is None else f"{record.loss:7.4{'f' if abs(record.loss) < 1e4 else 'g'}}"
        done = self._done(record)
        left = (now - self._started) * max(1 - done, 0) / max(done - self._begun, 1e-9)
        sent = f"sent {readable_bytes(record.bytes_sent):>8}"
        seconds = training_seconds(record.seconds)  # simulated, in simulated time
        if width >= WIDE and seconds > 0 and self._last_bytes is not None:
            sent += f" ({(record.bytes_sent - self._last_bytes) / seconds / 1e6:.3g} MB/s)"
        trained = [count for count in record.gradients if count]
        ranks = f"gradients a rank {min(trained)}-{max(trained)}  " if trained and width >= WIDE else ""
        distance = record.consensus_distance
        consensus = f"consensus {distance:8.2e}  " if distance is not None and width >= WIDE else ""
        return f"{epoch}{step}loss {loss}  {self._test}  {sent}  {ranks}{consensus}{readable_time(left)} left"
