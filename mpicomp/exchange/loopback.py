"""N ranks as N threads of one process: for tests, the debugger, a laptop, and the study of many ranks.

Messages are packed into bytes exactly as for MPI, so that layouts, byte counts and results are the same. A message is
packed once and read in place by all receivers. No more ranks run at a time than there are cores: ranks take turns when
they wait for each other, and only then, so they must not wait by other means. When all ranks that are left wait for
each other, or for one that has returned, the run fails instead of hanging.
"""

from __future__ import annotations

import os
import socket
import threading
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
from mpicomp.exchange.loopback_mailbox import Delays, LoopbackBoard
from mpicomp.exchange.mailbox import SlotMailbox, slots_of
from mpicomp.exchange.placement import core_share, thread_count
from mpicomp.exchange.watchdog import Waiting
from mpicomp.timing import timed
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

    woken: threading.Condition
    may_run: bool = False
    inbox: defaultdict[_Sender, deque[_Message]] = field(default_factory=lambda: defaultdict(deque))
    missing: set[_Sender] = field(default_factory=set)


class _Round:
    """One collective operation: the values given so far."""

    def __init__(self, size: int) -> None:
        self.values: list[Any] = [None] * size
        self.missing = set(range(size))
        self.waiting: list[_Seat] = []


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
        self._seats = [_Seat(threading.Condition(self._lock)) for _ in range(size)]
        self._round = _Round(size)
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


class _LoopbackPending:
    """The messages to come for one rank."""

    def __init__(self, exchange: LoopbackExchange, layout: Layout, sources: list[int]) -> None:
        self._exchange = exchange
        self._layout = layout
        self._sources = sources

    @timed("exchange")
    def wait(self) -> dict[int, Payload]:
        """Return the messages by source rank, ascending."""
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

    @timed("exchange")
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

    @timed("exchange")
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
        self.notices: tuple[str, ...] = ()
        self._hub = hub
        self._exchanges = 0

    def exchange(self, schedule: Schedule) -> LoopbackExchange:
        """Return the exchange over the edges of `schedule`."""
        self._exchanges += 1
        return LoopbackExchange(self._hub, self.rank, self._exchanges, schedule, self.device)

    def mailbox(self, topology: Topology, nbytes: int, depth: int = 2) -> SlotMailbox:
        """Return the mailbox over the edges of `topology`, for messages of up to `nbytes` bytes."""
        check_schedule(topology, self.size)
        hub, rank = self._hub, self.rank
        slots = slots_of(topology, rank, nbytes, depth)
        board = LoopbackBoard(
            rank, slots, hub.delays, lambda: hub.pause(rank), lambda value: hub.gather(rank, value, "mailbox")
        )
        return SlotMailbox(self, board, topology, nbytes, depth)

    def all_gather(self, value: T) -> list[T]:
        """Return the values of all ranks, by rank: the objects themselves, not copies."""
        return self._hub.gather(self.rank, value, "all_gather")

    def broadcast(self, value: T) -> T:
        """Return rank 0's value: the object itself, not a copy."""
        return self._hub.gather(self.rank, value, "broadcast")[0]

    def broadcast_(self, x: Tensor) -> None:
        """Overwrite `x` by rank 0's."""
        root = self._hub.gather(self.rank, x, "broadcast_")[0]
        if self.rank != 0:
            x.copy_(root)
        self.barrier()

    def start_maximum(self, values: Sequence[int]) -> LoopbackMaximum:
        """Begin to form the maximum over all ranks of each of `values`."""
        return LoopbackMaximum(self, list(values))

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


class LoopbackMaximum:
    """A maximum over all ranks under way."""

    def __init__(self, world: LoopbackWorld, values: list[int]) -> None:
        self._world = world
        self._values = values

    def wait(self) -> list[int]:
        """Return the largest of each of the values that the ranks have given."""
        return [max(column) for column in zip(*self._world.all_gather(self._values), strict=True)]


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

    Raises:
        ExchangeError: the ranks wait for each other for ever.
        Exception: what the first rank to fail has raised; it carries a note with the rank. The others are stopped.

    """
    if size < 1:
        raise ValueError(f"size = {size}: there must be at least one rank")
    results: list[Any] = [None] * size
    allowed = os.sched_getaffinity(0)
    hub = _Hub(size, cores or len(allowed), delays)
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
