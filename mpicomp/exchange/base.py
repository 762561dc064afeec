"""HOW messages travel: the protocols that algorithms and the training loop see. No MPI here.

A `World` represents all ranks, and makes an `Exchange` or a `Mailbox` for a graph. Training traffic goes through these.
The methods of `World` itself are for set-up, diagnostics, evaluation and sharing of batches; they are not counted in
``bytes_sent``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NoReturn, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mpicomp.compression.message import Layout, Payload
from mpicomp.errors import ExchangeError, TopologyError
from mpicomp.topology.base import Schedule, Topology

T = TypeVar("T")


class Stopped(BaseException):
    """Ends a rank of the loopback after another one has failed; a user's `except Exception` does not catch it."""


class Pending(Protocol):
    """An exchange whose messages may still be on their way."""

    def test(self) -> bool:
        """Return whether all messages have arrived, without waiting; makes progress. If so, `wait` returns at once."""

    def wait(self) -> dict[int, Payload]:
        """Return the messages by source rank, ascending, so that the order of summation is fixed.

        The payloads are read-only views. They are valid until the next `Exchange.start`.
        """


class Exchange(Protocol):
    """Messages between neighbors of a graph; both ends take part in every call (collective on all ranks)."""

    rank: int
    size: int
    bytes_sent: int
    schedule: Schedule

    def start(self, payload: Payload, layout: Layout, topology: Topology) -> Pending:
        """Send `payload` to this rank's targets in `topology`, and begin to receive from its sources.

        `topology` is ``schedule(step)``; all ranks pass the same one. `payload` may be changed as soon as this
        returns. One exchange at a time: wait for the last one first. On a GPU all of it is ordered with the current
        stream alone; `DeviceStaging` says what work in other streams has to wait for.

        Raises:
            ExchangeError: another exchange is still pending, or the transport failed.

        """

    def start_each(self, payloads: Mapping[int, Payload], layout: Layout, topology: Topology) -> Pending:
        """Send each target in `topology` a payload of its own, ``payloads[target]``; otherwise as `start`."""

    def mean_(self, x: Tensor) -> None:
        """Average `x` (n,) over all ranks, in place, by an all-reduce.

        This is the only operation here that is not between neighbors. It counts as ``2 (size - 1) / size`` vectors sent
        by each rank, which is what a ring all-reduce sends.
        """


Groups = tuple[tuple[int, ...], ...]
"""The ranks of each node, ascending; every rank belongs to one."""


class Node(Protocol):
    """The node of a rank, seen from this rank. Methods are collective on the ranks of the node, `exchange` on all.

    The ranks of a node hold one model together. Rank i of a node owns shard i of the model's flat vectors:

        mean_shard_(g)         shard i of g becomes its mean over the ranks of the node        a reduce-scatter
        exchange(schedule)     rank i of a node and rank i of each neighbor node are neighbors
        gather_shards_(x)      all ranks of the node get all shards of x                       an all-gather

    So what a node sends crosses the slow links once, and not once for each of its ranks, and its ranks share the
    compression. The sums inside are in float64 and in the order of ranks, so the bits do not depend on the transport.

    Attributes:
        number: of the node among all nodes.
        place: of the rank in its node, and the number of its shard.
        size: how many ranks the node has, the same for all nodes.
        groups: the ranks of all nodes.

    """

    number: int
    place: int
    size: int
    groups: Groups

    def exchange(self, schedule: Schedule) -> Exchange:
        """Return the exchange between nodes over the edges of `schedule`: its ranks are the numbers of nodes."""

    def mean_shard_(self, x: Tensor, shards: Sequence[slice]) -> None:
        """Average `x` (n,) over the ranks of the node, in place, but only in the shard of this rank."""

    def gather_shards_(self, x: Tensor, shards: Sequence[slice]) -> None:
        """Overwrite each shard of `x` (n,) with that of the rank that owns it."""


@dataclass(frozen=True)
class Mail:
    """A message received from a mailbox.

    Attributes:
        number: 1 for the first message on its edge, then 2, 3, ... without gaps.
        step: the step of the sender when it sent the message.
        payload: the content; a copy, which stays valid.

    """

    number: int
    step: int
    payload: Payload


