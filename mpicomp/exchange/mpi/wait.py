"""Waiting for MPI without burning a core that another rank needs.

MPI libraries wait by polling at full speed: right when every rank has a core of its own, ruinous when ranks outnumber
cores. MPICH 5.0.2 then halves the speed of the rank that shares the core with a waiting one; a `Testall` now and
then, with a sleep in between, costs it a few percent.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence

from mpicomp.errors import ExchangeError
from mpicomp.exchange.mpi.library import MPI
from mpicomp.exchange.watchdog import Waiting

SPIN_S = 50e-6
"""How long to poll at full speed: most messages between ranks that run at the same time arrive within it."""

SLEEP_MIN_S = 50e-6
SLEEP_MAX_S = 500e-6

EAGER_S = 1e-3
"""How long after the last message a rank with a core of its own looks for the next one without a sleep."""

PATIENCE_S = 1.0
"""After how long a rank begins to look which of its messages are there; that slows long ones down."""


def poll(is_done: Callable[[], bool], limit_s: float = math.inf) -> bool:
    """Wait until `is_done` returns true, and return whether it has done so within `limit_s`, about.

    Asks in a tight loop for `SPIN_S`, then with longer and longer sleeps.
    """
    begin = time.perf_counter()
    while time.perf_counter() < begin + SPIN_S:
        if is_done():
            return True
    pause = SLEEP_MIN_S
    while not is_done():
        if time.perf_counter() > begin + limit_s:
            return False
        time.sleep(pause)
        pause = min(2 * pause, SLEEP_MAX_S)
    return True


def spin(is_done: Callable[[], bool], limit_s: float = math.inf) -> bool:
    """Wait as `poll` does, but without a sleep: for a rank with a core of its own.

    It yields, because the core may be shared without its knowing: beside other programs, MPI's own waiting took 4 to
    16 ms a message where this took 20 us to 1 ms (Open MPI 5.0.11; MPICH 5.0.2, whose Waitall alone yields).
    """
    begin = time.perf_counter()
    while not is_done():
        if time.perf_counter() > begin + limit_s:
            return False
        os.sched_yield()
    return True


def rest(idle_s: float, *, is_polite: bool) -> None:
    """Leave the core to others for a moment: the longer, the longer nothing has happened.

    Args:
        idle_s: for how long nothing has happened, in seconds.
        is_polite: whether another rank needs this core.

    """
    if idle_s < EAGER_S and not is_polite:
        # To spin took Open MPI 5.0.11 4 ms a message between hosts that share two cores, and to yield 0.25 to 0.4 ms.
        os.sched_yield()
    else:
        # Beside other programs, yields of 1 ms and more were seen; a sleep takes at least 60 us.
        time.sleep(min(idle_s / 32, SLEEP_MAX_S))


def wait_all(
    requests: Sequence[MPI.Request],
    statuses: list[MPI.Status] | None = None,
    *,
    is_polite: bool,
    operation: str = "message",
    peers: Sequence[int] | None = None,
) -> None:
    """Wait for all `requests`, and note for the watchdog what for.

    Args:
        requests: those that are complete already do no harm.
        statuses: overwritten by those of the requests, if given.
        is_polite: whether another rank needs this core.
        operation: what it is, for people.
        peers: the rank at the other end of each request; None where all ranks take part.

    Raises:
        ExchangeError: the transport failed, or a message was longer than its receive buffer.

    """
    pending = list(requests)
    found = [MPI.Status() for _ in pending] if statuses is None else statuses
    missing = set(range(len(pending)))
    with Waiting(operation, None if peers is None else lambda: [peers[index] for index in list(missing)]):
        try:
            wait = poll if is_polite else spin
            if not wait(lambda: MPI.Request.Testall(pending, found), PATIENCE_S):
                wait(lambda: _advance(pending, found, missing))
        except MPI.Exception as error:
            raise _failure(error, found) from error


def test_all(requests: list[MPI.Request], statuses: list[MPI.Status]) -> bool:
    """Return whether all `requests` are complete, without waiting; `statuses` are theirs if so.

    Raises:
        ExchangeError: the transport failed, or a message was longer than its receive buffer.

    """
    try:
        return bool(MPI.Request.Testall(requests, statuses))
    except MPI.Exception as error:
        raise _failure(error, statuses) from error


def _advance(pending: list[MPI.Request], found: list[MPI.Status], missing: set[int]) -> bool:
    """Take note of the requests that are complete by now, and return whether that was the last."""
    statuses = [MPI.Status() for _ in pending]
    try:
        done = MPI.Request.Testsome(pending, statuses)
    except MPI.Exception:
        found[:] = statuses
        raise
    for status, index in zip(statuses, done or (), strict=False):
        found[index] = status
        missing.discard(index)
    return done is None or not missing


def _failure(error: MPI.Exception, statuses: list[MPI.Status]) -> ExchangeError:
    for status in statuses:
        if status.Get_error() not in (MPI.SUCCESS, MPI.ERR_PENDING):
            return ExchangeError(f"message from rank {status.Get_source()}: {MPI.Get_error_string(status.Get_error())}")
    return ExchangeError(f"MPI failed: {error.Get_error_string()}")
