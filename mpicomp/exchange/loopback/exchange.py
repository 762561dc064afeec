"""Messages between threads, packed into bytes exactly as for MPI, and averages over all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mpicomp.compression.message import Layout, Payload
from mpicomp.errors import ExchangeError
from mpicomp.exchange.base import all_reduce_nbytes, check_message, check_schedule, mean_in_order
from mpicomp.exchange.loopback.scheduler import Message, Scheduler, Sender
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
    """The `Exchange` between the threads of one process.

    Args:
        scheduler: of all threads.
        rank: this one, among the ranks of the exchange.
        number: of the exchange, the same on all ranks.
        schedule: the graph of each step.
        device: of the payloads.
        threads: the number of the thread of each rank; by default rank i is thread i.

    """

    def __init__(
        self,
        scheduler: Scheduler,
        rank: int,
        number: int,
        schedule: Schedule,
        device: torch.device,
        threads: Sequence[int] | None = None,
    ) -> None:
        self._threads = range(scheduler.size) if threads is None else threads
        check_schedule(schedule, len(self._threads))
        self.rank = rank
        self.size = len(self._threads)
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
        mean_over_ranks_(self._scheduler, self._threads[self.rank], x, self._threads)
        nbytes = all_reduce_nbytes(x, self.size)
        self._scheduler.all_reduce(self._threads[self.rank], nbytes, self._threads)
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
        thread = self._threads[self.rank]
        self._scheduler.post((self._number, thread), {self._threads[to]: m for to, m in messages.items()})
        self.bytes_sent += sum(message.nbytes for message in messages.values())

    def _buffer(self, nbytes: int) -> Tensor:
        while self._pool:
            wire = self._pool.pop()
            if wire.numel() >= nbytes:
                return wire
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def _is_there(self, sources: list[int]) -> bool:
        return self._scheduler.is_there(self._threads[self.rank], self._senders(sources))

    def _take(self, sources: list[int]) -> list[Message]:
        assert self._is_pending, "waited for twice"
        self._held = self._scheduler.take(self._threads[self.rank], self._senders(sources))
        self._is_pending = False
        return self._held

    def _senders(self, sources: list[int]) -> list[Sender]:
        return [(self._number, self._threads[source]) for source in sources]


def mean_over_ranks_(scheduler: Scheduler, rank: int, x: Tensor, among: Sequence[int]) -> None:
    """Average `x` over the ranks `among` which this one is: some average a piece, and all copy all pieces.

    Collective on all ranks, which may form several such sets.
    """
    everyone = scheduler.gather(rank, x.detach().view(-1), "mean_")
    vectors, place = [everyone[other] for other in among], among.index(rank)
    workers = min(len(among), scheduler.cores)
    begin, end = (len(vectors[place]) * min(i, workers) // workers for i in (place, place + 1))
    mean = mean_in_order([vector[begin:end] for vector in vectors]) if place < workers else None
    means = scheduler.gather(rank, mean, "mean_")
    # The second gather is also a barrier: no rank overwrites its vector before all have read it.
    torch.cat([mean for mean in (means[other] for other in among) if mean is not None], out=vectors[place])
