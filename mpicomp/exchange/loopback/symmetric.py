"""One rank of many that all do the same: its messages in simulated time, without the other ranks.

On a graph where all ranks have as many neighbors, every rank of a synchronous method sends as many bytes at the same
moment. So one rank is enough to know the time of all: it hears from each source what it sends itself, and its messages
arrive as on the `Network` of a simulation. Memory and work are those of one rank, whatever their number. On an
irregular graph, take the rank with the most neighbors: the others wait for it.

Times are right, and so are bytes where their number does not depend on what the others send; the sums are not those of
training. A star's sum of sparse messages of all ranks has more entries than one message, which is not seen here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mpicomp.compression.message import Layout, Payload
from mpicomp.exchange.base import all_reduce_nbytes
from mpicomp.exchange.loopback.network import Links, Network
from mpicomp.topology.base import Schedule, Topology


class SymmetricExchange:
    """The `Exchange` of one rank, which hears from its sources what it sends itself.

    Its clock advances by what the rank computes, as `stopwatch` has it, by `sleep`, and by waiting for messages.

    Args:
        rank: of which the neighbors are taken.
        schedule: the graph of each step.
        links: of the messages between neighbors.
        sums: of all-reduces.
        stopwatch: the seconds that this process has computed, from an arbitrary origin.

    Attributes:
        waited_s: seconds of waiting for messages, in total.

    """

    def __init__(
        self, rank: int, schedule: Schedule, links: Links, sums: Links, stopwatch: Callable[[], float]
    ) -> None:
        self.rank = rank
        self.size = schedule.size
        self.schedule = schedule
        self.bytes_sent = 0
        self._waited_ns = 0
        self._network, self._sums = Network(self.size, links), Network(self.size, sums)
        self._stopwatch = stopwatch
        self._since = stopwatch()
        self._now_ns = 0
        self._wires: dict[int, Tensor] = {}

    @property
    def waited_s(self) -> float:
        """Return the seconds of waiting for messages, in total."""
        return self._waited_ns / 1e9

    def now(self) -> float:
        """Return the simulated time in seconds."""
        self._count()
        return self._now_ns / 1e9

    def sleep(self, seconds: float) -> None:
        """Let `seconds` of simulated time pass."""
        self._count()
        self._now_ns += round(1e9 * seconds)

    def skip(self) -> float:
        """Leave out what was computed since the last call of this object, and return its seconds."""
        begin, self._since = self._since, self._stopwatch()
        return self._since - begin

    def start(self, payload: Payload, layout: Layout, topology: Topology) -> SymmetricPending:
        """Send `payload` to this rank's targets, and hear the same from its sources."""
        sources, targets = topology.sources(self.rank), topology.targets(self.rank)
        if not sources and not targets:
            return SymmetricPending(self, {}, 0)
        nbytes, received = self._pack(payload, layout)
        self.bytes_sent += nbytes * len(targets)
        return self._send(nbytes * max(len(targets), len(sources)), dict.fromkeys(sources, received))

    def start_each(self, payloads: Mapping[int, Payload], layout: Layout, topology: Topology) -> SymmetricPending:
        """Send each target its own payload, and hear the same from it."""
        total, received = 0, {}
        for target in topology.targets(self.rank):
            nbytes, heard = self._pack(payloads[target], layout)
            received[target] = {name: tensor.clone() for name, tensor in heard.items()}
            total += nbytes
        self.bytes_sent += total
        return self._send(total, received)

    def mean_(self, x: Tensor) -> None:
        """Take the time of an all-reduce of `x`; its mean over ranks that do the same is `x`."""
        nbytes = all_reduce_nbytes(x, self.size)
        self.bytes_sent += nbytes
        self._count()
        begin_ns = max(self._now_ns, self._network.free_ns())
        self._wait_until(begin_ns + self._sums.all_reduce_ns(nbytes, range(self.size)))

    def _pack(self, payload: Payload, layout: Layout) -> tuple[int, Payload]:
        if layout.nbytes not in self._wires:
            device = next(iter(payload.values())).device
            self._wires[layout.nbytes] = torch.empty(layout.nbytes, dtype=torch.uint8, device=device)
        wire = self._wires[layout.nbytes]
        nbytes = layout.pack(payload, wire)
        if not wire.is_cpu:
            nbytes = layout.finish(wire[:nbytes])
        return nbytes, layout.unpack(wire[:nbytes])

    def _send(self, nbytes: int, received: dict[int, Payload]) -> SymmetricPending:
        """Send so many bytes through the port, through which as many are received meanwhile."""
        self._count()
        neighbor = (self.rank + 1) % self.size  # its port receives what that of this rank does
        arrival_ns = self._network.send(self.rank, {neighbor: nbytes}, self._now_ns)[neighbor]
        return SymmetricPending(self, received, arrival_ns)

    def _count(self) -> None:
        """Let what was computed since the last call pass as simulated time."""
        now = self._stopwatch()
        self._now_ns += round(1e9 * (now - self._since))
        self._since = now

    def _has_come(self, arrival_ns: int) -> bool:
        self._count()
        return self._now_ns >= arrival_ns

    def _wait_until(self, arrival_ns: int) -> None:
        self._count()
        self._waited_ns += max(0, arrival_ns - self._now_ns)
        self._now_ns = max(self._now_ns, arrival_ns)


@dataclass
class SymmetricPending:
    """The messages that one rank waits for."""

    _exchange: SymmetricExchange
    _received: dict[int, Payload]
    _arrival_ns: int

    def test(self) -> bool:
        """Return whether all messages have arrived."""
        return self._exchange._has_come(self._arrival_ns)

    def wait(self) -> dict[int, Payload]:
        """Return the messages by source rank, ascending."""
        self._exchange._wait_until(self._arrival_ns)
        return dict(sorted(self._received.items()))
