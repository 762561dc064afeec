"""Work with files that may take long on one rank, while the others wait for it.

No watchdog must take that for a hang, so the ranks meet in short rounds. A rank that comes to them is alive, however
slow its file system is.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any, TypeVar

from mpicomp.exchange.base import World
from mpicomp.exchange.guard import together

T = TypeVar("T")

PATIENCE_S = 0.25
"""The length of a round in seconds."""

_threads = ThreadPoolExecutor(2, "patience")
"""The threads that work, for all ranks of this process: a thousand of them must not read at once."""


def patiently(world: World, work: Callable[[], T], moved: Callable[[], None] = lambda: None) -> T:
    """Do `work` in the background, wait for that of all ranks, and return its result; collective on all ranks.

    Args:
        world: the ranks.
        work: what to do on this rank; it must not communicate.
        moved: called again and again meanwhile.

    Raises:
        MpicompError: the work of a rank has raised one; the same on all ranks.

    """
    future = _threads.submit(work)
    try:
        wait_in_rounds(world, partial(_is_running, future), moved)
    finally:
        wait([future])  # even if a rank is lost: the work may use what its caller changes next
    with together(world):
        return future.result()


def wait_in_rounds(world: World, is_busy: Callable[[float], bool], moved: Callable[[], None]) -> None:
    """Wait until no rank is busy; collective on all ranks.

    Args:
        world: the ranks. In simulated time, where messages would take time, nothing is waited for.
        is_busy: waits until this rank is no longer busy, but at most so many seconds; returns whether it still is.
        moved: called after each round.

    """
    if not world.is_simulated:
        while any(world.all_gather(is_busy(PATIENCE_S))):
            moved()


def _is_running(future: Future[Any], seconds: float) -> bool:
    """Wait for `future`, at most so many seconds, and return whether it still runs."""
    wait([future], seconds)
    return not future.done()
