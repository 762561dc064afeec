"""N ranks as N threads of one process: for tests, the debugger, a laptop, and the study of many ranks.

Messages are packed into bytes exactly as for MPI, so that layouts, byte counts and results are the same. A message is
packed once and read in place by all receivers. No more ranks run at a time than there are cores: ranks take turns when
they wait for each other, and only then, so they must not wait by other means. When all ranks that are left wait for
each other, or for one that has returned, the run fails instead of hanging.
"""

from __future__ import annotations

import heapq
import os
import socket
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from mpicomp.compression.base import Layout, Payload
from mpicomp.errors import ExchangeError
from mpicomp.exchange.base import Stopped, all_reduce_nbytes, check_message, check_schedule, mean_in_order
from mpicomp.exchange.guard import is_agreed
from mpicomp.exchange.loopback_mailbox import Delays, Links, LoopbackBoard, SimulatedBoard
from mpicomp.exchange.mailbox import SlotMailbox, Slots, slots_of
from mpicomp.exchange.placement import core_share, thread_count
from mpicomp.exchange.watchdog import Waiting
from mpicomp.timing import Underway, timed
from mpicomp.topology.base import Schedule, Topology

_Sender = tuple[int, int]
"""The number of an exchange, in the order in which every rank makes them, and a source rank."""

R = TypeVar("R")
T = TypeVar("T")


@dataclass
class _Message:
    """A packed payload; its buffer goes back to the sender's pool when the last reader has released it."""

    wire: Tensor
    nbytes: int
    readers: int
    pool: list[Tensor]


@dataclass
class _Seat:
    """What the hub knows of one rank."""

    rank: int
    woken: threading.Condition
    may_run: bool = False
    inbox: defaultdict[_Sender, deque[_Message]] = field(default_factory=lambda: defaultdict(deque))
    missing: set[_Sender] = field(default_factory=set)
    naps: int = 0
    is_awaiting_mail: bool = False


class _Round:
    """One collective operation: the values given so far."""

    def __init__(self, size: int) -> None:
        self.values: list[Any] = [None] * size
        self.missing = set(range(size))
        self.waiting: list[_Seat] = []


class _Tally:
    """Numbers that the ranks give one by one, without waiting for each other."""

    def __init__(self, size: int) -> None:
        self.values: list[list[float]] = [[] for _ in range(size)]
        self.missing = size
        self.waiting: list[_Seat] = []
        self.unread = size


