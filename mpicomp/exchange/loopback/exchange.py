"""Messages between threads, packed into bytes exactly as for MPI, and averages over all of them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mpicomp.compression.message import Layout, Payload
from mpicomp.errors import ExchangeError
from mpicomp.exchange.base import all_reduce_nbytes, check_message, check_schedule, mean_in_order
from mpicomp.exchange.loopback.scheduler import Message, Scheduler
from mpicomp.timing import Underway, timed
from mpicomp.topology.base import Schedule, Topology


class LoopbackPending:
    """The messages that one rank waits for."""

    def __init__(self, exchange: LoopbackExchange, layout: Layout, sources: list[int]) -> None:
        self._exchange = exchange
        self._layout = layout
        self._sources = sources
        self._underway = Underway() if sources else None

    @timed("exchange", is_event=False)
    def test(self) -> bool:
        """Return whether all messages have arrived."""
        is_there = self._exchange._is_there(self._sources)
        if is_there and self._underway:
            self._underway.arrived()
        return is_there

    @timed("exchange")
    def wait(self) -> dict[int, Payload]:
        """Return the messages by source rank, ascending."""
        if self._underway:
            self._underway.arrived()
        messages = self._exchange._take(self._sources)
        payloads = {}
        for source, message in zip(self._sources, messages, strict=True):
            payloads[source] = self._layout.unpack(message.wire[: message.nbytes])
            check_message(payloads[source], self._layout, message.nbytes, source)
        return payloads


class LoopbackExchange:
    """The `Exchange` between the threads of one process."""

    def __init__(self, scheduler: Scheduler, rank: int, number: int, schedule: Schedule, device: torch.device) -> None:
        check_schedule(schedule, scheduler.size)
        self.rank = rank
        self.size = scheduler.size
        self.schedule = schedule
        self.bytes_sent = 0
        self._scheduler = scheduler
        self._number = number
        self._device = device
        self._pool: list[Tensor] = []
        self._held: list[Message] = []
        self._is_pending = False

    @timed("exchange", "send")
    def start(self, payload: Payload, layout: Layout, topology: Topology) -> LoopbackPending:
        """Send `payload` to this rank's targets, and begin to receive from its sources."""
        self._begin()
        if targets := topology.targets(self.rank):
            message = self._pack(payload, layout, len(targets))
            self._post(dict.fromkeys(targets, message))
        return LoopbackPending(self, layout, topology.sources(self.rank))

    @timed("exchange", "send")
    def start_each(self, payloads: Mapping[int, Payload], layout: Layout, topology: Topology) -> LoopbackPending:
        """Send each target its own payload, and begin to receive from the sources."""
        self._begin()
        self._post({target: self._pack(payloads[target], layout) for target in topology.targets(self.rank)})
        return LoopbackPending(self, layout, topology.sources(self.rank))

    @timed("exchange", "all_reduce")
    def mean_(self, x: Tensor) -> None:
        """Average `x` over all ranks, in place; summed in float64 in the order of ranks."""
        mean_over_ranks_(self._scheduler, self.rank, x)
        nbytes = all_reduce_nbytes(x, self.size)
        self._scheduler.all_reduce(self.rank, nbytes)
        self.bytes_sent += nbytes

    def _begin(self) -> None:
        if self._is_pending:
            raise ExchangeError("an exchange is still pending: wait for it before the next one")
        self._is_pending = True
        self._scheduler.release(self._held)
        self._held = []

    def _pack(self, payload: Payload, layout: Layout, readers: int = 1) -> Message:
        wire = self._buffer(layout.nbytes)
        nbytes = layout.pack(payload, wire)
        if not wire.is_cpu:
            nbytes = layout.finish(wire[:nbytes])
        return Message(wire, nbytes, readers, self._pool)

    def _post(self, messages: Mapping[int, Message]) -> None:
        self._scheduler.post((self._number, self.rank), messages)
        self.bytes_sent += sum(message.nbytes for message in messages.values())

    def _buffer(self, nbytes: int) -> Tensor:
        while self._pool:
            wire = self._pool.pop()
            if wire.numel() >= nbytes:
                return wire
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def _is_there(self, sources: list[int]) -> bool:
        return self._scheduler.is_there(self.rank, [(self._number, source) for source in sources])

    def _take(self, sources: list[int]) -> list[Message]:
        assert self._is_pending, "waited for twice"
        self._held = self._scheduler.take(self.rank, [(self._number, source) for source in sources])
        self._is_pending = False
        return self._held


def mean_over_ranks_(scheduler: Scheduler, rank: int, x: Tensor) -> None:
    """Average `x` over all ranks: one rank for each core averages a piece, and every rank copies all pieces."""
    vectors = scheduler.gather(rank, x.detach().view(-1), "mean_")
    workers = min(scheduler.size, scheduler.cores)
    begin, end = (len(vectors[rank]) * min(i, workers) // workers for i in (rank, rank + 1))
    mean = mean_in_order([vector[begin:end] for vector in vectors]) if rank < workers else None
    means = scheduler.gather(rank, mean, "mean_")
    # The second gather is also a barrier: no rank overwrites its vector before all have read it.
    torch.cat([mean for mean in means if mean is not None], out=vectors[rank])
