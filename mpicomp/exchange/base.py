"""HOW messages travel: the protocols that algorithms and the training loop see. No MPI here.

A `World` is what a rank knows of all ranks; it makes an `Exchange` for a graph. Everything in `World` is for
set-up, diagnostics and evaluation and is not counted in ``bytes_sent``; training traffic goes through `Exchange`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NoReturn, Protocol, TypeVar

import torch
from torch import Tensor

from mpicomp.compression.message import Layout, Payload
from mpicomp.errors import ExchangeError, TopologyError
from mpicomp.topology.base import Schedule, Topology

T = TypeVar("T")


class Stopped(BaseException):
    """Unwinds a rank of the loopback after another one has failed; no `except Exception` of the user's catches it."""


class Pending(Protocol):
    """An exchange under way."""

    def test(self) -> bool:
        """Return whether all messages are there, and move on what is under way; `wait` then returns at once."""

    def wait(self) -> dict[int, Payload]:
        """Return the messages by source rank, ascending: the order of summation is fixed.

        The payloads are views, to be read only, and valid until the next `Exchange.start`.
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

    def mean_(self, x: Tensor) -> None:
        """Average `x` (n,) over all ranks, in place: an all-reduce, the one operation that is not neighbor-only.

        Counted as ``2 (size - 1) / size`` vectors sent a rank, what a ring all-reduce moves.
        """


@dataclass(frozen=True)
class Mail:
    """A message out of a mailbox.

    Attributes:
        number: the first on its edge is 1; none is left out.
        step: the sender's, when it sent this.
        payload: what it sent, to be kept as long as one likes.

    """

    number: int
    step: int
    payload: Payload


@dataclass(frozen=True)
class Peer:
    """What a rank knows of a neighbor without asking it.

    Attributes:
        step: the last one that it has announced.
        is_done: whether it has announced its end.
        silent_s: seconds since its last sign of life. A rank that computes for long without a call is silent too.
        has_ended: whether its process has gone without that; known on the same machine only.

    """

    step: int
    is_done: bool
    silent_s: float
    has_ended: bool


class Mailbox(Protocol):
    """One-sided messages between neighbors: nobody waits, and nothing is lost, torn or reordered.

    A sender may be `depth` messages ahead of the reader on each edge; a further one is refused until the reader has
    read. Making one, `settle` and `free` are collective on all ranks; nothing else is.

    Attributes:
        how: the way the bytes take, for people.
        bytes_sent: payloads, headers and notes.
        torn: how often a message was looked at while it was still arriving.

    """

    rank: int
    size: int
    bytes_sent: int
    torn: int
    topology: Topology

    @property
    def how(self) -> str:
        """The way the bytes take, for people."""

    @property
    def needs_poke(self) -> bool:
        """Whether messages move faster if a rank that computes for long pokes now and then."""

    def put(self, payload: Payload, layout: Layout, targets: Sequence[int], step: int) -> list[int]:
        """Send `payload` to those of `targets` that have room, and return them. `payload` may be changed afterwards.

        Raises:
            ExchangeError: the message is longer than the slots, or the transport failed.

        """

    def room(self, target: int) -> int:
        """Return how many messages `target` would take now."""

    def receive(self, layout: Layout | Mapping[int, Layout], up_to: float = math.inf) -> dict[int, list[Mail]]:
        """Return what has arrived since the last call: by source rank, ascending, each in the order it was sent.

        Messages whose step is beyond `up_to` stay where they are, with all that came after them. `layout` may differ
        from source to source.

        Raises:
            ExchangeError: a message is of another layout, or damaged.

        """

    def announce(self, step: int, is_done: bool = False) -> None:
        """Tell all neighbors this rank's step, and whether it has finished."""

    def peers(self) -> dict[int, Peer]:
        """Return what is known of each neighbor."""

    def poke(self) -> None:
        """Let messages pass, for the middle of a long computation; costs next to nothing."""

    def pause(self) -> None:
        """Leave the core to others for a moment; in every loop that waits for mail."""

    def settle(self) -> None:
        """Wait until everything that was put has arrived, and can be received (collective on all ranks)."""

    def free(self) -> None:
        """Give the memory back; what was not received is lost (collective on all ranks)."""


