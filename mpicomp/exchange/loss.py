"""An exchange that loses messages at random, to try out a method on a network that does.

Each message is lost with the same probability, whatever happens to others. Whether it is depends on (seed, source,
target, step) alone, so every run loses the same ones, also a run that goes on from a checkpoint. A lost message was
sent: it counts as bytes, takes its time on the links, and its receiver goes on when it would have arrived.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from mpicomp.compression.message import Layout, Payload
from mpicomp.exchange.base import Exchange, Pending
from mpicomp.topology.base import Topology


class LossyExchange:
    """An `Exchange` some of whose messages do not arrive: `Pending.wait` returns the others.

    Args:
        exchange: what sends the messages.
        probability: of a message to be lost, in [0, 1).
        seed: of the draws. Exchanges of other shards of a node need another one, because each numbers its ranks from 0.
        step: returns the number of the step, in which there is at most one message from a rank to another.

    """

    def __init__(self, exchange: Exchange, probability: float, seed: tuple[int, ...], step: Callable[[], int]) -> None:
        self.rank = exchange.rank
        self.size = exchange.size
        self.schedule = exchange.schedule
        self._exchange = exchange
        self._probability = probability
        self._seed = seed
        self._step = step

    @property
    def bytes_sent(self) -> int:
        """The bytes sent, with those of lost messages."""
        return self._exchange.bytes_sent

    @bytes_sent.setter
    def bytes_sent(self, nbytes: int) -> None:
        self._exchange.bytes_sent = nbytes

    def start(self, payload: Payload, layout: Layout, topology: Topology) -> LossyPending:
        """Send `payload` to this rank's targets, and begin to receive from its sources."""
        return self._lossy(self._exchange.start(payload, layout, topology))

    def start_each(self, payloads: Mapping[int, Payload], layout: Layout, topology: Topology) -> LossyPending:
        """Send each target its own payload, and begin to receive from the sources."""
        return self._lossy(self._exchange.start_each(payloads, layout, topology))

    def mean_(self, x: Tensor) -> None:
        """Average `x` over all ranks, in place; no part of it is lost."""
        self._exchange.mean_(x)

    def _lossy(self, pending: Pending) -> LossyPending:
        step = self._step()
        return LossyPending(pending, lambda source: self._is_lost(source, step))

    def _is_lost(self, source: int, step: int) -> bool:
        random = np.random.default_rng([*self._seed, source, self.rank, step])
        return bool(random.random() < self._probability)


@dataclass
class LossyPending:
    """The messages that one rank waits for, of which some are lost."""

    _pending: Pending
    _is_lost: Callable[[int], bool]

    def test(self) -> bool:
        """Return whether all messages have arrived, or would have."""
        return self._pending.test()

    def wait(self) -> dict[int, Payload]:
        """Return the messages that are not lost, by source rank, ascending."""
        return {source: payload for source, payload in self._pending.wait().items() if not self._is_lost(source)}
