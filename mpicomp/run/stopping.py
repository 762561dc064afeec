"""Who may ask a run to stop, and how all ranks agree on it without stopping for it.

A signal on any rank, a file named ``stop`` in the run folder, or the nearing end of the time limit ask for it. A signal
handler only sets a flag. About four times a second the ranks begin to collect what each of them knows; it
travels while they compute, and is read by all of them after the same step. So all of them stop after the same step,
and no step waits for a rank that is not a neighbor, but for these.
"""

from __future__ import annotations

import dataclasses
import enum
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from mpicomp.config.signals import signal_number
from mpicomp.exchange.base import Gather, World

INTERVAL_S = 0.25
"""How long a round of the agreement shall last, about: it is counted in steps, which all ranks see alike."""

EXIT_UNFINISHED = 75
"""The exit code of a run that was asked to stop and has stored a checkpoint: run it again (EX_TEMPFAIL in C)."""

LARGEST_LEAD = 0.25
"""The part of a time limit that may be kept for the last checkpoint: a short limit must not stop a run at once."""


class Reason(enum.IntEnum):
    """Why a run is to stop; the greater one is named if there are several."""

    NONE = 0
    TIME_LIMIT = 1
    STOP_FILE = 2
    SIGNAL = 3

    def __str__(self) -> str:
        return self.name.lower().replace("_", " ")


def stopped(step: int, steps: int, reason: Reason, folder: Path | None) -> list[str]:
    """Return the lines for a user whose run has stopped."""
    lines = [f"Stopped after step {step} of {steps}: {reason}."]
    return [*lines, f"Go on with: mpicomp train --resume {folder}"] if folder else lines


class StopRequests:
    """What has asked this process to stop, so far. Make it on the main thread: it sets a signal handler.

    The handler stays for the life of the process: a second signal, while the last checkpoint is written, must not
    find the default action, which is to die.

    Args:
        signal_name: the signal that asks to stop, e.g. ``"USR1"``.

    Raises:
        ConfigError: a signal that cannot be caught.

    """

    def __init__(self, signal_name: str = "USR1") -> None:
        self._file: Path | None = None
        self._deadline: float | None = None
        self._is_signaled = False
        signal.signal(signal_number(signal_name), self._handle)

    def watch(self, file: Path, end_time: float | None, lead_s: float) -> None:
        """Let a file and the clock ask to stop, too: on one rank, which spares the file system.

        Args:
            file: its existence asks to stop.
            end_time: unix seconds at which the process will be ended from outside, or None.
            lead_s: how long before that to stop; at most a quarter of the time that is left now.

        """
        self._file = file
        if end_time is not None:
            self._deadline = end_time - min(lead_s, LARGEST_LEAD * max(end_time - time.time(), 0))

    def reason(self) -> Reason:
        """Return what asks to stop now."""
        if self._is_signaled:
            return Reason.SIGNAL
        if self._file is not None and self._file.exists():
            return Reason.STOP_FILE
        if self._deadline is not None and time.time() >= self._deadline:
            return Reason.TIME_LIMIT
        return Reason.NONE

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._is_signaled = True


@dataclass(frozen=True)
class Status:
    """What a rank reports to the others, and the maxima over all ranks.

    Attributes:
        stop: a `Reason`.
        save: 1 if a checkpoint is due by the clock.
        writing: 1 if a checkpoint is still being written.

    """

    stop: int = Reason.NONE
    save: int = 0
    writing: int = 0

    @classmethod
    def maxima(cls, statuses: Iterable[Status]) -> Status:
        """Return the largest value of each."""
        return cls(*map(max, zip(*map(dataclasses.astuple, statuses), strict=True)))


class Agreement:
    """Rounds of reports from all ranks, each begun and read after the same steps on all of them."""

    def __init__(self, world: World, step: int) -> None:
        self._world = world
        self._pending: Gather | None = None
        self._begun = self._due = step
        self._interval = 1
        self._slowest_us = 0
        self._clock = time.perf_counter()

    def is_due(self, step: int) -> bool:
        """Return whether all ranks call `next_round` after `step` steps."""
        return step >= self._due

    def next_round(self, step: int, mine: Status) -> Status:
        """End the round under way and return what it says, nothing at first; begin the next with `mine`."""
        agreed = self.finish()
        now = time.perf_counter()
        if self._slowest_us:
            wanted = round(1e6 * INTERVAL_S / self._slowest_us)
            self._interval = max(1, min(wanted, 2 * self._interval))
        step_us = round(1e6 * (now - self._clock) / max(step - self._begun, 1))
        self._clock, self._begun, self._due = now, step, step + self._interval
        self._pending = self._world.start_gather((*dataclasses.astuple(mine), step_us))
        return agreed

    def finish(self) -> Status:
        """End the round under way, if there is one, and return what it says."""
        self._slowest_us = 0
        pending, self._pending = self._pending, None
        if pending is None:
            return Status()
        *statuses, self._slowest_us = (int(max(column)) for column in zip(*pending.wait(), strict=True))
        return Status(*statuses)
