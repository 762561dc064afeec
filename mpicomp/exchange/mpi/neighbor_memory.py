"""Memory that neighbors on the same machine read: a message between them is copied once, when it is packed.

Between processes MPI would copy a message again after it was packed. Here the neighbor reads what was packed:

    sender    packs its message into a region of its memory that all readers have released, or into a new one; sends
              each reader a notice by MPI: where the message begins, and how long it is
    reader    its payload is a view of the sender's memory, until it begins its next exchange and releases the message

A reader releases a message by counting it in memory that the sender sees. So two regions are enough where a rank hears
from its readers in each exchange. Where a graph is directed or changes, a rank may be further ahead of a reader, and
takes more regions; it never waits for a release. MPI orders memory: a notice is sent after its message was packed, and
received before that is read.

The memory is that of files without a name. Neighbors open each other's as ``/proc/PID/fd/FD`` when they meet. Nothing
is left of it when processes are killed, and the size of ``/dev/shm`` does not limit it. Ranks that cannot open each
other's files (on other machines, in containers of their own, on another system than Linux) send messages.
"""

from __future__ import annotations

import errno
import mmap
import os
import secrets
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from mpicomp.compression.message import Layout, Payload, Wire
from mpicomp.errors import ExchangeError
from mpicomp.exchange.mpi.communicator import Communicator
from mpicomp.exchange.mpi.library import MPI

SHORTEST = 2**15
"""Bytes of the shortest message that goes through memory. For shorter ones a copy costs less than a notice."""

ALIGNMENT = 64
"""Bytes to which messages are aligned: a line of the cache."""

TAG = 0
"""The tag of notices, which take the place of messages in their order."""

Notice = npt.NDArray[np.int64]
"""What a sender tells a reader: how long its file is, where in it the message begins, and the bytes of the message."""

_NAME = "mpicomp"

_Counts = npt.NDArray[np.int64]