@dataclass(frozen=True)
class Peer:
    """What a rank knows about a neighbor without asking it.

    Attributes:
        step: the last step that the neighbor has announced.
        is_done: whether it has announced that it has finished.
        has_ended: whether its process ended before it announced that; known only on the same machine.

    """

    step: int
    is_done: bool
    has_ended: bool


class Mailbox(Protocol):
    """One-sided messages between neighbors. Sending and receiving do not wait; messages arrive whole and in order.

    A sender may be `depth` messages ahead of the reader on each edge. `put` refuses a further one until the reader has
    read. Only making a mailbox, `settle` and `free` are collective on all ranks.

    Attributes:
        how: the name of the transport, for reports.
        bytes_sent: bytes of payloads, headers and notes.
        torn: how often the reader found a message that had not arrived completely.

    """

    rank: int
    size: int
    bytes_sent: int
    torn: int
    topology: Topology

    @property
    def how(self) -> str:
        """The name of the transport, for reports."""

    @property
    def needs_poke(self) -> bool:
        """Whether messages move faster if a rank calls `poke` during a long computation."""

    @property
    def rest(self) -> Callable[[float], float] | None:
        """Sleeps in simulated time until something arrives, for so many seconds at most, and returns what is left."""

    def put(self, payload: Payload, layout: Layout, targets: Sequence[int], step: int) -> list[int]:
        """Send `payload` to the `targets` that have room, and return these. `payload` may be changed afterwards.

        Raises:
            ExchangeError: the message is longer than the slots, or the transport failed.

        """

    def room(self, target: int) -> int:
        """Return how many messages to `target` there is room for."""

    def receive(self, layout: Layout | Mapping[int, Layout], up_to: float = math.inf) -> dict[int, list[Mail]]:
        """Return the messages that have arrived since the last call, by source rank, ascending, in order of sending.

        A message whose step is beyond `up_to` stays in the mailbox, and so do those behind it. `layout` may differ
        between sources.

        Raises:
            ExchangeError: a message has another layout, or is damaged.

        """

    def announce(self, step: int, is_done: bool = False) -> None:
        """Tell all neighbors this rank's step, and whether it has finished."""

    def peers(self) -> dict[int, Peer]:
        """Return what is known about each neighbor."""

    def poke(self) -> None:
        """Make progress on messages; for the middle of a long computation. Costs almost nothing."""

    def pause(self) -> None:
        """Yield the core for a moment; to be called in every loop that waits for messages."""

    def settle(self) -> None:
        """Wait until every message that was put can be received (collective on all ranks)."""

    def free(self) -> None:
        """Free the memory; messages not yet received are lost (collective on all ranks)."""


class Gather(Protocol):
    """A non-blocking all-gather of numbers."""

    def test(self) -> bool:
        """Return whether the numbers of all ranks are here, without waiting; if so, `wait` returns at once."""

    def wait(self) -> npt.NDArray[np.float64]:
        """Return the numbers, (ranks, numbers of each), not to be changed; collective on all ranks."""


class Counter(Protocol):
    """A shared counter that gives each value to one rank only. Making and freeing it are collective on all ranks."""

    def prefetch(self) -> None:
        """Begin to take the next value, unless it was begun already."""

    def test(self) -> bool:
        """Return whether the next value is here; `take` then returns at once."""

    def take(self) -> int:
        """Return the next value; waits unless it was prefetched early enough."""

    def free(self) -> None:
        """Free the memory."""


class FailureDetector(Protocol):
    """Detects ranks that have died, and makes a world of the survivors."""

    def look(self) -> None:
        """Raise RankLost if a rank has died; not collective. Waits for all ranks check this, too."""

    def watching(self) -> AbstractContextManager[None]:
        """Raise RankLost if the transport fails in the block because a rank has died; not collective."""

    def regrouped(self) -> AbstractContextManager[list[str]]:
        """Make the world one of the survivors, with new numbers; the block gets the names of those that have died.

        Collective on the survivors, after RankLost on each of them. Exchanges, mailboxes and counters of the old world
        can no longer be used, and must not be freed. If another rank dies while the block makes new ones, the run ends,
        or RankLost is raised again.
        """


