"""All ranks of a loopback, seen from one of them, and the function that runs them."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mpicomp.exchange.base import Groups, Stopped, check_schedule
from mpicomp.exchange.guard import is_agreed
from mpicomp.exchange.loopback.exchange import LoopbackExchange, mean_over_ranks_
from mpicomp.exchange.loopback.mailbox import Delays
from mpicomp.exchange.loopback.network import Links
from mpicomp.exchange.loopback.node import LoopbackNode
from mpicomp.exchange.loopback.scheduler import Scheduler
from mpicomp.exchange.loopback.simulated_time import SimulatedScheduler
from mpicomp.exchange.mailbox.slots import SlotMailbox, slots_of
from mpicomp.exchange.placement import core_share, thread_count
from mpicomp.topology.base import Schedule, Topology

R = TypeVar("R")
T = TypeVar("T")


class LoopbackWorld:
    """The `World` of one thread."""

    def __init__(self, scheduler: Scheduler, rank: int, device: torch.device) -> None:
        self.rank = rank
        self.size = scheduler.size
        self.host = socket.gethostname()
        self.local_rank = rank
        self.local_size = scheduler.size
        self.device = device
        self.is_simulated = isinstance(scheduler, SimulatedScheduler)
        self.notices: tuple[str, ...] = ()
        self._scheduler = scheduler
        self._exchanges = self._gathers = self._counters = 0

    def exchange(self, schedule: Schedule) -> LoopbackExchange:
        """Return the exchange over the edges of `schedule`."""
        self._exchanges += 1
        return LoopbackExchange(self._scheduler, self.rank, self._exchanges, schedule, self.device)

    def node(self, groups: Groups) -> LoopbackNode:
        """Return the node of this rank."""
        self._exchanges += 2  # one number inside the node, and one between nodes
        return LoopbackNode(self._scheduler, self.rank, self._exchanges - 1, groups, self.device)

    def mailbox(self, topology: Topology, nbytes: int, depth: int = 2) -> SlotMailbox:
        """Return the mailbox over the edges of `topology`, for messages of up to `nbytes` bytes."""
        check_schedule(topology, self.size)
        transport = self._scheduler.make_transport(self.rank, slots_of(topology, self.rank, nbytes, depth))
        return SlotMailbox(self.rank, self.device, transport, topology, nbytes, depth)

    def all_gather(self, value: T) -> list[T]:
        """Return the values of all ranks, by rank: the objects themselves, not copies."""
        return self._scheduler.gather(self.rank, value, "all_gather")

    def broadcast(self, value: T) -> T:
        """Return rank 0's value: the object itself, not a copy."""
        return self._scheduler.gather(self.rank, value, "broadcast")[0]

    def broadcast_(self, x: Tensor, root: int = 0) -> None:
        """Overwrite `x` with the `x` of rank `root`."""
        theirs = self._scheduler.gather(self.rank, x, "broadcast_")[root]
        if self.rank != root:
            x.copy_(theirs)
        self.barrier()

    def start_gather(self, values: Sequence[float]) -> LoopbackGather:
        """Begin to gather the `values` of all ranks."""
        self._gathers += 1
        return LoopbackGather(self._scheduler, self.rank, self._gathers, values)

    def counter(self, start: int = 0) -> LoopbackCounter:
        """Return a counter whose first value is `start`."""
        self._counters += 1
        return LoopbackCounter(self._scheduler, self._counters, start)

    def failure_detector(self, names: Sequence[str], in_step: bool) -> None:
        """Return None: threads of one process live and die together."""

    def now(self) -> float:
        """Return the time in seconds; simulated time where the scheduler simulates it."""
        return self._scheduler.now()

    def sleep(self, seconds: float) -> None:
        """Do nothing for `seconds`; the core is free for another rank meanwhile."""
        self._scheduler.sleep(self.rank, seconds)

    def rest(self, seconds: float) -> float:
        """Sleep until a message arrives, in simulated time, for `seconds` at most, and return what is left of them."""
        assert isinstance(self._scheduler, SimulatedScheduler)
        return self._scheduler.rest(self.rank, seconds)

    def mean_(self, x: Tensor) -> None:
        """Average `x` over all ranks, in place, in float64 and in the order of ranks."""
        mean_over_ranks_(self._scheduler, self.rank, x, range(self.size))

    def barrier(self) -> None:
        """Wait for all ranks."""
        self._scheduler.gather(self.rank, None, "barrier")

    def abort(self, exit_code: int) -> NoReturn:
        """Stop all ranks; `run` raises ``SystemExit(exit_code)``."""
        self._scheduler.fail(SystemExit(exit_code), self.rank)
        raise Stopped