class _Hub:
    """Where the threads meet, and who of them may run.

    One lock guards everything; each rank sleeps on a condition of its own. No more ranks run at a time than there are
    cores, and a rank that must wait hands its core to the next one that is ready: hundreds of threads that all want
    Python's interpreter lock would mostly wake each other.
    """

    def __init__(self, size: int, cores: int, delays: Delays | None = None) -> None:
        self.size = size
        self.cores = cores
        self.delays = delays
        self.error: BaseException | None = None
        self.failed_rank: int | None = None
        self._lock = threading.Lock()
        self._seats = [_Seat(rank, threading.Condition(self._lock)) for rank in range(size)]
        self._round = _Round(size)
        self._tallies: defaultdict[int, _Tally] = defaultdict(lambda: _Tally(size))
        self._counters: dict[int, int] = {}
        self._free_cores = cores
        self._ready: deque[_Seat] = deque()
        self._present = size
        self._blocked = 0
        # By rank, whichever thread comes first, so that a run on one core can be repeated.
        with self._lock:
            for seat in self._seats:
                self._make_ready(seat)

    def fail(self, error: BaseException, rank: int | None = None) -> None:
        """Stop all ranks because of `error` on `rank`; the first error wins."""
        with self._lock:
            self._fail(error, rank)

    def enter(self, rank: int) -> None:
        """Wait for a core to begin on."""
        with self._lock:
            self._await_core(self._seats[rank])
            self._check_alive()

    def leave(self) -> None:
        """Note that a rank has returned."""
        with self._lock:
            self._present -= 1
            self._hand_on_core()
            self._check_progress()

    def post(self, sender: _Sender, targets: Iterable[int], message: _Message) -> None:
        """Put `message` into the inbox of each of `targets`."""
        with self._lock:
            for target in targets:
                seat = self._seats[target]
                seat.inbox[sender].append(message)
                if sender in seat.missing:
                    seat.missing.discard(sender)
                    if not seat.missing:
                        self._wake(seat)

    def take(self, rank: int, senders: Sequence[_Sender]) -> list[_Message]:
        """Return the next message from each of `senders`, when all are there."""
        with self._lock:
            seat = self._seats[rank]
            seat.missing = {sender for sender in senders if not seat.inbox[sender]}
            if seat.missing:
                with Waiting("message", lambda: [source for _, source in self._snapshot(seat.missing)]):
                    self._sleep(seat)
            self._check_alive()
            return [seat.inbox[sender].popleft() for sender in senders]

    def is_there(self, rank: int, senders: Sequence[_Sender]) -> bool:
        """Return whether `take` would return at once."""
        with self._lock:
            self._check_alive()
            inbox = self._seats[rank].inbox
            return all(inbox[sender] for sender in senders)

    def release(self, messages: Iterable[_Message]) -> None:
        """Give back messages that a rank has read."""
        with self._lock:
            for message in messages:
                message.readers -= 1
                if message.readers == 0:
                    message.pool.append(message.wire)

    def gather(self, rank: int, value: T, operation: str) -> list[T]:
        """Return the values of all ranks, when all have called this; `operation` is what it is for, for people."""
        with self._lock:
            self._check_alive()
            current = self._round
            current.values[rank] = value
            current.missing.discard(rank)
            if current.missing:
                current.waiting.append(self._seats[rank])
                with Waiting(operation, lambda: self._snapshot(current.missing)):
                    self._sleep(self._seats[rank])
                self._check_alive()
            else:
                self._round = _Round(self.size)
                for seat in current.waiting:
                    self._wake(seat)
            return list(current.values)

    def give(self, rank: int, number: int, values: list[float]) -> None:
        """Give this rank's part of gather `number`."""
        with self._lock:
            self._check_alive()
            tally = self._tallies[number]
            tally.values[rank] = values
            tally.missing -= 1
            if not tally.missing:
                for seat in tally.waiting:
                    self._wake(seat)
                self._notify_all()

    def is_given(self, number: int) -> bool:
        """Return whether all ranks have given their part of gather `number`."""
        with self._lock:
            return number not in self._tallies or not self._tallies[number].missing

    def collect(self, rank: int, number: int) -> list[list[float]]:
        """Return the parts of gather `number`, when all are there; once for each rank."""
        with self._lock:
            tally = self._tallies[number]
            if tally.missing:
                tally.waiting.append(self._seats[rank])
                with Waiting("gather"):
                    self._sleep(self._seats[rank])
            self._check_alive()
            tally.unread -= 1
            if not tally.unread:
                del self._tallies[number]
            return tally.values

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
        """Leave the core to others for `seconds`."""
        with self._lock:
            seat = self._seats[rank]
            seat.may_run = False
            self._hand_on_core()
        time.sleep(seconds)
        with self._lock:
            self._make_ready(seat)
            self._await_core(seat)
            self._check_alive()

    def make_board(self, rank: int, slots: Slots) -> LoopbackBoard | SimulatedBoard:
        """Return the memory of a mailbox."""
        return LoopbackBoard(
            rank, slots, self.delays, lambda: self.pause(rank), lambda value: self.gather(rank, value, "mailbox")
        )

    def pause(self, rank: int) -> None:
        """Let another rank run if one is ready: at the end of the queue, each gets its turn."""
        with self._lock:
            self._check_alive()
            if self._ready:
                seat = self._seats[rank]
                seat.may_run = False
                self._ready.append(seat)
                self._hand_on_core()
                with Waiting("mail", list):
                    self._await_core(seat)
                self._check_alive()

    def _notify_all(self) -> None:
        """Note that something has happened that ranks may be looking for: here they look by themselves."""

    def _snapshot(self, missing: set[T]) -> list[T]:
        """Return what is missing, which changes under the lock; for threads that do not hold it."""
        with self._lock:
            return list(missing)

    def _sleep(self, seat: _Seat) -> None:
        self._blocked += 1
        seat.may_run = False
        self._hand_on_core()
        self._check_progress()
        self._await_core(seat)

    def _wake(self, seat: _Seat) -> None:
        self._blocked -= 1
        self._make_ready(seat)

    def _make_ready(self, seat: _Seat) -> None:
        self._ready.append(seat)
        if self._free_cores:
            self._free_cores -= 1
            self._hand_on_core()

    def _hand_on_core(self) -> None:
        if self._ready:
            seat = self._ready.popleft()
            seat.may_run = True
            seat.woken.notify()
        else:
            self._free_cores += 1

    def _await_core(self, seat: _Seat) -> None:
        while not seat.may_run and self.error is None:
            seat.woken.wait()

    def _check_progress(self) -> None:
        if self._blocked == self._present > 0:
            waiting = [rank for rank, seat in enumerate(self._seats) if seat.missing]
            detail = ", ".join(
                f"rank {rank} for {sorted(source for _, source in self._seats[rank].missing)}" for rank in waiting[:8]
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
            for seat in self._seats:
                seat.woken.notify()


class _SimulatedHub(_Hub):
    """A hub whose time goes on only when every rank sleeps or waits: to the next moment at which one has work.

    One rank runs at a time, and ranks that wake at the same moment do so in their order; so a run can be repeated
    exactly, on any machine, and goes on from a checkpoint as if it had not been interrupted. Computing takes no time by
    itself: ranks `sleep` for as long as it is to take.
    """

    def __init__(self, size: int, links: Links) -> None:
        super().__init__(size, cores=1)
        self._links = links
        self._now_ns = 0
        self._events: list[tuple[int, int, int, int]] = []
        self._decided = 0

    def now(self) -> float:
        """Return the simulated time in seconds."""
        return self._now_ns / 1e9

    def now_ns(self) -> int:
        """Return the simulated time: whole nanoseconds, so that a run that goes on from a checkpoint adds up alike."""
        return self._now_ns

    def sleep(self, rank: int, seconds: float) -> None:
        """Wake up after `seconds` of simulated time."""
        self._nap(rank, self._now_ns + round(1e9 * seconds), is_awaiting_mail=False)

    def gather(self, rank: int, value: T, operation: str) -> list[T]:
        """Return the values of all ranks, which then go on in their order, whoever came last."""
        values = super().gather(rank, value, operation)
        self.sleep(rank, 0.0)
        return values

    def await_mail(self, rank: int, until_ns: int) -> None:
        """Wake up at that time, or when something arrives before."""
        self._nap(rank, until_ns, is_awaiting_mail=True)

    def notify(self, rank: int, at_ns: int) -> None:
        """Note that something will arrive at `rank` at that time."""
        with self._lock:
            self._notify(self._seats[rank], at_ns)

    def make_board(self, rank: int, slots: Slots) -> SimulatedBoard:
        """Return the memory of a mailbox."""
        return SimulatedBoard(rank, slots, self._links, self, lambda value: self.gather(rank, value, "mailbox"))

    def _nap(self, rank: int, until_ns: int, is_awaiting_mail: bool) -> None:
        with self._lock:
            self._check_alive()
            seat = self._seats[rank]
            seat.is_awaiting_mail = is_awaiting_mail
            self._at(until_ns, seat)
            seat.may_run = False
            self._hand_on_core()
            with Waiting("mail", list):
                self._await_core(seat)
            self._check_alive()

    def _notify_all(self) -> None:
        for seat in self._seats:
            self._notify(seat, self._now_ns)

    def _notify(self, seat: _Seat, at_ns: int) -> None:
        if seat.is_awaiting_mail:
            self._at(at_ns, seat)

    def _at(self, at_ns: int, seat: _Seat) -> None:
        heapq.heappush(self._events, (at_ns, seat.rank, self._decided, seat.naps))
        self._decided += 1

    def _hand_on_core(self) -> None:
        while not self._ready and self._events:
            at_ns, rank, _, nap = heapq.heappop(self._events)
            seat = self._seats[rank]
            if nap == seat.naps:  # else it was woken by an earlier event
                self._now_ns = max(self._now_ns, at_ns)
                seat.naps += 1
                seat.is_awaiting_mail = False
                self._ready.append(seat)
        super()._hand_on_core()


class _LoopbackPending:
    """The messages to come for one rank."""

    def __init__(self, exchange: LoopbackExchange, layout: Layout, sources: list[int]) -> None:
        self._exchange = exchange
        self._layout = layout
        self._sources = sources
        self._underway = Underway() if sources else None

    @timed("exchange", is_event=False)
    def test(self) -> bool:
        """Return whether all messages are there."""
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

    def __init__(self, hub: _Hub, rank: int, number: int, schedule: Schedule, device: torch.device) -> None:
        check_schedule(schedule, hub.size)
        self.rank = rank
        self.size = hub.size
        self.schedule = schedule
        self.bytes_sent = 0
        self._hub = hub
        self._number = number
        self._device = device
        self._pool: list[Tensor] = []
        self._held: list[_Message] = []
        self._is_pending = False

    @timed("exchange", "send")
    def start(self, payload: Payload, layout: Layout, topology: Topology) -> _LoopbackPending:
        """Send `payload` to this rank's targets, and begin to receive from its sources."""
        if self._is_pending:
            raise ExchangeError("an exchange is still pending: wait for it before the next one")
        self._is_pending = True
        self._hub.release(self._held)
        self._held = []
        targets = topology.targets(self.rank)
        if targets:
            wire = self._buffer(layout.nbytes)
            nbytes = layout.pack(payload, wire)
            self._hub.post((self._number, self.rank), targets, _Message(wire, nbytes, len(targets), self._pool))
            self.bytes_sent += nbytes * len(targets)
        return _LoopbackPending(self, layout, topology.sources(self.rank))

    @timed("exchange", "all_reduce")
    def mean_(self, x: Tensor) -> None:
        """Average `x` over all ranks, in place; summed in float64 in the order of ranks."""
        _mean_(self._hub, self.rank, x)
        self.bytes_sent += all_reduce_nbytes(x, self.size)

    def _buffer(self, nbytes: int) -> Tensor:
        while self._pool:
            wire = self._pool.pop()
            if wire.numel() >= nbytes:
                return wire
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def _is_there(self, sources: list[int]) -> bool:
        return self._hub.is_there(self.rank, [(self._number, source) for source in sources])

    def _take(self, sources: list[int]) -> list[_Message]:
        assert self._is_pending, "waited for twice"
        self._held = self._hub.take(self.rank, [(self._number, source) for source in sources])
        self._is_pending = False
        return self._held


class LoopbackWorld:
    """The `World` of one thread."""

    def __init__(self, hub: _Hub, rank: int, device: torch.device) -> None:
        self.rank = rank
        self.size = hub.size
        self.host = socket.gethostname()
        self.local_rank = rank
        self.local_size = hub.size
        self.device = device
        self.is_simulated = isinstance(hub, _SimulatedHub)
        self.notices: tuple[str, ...] = ()
        self._hub = hub
        self._exchanges = self._gathers = self._counters = 0

    def exchange(self, schedule: Schedule) -> LoopbackExchange:
        """Return the exchange over the edges of `schedule`."""
        self._exchanges += 1
        return LoopbackExchange(self._hub, self.rank, self._exchanges, schedule, self.device)

    def mailbox(self, topology: Topology, nbytes: int, depth: int = 2) -> SlotMailbox:
        """Return the mailbox over the edges of `topology`, for messages of up to `nbytes` bytes."""
        check_schedule(topology, self.size)
        board = self._hub.make_board(self.rank, slots_of(topology, self.rank, nbytes, depth))
        return SlotMailbox(self, board, topology, nbytes, depth)

    def all_gather(self, value: T) -> list[T]:
        """Return the values of all ranks, by rank: the objects themselves, not copies."""
        return self._hub.gather(self.rank, value, "all_gather")

    def broadcast(self, value: T) -> T:
        """Return rank 0's value: the object itself, not a copy."""
        return self._hub.gather(self.rank, value, "broadcast")[0]

    def broadcast_(self, x: Tensor, root: int = 0) -> None:
        """Overwrite `x` by that of rank `root`."""
        theirs = self._hub.gather(self.rank, x, "broadcast_")[root]
        if self.rank != root:
            x.copy_(theirs)
        self.barrier()

    def start_gather(self, values: Sequence[float]) -> LoopbackGather:
        """Begin to collect the `values` of all ranks."""
        self._gathers += 1
        return LoopbackGather(self._hub, self.rank, self._gathers, values)

    def counter(self, start: int = 0) -> LoopbackCounter:
        """Return a counter whose first value is `start`."""
        self._counters += 1
        return LoopbackCounter(self._hub, self._counters, start)

    def lookout(self, names: Sequence[str]) -> None:
        """Return None: threads of one process live and die together."""

    def now(self) -> float:
        """Return the time in seconds; simulated time where the hub simulates it."""
        return self._hub.now()

    def sleep(self, seconds: float) -> None:
        """Do nothing for `seconds`; the core is free for another rank meanwhile."""
        self._hub.sleep(self.rank, seconds)

    def mean_(self, x: Tensor) -> None:
        """Average `x` over all ranks, in place, in float64 and in the order of ranks."""
        _mean_(self._hub, self.rank, x)

    def barrier(self) -> None:
        """Wait for all ranks."""
        self._hub.gather(self.rank, None, "barrier")

    def abort(self, exit_code: int) -> NoReturn:
        """Stop all ranks; `run` raises ``SystemExit(exit_code)``."""
        self._hub.fail(SystemExit(exit_code), self.rank)
        raise Stopped


class LoopbackGather:
    """Numbers of all ranks under way to all ranks."""

    def __init__(self, hub: _Hub, rank: int, number: int, values: Sequence[float]) -> None:
        self._hub = hub
        self._rank = rank
        self._number = number
        self._rows: list[list[float]] | None = None
        hub.give(rank, number, [float(value) for value in values])

    def test(self) -> bool:
        """Return whether all ranks have given theirs."""
        return self._rows is not None or self._hub.is_given(self._number)

    def wait(self) -> list[list[float]]:
        """Return the numbers by rank."""
        if self._rows is None:
            self._rows = self._hub.collect(self._rank, self._number)
        return self._rows


class LoopbackCounter:
    """A number that all ranks take from, each value once."""

    def __init__(self, hub: _Hub, number: int, start: int) -> None:
        self._hub = hub
        self._number = number
        self._start = start
        self._next: int | None = None

    def prefetch(self) -> None:
        """Take the next value, unless that has been done."""
        if self._next is None:
            self._next = self._hub.count(self._number, self._start)

    def test(self) -> bool:
        """Say yes."""
        self.prefetch()
        return True

    def take(self) -> int:
        """Return the next value."""
        self.prefetch()
        value, self._next = self._next, None
        assert value is not None
        return value

    def free(self) -> None:
        """Nothing to give back."""


def _mean_(hub: _Hub, rank: int, x: Tensor) -> None:
    """Average `x` over all ranks: as many ranks as there are cores average a piece each, and all copy all pieces."""
    vectors = hub.gather(rank, x.detach().view(-1), "mean_")
    workers = min(hub.size, hub.cores)
    begin, end = (len(vectors[rank]) * min(i, workers) // workers for i in (rank, rank + 1))
    mean = mean_in_order([vector[begin:end] for vector in vectors]) if rank < workers else None
    means = hub.gather(rank, mean, "mean_")
    # Nobody overwrites a vector before all have read it: the second gather is a barrier too.
    torch.cat([mean for mean in means if mean is not None], out=vectors[rank])


def run(
    size: int,
    function: Callable[..., R],
    *args: Any,
    device: torch.device | str = "cpu",
    cores: int | None = None,
    delays: Delays | None = None,
    simulated: Links | None = None,
) -> list[R]:
    """Call ``function(world, *args)`` on `size` ranks and return the results, by rank.

    Threads of torch are divided among the ranks as they are under MPI on one machine.

    Args:
        size: the number of ranks.
        function: what each does.
        args: what it gets beside its world.
        device: of the tensors.
        cores: how many ranks may run at a time; as many as there are cores if None, and the same run again with one.
        delays: of the mailbox's messages.
        simulated: simulate the time, with such links between the ranks; one rank runs at a time, and a run is the same
            each time. Mailboxes only: other messages take no time.

    Raises:
        ExchangeError: the ranks wait for each other for ever.
        Exception: what the first rank to fail has raised; it carries a note with the rank. The others are stopped.

    """
    if size < 1:
        raise ValueError(f"size = {size}: there must be at least one rank")
    results: list[Any] = [None] * size
    allowed = os.sched_getaffinity(0)
    hub = _Hub(size, cores or len(allowed), delays) if simulated is None else _SimulatedHub(size, simulated)
    threads_before = torch.get_num_threads()
    threads_each = thread_count(core_share(allowed, [allowed] * size))

    def serve(rank: int) -> None:
        torch.set_num_threads(threads_each)
        try:
            hub.enter(rank)
            results[rank] = function(LoopbackWorld(hub, rank, torch.device(device)), *args)
        except Stopped:
            pass
        except BaseException as error:
            hub.fail(error, rank)
        finally:
            hub.leave()

    threads = [threading.Thread(target=serve, args=(rank,), name=f"rank {rank}", daemon=True) for rank in range(size)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except BaseException as error:
        hub.fail(error)
        raise
    finally:
        torch.set_num_threads(threads_before)
    if hub.error is not None:
        if hub.failed_rank is not None and size > 1 and not is_agreed(hub.error):
            # As `add_note` does from Python 3.11 on.
            notes = getattr(hub.error, "__notes__", [])
            hub.error.__notes__ = [*notes, f"on rank {hub.failed_rank} of {size} (loopback)"]
        raise hub.error
    return results