class Gather(Protocol):
    """Numbers of all ranks under way to all ranks."""

    def test(self) -> bool:
        """Return whether all ranks have given theirs, and move on what is under way; `wait` then returns at once."""

    def wait(self) -> list[list[float]]:
        """Return the numbers by rank; collective on all ranks."""


class Counter(Protocol):
    """A number that all ranks take from, each value once. Making and freeing it are collective on all ranks."""

    def prefetch(self) -> None:
        """Begin to take the next value, unless that has been done."""

    def test(self) -> bool:
        """Return whether the next value is here; `take` then returns at once."""

    def take(self) -> int:
        """Return the next value; waits where it has not been prefetched early enough."""

    def free(self) -> None:
        """Give the memory back."""


class FailureDetector(Protocol):
    """Sees which ranks die, and makes a world of the others."""

    def look(self) -> None:
        """Raise RankLost if a rank has died; not collective. Waiting for all ranks looks too."""

    def regrouped(self) -> AbstractContextManager[list[int]]:
        """Make the world that of the survivors, numbered anew; the block gets those that have died, ascending.

        Collective on the survivors, after RankLost on each of them. All that was made for the old world, an exchange, a
        mailbox or a counter, is of no use any more, and must not be freed. A rank that dies while the block makes new
        ones ends the run.
        """


class World(Protocol):
    """All ranks, seen from one of them. Every method is collective on all ranks, unless it says otherwise."""

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
        """Return the exchange over the edges of `schedule`, whose size must be this world's."""

    def mailbox(self, topology: Topology, nbytes: int, depth: int = 2) -> Mailbox:
        """Return the mailbox over the edges of `topology`, for messages of up to `nbytes` bytes.

        A source may be `depth` messages ahead of its reader: `depth` times `nbytes` bytes of memory for each source.
        """

    def all_gather(self, value: T) -> list[T]:
        """Return the (small, picklable) values of all ranks, by rank."""

    def broadcast(self, value: T) -> T:
        """Return rank 0's (small, picklable) value."""

    def broadcast_(self, x: Tensor, root: int = 0) -> None:
        """Overwrite `x` by that of rank `root`."""

    def start_gather(self, values: Sequence[float]) -> Gather:
        """Begin to collect the (few) `values` of all ranks, as many on each; they travel while the ranks compute."""

    def counter(self, start: int = 0) -> Counter:
        """Return a counter whose first value is `start`, the same on all ranks."""

    def failure_detector(self, names: Sequence[str]) -> FailureDetector | None:
        """Look after the ranks, of these `names`, from now on; None where one cannot die alone, or not be seen to."""

    def now(self) -> float:
        """Return the time in seconds, from any origin; not collective. A simulated world has a time of its own."""

    def sleep(self, seconds: float) -> None:
        """Do nothing for `seconds`; not collective."""

    def mean_(self, x: Tensor) -> None:
        """Average `x` over all ranks, in place, in float64 and by ascending rank; not counted as training traffic."""

    def barrier(self) -> None:
        """Wait for all ranks."""

    def abort(self, exit_code: int) -> NoReturn:
        """End all ranks at once; not collective."""


def check_schedule(schedule: Schedule, size: int) -> None:
    """Raise `TopologyError` unless `schedule` is made for `size` ranks."""
    if schedule.size != size:
        raise TopologyError(f"topology {schedule.name!r} is made for {schedule.size} ranks, but there are {size}")


def check_message(payload: Payload, layout: Layout, nbytes: int, source: int) -> None:
    """Raise `ExchangeError` unless the `payload` read from a message of `nbytes` bytes is all of it."""
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

    Every `World` averages by this function, so that all of them agree bit for bit.
    """
    total = vectors[0].to(torch.float64, copy=True)
    for vector in vectors[1:]:
        total += vector
    total /= len(vectors)
    return total.to(vectors[0].dtype)
