"""The mailbox: neighbors write into each other's memory, and neither sending nor receiving waits for the other side.

Every rank has a piece of memory that its neighbors write into: `depth` slots for the messages of each source, and one
note from each neighbor. Every slot and every note has a single writer. A `SlotTransport` (`window`, `messages`, the
loopback's) carries the bytes. They may arrive late, in pieces and in any order.

A message holds its number (1, 2, ... on each edge), its sender's step, its length and a CRC-32 of all of it. Message i
lies in slot ``(i - 1) % depth``. The reader takes message i when the slot shows i *and* the CRC is right; until then
the message counts as not yet arrived. It copies the message and writes a note to the sender: the number of the last
message read, and its own step. The sender overwrites only messages that were read; `put` returns the targets that had
room. So messages are neither torn, nor lost, nor reordered, and a sender is at most `depth` messages ahead.

On the wire a message is 32 bytes longer than its payload; a note is 32 bytes, and counts as traffic too.
"""

from __future__ import annotations

import math
import struct
import threading
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from mpicomp.compression.message import Layout, Payload
from mpicomp.errors import ExchangeError
from mpicomp.exchange.base import Mail, Peer, check_message
from mpicomp.exchange.process import Process
from mpicomp.exchange.staging import Bytes, make_staging
from mpicomp.timing import timed
from mpicomp.topology.base import Topology

HEADER = 32
"""Bytes ahead of a payload: number, step, length and CRC, as int64."""

NOTE = 32
"""Bytes of a note: messages read, step, count of notes with the lowest bit for done, and CRC, as int64."""

DAMAGED_S = 10.0
"""Seconds of an unchanged bad CRC before a message counts as corrupt.

A long message may make no progress while this rank computes, so at most `LOOK_S` of the time between two checks counts.
"""

LOOK_S = 1.0

SUSPECT_S = 0.5
"""Seconds of silence after which this rank checks whether a neighbor's process still runs."""

_CRC_WORDS = struct.Struct("=3q")

_LINE = 64
"""Slots begin at cache lines, so that no two writers share one."""


