"""Transports over two-sided messages: for hosts without hardware that writes into another host's memory.

A write is an `Isend` whose tag names the slot. The receiver's `poll` matches it and receives directly into that slot.
Messages below the library's eager limit (64 KiB over TCP with both libraries) leave the sender without the receiver's
help, and wait in the receiver's socket until it polls. Longer ones move only while both ends poll: see `progress`.

For neighbors on the same machine a window is used if it is passive (see `mpicomp.exchange.mailbox.window`).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mpicomp.errors import ExchangeError
from mpicomp.exchange.mailbox.slots import Slots
from mpicomp.exchange.mailbox.window import WindowTransport
from mpicomp.exchange.mpi.library import MPI
from mpicomp.exchange.mpi.wait import poll, rest
from mpicomp.exchange.staging import Bytes

_NOTE_TAG = 0


class MessageTransport:
    """The memory of a `Mailbox`, written by two-sided messages, and for the ranks in `near` through that window.

    Owns the communicators, and frees them.
    """

    needs_poke = True
    beat_s = 0.25
    rest = None

    def __init__(
        self,
        comm: MPI.Comm,
        slots_at: Callable[[int], Slots],
        near: WindowTransport | None,
        is_polite: bool,
    ) -> None:
        self._comm = comm
        self._slots = slots_at(comm.rank)
        self._near = near
        self._is_polite = is_polite
        self.memory: Bytes = np.zeros(self._slots.total, dtype=np.uint8) if near is None else near.memory
        self.how = "messages" if near is None else "window on a machine, messages between machines"
        self._sends: list[MPI.Request] = []
        self._receives: list[MPI.Request] = []
        self._note_sends: dict[int, MPI.Request] = {}
        self._next_notes: dict[int, Bytes] = {}
        self._sent = np.zeros(comm.size, dtype=np.int64)
        self._received = np.zeros(comm.size, dtype=np.int64)

    def write(self, target: int, index: int | None, data: Bytes) -> None:
        """Send `data`; a note replaces an earlier one that has not been sent yet."""
        if self._near is not None and target in self._near.places:
            self._near.write(target, index, data)
        elif index is None:
            self._next_notes[target] = data
            self._send_notes()
        else:
            self._sends.append(self._send(data, target, 1 + index))

    def poll(self) -> None:
        """Receive the messages that have arrived, and release the buffers of those sent."""
        try:
            while (message := self._comm.Improbe(MPI.ANY_SOURCE, MPI.ANY_TAG, status := MPI.Status())) is not None:
                self._accept(message, status)
            self._sends = [request for request in self._sends if not request.Test()]
            self._receives = [request for request in self._receives if not request.Test()]
        except MPI.Exception as error:
            raise ExchangeError(f"the mailbox cannot receive: {error.Get_error_string()}") from error
        if self._next_notes:
            self._send_notes()
        if self._near is not None:
            self._near.poll()

    def pause(self, idle_s: float) -> None:
        """Yield the core for a moment."""
        rest(idle_s, is_polite=self._is_polite)

    def settle(self) -> None:
        """Wait until all ranks have received all that was sent (collective on all ranks)."""
        self._poll_until(lambda: not self._next_notes and not self._sends)
        counts = np.empty_like(self._sent)
        exchange = self._comm.Ialltoall(self._sent, counts)
        self._poll_until(exchange.Test)
        self._poll_until(lambda: np.array_equal(counts, self._received) and not self._receives)
        # Others may still need this rank to poll: a completed send may still lie in the MPI library.
        self._poll_until(self._comm.Ibarrier().Test)
        if self._near is not None:
            self._near.settle()

    def free(self) -> None:
        """Free the communicator and the window (collective on all ranks)."""
        for request in self._note_sends.values():
            request.Wait()
        self.memory = np.empty(0, dtype=np.uint8)
        if self._near is not None:
            self._near.free()
        self._comm.Free()

    def _send(self, data: Bytes, target: int, tag: int) -> MPI.Request:
        self._sent[target] += 1
        try:
            return self._comm.Isend(data, target, tag)
        except MPI.Exception as error:
            raise ExchangeError(f"cannot send to the mailbox of rank {target}: {error.Get_error_string()}") from error

    def _send_notes(self) -> None:
        for target in list(self._next_notes):
            if target not in self._note_sends or self._note_sends[target].Test():
                self._note_sends[target] = self._send(self._next_notes.pop(target), target, _NOTE_TAG)

    def _accept(self, message: MPI.Message, status: MPI.Status) -> None:
        source, tag = status.Get_source(), status.Get_tag()
        self._received[source] += 1
        slots = self._slots
        begin = slots.note(source) if tag == _NOTE_TAG else slots.message(source, tag - 1)
        place = self.memory[begin : begin + status.Get_count(MPI.BYTE)]
        if tag == _NOTE_TAG:
            message.Recv(place)  # At once: the next note goes to the same place.
        else:
            self._receives.append(message.Irecv(place))

    def _poll_until(self, is_done: Callable[[], bool]) -> None:
        def look() -> bool:
            self.poll()
            return is_done()

        poll(look)
