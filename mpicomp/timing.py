"""Where the seconds of a step go: ``@timed("compress")`` on the few functions that the metrics name.

Each thread (a rank of the loopback is a thread) adds up its own seconds by name. A function that is called inside
another of the same name is part of that one and is not counted twice.
"""

from __future__ import annotations

import functools
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class _Clock(threading.local):
    """The seconds of the calling thread, and the names that it is inside of."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.open: set[str] = set()
        self.now: Callable[[], float] = time.perf_counter


_clock = _Clock()


def timed(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a function so that its wall-clock seconds are added under `name`."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            if name in _clock.open:
                return function(*args, **kwargs)
            _clock.open.add(name)
            start = _clock.now()
            try:
                return function(*args, **kwargs)
            finally:
                _clock.seconds[name] += _clock.now() - start
                _clock.open.discard(name)

        return wrapper

    return decorate


def take_seconds() -> dict[str, float]:
    """Return the seconds by name since the last call on this thread, and start again from zero."""
    seconds = dict(_clock.seconds)
    _clock.seconds.clear()
    return seconds


def use_clock(now: Callable[[], float]) -> None:
    """Measure the seconds of this thread by `now` from here on: in a simulation, by its time."""
    _clock.now = now