class _File:
    """A file in memory, mapped as far as needed. It is closed with this object, and lasts while anybody has it open.

    Args:
        descriptor: taken over.

    Attributes:
        descriptor: the number by which this process knows it.
        memory: (mapped bytes,) uint8. Each process has its own view of the same memory.

    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.memory = torch.empty(0, dtype=torch.uint8)
        weakref.finalize(self, os.close, descriptor)

    @classmethod
    def make(cls, nbytes: int = 0) -> _File:
        """Return a new file of `nbytes` zeros."""
        file = cls(os.memfd_create(_NAME, os.MFD_CLOEXEC))
        file.grow(nbytes)
        return file

    @classmethod
    def open(cls, pid: int, descriptor: int) -> _File:
        """Return the file that process `pid` knows by `descriptor`.

        Raises:
            OSError: there is no such file of this package, or it is not for this process.

        """
        path = Path(f"/proc/{pid}/fd/{descriptor}")
        if not str(path.readlink()).startswith(f"/memfd:{_NAME} "):  # in a container, a process may have another number
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        return cls(os.open(path, os.O_RDWR | os.O_CLOEXEC))

    def grow(self, nbytes: int) -> None:
        """Make the file `nbytes` bytes long, if it is shorter, and map it."""
        if self.memory.numel() < nbytes:
            os.ftruncate(self.descriptor, nbytes)
            self.map(nbytes)

    def map(self, nbytes: int) -> None:
        """Map the first `nbytes` bytes, if fewer are mapped."""
        if self.memory.numel() < nbytes:
            self._map = mmap.mmap(self.descriptor, nbytes)
            self.memory = torch.frombuffer(self._map, dtype=torch.uint8)

    def drop(self, begin: int, nbytes: int) -> None:
        """Give the memory of some pages back; they read as zeros."""
        self._map.madvise(mmap.MADV_REMOVE, begin, nbytes)


@dataclass
class _Region:
    """Memory for the messages of one exchange of this rank.

    Attributes:
        begin: its first byte in the file.
        nbytes: its length.
        readers: for each rank that was sent a notice, the number of its message.
        wires: its messages.

    """

    begin: int
    nbytes: int
    readers: dict[int, int] = field(default_factory=dict)
    wires: list[Wire] = field(default_factory=list)


@dataclass
class _Neighbor:
    """A neighbor on the same machine.

    Attributes:
        file: the memory of its messages.
        released: how many messages of each rank it has released.
        sent: how many this rank has sent it.
        wires: its messages, by where they begin.

    """

    file: _File
    released: _Counts
    sent: int = 0
    wires: dict[int, Wire] = field(default_factory=dict)


class NeighborMemory:
    """The memory of this rank that its neighbors read, and theirs. Making one is collective on the neighbors.

    Args:
        world: the ranks.
        comm: a communicator of these ranks, for the messages in which neighbors meet.
        neighbors: the ranks that this rank sends to, or receives from.
        is_used: whether the payloads of this rank are in memory of the host.

    Attributes:
        near: the neighbors that read this rank's memory, and whose memory this rank reads.

    """

    def __init__(self, world: Communicator, comm: MPI.Intracomm, neighbors: Iterable[int], is_used: bool) -> None:
        self._world = world
        self._comm = comm
        self._regions: list[_Region] = []  # the one used last is the last one
        self._stride = 0  # bytes from one reserved message to the next
        self._held: list[int] = []  # the senders whose messages this rank has not released
        candidates = sorted(set(neighbors) & set(world.local_ranks))
        greeting = [0] * 4
        if candidates and is_used and (files := _make_files(8 * (world.size + 1))):
            self._messages, counts = files
            self._released = _counts(counts)
            self._released[-1] = secrets.randbits(62)  # by which a neighbor knows that it has opened the right file
            greeting = [os.getpid(), int(self._released[-1]), counts.descriptor, self._messages.descriptor]
        found = {
            rank: _meet(world.size + 1, *theirs) if greeting[0] and theirs[0] else None
            for rank, theirs in self._swap(candidates, lambda rank: greeting).items()
        }
        agreed = self._swap(candidates, lambda rank: [found[rank] is not None])
        self._neighbors = {rank: each for rank, each in found.items() if each and agreed[rank][0]}
        self.near = frozenset(self._neighbors)

    def release(self) -> None:
        """Release the messages that were read; their payloads are no longer used."""
        for sender in self._held:
            self._released[sender] += 1
        self._held.clear()

    def reserve(self, count: int, layout: Layout) -> list[Wire]:
        """Return memory for `count` messages of `layout`.

        Raises:
            ExchangeError: the machine has no more.

        """
        self._stride = -(-layout.nbytes // ALIGNMENT) * ALIGNMENT
        region = self._region(count * self._stride)
        if len(region.wires) != count or region.wires[0].layout is not layout:
            begins = range(region.begin, region.begin + count * self._stride, self._stride)
            region.wires = [Wire(layout, self._messages.memory[begin : begin + layout.nbytes]) for begin in begins]
        return region.wires

    def notify(self, reader: int, index: int, nbytes: int) -> MPI.Request:
        """Tell `reader` which of the reserved messages is for it, and how many bytes it has."""
        region, neighbor = self._regions[-1], self._neighbors[reader]
        neighbor.sent += 1
        region.readers[reader] = neighbor.sent
        words = (self._messages.memory.numel(), region.begin + index * self._stride, nbytes)
        return self._comm.Isend(np.array(words, dtype=np.int64), reader, TAG)

    def read(self, sender: int, notice: Notice, layout: Layout) -> tuple[int, Payload]:
        """Return the bytes and the payload of the message of `sender`; it lasts until `release`."""
        size, begin, nbytes = notice.tolist()
        neighbor = self._neighbors[sender]
        wire = neighbor.wires.get(begin)
        if wire is None or wire.layout is not layout:
            try:
                neighbor.file.map(size)
            except OSError as error:
                raise ExchangeError(f"message from rank {sender}: its memory cannot be mapped: {error}") from error
            wire = Wire(layout, neighbor.file.memory[begin : begin + layout.nbytes])
            neighbor.wires[begin] = wire
        self._held.append(sender)
        return nbytes, wire.unpack(nbytes)

    def _region(self, nbytes: int) -> _Region:
        """Return the region that was free for the longest time, or a new one; free those that are too short."""
        free = [region for region in self._regions if self._is_released(region)]
        for region in free:
            self._regions.remove(region)
            if region.nbytes >= nbytes:
                break
            self._messages.drop(region.begin, region.nbytes)
        else:
            begin = self._messages.memory.numel()
            # to a power of two, for messages that grow: memory is taken when it is first written
            region = _Region(begin, max(mmap.PAGESIZE, 1 << (nbytes - 1).bit_length()))
            try:
                self._messages.grow(begin + region.nbytes)
            except OSError as error:
                raise ExchangeError(f"no memory for messages of {nbytes} bytes: {error}") from error
        region.readers.clear()
        self._regions.append(region)
        return region

    def _is_released(self, region: _Region) -> bool:
        me, neighbors = self._world.rank, self._neighbors
        return all(neighbors[reader].released[me] >= number for reader, number in region.readers.items())

    def _swap(self, neighbors: Sequence[int], mine: Callable[[int], Sequence[int]]) -> dict[int, list[int]]:
        """Send each of the `neighbors` a few numbers, ``mine(neighbor)``, and return theirs, as many."""
        out = {rank: np.array(mine(rank), dtype=np.int64) for rank in neighbors}
        back = {rank: np.empty_like(numbers) for rank, numbers in out.items()}
        requests = [self._comm.Irecv(numbers, rank, TAG) for rank, numbers in back.items()]
        requests += [self._comm.Isend(numbers, rank, TAG) for rank, numbers in out.items()]
        self._world.wait_all(requests, operation="meeting of neighbors", peers=[*neighbors, *neighbors])
        return {rank: numbers.tolist() for rank, numbers in back.items()}


def new_notice() -> Notice:
    """Return a notice to receive into."""
    return np.empty(3, dtype=np.int64)


def _make_files(nbytes: int) -> tuple[_File, _File] | None:
    """Return a file for messages, and one of `nbytes` bytes; None if this process cannot have any."""
    try:
        return (_File.make(), _File.make(nbytes)) if hasattr(os, "memfd_create") else None
    except OSError:
        return None


def _meet(length: int, pid: int, number: int, counts: int, messages: int) -> _Neighbor | None:
    """Open the files of a neighbor; return None if this process cannot, or has opened those of another process."""
    try:
        file = _File.open(pid, counts)
        if os.fstat(file.descriptor).st_size != 8 * length:
            return None
        file.map(8 * length)
        released = _counts(file)
        return _Neighbor(_File.open(pid, messages), released) if released[-1] == number else None
    except OSError:
        return None


def _counts(file: _File) -> _Counts:
    counts: _Counts = file.memory.numpy().view(np.int64)
    return counts
