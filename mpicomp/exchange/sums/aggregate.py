"""The sum that a server would form, over the links of a star or of a ring only. No MPI here.

    star    every rank sends its message to the hub, which adds them up and sends the sum to all
    ring    every message is relayed ``size - 1`` times; every rank adds up all messages, as the hub does
    ring, messages of a common support (identity, block)      a ring all-reduce of their values

Messages are added up by ascending rank. So all ranks hold the same bits, and a star gives the same bits as a relay. A
ring all-reduce adds up each of its ``size`` pieces in another order. All ranks again hold the same bits, but these
agree with those of a star only up to rounding.

Bytes sent, for messages of m bytes:

    star          a worker sends m, the hub ``size - 1`` sums, without zeros (values only for a common support)
    relay         each rank sends ``(size - 1) m``
    all-reduce    each rank sends ``2 (size - 1) / size`` of the values

Memory: a hub, or a rank of a ring, holds all ``size`` messages until it has added them up.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from mpicomp.compression.base import Compressor
from mpicomp.compression.identity import Identity
from mpicomp.compression.message import Field, Layout, Payload, Spec
from mpicomp.compression.nonzero import Nonzero
from mpicomp.errors import TopologyError
from mpicomp.exchange.base import Exchange, Pending
from mpicomp.topology.base import Schedule, Topology
from mpicomp.topology.star_or_ring import Ring, Star, star_or_ring

_SUM = Nonzero()

Plan = TypeVar("Plan", Star, Ring)


class PendingAverage(Protocol):
    """A pending weighted sum.

    It takes several exchanges, one after the other. The next one begins when `test` or `wait` finds that the last one
    is complete.
    """

    def test(self) -> bool:
        """Make progress, and return whether all messages have arrived; if so, `wait` does not wait for any."""

    def wait(self, out: Tensor) -> None:
        """Overwrite `out` (n,) with the sum, on every rank."""

    def wait_on_servers(self, out: Tensor) -> None:
        """Overwrite `out` (n,) with the sum where `Aggregator.is_server`; elsewhere its content is lost."""


class Aggregator:
    """Sums over all ranks, by messages between neighbors. All methods are collective on all ranks.

    Args:
        exchange: over a star or a ring.

    Raises:
        TopologyError: the graph is neither.

    """

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._plan = star_or_ring_of(exchange.schedule)

    @property
    def is_server(self) -> bool:
        """Whether this rank acts as a server: the hub of a star, or any rank of a ring."""
        return isinstance(self._plan, Ring) or self._exchange.rank == self._plan.hub

    def start(
        self, payload: Payload, compressor: Compressor, spec: Spec, weights: Sequence[float] | None = None
    ) -> PendingAverage:
        """Begin to form ``sum_i weights[i] Q(x_i)``.

        Args:
            payload: the message of this rank, made by `compressor`; must not change until the sum is complete.
            compressor: reads the messages of all ranks.
            spec: of the vectors.
            weights: by rank; ``1 / size`` for each by default.

        """
        size = self._exchange.size
        shares = [1 / size] * size if weights is None else list(weights)
        if isinstance(self._plan, Star):
            return _StarAverage(self._exchange, self._plan, payload, compressor, spec, shares)
        way = _RingAllReduce if compressor.has_common_support else _RingRelay
        return way(self._exchange, self._plan, payload, compressor, spec, shares)

    def average_(
        self,
        payload: Payload,
        compressor: Compressor,
        spec: Spec,
        out: Tensor,
        weights: Sequence[float] | None = None,
    ) -> None:
        """Overwrite `out` (n,) with ``sum_i weights[i] Q(x_i)`` on every rank; see `start`."""
        self.start(payload, compressor, spec, weights).wait(out)

    def mean_(self, x: Tensor, weights: Sequence[float] | None = None) -> None:
        """Overwrite `x` (n,) with the mean over all ranks, uncompressed."""
        spec = Spec.flat(x.numel(), x.dtype)
        self.average_(Identity().compress(x.clone(), spec, None), Identity(), spec, x, weights)

    def answer(self, payload: Payload, layout: Layout) -> Payload:
        """Return the servers' `payload`, which is equal on all servers, on every rank; that of others is ignored.

        The result is read-only, and valid until the next exchange.
        """
        if isinstance(self._plan, Ring):
            return payload
        received = self._exchange.start(payload, layout, self._plan.down).wait()
        return received.get(self._plan.hub, payload)

    def share_(self, x: Tensor, spec: Spec) -> None:
        """Overwrite `x` (n,) with that of the servers, which is equal on all servers; its zeros do not travel."""
        if isinstance(self._plan, Ring):
            return
        answer = self.answer(_SUM.compress(x, spec, None) if self.is_server else {}, _SUM.layout(spec))
        if not self.is_server:
            x.zero_()
            _SUM.accumulate(answer, spec, x)


def star_or_ring_of(schedule: Schedule) -> Star | Ring:
    """Return how to sum over `schedule`; raise TopologyError unless it is a star or a ring."""
    found = star_or_ring(schedule) if isinstance(schedule, Topology) else None
    if found is None:
        raise TopologyError(
            f"topology.kind = {schedule.name!r}: gradients of all ranks are added up through the hub of a star or "
            "round a ring. Use topology.kind = 'ring' or 'star'."
        )
    return found


class _Average(ABC, Generic[Plan]):
    """The common part of the pending sums below."""

    def __init__(
        self,
        exchange: Exchange,
        plan: Plan,
        payload: Payload,
        compressor: Compressor,
        spec: Spec,
        weights: list[float],
    ) -> None:
        self._exchange, self._own = exchange, payload
        self._plan: Plan = plan
        self._compressor, self._spec, self._weights = compressor, spec, weights
        self._begin()

    @abstractmethod
    def _begin(self) -> None:
        """Start the first exchange."""


class _StarAverage(_Average[Star]):
    """A sum over a star: messages go to the hub, and the hub sends the sum to all."""

    def _begin(self) -> None:
        self._is_hub = self._exchange.rank == self._plan.hub
        self._pending = self._exchange.start(self._own, self._compressor.layout(self._spec), self._plan.up)
        self._answer: tuple[Payload, Tensor] | None = None

    def wait_on_servers(self, out: Tensor) -> None:
        """Add up on the hub."""
        received = self._pending.wait()
        if self._is_hub:
            _add_up_(out, {**received, self._plan.hub: self._own}, self._compressor, self._spec, self._weights)

    def test(self) -> bool:
        """Make progress; the hub begins to answer once all messages have arrived."""
        if self._answer is None:
            if not self._pending.test():
                return False
            device = [*self._own.values()][-1].device
            is_summed_here = self._is_hub and not self._compressor.has_common_support
            self._turn(torch.empty(self._spec.numel if is_summed_here else 0, dtype=self._spec.dtype, device=device))
        return self._pending.test()

    def wait(self, out: Tensor) -> None:
        """Add up on the hub, and send the sum to all."""
        own, sum_ = self._answer or self._turn(out)
        message = self._pending.wait().get(self._plan.hub, own)
        if self._compressor.has_common_support:
            out.zero_()
            self._compressor.accumulate(message, self._spec, out)
        elif not self._is_hub:
            out.zero_()
            _SUM.accumulate(message, self._spec, out)
        elif sum_ is not out:
            out.copy_(sum_)

    def _turn(self, sum_: Tensor) -> tuple[Payload, Tensor]:
        """Wait for the messages to the hub, add them up there, and begin to answer; `sum_` (n,) holds a sparse sum."""
        layout, answer = _SUM.layout(self._spec), self._own
        if self._compressor.has_common_support:
            layout, received = self._compressor.layout(self._spec), self._pending.wait()
            if self._is_hub:
                total = torch.zeros_like(self._compressor.summable(self._own))
                for rank, payload in sorted({**received, self._plan.hub: self._own}.items()):
                    total.add_(self._compressor.summable(payload), alpha=self._weights[rank])
                answer = self._compressor.with_sum(self._own, total)
        else:
            self.wait_on_servers(sum_)
            if self._is_hub:
                answer = _SUM.compress(sum_, self._spec, None)
        self._pending = self._exchange.start(answer, layout, self._plan.down)
        self._answer = answer, sum_
        return self._answer


class _RingRelay(_Average[Ring]):
    """A sum over a ring: every message is relayed to all ranks, and every rank adds up all messages."""

    def _begin(self) -> None:
        self._place = self._plan.order.index(self._exchange.rank)
        self._messages = {self._exchange.rank: self._own}
        self._pending = self._pass_on(self._own)

    def test(self) -> bool:
        """Relay the messages that have arrived; return whether all have."""
        while self._is_relaying:
            if not self._pending.test():
                return False
            self._relay()
        return True

    def wait(self, out: Tensor) -> None:
        """Relay the remaining messages, and add up all of them."""
        while self._is_relaying:
            self._relay()
        _add_up_(out, self._messages, self._compressor, self._spec, self._weights)

    wait_on_servers = wait

    @property
    def _is_relaying(self) -> bool:
        return len(self._messages) < self._exchange.size

    def _relay(self) -> None:
        """Wait for a message, and pass it on unless all ranks have had it."""
        (received,) = self._pending.wait().values()
        message = {name: tensor.clone() for name, tensor in received.items()}
        self._messages[self._plan.order[self._place - len(self._messages)]] = message
        if self._is_relaying:
            self._pending = self._pass_on(message)

    def _pass_on(self, payload: Payload) -> Pending:
        return self._exchange.start(payload, self._compressor.layout(self._spec), self._plan.onward)


class _RingAllReduce(_Average[Ring]):
    """A ring all-reduce of the values: each of `size` pieces goes round once to be summed, then to be distributed."""

    def _begin(self) -> None:
        own, size, rank = self._compressor.summable(self._own), self._exchange.size, self._exchange.rank
        piece = -(-own.numel() // size)
        self._layout = Layout((Field("piece", own.dtype, piece),))
        self._place = self._plan.order.index(rank)
        self._sums = own.new_zeros(size, piece)
        torch.mul(own, self._weights[rank], out=self._sums.view(-1)[: own.numel()])
        self._hops = 0
        self._pending = self._pass_on(self._place)

    def test(self) -> bool:
        """Process the pieces that have arrived; return whether all have."""
        while self._is_passing_on:
            if not self._pending.test():
                return False
            self._hop()
        return True

    def wait(self, out: Tensor) -> None:
        """Process the remaining pieces, and overwrite `out` with the sum."""
        while self._is_passing_on:
            self._hop()
        total = self._sums.view(-1)[: self._compressor.summable(self._own).numel()]
        out.zero_()
        self._compressor.accumulate(self._compressor.with_sum(self._own, total), self._spec, out)

    wait_on_servers = wait

    @property
    def _is_passing_on(self) -> bool:
        return self._hops < 2 * self._exchange.size - 2

    def _hop(self) -> None:
        """Wait for a piece, add to it or keep it, and pass it on unless all ranks have had it."""
        (received,) = self._pending.wait().values()
        self._hops += 1
        place = (self._place - self._hops) % self._exchange.size
        if self._hops < self._exchange.size:
            self._sums[place].add_(received["piece"])
        else:
            self._sums[place].copy_(received["piece"])
        if self._is_passing_on:
            self._pending = self._pass_on(place)

    def _pass_on(self, piece: int) -> Pending:
        return self._exchange.start({"piece": self._sums[piece]}, self._layout, self._plan.onward)


def _add_up_(
    out: Tensor, messages: dict[int, Payload], compressor: Compressor, spec: Spec, weights: list[float]
) -> None:
    """Compute ``out = sum_i weights[i] Q(x_i)``, by ascending rank."""
    out.zero_()
    for rank, message in sorted(messages.items()):
        compressor.accumulate(message, spec, out, weights[rank])