@dataclass(frozen=True)
class Slots:
    """The layout of the memory of one rank.

    Attributes:
        depth: how many messages a source may be ahead.
        nbytes: bytes of the longest payload.
        neighbors: the ranks that write notes, ascending.
        sources: the ranks that write messages, ascending.

    """

    depth: int
    nbytes: int
    neighbors: tuple[int, ...]
    sources: tuple[int, ...]

    @property
    def stride(self) -> int:
        """The bytes from one slot to the next."""
        return -(-(HEADER + self.nbytes) // _LINE) * _LINE

    @property
    def total(self) -> int:
        """The bytes of all slots and notes."""
        return _LINE * len(self.neighbors) + self.stride * self.depth * len(self.sources)

    def note(self, writer: int) -> int:
        """Return where the note of `writer` begins."""
        return _LINE * self.neighbors.index(writer)

    def message(self, source: int, index: int) -> int:
        """Return where slot `index` of `source` begins."""
        return _LINE * len(self.neighbors) + self.stride * (self.depth * self.sources.index(source) + index)


def slots_of(topology: Topology, rank: int, nbytes: int, depth: int) -> Slots:
    """Return the layout of the memory that `rank` needs for the edges of `topology`."""
    sources, targets = topology.sources(rank), topology.targets(rank)
    return Slots(depth, nbytes, tuple(sorted({*sources, *targets})), tuple(sources))


class SlotTransport(Protocol):
    """Memory that the neighbors write into. Making one, `settle` and `free` are collective on all ranks.

    Attributes:
        memory: of this rank, uint8, zero at first; `slots_of` gives its layout.
        how: the name of the transport, for reports.
        needs_poke: whether bytes move only while their target calls `poll`.
        beat_s: seconds after which `poke` writes notes even if nothing has happened, as a sign of life.

    """

    memory: Bytes
    how: str
    needs_poke: bool
    beat_s: float

    @property
    def rest(self) -> Callable[[float], float] | None:
        """Sleeps in simulated time until something arrives, for so many seconds at most, and returns what is left."""

    def write(self, target: int, index: int | None, data: Bytes) -> None:
        """Begin to write `data` into this rank's slot `index` at `target`, or its note there if None.

        `data` must not be changed afterwards.
        """

    def poll(self) -> None:
        """Make progress without waiting; afterwards `memory` holds everything that has arrived."""

    def pause(self, idle_s: float) -> None:
        """Yield the core for a moment; nothing was sent or received for `idle_s` seconds."""

    def settle(self) -> None:
        """Wait until all writes of all ranks have arrived."""

    def free(self) -> None:
        """Free the memory, after `settle`."""


class Stoppable(Protocol):
    """The thread that pokes a mailbox."""

    def stop(self) -> None:
        """End the thread, and wait for its end."""


class _Inbox:
    """What a rank knows about a source."""

    def __init__(self) -> None:
        self.read = 0
        self.torn_crc: int | None = None
        self.looked = 0.0
        self.quiet_s = 0.0


class _Outbox:
    """What a rank knows about a target."""

    def __init__(self) -> None:
        self.sent = 0
        self.read_there = 0


class _Known:
    """What a rank knows about a neighbor from its notes."""

    def __init__(self) -> None:
        self.count = 0
        self.step = 0
        self.is_done = False
        self.has_ended = False
        self.heard = time.monotonic()


class SlotMailbox:
    """The `Mailbox` over a `SlotTransport`.

    Attributes:
        processes: the processes of ranks on this machine, as far as this rank can see them.

    """

    def __init__(
        self,
        rank: int,
        device: torch.device,
        transport: SlotTransport,
        topology: Topology,
        nbytes: int,
        depth: int,
        processes: Mapping[int, Process] | None = None,
    ) -> None:
        self.rank = rank
        self.size = topology.size
        self.topology = topology
        self.bytes_sent = 0
        self.torn = 0
        self.transport = transport
        self.processes = dict(processes or {})
        self.progress: Stoppable | None = None
        self.failure: BaseException | None = None
        self._depth = depth
        self._slots = slots_of(topology, self.rank, nbytes, depth)
        self._staging = make_staging(device)
        self._inboxes = {source: _Inbox() for source in topology.sources(self.rank)}
        self._outboxes = {target: _Outbox() for target in topology.targets(self.rank)}
        self._known = {neighbor: _Known() for neighbor in self._slots.neighbors}
        self._step = 0
        self._is_done = False
        self._notes = 0
        self._told = time.monotonic()
        self._news = time.monotonic()
        # A progress thread may poke while the owner reads.
        self._lock = threading.RLock()

    @property
    def how(self) -> str:
        """The name of the transport, for reports: "window", "messages", ..."""
        return self.transport.how + (", progress thread" if self.progress else "")

    @property
    def needs_poke(self) -> bool:
        """Whether messages move faster if a rank calls `poke` during a long computation."""
        return self.transport.needs_poke and self.progress is None

    @property
    def rest(self) -> Callable[[float], float] | None:
        """Sleeps in simulated time until something arrives, for so many seconds at most, and returns what is left."""
        return self.transport.rest

    @timed("exchange")
    def put(self, payload: Payload, layout: Layout, targets: Sequence[int], step: int) -> list[int]:
        """Send `payload` to the `targets` that have room, and return these."""
        if not targets:
            return []
        packed = self._staging.pack(payload, layout)
        if packed.nbytes > self._slots.nbytes:
            raise ExchangeError(
                f"rank {self.rank}: a message of {packed.nbytes} bytes does not fit the mailbox, whose slots hold "
                f"{self._slots.nbytes}: make the mailbox for the longest layout"
            )
        with self._lock:
            self._look()
            taken = [target for target in targets if self._room(target)]
            for target in taken:
                outbox = self._outboxes[target]
                outbox.sent += 1
                data = _message(outbox.sent, step, packed)
                self.transport.write(target, (outbox.sent - 1) % self._depth, data)
                self.bytes_sent += data.nbytes
            self.transport.poll()
            if taken:
                self._news = time.monotonic()
        return taken

    def room(self, target: int) -> int:
        """Return how many messages to `target` there is room for."""
        with self._lock:
            self._look()
            return self._room(target)

    @timed("exchange")
    def receive(self, layout: Layout | Mapping[int, Layout], up_to: float = math.inf) -> dict[int, list[Mail]]:
        """Return the messages that have arrived since the last call, by source rank, ascending, in order of sending."""
        arrived = {}
        with self._lock:
            self._look()
            for source, inbox in self._inboxes.items():
                mails = []
                expected = layout[source] if isinstance(layout, Mapping) else layout
                while (mail := self._take(source, inbox, expected, up_to)) is not None:
                    mails.append(mail)
                if mails:
                    arrived[source] = mails
                    self._news = self._known[source].heard = time.monotonic()
                    self._tell(source)
        return arrived

    def announce(self, step: int, is_done: bool = False) -> None:
        """Tell all neighbors this rank's step, and whether it has finished."""
        with self._lock:
            self._step, self._is_done = step, is_done
            self._tell(*self._known)
            self.transport.poll()

    def peers(self) -> dict[int, Peer]:
        """Return what is known about each neighbor."""
        with self._lock:
            self._look()
            now = time.monotonic()
            return {
                rank: Peer(known.step, known.is_done, self._has_ended(rank, known, now))
                for rank, known in self._known.items()
            }

    def poke(self) -> None:
        """Make progress on messages; for the middle of a long computation."""
        with self._lock:
            self._look()
            if time.monotonic() - self._told > self.transport.beat_s:
                self._tell(*self._known)

    def pause(self) -> None:
        """Yield the core for a moment; to be called in every loop that waits for messages."""
        self.poke()
        self.transport.pause(time.monotonic() - self._news)

    def settle(self) -> None:
        """Wait until every message that was put can be received (collective on all ranks)."""
        with self._lock:
            self.transport.settle()

    def free(self) -> None:
        """Free the memory; messages not yet received are lost (collective on all ranks)."""
        if self.progress:
            self.progress.stop()
        with self._lock:
            self.transport.settle()
            self.transport.free()

    def _room(self, target: int) -> int:
        outbox = self._outboxes[target]
        return self._depth - (outbox.sent - outbox.read_there)

    def _look(self) -> None:
        """Read the notes of all neighbors."""
        if self.failure:
            raise self.failure
        self.transport.poll()
        for writer, known in self._known.items():
            begin = self._slots.note(writer)
            read, step, state, crc = self.transport.memory[begin : begin + NOTE].copy().view(np.int64).tolist()
            count, is_done = divmod(state, 2)
            # A torn note is read again next time; until then the last one holds.
            if count <= known.count or crc != _note_crc(read, step, state):
                continue
            known.count, known.step, known.is_done, known.heard = count, step, bool(is_done), time.monotonic()
            if writer in self._outboxes:
                self._outboxes[writer].read_there = read

    def _tell(self, *neighbors: int) -> None:
        self._notes += 1
        self._told = time.monotonic()
        state = 2 * self._notes + self._is_done
        for neighbor in neighbors:
            read = self._inboxes[neighbor].read if neighbor in self._inboxes else 0
            note = np.array([read, self._step, state, _note_crc(read, self._step, state)], dtype=np.int64)
            self.transport.write(neighbor, None, note.view(np.uint8))
            self.bytes_sent += note.nbytes

    def _take(self, source: int, inbox: _Inbox, layout: Layout, up_to: float) -> Mail | None:
        number = inbox.read + 1
        begin = self._slots.message(source, inbox.read % self._depth)
        memory = self.transport.memory[begin : begin + self._slots.stride]
        found, step, nbytes, crc = memory[:HEADER].copy().view(np.int64).tolist()
        if found != number:
            return None
        data = memory[HEADER : HEADER + min(max(nbytes, 0), self._slots.nbytes)].copy()
        found_crc = _crc(found, step, nbytes, data)
        if crc == found_crc and data.size == nbytes:
            if step > up_to:
                return None
            inbox.read, inbox.torn_crc = number, None
            payload = self._staging.load(data, layout)
            check_message(payload, layout, nbytes, source)
            return Mail(number, step, payload)
        self.torn += 1
        now = time.monotonic()
        inbox.quiet_s = inbox.quiet_s + min(now - inbox.looked, LOOK_S) if found_crc == inbox.torn_crc else 0.0
        inbox.torn_crc, inbox.looked = found_crc, now
        if inbox.quiet_s > DAMAGED_S:
            raise ExchangeError(
                f"rank {self.rank}: message {number} from rank {source} has had a wrong checksum for {DAMAGED_S:g} s: "
                "the transport damages messages, or the sender died while it wrote; mpicomp doctor tries both"
            )
        return None

    def _has_ended(self, rank: int, known: _Known, now: float) -> bool:
        if known.is_done or now - known.heard < SUSPECT_S:
            return False
        known.has_ended = known.has_ended or (rank in self.processes and not self.processes[rank].is_alive())
        return known.has_ended


def _crc(number: int, step: int, nbytes: int, data: Bytes) -> int:
    return zlib.crc32(data.data, zlib.crc32(_CRC_WORDS.pack(number, step, nbytes)))


def _note_crc(read: int, step: int, state: int) -> int:
    return zlib.crc32(_CRC_WORDS.pack(read, step, state))


def _message(number: int, step: int, packed: Bytes) -> Bytes:
    data = np.empty(HEADER + packed.nbytes, dtype=np.uint8)
    data[:HEADER].view(np.int64)[:] = number, step, packed.nbytes, _crc(number, step, packed.nbytes, packed)
    data[HEADER:] = packed
    return data
