"""What may ask a run to stop, and how all ranks agree to stop after the same step.

A run is asked to stop by a signal on any rank, by a file named ``stop`` in the run folder, or because its time limit is
near. The signal handler only sets a flag. About four times a second the ranks start a non-blocking all-gather of their
flags. It travels while they compute, and all ranks read it after the same step, so all stop after the same step. Apart
from reading it (and from records and checkpoints), a gossip step waits for neighbors only.
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
from mpicomp.exchange.loopback.world import LoopbackWorld

INTERVAL_S = 0.25
"""The approximate length of a round of the agreement; it is converted to a number of steps, equal on all ranks."""

EXIT_UNFINISHED = 75
"""The exit code of a run that was asked to stop and has stored a checkpoint: run it again (EX_TEMPFAIL in C)."""

LARGEST_LEAD = 0.25
"""The largest fraction of a time limit reserved for the last checkpoint; a short limit must not stop a run at once."""


class Reason(enum.IntEnum):
    """Why a run stops; of several reasons, the one with the largest value is reported."""

    NONE = 0
    TIME_LIMIT = 1
    STOP_FILE = 2
    SIGNAL = 3

    def __str__(self) -> str:
        return self.name.lower().replace("_", " ")


def stopped(step: int, steps: int, reason: Reason, folder: Path | None, ranks: str) -> list[str]:
    """Return the lines to show when a run has stopped: step, reason, and how to continue, with the option `ranks`."""
    lines = [f"Stopped after step {step} of {steps}: {reason}."]
    return [*lines, f"Go on with: mpicomp train --resume {folder}{ranks}"] if folder else lines


def same_ranks(world: World) -> str:
    """Return what to add to ``mpicomp train``, so that it starts as many ranks."""
    if isinstance(world, LoopbackWorld):
        return f" --{'simulate' if world.is_simulated else 'loopback'} {world.size}"
    return f" (by mpiexec -n {world.size}, as before)" if world.size > 1 else ""


class StopRequests:
    """The requests to stop that this process has got. Make it on the main thread: it sets a signal handler.

    The handler stays for the life of the process. Otherwise a second signal would end the process while it writes the
    last checkpoint.

    Args:
        signal_name: the signal that asks to stop, e.g. ``"USR1"``.

    Raises:
        ConfigError: the signal cannot be caught.

    """

    def __init__(self, signal_name: str = "USR1") -> None:
        self._file: Path | None = None
        self._deadline: float | None = None
        self._is_signaled = False
        signal.signal(signal_number(signal_name), self._handle)

    def watch(self, file: Path, end_time: float | None, lead_s: float) -> None:
        """Let a file and the clock ask to stop, too; call it on one rank only, to spare the file system.

        Args:
            file: if it exists, the run is asked to stop.
            end_time: the time limit in unix seconds, or None.
            lead_s: how many seconds before that to stop; at most a quarter of the time that is left now.

        """
        self._file = file
        if end_time is not None:
            self._deadline = end_time - min(lead_s, LARGEST_LEAD * max(end_time - time.time(), 0))

    def reason(self) -> Reason:
        """Return the present reason to stop, or `Reason.NONE`."""
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
    """What a rank reports to the others, or the maximum over all ranks.

    Attributes:
        stop: a `Reason`.
        save: 1 if a checkpoint is due by time.
        writing: 1 if a checkpoint is still being written.

    """

    stop: int = Reason.NONE
    save: int = 0
    writing: int = 0

    @classmethod
    def maxima(cls, statuses: Iterable[Status]) -> Status:
        """Return the status with the largest value of each field."""
        return cls(*map(max, zip(*map(dataclasses.astuple, statuses), strict=True)))


class Agreement:
    """Rounds in which all ranks gather their statuses; all ranks begin and read a round after the same steps."""

    def __init__(self, world: World, step: int) -> None:
        self._world = world
        self._pending: Gather | None = None
        self._begun = self._due = step
        self._interval = 1
        self._slowest_us = 0
        self._clock = time.perf_counter()

    def is_due(self, step: int) -> bool:
        """Return whether to call `next_round` after `step` steps; the same on all ranks."""
        return step >= self._due

    def next_round(self, step: int, mine: Status) -> Status:
        """End the present round and return the agreed status; begin the next round with `mine`."""
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
        """End the present round, if there is one, and return the agreed status."""
        self._slowest_us = 0
        pending, self._pending = self._pending, None
        if pending is None:
            return Status()
        *statuses, self._slowest_us = map(int, pending.wait().max(axis=0))
        return Status(*statuses)
