"""The scheduler of the loopback with simulated time."""

from __future__ import annotations

import heapq
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from typing import TypeVar

from mpicomp.exchange.loopback.mailbox import SimulatedTransport
from mpicomp.exchange.loopback.network import Links, Network
from mpicomp.exchange.loopback.scheduler import Message, RankThread, Scheduler, Sender
from mpicomp.exchange.mailbox.slots import Slots
from mpicomp.exchange.watchdog import Waiting

T = TypeVar("T")


class SimulatedScheduler(Scheduler):
    """A scheduler with simulated time, which advances only when every rank sleeps or waits, to the next event.

    One rank runs at a time, and ranks that wake at the same moment run in rank order. So events have the same order in
    every run, on any machine, and a run that continues from a checkpoint is identical to one that was not interrupted.
    Computing itself takes no simulated time: a rank calls `sleep` for as long as its computation is to take. Messages
    take as long as the `Network` says. Other collective operations (agreements, evaluations) wait for the last rank and
    until all ports are free, and take no time of their own.
    """

    def __init__(self, size: int, links: Links) -> None:
        super().__init__(size, cores=1)
        self._network = Network(size, links)
        self._arrivals: list[defaultdict[Sender, deque[int]]] = [defaultdict(deque) for _ in range(size)]
        self._now_ns = 0
        self._events: list[tuple[int, int, int, int]] = []
        self._decided = 0

    def now(self) -> float:
        """Return the simulated time in seconds."""
        return self._now_ns / 1e9

    def now_ns(self) -> int:
        """Return the simulated time in whole nanoseconds, so that sums are exact, also in a run that was continued."""
        return self._now_ns

    def sleep(self, rank: int, seconds: float) -> None:
        """Sleep for `seconds` of simulated time."""
        self._nap(rank, self._now_ns + round(1e9 * seconds), is_awaiting_mail=False)

    def gather(self, rank: int, value: T, operation: str) -> list[T]:
        """Return the values of all ranks; the ranks continue in rank order, in whatever order they arrived."""
        values = super().gather(rank, value, operation)
        # All ports are free then: a run that continues from a checkpoint, before which all meet, has the same times.
        self._nap(rank, max(self._now_ns, self._network.free_ns()), is_awaiting_mail=False)
        return values

    def post(self, sender: Sender, messages: Mapping[int, Message]) -> None:
        """Send each target its message."""
        nbytes = {target: message.nbytes for target, message in messages.items()}
        for target, arrival_ns in self._network.send(sender[1], nbytes, self._now_ns).items():
            self._arrivals[target][sender].append(arrival_ns)
            with self._lock:
                self._notify(self._threads[target], arrival_ns)
        super().post(sender, messages)

    def take(self, rank: int, senders: Sequence[Sender]) -> list[Message]:
        """Wait for the arrival of the next message from each of `senders` and return them."""
        messages = super().take(rank, senders)
        arrived_ns = max((self._arrivals[rank][sender].popleft() for sender in senders), default=0)
        if arrived_ns > self._now_ns:
            self._nap(rank, arrived_ns, is_awaiting_mail=False)
        return messages

    def is_there(self, rank: int, senders: Sequence[Sender]) -> bool:
        """Return whether `take` would return without waiting."""
        return super().is_there(rank, senders) and all(
            self._arrivals[rank][sender][0] <= self._now_ns for sender in senders
        )

    def all_reduce(self, rank: int, nbytes: int, among: Sequence[int]) -> None:
        """Sleep for the time of an all-reduce over the ranks `among` in which each of them sends `nbytes`."""
        rings = min(self.size // len(among), self._network.links.node_size)  # over one port, of the ranks of a node
        self._nap(rank, self._now_ns + self._network.all_reduce_ns(rings * nbytes, among), is_awaiting_mail=False)

    def rest(self, rank: int, seconds: float) -> float:
        """Sleep until a message arrives at `rank`, for `seconds` at most, and return what is left of them."""
        end_ns = self._now_ns + round(1e9 * seconds)
        coming = [times[0] for times in self._arrivals[rank].values() if times and times[0] > self._now_ns]
        self._nap(rank, min([end_ns, *coming]), is_awaiting_mail=True)
        return (end_ns - self._now_ns) / 1e9

    def await_mail(self, rank: int, until_ns: int) -> None:
        """Sleep until `until_ns`, or until something arrives at `rank`."""
        self._nap(rank, until_ns, is_awaiting_mail=True)

    def send(self, source: int, target: int, nbytes: int) -> int:
        """Send a message of a mailbox and return when it arrives; `target` wakes then if it waits for mail."""
        with self._lock:
            arrival_ns = self._network.send(source, {target: nbytes}, self._now_ns)[target]
            self._notify(self._threads[target], arrival_ns)
            return arrival_ns

    def make_transport(self, rank: int, slots: Slots) -> SimulatedTransport:
        """Return a transport over the memory of a mailbox."""
        return SimulatedTransport(rank, slots, self, lambda value: self.gather(rank, value, "mailbox"))

    def _nap(self, rank: int, until_ns: int, is_awaiting_mail: bool) -> None:
        with self._lock:
            self._check_alive()
            thread = self._threads[rank]
            thread.is_awaiting_mail = is_awaiting_mail
            self._at(until_ns, thread)
            thread.may_run = False
            self._hand_on_core()
            with Waiting("mail", list):
                self._await_core(thread)
            self._check_alive()

    def _notify_all(self) -> None:
        for thread in self._threads:
            self._notify(thread, self._now_ns)

    def _notify(self, thread: RankThread, at_ns: int) -> None:
        if thread.is_awaiting_mail:
            self._at(at_ns, thread)

    def _at(self, at_ns: int, thread: RankThread) -> None:
        heapq.heappush(self._events, (at_ns, thread.rank, self._decided, thread.naps))
        self._decided += 1

    def _hand_on_core(self) -> None:
        while not self._ready and self._events:
            at_ns, rank, _, nap = heapq.heappop(self._events)
            thread = self._threads[rank]
            if nap == thread.naps:  # else it was woken by an earlier event
                self._now_ns = max(self._now_ns, at_ns)
                thread.naps += 1
                thread.is_awaiting_mail = False
                self._ready.append(thread)
        super()._hand_on_core()
