"""Transports of the loopback: memory of the same process, with delays on request, so that races can be replayed.

With `Delays`, every write is cut into up to three pieces. Each piece arrives after a random number of polls by its
target, so writes arrive late, in part and out of order, as far as a transport may do so. Polls are counted, not timed,
and the random numbers depend on the seed and the edge. On one core (``loopback.run(..., cores=1)``) ranks run in a
fixed order, so runs with the same seed are identical.

In simulated time, a message arrives when the network has transmitted it.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from mpicomp.exchange.mailbox.slots import Slots
from mpicomp.exchange.staging import Bytes

PAUSE_NS = 250_000_000
"""The longest pause of a rank that waits for messages, in nanoseconds of simulated time."""


@dataclass(frozen=True)
class Delays:
    """How late writes arrive.

    Attributes:
        seed: of the random numbers.
        turns: the largest number of polls of the target until a piece arrives.

    """

    seed: int
    turns: int = 20


class _Memory:
    """The memory of one rank, and the pieces on their way to it."""

    def __init__(self, slots: Slots) -> None:
        self.slots = slots
        self.bytes: Bytes = np.zeros(slots.total, dtype=np.uint8)
        self.turn = 0
        self.coming: list[tuple[int, int, int, Bytes]] = []
        self.pieces = 0
        self.last_due: dict[int, int] = {}

    def add(self, begin: int, piece: Bytes, due: int) -> None:
        # The number keeps pieces that are due together in the order they were written.
        heapq.heappush(self.coming, (due, self.pieces, begin, piece))
        self.pieces += 1

    def arrive(self, until: float) -> None:
        while self.coming and self.coming[0][0] <= until:
            _, _, begin, piece = heapq.heappop(self.coming)
            self.bytes[begin : begin + piece.size] = piece


class LoopbackTransport:
    """The memory of one rank, written by the other threads.

    `pause` passes the core to another rank. `meet` is a collective operation that returns the values of all ranks.
    """

    how = "loopback"
    needs_poke = False
    beat_s = math.inf
    rest = None

    def __init__(
        self,
        rank: int,
        slots: Slots,
        delays: Delays | None,
        pause: Callable[[], None],
        meet: Callable[[_Memory | None], Sequence[_Memory | None]],
    ) -> None:
        self._rank = rank
        self._pause = pause
        self._meet = meet
        self._mine = _Memory(slots)
        self.memory = self._mine.bytes
        self._all = [memory for memory in meet(self._mine) if memory is not None]
        self._delays = delays
        self._generators = [
            np.random.default_rng([delays.seed, rank, target]) if delays else None for target in range(len(self._all))
        ]

    def write(self, target: int, index: int | None, data: Bytes) -> None:
        """Copy `data` into the slot of this rank at `target`, at once or in late pieces."""
        memory, generator = self._all[target], self._generators[target]
        begin = memory.slots.note(self._rank) if index is None else memory.slots.message(self._rank, index)
        if generator is None or self._delays is None:
            memory.bytes[begin : begin + data.size] = data
            return
        cuts = sorted(generator.integers(0, data.size + 1, 2).tolist())
        # Two writes to the same place arrive in order: every transport promises that.
        earliest = max(memory.turn, memory.last_due.get(begin, 0))
        dues = [earliest + int(turns) for turns in generator.integers(0, self._delays.turns + 1, 3)]
        memory.last_due[begin] = max(dues)
        for cut, end, due in zip([0, *cuts], [*cuts, data.size], dues, strict=True):
            memory.add(begin + cut, data[cut:end], due)

    def poll(self) -> None:
        """Let the other ranks run, then apply the writes that have arrived."""
        self._pause()
        self._mine.turn += 1
        self._mine.arrive(self._mine.turn)

    def pause(self, idle_s: float) -> None:
        """Do nothing: every poll yields the core already."""

    def settle(self) -> None:
        """Wait for all ranks, then apply all writes that are still on their way."""
        self._meet(None)
        self._mine.arrive(math.inf)
        self._meet(None)

    def free(self) -> None:
        """Do nothing: the memory belongs to this process."""


class Clock(Protocol):
    """The clock of a simulation."""

    def now_ns(self) -> int:
        """Return the simulated time in nanoseconds."""

    def await_mail(self, rank: int, until_ns: int) -> None:
        """Let `rank` sleep until `until_ns`, or until something arrives."""

    def send(self, source: int, target: int, nbytes: int) -> int:
        """Send a message over the simulated network and return when it arrives; `target` wakes then if it waits."""


class SimulatedTransport:
    """The memory of one rank in simulated time: a write arrives whole when the network has transmitted it."""

    how = "simulation"
    needs_poke = False
    beat_s = math.inf

    def __init__(
        self,
        rank: int,
        slots: Slots,
        clock: Clock,
        meet: Callable[[_Memory | None], Sequence[_Memory | None]],
    ) -> None:
        self._rank = rank
        self._clock = clock
        self._meet = meet
        self._mine = _Memory(slots)
        self.memory = self._mine.bytes
        self._all = [memory for memory in meet(self._mine) if memory is not None]

    def write(self, target: int, index: int | None, data: Bytes) -> None:
        """Send `data` to `target`."""
        memory = self._all[target]
        begin = memory.slots.note(self._rank) if index is None else memory.slots.message(self._rank, index)
        memory.add(begin, data, self._clock.send(self._rank, target, data.size))

    def poll(self) -> None:
        """Apply the writes that have arrived by now."""
        self._mine.arrive(self._clock.now_ns())

    def pause(self, idle_s: float) -> None:
        """Wait until something arrives, for `PAUSE_NS` at most, because the rank may have other work."""
        self._await_mail(self._clock.now_ns() + PAUSE_NS)

    def rest(self, seconds: float) -> float:
        """Sleep until something arrives, for `seconds` at most, and return what is left of them."""
        end_ns = self._clock.now_ns() + round(1e9 * seconds)
        self._await_mail(end_ns)
        return (end_ns - self._clock.now_ns()) / 1e9

    def _await_mail(self, until_ns: int) -> None:
        coming_ns = self._mine.coming[0][0] if self._mine.coming else until_ns
        self._clock.await_mail(self._rank, min(until_ns, coming_ns))

    def settle(self) -> None:
        """Wait for all ranks, then apply all writes that are still on their way."""
        self._meet(None)
        self._mine.arrive(math.inf)
        self._meet(None)

    def free(self) -> None:
        """Do nothing: the memory belongs to this process."""
