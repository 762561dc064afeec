"""Waiting for MPI without occupying a core that another rank needs.

MPI libraries wait by polling at full speed. That is right when every rank has a core of its own, and slow when ranks
outnumber cores: with MPICH 5.0.2, a waiting rank then halves the speed of the rank that shares its core. A `Testall`
now and then, with a sleep in between, costs that rank only a few percent.
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
"""Seconds of polling at full speed: most messages between ranks that run at the same time arrive within this time."""

SLEEP_MIN_S = 50e-6
SLEEP_MAX_S = 500e-6

EAGER_S = 1e-3
"""Seconds after the last message for which a rank with a core of its own polls without sleeping."""

PATIENCE_S = 1.0
"""Seconds after which a rank begins to check which of its messages have arrived; checking slows long messages down."""

LOOK_S = 0.2
"""Seconds between two checks of a waiting rank whether the others are alive."""


def poll(is_done: Callable[[], bool], limit_s: float = math.inf) -> bool:
    """Wait until `is_done` returns true, for about `limit_s` at most; return whether it did.

    Polls in a tight loop for `SPIN_S`, then with longer and longer sleeps.
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

    It yields, because other programs may use the core, too. With other programs running, MPI's own waiting took 4 to
    16 ms a message and this function 20 us to 1 ms (Open MPI 5.0.11; MPICH 5.0.2, which yields in Waitall only).
    """
    begin = time.perf_counter()
    while not is_done():
        if time.perf_counter() > begin + limit_s:
            return False
        os.sched_yield()
    return True


def rest(idle_s: float, *, is_polite: bool) -> None:
    """Yield the core or sleep for a moment; longer if nothing has happened for longer.

    Args:
        idle_s: seconds since something happened last.
        is_polite: whether another rank needs this core.

    """
    if idle_s < EAGER_S and not is_polite:
        # With Open MPI 5.0.11 between hosts that share two cores, spinning took 4 ms a message, yielding 0.25 to 0.4.
        os.sched_yield()
    else:
        # With other programs running, yields took 1 ms and more at times; a sleep takes at least 60 us.
        time.sleep(min(idle_s / 32, SLEEP_MAX_S))


def wait_all(
    requests: Sequence[MPI.Request],
    statuses: list[MPI.Status] | None = None,
    *,
    is_polite: bool,
    operation: str = "message",
    peers: Sequence[int] | None = None,
    look: Callable[[], None] | None = None,
) -> None:
    """Wait for all `requests`, and tell the watchdog what this rank waits for.

    Args:
        requests: some may be complete already.
        statuses: overwritten with the statuses of the requests, if given.
        is_polite: whether another rank needs this core.
        operation: its name in messages.
        peers: the rank at the other end of each request; None where all ranks take part.
        look: called every `LOOK_S` of a long wait; what it raises ends the wait.

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
                while not wait(lambda: _advance(pending, found, missing), LOOK_S):
                    if look:
                        look()
        except MPI.Exception as error:
            raise _failure(error, found) from error


def test_all(requests: list[MPI.Request], statuses: list[MPI.Status]) -> bool:
    """Return whether all `requests` are complete, without waiting; if so, `statuses` are overwritten.

    Raises:
        ExchangeError: the transport failed, or a message was longer than its receive buffer.

    """
    try:
        return bool(MPI.Request.Testall(requests, statuses))
    except MPI.Exception as error:
        raise _failure(error, statuses) from error


def _advance(pending: list[MPI.Request], found: list[MPI.Status], missing: set[int]) -> bool:
    """Note which requests are complete by now, and return whether all are."""
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