class LoopbackGather:
    """A non-blocking all-gather between threads."""

    def __init__(self, scheduler: Scheduler, rank: int, number: int, values: Sequence[float]) -> None:
        self._scheduler = scheduler
        self._rank = rank
        self._number = number
        self._rows: npt.NDArray[np.float64] | None = None
        scheduler.give(rank, number, values)

    def test(self) -> bool:
        """Return whether the numbers of all ranks are here."""
        return self._rows is not None or self._scheduler.is_given(self._number)

    def wait(self) -> npt.NDArray[np.float64]:
        """Return the numbers by rank, one array for all ranks."""
        if self._rows is None:
            self._rows = self._scheduler.collect(self._rank, self._number)
        return self._rows


class LoopbackCounter:
    """A shared counter that gives each value to one rank only."""

    def __init__(self, scheduler: Scheduler, number: int, start: int) -> None:
        self._scheduler = scheduler
        self._number = number
        self._start = start
        self._next: int | None = None

    def prefetch(self) -> None:
        """Take the next value, unless it was taken already."""
        if self._next is None:
            self._next = self._scheduler.count(self._number, self._start)

    def test(self) -> bool:
        """Return True: the next value is available at once."""
        self.prefetch()
        return True

    def take(self) -> int:
        """Return the next value."""
        self.prefetch()
        value, self._next = self._next, None
        assert value is not None
        return value

    def free(self) -> None:
        """Do nothing: the counter has no memory of its own."""


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
        function: called on each rank.
        args: further arguments after its world.
        device: of the tensors.
        cores: how many ranks may run at a time; None for the number of cores. With one, runs are repeatable.
        delays: of the mailbox's messages.
        simulated: the links of a simulated network; time is then simulated, one rank runs at a time, and runs are
            repeatable.

    Raises:
        ExchangeError: all ranks wait for each other (deadlock).
        Exception: the exception of the first rank that fails, with a note that names the rank. The others are stopped.

    """
    if size < 1:
        raise ValueError(f"size = {size}: there must be at least one rank")
    results: list[Any] = [None] * size
    allowed = os.sched_getaffinity(0)
    scheduler = (
        Scheduler(size, cores or len(allowed), delays) if simulated is None else SimulatedScheduler(size, simulated)
    )
    threads_before = torch.get_num_threads()
    threads_each = thread_count(core_share(allowed, [allowed] * size))

    def serve(rank: int) -> None:
        torch.set_num_threads(threads_each)
        try:
            scheduler.enter(rank)
            results[rank] = function(LoopbackWorld(scheduler, rank, torch.device(device)), *args)
        except Stopped:
            pass
        except BaseException as error:
            scheduler.fail(error, rank)
        finally:
            scheduler.leave()

    threads = [threading.Thread(target=serve, args=(rank,), name=f"rank {rank}", daemon=True) for rank in range(size)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except BaseException as error:
        scheduler.fail(error)
        raise
    finally:
        torch.set_num_threads(threads_before)
    if scheduler.error is not None:
        if scheduler.failed_rank is not None and size > 1 and not is_agreed(scheduler.error):
            # As `add_note` does from Python 3.11 on.
            notes = getattr(scheduler.error, "__notes__", [])
            scheduler.error.__notes__ = [*notes, f"on rank {scheduler.failed_rank} of {size} (loopback)"]
        raise scheduler.error
    return results
