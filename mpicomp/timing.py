"""Seconds of a step by part: ``@timed("compress")`` marks the few functions whose time the metrics report.

Each thread (a rank of the loopback is a thread) adds up its own seconds by part. Every moment counts once: if a
function of one part calls a function of another, the time of the inner one counts for the inner part only. A `Recorder`
also records when these functions ran. ``@traced("select")`` marks further functions for the recorder only.
"""

from __future__ import annotations

import functools
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

HIDDEN = "exchange_hidden"
"""The part that `Underway` counts; it is not included in the sum of the parts."""

SHORTEST_S = 1e-6
"""A gap between two events that is shorter gets no event of its own."""


IDLE_S = 100e-6
"""A gap between two idle times that is shorter is counted as idle."""


class Event(NamedTuple):
    """A recorded call or period.

    Attributes:
        name: of the function or period.
        category: the part to which its seconds count; empty for none.
        begin: in seconds, by the clock of the thread.
        end: the same.

    """

    name: str
    category: str
    begin: float
    end: float


@dataclass
class Recorder:
    """Records the first events of a thread.

    Attributes:
        steps: how many steps to record.
        limit: how many events to record at most.
        push: called with the name when an event begins (NVTX).
        pop: called when an event ends.
        on_full: called between two events when the recorder is full: after the last step, or at the limit.
        events: in the order of their ends.

    """

    steps: int
    limit: int
    push: Callable[[str], object] | None = None
    pop: Callable[[], object] | None = None
    on_full: Callable[[], object] | None = None
    events: list[Event] = field(default_factory=list)
    _shown: int = 0

    @property
    def is_full(self) -> bool:
        """Whether the recorder takes no further event."""
        return self.steps <= 0 or len(self.events) >= self.limit

    def begin(self, name: str) -> None:
        """Tell the profiler that an event begins."""
        if self.push:
            self.push(name)

    def end(self, name: str, category: str, begin: float, end: float) -> None:
        """Record an event; to be called for each `begin`."""
        if self.pop:
            self.pop()
        self.add(name, category, begin, end)

    def add(self, name: str, category: str, begin: float, end: float) -> None:
        """Record an event if the recorder is not full."""
        if not self.is_full:
            self.events.append(Event(name, category, begin, end))

    def add_rest(self, begin: float, end: float) -> None:
        """Record as ``mix`` the time from `begin` to `end` in which no event since the last call ran."""
        known = [event for event in self.events[self._shown :] if event.category not in ("", "mix")]
        for event in [*sorted(known, key=lambda event: event.begin), Event("", "", end, end)]:
            if event.begin - begin >= SHORTEST_S:
                self.add("mix", "mix", begin, event.begin)
            begin = max(begin, event.end)
        self._shown = len(self.events)
        if self.is_full and self.on_full:
            self.on_full()

    def add_idle(self, begin: float, end: float) -> None:
        """Record the time from `begin` to `end` as ``idle``; idle times that follow one another become one event.

        Short work between them, such as checking for something to do, then counts as idle.
        """
        last = self.events[-1] if self.events else None
        if last and last.name == "idle" and begin - last.end < IDLE_S and not self.is_full:
            self.events[-1] = last._replace(end=end)
        else:
            self.add("idle", "wait", begin, end)
        self._shown = len(self.events)

    def end_step(self, begin: float, end: float) -> None:
        """Record a step, and as ``mix`` the time in it without events."""
        self.add_rest(begin, end)
        self.add("step", "", begin, end)
        self._shown = len(self.events)
        self.steps -= 1
        if self.is_full and self.on_full:
            self.on_full()


class _Clock:
    """The seconds of a thread by part, its present part, and the time since which it has counted for that part."""

    __slots__ = ("now", "part", "recorder", "seconds", "since", "taken")

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.part: str | None = None
        self.since = 0.0
        self.taken = 0.0  # seconds of exchanges that `take_seconds` has given out
        self.now: Callable[[], float] = time.perf_counter
        self.recorder: Recorder | None = None


class _Clocks(threading.local):
    """The clock of the calling thread; looked up once in each call, because this lookup takes most of the time."""

    def __init__(self) -> None:
        self.own = _Clock()


_clocks = _Clocks()


def timed(part: str, event: str | None = None, *, is_event: bool = True) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a function so that its wall-clock seconds are added under `part`.

    Args:
        part: of a step.
        event: its name for a `Recorder`; by default that of the function.
        is_event: whether a `Recorder` records it.

    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        name = event or function.__name__.strip("_")

        @functools.wraps(function)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            clock = _clocks.own
            outer = clock.part
            recorder = clock.recorder if is_event else None
            if outer == part and recorder is None:
                return function(*args, **kwargs)
            begin = clock.now()
            if outer is not None:
                clock.seconds[outer] += begin - clock.since
            clock.part, clock.since = part, begin
            if recorder is not None:
                recorder.begin(name)
            try:
                return function(*args, **kwargs)
            finally:
                end = clock.now()
                clock.seconds[part] += end - clock.since
                clock.part, clock.since = outer, end
                if recorder is not None:
                    recorder.end(name, part, begin, end)

        return wrapper

    return decorate


def traced(name: str, category: str = "mix") -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a function so that a `Recorder` records it; its seconds count for the part that calls it.

    `category` is used if no part calls it.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            clock = _clocks.own
            recorder = clock.recorder
            if recorder is None:
                return function(*args, **kwargs)
            begin = clock.now()
            recorder.begin(name)
            try:
                return function(*args, **kwargs)
            finally:
                recorder.end(name, clock.part or category, begin, clock.now())

        return wrapper

    return decorate


class Underway:
    """Counts, as `HIDDEN`, the seconds in which messages travel while the rank does other work.

    They go from the end of the timed function that makes this object to the begin of the function that calls `arrived`.
    The seconds of other ``exchange`` functions in between are exposed and not counted here, so none counts twice.
    """

    def __init__(self) -> None:
        self._is_over = False
        self._before = self._elsewhere()

    def arrived(self) -> None:
        """Count the time until now; later calls have no effect."""
        if not self._is_over:
            self._is_over = True
            _clocks.own.seconds[HIDDEN] += self._elsewhere() - self._before

    @staticmethod
    def _elsewhere() -> float:
        """Return the time not spent in exchanges, from an arbitrary origin."""
        clock = _clocks.own
        assert clock.part == "exchange"
        return clock.since - clock.seconds["exchange"] - clock.taken


def take_seconds() -> dict[str, float]:
    """Return the seconds by part since the last call on this thread, and reset them to zero."""
    clock = _clocks.own
    seconds = dict(clock.seconds)
    clock.taken += seconds.get("exchange", 0.0)
    clock.seconds.clear()
    return seconds


def now() -> float:
    """Return the time in seconds, by the clock of this thread."""
    return _clocks.own.now()


def use_clock(now: Callable[[], float]) -> None:
    """Measure the seconds of this thread with `now` from here on; a simulation passes simulated time."""
    _clocks.own.now = now


def record(recorder: Recorder | None) -> None:
    """Let `recorder` record the events of this thread from here on."""
    _clocks.own.recorder = recorder


def recorder() -> Recorder | None:
    """Return the recorder of this thread, or None."""
    return _clocks.own.recorder
