"""The scheduler of the loopback: it decides which threads run, and passes messages between them."""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from torch import Tensor

from mpicomp.errors import ExchangeError
from mpicomp.exchange.base import Stopped
from mpicomp.exchange.loopback.mailbox import Delays, LoopbackTransport, SimulatedTransport
from mpicomp.exchange.mailbox.slots import Slots
from mpicomp.exchange.watchdog import Waiting

Sender = tuple[int, int]
"""The number of an exchange, which ranks make in the same order, and a source rank."""

T = TypeVar("T")


@dataclass
class Message:
    """A packed payload; its buffer goes back to the sender's pool when the last reader has released it."""

    wire: Tensor
    nbytes: int
    readers: int
    pool: list[Tensor]


@dataclass
class RankThread:
    """What the scheduler knows about one rank."""

    rank: int
    woken: threading.Condition
    may_run: bool = False
    inbox: defaultdict[Sender, deque[Message]] = field(default_factory=lambda: defaultdict(deque))
    missing: set[Sender] = field(default_factory=set)
    naps: int = 0
    is_awaiting_mail: bool = False


class Collective:
    """One collective operation: the values given so far."""

    def __init__(self, size: int) -> None:
        self.values: list[Any] = [None] * size
        self.missing = set(range(size))
        self.waiting: list[RankThread] = []


class PendingGather:
    """A non-blocking all-gather: the numbers given so far."""

    def __init__(self, size: int) -> None:
        self.values: list[Sequence[float]] = [()] * size
        self.rows: npt.NDArray[np.float64] = np.empty((0, 0))
        self.missing = size
        self.waiting: list[RankThread] = []
        self.unread = size


