"""Transports in an MPI window: a write is a `Put` into the neighbor's memory. The only place with `MPI.Win`.

MPI allocates the window in host memory. It is locked for all ranks once, for its whole life. On one machine such memory
is shared, and MPICH 5.0.2 and Open MPI 5.0.11 both write to it at once, whatever its owner is doing: the window is
*passive*. Between hosts neither moves a byte before the owner calls MPI, unless the hardware does, and a flush waits
for that; then messages are better. Memory that the caller allocates (`Win.Create`) is no better on one machine.
`is_passive` tests a window instead of relying on this.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from mpicomp.errors import ExchangeError
from mpicomp.exchange.mailbox.slots import Slots
from mpicomp.exchange.mpi.library import MPI
from mpicomp.exchange.mpi.wait import poll, rest
from mpicomp.exchange.staging import Bytes

PATIENCE_S = 0.3
"""Seconds within which a put must arrive while its target makes no MPI call, for the window to count as passive."""


class WindowTransport:
    """The memory of a `Mailbox` in a passive MPI window over `comm`, for the neighbors that are in `comm`.

    Owns the communicator, and frees it.

    Attributes:
        places: for each rank of the world that is in `comm`, its rank there.

    """

    beat_s = 0.25
    rest = None

    how = "window"
    needs_poke = False

    def __init__(
        self,
        comm: MPI.Intracomm,
        places: dict[int, int],
        rank: int,
        slots_at: Callable[[int], Slots],
        is_polite: bool,
        wait: Callable[[MPI.Request, str], None],
    ) -> None:
        self.places = places
        self._comm = comm
        self._rank = rank
        self._slots_at = slots_at
        self._is_polite = is_polite
        self._wait = wait
        self._win = allocate(comm, slots_at(rank).total)
        self.memory: Bytes = _memory(self._win)

    def write(self, target: int, index: int | None, data: Bytes) -> None:
        """Put `data` into the slot of this rank at `target`."""
        slots = self._slots_at(target)
        begin = slots.note(self._rank) if index is None else slots.message(self._rank, index)
        place = self.places[target]
        try:
            self._win.Put(data, place, begin)
            self._win.Flush(place)
        except MPI.Exception as error:
            raise _failure(error, target) from error

    def poll(self) -> None:
        """Synchronize memory, so that puts of other ranks become visible."""
        self._win.Sync()

    def pause(self, idle_s: float) -> None:
        """Yield the core for a moment."""
        rest(idle_s, is_polite=self._is_polite)

    def settle(self) -> None:
        """Wait until all puts of all ranks have arrived (collective on the ranks of the communicator)."""
        self._win.Flush_all()
        self._wait(self._comm.Ibarrier(), "arrival of all messages")
        self._win.Sync()

    def free(self) -> None:
        """Free the window (collective on the ranks of the communicator)."""
        self.memory = np.empty(0, dtype=np.uint8)
        self._win.Unlock_all()
        self._win.Free()
        self._comm.Free()


class WindowCounter:
    """A shared counter in the memory of rank 0 of `comm`, which gives each value to one rank only.

    Owns the communicator, and frees it. Between hosts, rank 0 must call MPI now and then, so `prefetch` early.
    """

    def __init__(self, comm: MPI.Intracomm, start: int) -> None:
        self._comm = comm
        self._win = allocate(comm, 8)
        if comm.rank == 0:
            _memory(self._win)[:8].view(np.int64)[0] = start
            self._win.Sync()
        comm.Barrier()
        self._one = np.ones(1, dtype=np.int64)
        self._value = np.zeros(1, dtype=np.int64)
        self._request: MPI.Request | None = None

    def prefetch(self) -> None:
        """Begin to take the next value, unless it was begun already."""
        if self._request is None:
            try:
                self._request = self._win.Rget_accumulate(self._one, self._value, 0, op=MPI.SUM)
            except MPI.Exception as error:
                raise _failure(error, 0) from error

    def test(self) -> bool:
        """Return whether the next value is here."""
        self.prefetch()
        assert self._request is not None
        return bool(self._request.Test())

    def take(self) -> int:
        """Return the next value."""
        self.prefetch()
        assert self._request is not None
        poll(self._request.Test)
        self._request = None
        return int(self._value[0])

    def free(self) -> None:
        """Free the memory (collective on the ranks of the communicator)."""
        if self._request is not None:
            poll(self._request.Test)
        self._win.Flush_all()
        self._comm.Barrier()
        self._win.Unlock_all()
        self._win.Free()
        self._comm.Free()


def allocate(comm: MPI.Intracomm, nbytes: int) -> MPI.Win:
    """Return a window of `nbytes` zeros on each rank, locked for all (collective on the ranks of `comm`)."""
    try:
        win = MPI.Win.Allocate(max(nbytes, 1), 1, comm=comm)
    except MPI.Exception as error:
        raise ExchangeError(
            f"MPI cannot allocate a window of {nbytes} bytes ({error.Get_error_string()}): a smaller mailbox depth "
            "needs less; mpicomp doctor tries one"
        ) from error
    win.Set_errhandler(MPI.ERRORS_RETURN)
    _memory(win)[:] = 0
    win.Lock_all(MPI.MODE_NOCHECK)
    win.Sync()
    comm.Barrier()
    return win


def is_passive(comm: MPI.Intracomm) -> bool:
    """Return whether a put arrives while its target makes no MPI call (collective on the ranks of `comm`).

    Even ranks put while odd ones watch their memory without calling MPI; then the other way round.
    """
    win = allocate(comm, 8)
    memory = _memory(win)[:8].view(np.int64)
    writer, is_seen = (comm.rank - 1) % comm.size, True
    for phase in range(2):
        comm.Barrier()
        if comm.rank % 2 == phase:
            win.Put(np.array([comm.rank + 1], dtype=np.int64).view(np.uint8), (comm.rank + 1) % comm.size)
            win.Flush_all()
        elif writer % 2 == phase:
            deadline = time.monotonic() + PATIENCE_S
            while memory[0] != writer + 1 and time.monotonic() < deadline:
                time.sleep(1e-4)
            is_seen = bool(memory[0] == writer + 1)
    verdict = all(comm.allgather(is_seen))
    del memory
    win.Unlock_all()
    win.Free()
    return verdict


def _memory(win: MPI.Win) -> Bytes:
    return np.asarray(win.tomemory())


def _failure(error: MPI.Exception, target: int) -> ExchangeError:
    return ExchangeError(f"cannot write into the window of rank {target}: {error.Get_error_string()}")