class World(Protocol):
    """All ranks, seen from one of them. A method is collective on all ranks unless its docstring says otherwise."""

    rank: int
    size: int
    host: str
    local_rank: int
    local_size: int
    device: torch.device
    is_simulated: bool
    """Whether time is simulated."""

    notices: tuple[str, ...]
    """Lines that rank 0 should tell the user, e.g. that there is no GPU."""

    def exchange(self, schedule: Schedule) -> Exchange:
        """Return the exchange over the edges of `schedule`; both must have the same number of ranks."""

    def node(self, groups: Groups) -> Node:
        """Return the node of this rank, given the ranks of every node."""

    def mailbox(self, topology: Topology, nbytes: int, depth: int = 2) -> Mailbox:
        """Return the mailbox over the edges of `topology`, for messages of up to `nbytes` bytes.

        A source may be `depth` messages ahead of its reader. This takes `depth` times `nbytes` bytes for each source.
        """

    def all_gather(self, value: T) -> list[T]:
        """Return the (small, picklable) values of all ranks, by rank."""

    def broadcast(self, value: T) -> T:
        """Return rank 0's (small, picklable) value."""

    def broadcast_(self, x: Tensor, root: int = 0) -> None:
        """Overwrite `x` with the `x` of rank `root`."""

    def start_gather(self, values: Sequence[float]) -> Gather:
        """Begin to gather a few `values`, equally many on each rank; they travel while the ranks compute."""

    def counter(self, start: int = 0) -> Counter:
        """Return a counter whose first value is `start`, the same on all ranks."""

    def failure_detector(self, names: Sequence[str], in_step: bool) -> FailureDetector | None:
        """Return a detector of ranks that die, named by `names`; None where ranks die together, or unnoticed.

        `in_step` is whether all ranks do the same steps, and use nothing but an `Exchange` and what `World` has.
        """

    def now(self) -> float:
        """Return the time in seconds, from an arbitrary origin; simulated time in a simulation. Not collective."""

    def sleep(self, seconds: float) -> None:
        """Do nothing for `seconds`; not collective."""

    def mean_(self, x: Tensor) -> None:
        """Average `x` over all ranks, in place, in float64 by ascending rank; not counted as training traffic."""

    def barrier(self) -> None:
        """Wait for all ranks."""

    def abort(self, exit_code: int) -> NoReturn:
        """End all ranks at once; not collective."""


def check_schedule(schedule: Schedule, size: int) -> None:
    """Raise `TopologyError` unless `schedule` is made for `size` ranks."""
    if schedule.size != size:
        raise TopologyError(f"topology {schedule.name!r} is made for {schedule.size} ranks, but there are {size}")


def check_message(payload: Payload, layout: Layout, nbytes: int, source: int) -> None:
    """Raise `ExchangeError` unless `payload` accounts for all `nbytes` bytes of its message."""
    if layout.nbytes_of(payload) != nbytes:
        raise ExchangeError(
            f"message from rank {source}: {nbytes} bytes, where its layout says {layout.nbytes_of(payload)}; "
            "all ranks must use the same model and compressor"
        )


def all_reduce_nbytes(x: Tensor, size: int) -> int:
    """Return the bytes that a ring all-reduce of `x` makes each of `size` ranks send."""
    return 2 * (size - 1) * x.numel() * x.element_size() // size


def mean_in_order(vectors: Sequence[Tensor]) -> Tensor:
    """Return the mean (n,) of the ranks' vectors (n,) in their dtype, summed in float64 by ascending rank.

    Each kind of `World` averages with this function, so that their results agree bit for bit.
    """
    total = vectors[0].to(torch.float64, copy=True)
    for vector in vectors[1:]:
        total += vector
    total /= len(vectors)
    return total.to(vectors[0].dtype)