class Scheduler:
    """Decides which threads run, and passes messages and collective values between them.

    One lock guards everything; each rank sleeps on its own condition variable. At most as many ranks run at a time as
    there are cores. A rank that must wait passes its core to the next rank that is ready, because hundreds of threads
    that compete for Python's interpreter lock would mostly wake each other.
    """

    def __init__(self, size: int, cores: int, delays: Delays | None = None) -> None:
        self.size = size
        self.cores = cores
        self.delays = delays
        self.error: BaseException | None = None
        self.failed_rank: int | None = None
        self._lock = threading.Lock()
        self._threads = [RankThread(rank, threading.Condition(self._lock)) for rank in range(size)]
        self._collective = Collective(size)
        self._gathers: defaultdict[int, PendingGather] = defaultdict(lambda: PendingGather(size))
        self._counters: dict[int, int] = {}
        self._free_cores = cores
        self._ready: deque[RankThread] = deque()
        self._present = size
        self._blocked = 0
        # By rank, whichever thread comes first, so that a run on one core can be repeated.
        with self._lock:
            for thread in self._threads:
                self._make_ready(thread)

    def fail(self, error: BaseException, rank: int | None = None) -> None:
        """Stop all ranks because of `error` on `rank`; the first error wins."""
        with self._lock:
            self._fail(error, rank)

    def enter(self, rank: int) -> None:
        """Wait for a core before the rank begins."""
        with self._lock:
            self._await_core(self._threads[rank])
            self._check_alive()

    def leave(self) -> None:
        """Note that a rank has returned."""
        with self._lock:
            self._present -= 1
            self._hand_on_core()
            self._check_progress()

    def post(self, sender: Sender, messages: Mapping[int, Message]) -> None:
        """Put each target's message into its inbox."""
        with self._lock:
            for target, message in messages.items():
                thread = self._threads[target]
                thread.inbox[sender].append(message)
                if sender in thread.missing:
                    thread.missing.discard(sender)
                    if not thread.missing:
                        self._wake(thread)

    def take(self, rank: int, senders: Sequence[Sender]) -> list[Message]:
        """Wait for the next message from each of `senders` and return them."""
        with self._lock:
            thread = self._threads[rank]
            thread.missing = {sender for sender in senders if not thread.inbox[sender]}
            if thread.missing:
                with Waiting("message", lambda: [source for _, source in self._snapshot(thread.missing)]):
                    self._sleep(thread)
            self._check_alive()
            return [thread.inbox[sender].popleft() for sender in senders]

    def is_there(self, rank: int, senders: Sequence[Sender]) -> bool:
        """Return whether `take` would return without waiting."""
        with self._lock:
            self._check_alive()
            inbox = self._threads[rank].inbox
            return all(inbox[sender] for sender in senders)

    def release(self, messages: Iterable[Message]) -> None:
        """Return the buffers of messages that a rank has read to their pools."""
        with self._lock:
            for message in messages:
                message.readers -= 1
                if message.readers == 0:
                    message.pool.append(message.wire)

    def gather(self, rank: int, value: T, operation: str) -> list[T]:
        """Wait until all ranks have called this and return their values; error messages name `operation`."""
        with self._lock:
            self._check_alive()
            current = self._collective
            current.values[rank] = value
            current.missing.discard(rank)
            if current.missing:
                current.waiting.append(self._threads[rank])
                with Waiting(operation, lambda: self._snapshot(current.missing)):
                    self._sleep(self._threads[rank])
                self._check_alive()
            else:
                self._collective = Collective(self.size)
                for thread in current.waiting:
                    self._wake(thread)
            return list(current.values)

    def give(self, rank: int, number: int, values: Sequence[float]) -> None:
        """Give this rank's part of gather `number`."""
        with self._lock:
            self._check_alive()
            pending = self._gathers[number]
            pending.values[rank] = values
            pending.missing -= 1
            if not pending.missing:
                pending.rows = np.array(pending.values, dtype=np.float64)
                for thread in pending.waiting:
                    self._wake(thread)
                self._notify_all()

    def is_given(self, number: int) -> bool:
        """Return whether all ranks have given their part of gather `number`."""
        with self._lock:
            return number not in self._gathers or not self._gathers[number].missing

    def collect(self, rank: int, number: int) -> npt.NDArray[np.float64]:
        """Wait for all parts of gather `number` and return them; to be called once on each rank."""
        with self._lock:
            pending = self._gathers[number]
            if pending.missing:
                pending.waiting.append(self._threads[rank])
                with Waiting("gather"):
                    self._sleep(self._threads[rank])
            self._check_alive()
            pending.unread -= 1
            if not pending.unread:
                del self._gathers[number]
            return pending.rows

    def count(self, number: int, start: int) -> int:
        """Return the next value of counter `number`, which begins at `start`."""
        with self._lock:
            value = self._counters.get(number, start)
            self._counters[number] = value + 1
            return value

    def now(self) -> float:
        """Return the time in seconds."""
        return time.perf_counter()

    def sleep(self, rank: int, seconds: float) -> None:
        """Sleep for `seconds`; other ranks may use the core."""
        with self._lock:
            thread = self._threads[rank]
            thread.may_run = False
            self._hand_on_core()
        time.sleep(seconds)
        with self._lock:
            self._make_ready(thread)
            self._await_core(thread)
            self._check_alive()

    def all_reduce(self, rank: int, nbytes: int, among: Sequence[int]) -> None:
        """Do nothing: the sum has taken its time. In simulated time, this sleeps as long as an all-reduce takes."""

    def make_transport(self, rank: int, slots: Slots) -> LoopbackTransport | SimulatedTransport:
        """Return a transport over the memory of a mailbox."""
        return LoopbackTransport(
            rank, slots, self.delays, lambda: self.pause(rank), lambda value: self.gather(rank, value, "mailbox")
        )

    def pause(self, rank: int) -> None:
        """Let another rank run if one is ready; this rank goes to the end of the queue, so each gets its turn."""
        with self._lock:
            self._check_alive()
            if self._ready:
                thread = self._threads[rank]
                thread.may_run = False
                self._ready.append(thread)
                self._hand_on_core()
                with Waiting("mail", list):
                    self._await_core(thread)
                self._check_alive()

    def _notify_all(self) -> None:
        """Do nothing: ranks poll here. In simulated time, this wakes those that wait for an event."""

    def _snapshot(self, missing: set[T]) -> list[T]:
        """Return a copy of the missing items; for threads that do not hold the lock."""
        with self._lock:
            return list(missing)

    def _sleep(self, thread: RankThread) -> None:
        self._blocked += 1
        thread.may_run = False
        self._hand_on_core()
        self._check_progress()
        self._await_core(thread)

    def _wake(self, thread: RankThread) -> None:
        self._blocked -= 1
        self._make_ready(thread)

    def _make_ready(self, thread: RankThread) -> None:
        self._ready.append(thread)
        if self._free_cores:
            self._free_cores -= 1
            self._hand_on_core()

    def _hand_on_core(self) -> None:
        if self._ready:
            thread = self._ready.popleft()
            thread.may_run = True
            thread.woken.notify()
        else:
            self._free_cores += 1

    def _await_core(self, thread: RankThread) -> None:
        while not thread.may_run and self.error is None:
            thread.woken.wait()

    def _check_progress(self) -> None:
        if self._blocked == self._present > 0:
            waiting = [rank for rank, thread in enumerate(self._threads) if thread.missing]
            detail = ", ".join(
                f"rank {rank} for {sorted(source for _, source in self._threads[rank].missing)}" for rank in waiting[:8]
            )
            self._fail(
                ExchangeError(
                    f"deadlock: {self._present} of {self.size} ranks still run, and all of them wait"
                    + (f" ({detail})" if detail else " for a collective operation")
                ),
                None,
            )

    def _check_alive(self) -> None:
        if self.error is not None:
            raise Stopped

    def _fail(self, error: BaseException, rank: int | None) -> None:
        if self.error is None:
            self.error, self.failed_rank = error, rank
            for thread in self._threads:
                thread.woken.notify()
