"""The watchdog: a run that hangs reports who waits for whom, and ends, so that it does not waste an allocation.

A thread on each rank checks whether the rank makes progress. If it has made none for `timeout_s`, the thread prints one
line: the ranks that it waits for, the operation and the step. For a rank that waits for no other, it prints the Python
stack instead. After a grace period, in which other ranks print their lines, the process ends, and the launcher ends all
others. The thread makes no MPI call, so it works while its rank is blocked in one.

The cause is the rank that prints a stack. If none does, it is a rank that others wait for and that prints nothing: its
process is stopped, its node is lost, or foreign code in it holds Python's interpreter lock.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from mpicomp.errors import ExchangeError
from mpicomp.exchange.base import World

TICKS = 20
"""How many times the thread checks within `timeout_s`."""

GRACE_S = 1.0
"""The least number of seconds between the line of a rank and its end; a tenth of `timeout_s` if that is longer.

A rank stops later the farther it is from the cause, by one step for each edge between them.
"""

LISTED_RANKS = 8
"""How many ranks a message names at most."""

_waiting: dict[int, Waiting | None] = {}
"""What each thread waits for, by its identifier."""


class Waiting:
    """Notes that the calling thread waits for other ranks within the block; costs less than a microsecond.

    Args:
        operation: what is waited for, e.g. ``"message"`` or ``"all_gather"``.
        missing: returns the ranks that are still missing, on any thread; None if that cannot be known, as in a
            collective operation of MPI.

    """

    __slots__ = ("_missing", "_outer", "_thread", "operation")

    def __init__(self, operation: str, missing: Callable[[], Collection[int]] | None = None) -> None:
        self.operation = operation
        self._missing = missing
        self._thread = threading.get_ident()
        self._outer = _waiting.get(self._thread)

    def __enter__(self) -> None:
        _waiting[self._thread] = self

    def __exit__(self, *error: object) -> None:
        _waiting[self._thread] = self._outer

    def missing(self) -> list[int] | None:
        """Return the ranks that are still missing, ascending, each once; None if that cannot be known."""
        return None if self._missing is None else sorted(set(self._missing()))


@dataclass(frozen=True)
class Member:
    """Where a rank runs. When a rank is killed, MPICH's launcher names a host and a PID, but no rank.

    MPICH's launcher kills the other ranks within a millisecond, so none of them could name the first. In about one case
    of four, MPICH 5.0.2 prints the PID of a rank that it has killed itself. Open MPI names the right rank.

    Attributes:
        pid: the number of its process, as that process sees it; outside of a container it may be another.

    """

    rank: int
    host: str
    pid: int

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} (PID {self.pid})"


def roster(world: World) -> list[Member]:
    """Return where each rank runs, by rank; collective on all ranks."""
    return world.all_gather(Member(world.rank, world.host, os.getpid()))


class Watchdog:
    """Ends the process, after a line that says why, when this rank makes no progress; a context manager.

    Making one is collective on all ranks. Enter it on the thread that trains, and call `moved` after every piece of
    work. `timeout_s` must be longer than the longest piece on any rank, because the others wait for that rank
    meanwhile. Time in which the process is stopped, or the machine sleeps, does not count.

    Args:
        world: the ranks.
        timeout_s: how many seconds a rank may take for one piece of work; 0 for no limit.
        key: the name under which users set it.
        only_waiting: whether only a single wait for others counts, and a rank may compute for any time; `moved` need
            not be called then.

    Attributes:
        members: where each rank runs.

    """

    def __init__(
        self, world: World, timeout_s: float, key: str = "run.hang_timeout_s", only_waiting: bool = False
    ) -> None:
        self.members = roster(world)
        self._me = self.members[world.rank]
        self._timeout_s = timeout_s
        self._key = key
        self._only_waiting = only_waiting
        self._grace_s = max(GRACE_S, timeout_s / 10)
        self._step: int | None = None
        self._moves = 0
        self._watched = threading.get_ident()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def moved(self, step: int | None = None) -> None:
        """Note that this rank makes progress: it begins `step`, or another piece of work in its current step."""
        if step is not None:
            self._step = step
        self._moves += 1

    def __enter__(self) -> Watchdog:
        self._watched = threading.get_ident()
        if self._timeout_s:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._is_over.set()
        if self._timeout_s:
            self._thread.join()

    def _watch(self) -> None:
        tick_s = self._timeout_s / TICKS
        moves, idle_s, has_told = self._progress(), 0.0, False
        last = time.monotonic()
        while not self._is_over.wait(tick_s):
            now = time.monotonic()
            # If this thread wakes much too late, the process was stopped, for example by Slurm in favor of another
            # job. Neither the rank nor this thread could make progress then.
            idle_s += min(now - last, 2 * tick_s)
            last = now
            if (now_at := self._progress()) is None or now_at != moves:
                if has_told:
                    _print(f"mpicomp: warning: {self._place()}: moves again {self._in_step()}")
                moves, idle_s, has_told = now_at, 0.0, False
            elif has_told and idle_s >= self._timeout_s + self._grace_s:
                os._exit(ExchangeError.exit_code)
            elif not has_told and idle_s >= self._timeout_s:
                _print(f"mpicomp: error: {self._place()}: {self._describe(idle_s)}")
                has_told = True

    def _progress(self) -> object:
        """Return a value that changes when this rank makes progress; None if no progress is expected of it."""
        return _waiting.get(self._watched) if self._only_waiting else self._moves

    def _describe(self, idle_s: float) -> str:
        note = _waiting.get(self._watched)
        remedy = f"ends in {self._grace_s:g} s unless it moves ({self._key} = {self._timeout_s:g})"
        if note is None:
            frame = sys._current_frames()[self._watched]
            stack = "".join(traceback.format_stack(frame)).rstrip()
            return f"no progress for {idle_s:.3g} s: computes {self._in_step()}; {remedy}; its stack:\n{stack}"
        return (
            f"no progress for {idle_s:.3g} s: waits for {self._name(note.missing())} "
            f"({note.operation} {self._in_step()}); {remedy}"
        )

    def _name(self, ranks: Sequence[int] | None) -> str:
        if ranks is None:
            return "all ranks"
        if not ranks:
            return "its turn"  # on the loopback: all has arrived, but other ranks have the cores
        named = ", ".join(str(self.members[rank]) for rank in ranks[:LISTED_RANKS])
        return f"{named} and {len(ranks) - LISTED_RANKS} more" if len(ranks) > LISTED_RANKS else named

    def _place(self) -> str:
        return f"rank {self._me.rank} on {self._me.host}"

    def _in_step(self) -> str:
        return "before the first step" if self._step is None else f"in step {self._step}"


def _print(text: str) -> None:
    # One write, so that lines of several ranks do not mix.
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
