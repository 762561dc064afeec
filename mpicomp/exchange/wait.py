"""Waiting for MPI without burning a core that another rank needs.

MPI libraries wait by polling at full speed: right when every rank has a core of its own, ruinous when ranks outnumber
cores. MPICH 5.0.2 then halves the speed of the rank that shares the core with a waiting one; a `Testall` now and
then, with a sleep in between, costs it a few percent.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from mpicomp.errors import ExchangeError
from mpicomp.exchange.library import MPI
from mpicomp.exchange.watchdog import Waiting

SPIN_S = 50e-6
"""How long to poll at full speed: most messages between ranks that run at the same time arrive within it."""

SLEEP_MIN_S = 50e-6
SLEEP_MAX_S = 500e-6


def poll(is_done: Callable[[], bool]) -> None:
    """Return when `is_done` returns true: ask in a tight loop for `SPIN_S`, then with longer and longer sleeps."""
    deadline = time.perf_counter() + SPIN_S
    while time.perf_counter() < deadline:
        if is_done():
            return
    pause = SLEEP_MIN_S
    while not is_done():
        time.sleep(pause)
        pause = min(2 * pause, SLEEP_MAX_S)


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
    pending, found = list(requests), [MPI.Status() for _ in requests]
    missing = set(range(len(pending)))

    def advance(some: Callable[[list[MPI.Request], list[MPI.Status]], list[int] | None]) -> bool:
        done = some(pending, found)
        if done is None:
            return True
        for place, index in enumerate(done):
            missing.discard(index)
            if statuses is not None:
                statuses[index] = found[place]
                found[place] = MPI.Status()
        return not missing

    with Waiting(operation, None if peers is None else lambda: [peers[index] for index in list(missing)]):
        try:
            if is_polite:
                poll(lambda: advance(MPI.Request.Testsome))
            else:
                while not advance(MPI.Request.Waitsome):
                    pass
        except MPI.Exception as error:
            raise _failure(error, found) from error


def _failure(error: MPI.Exception, statuses: list[MPI.Status] | None) -> ExchangeError:
    for status in statuses or ():
        if status.Get_error() not in (MPI.SUCCESS, MPI.ERR_PENDING):
            return ExchangeError(f"message from rank {status.Get_source()}: {MPI.Get_error_string(status.Get_error())}")
    return ExchangeError(f"MPI failed: {error.Get_error_string()}")
