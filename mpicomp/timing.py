"""Where the seconds of a step go: ``@timed("compress")`` on the few functions that the metrics name.

Each thread (a rank of the loopback is a thread) adds up its own seconds by part. Every instant is counted once: where a
function of one part calls one of another, the seconds of the inner one are the inner part's alone. A `Recorder` takes
down, in addition, when which of these functions ran; ``@traced("select")`` is for what it should show beside them.
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
"""The part that `Underway` counts: not a part of the others' sum."""

SHORTEST_S = 1e-6
"""What lies between two events and is shorter gets no event of its own."""


IDLE_S = 100e-6
"""What lies between two idle times and is shorter belongs to them."""


class Event(NamedTuple):
    """What ran when.

    Attributes:
        name: what it is.
        category: the part whose seconds it belongs to; empty if to none.
        begin: in seconds, by the clock of the thread.
        end: the same.

    """

    name: str
    category: str
    begin: float
    end: float


@dataclass
class Recorder:
    """Takes down the first events of a thread.

    Attributes:
        steps: how many steps to take down.
        limit: how many events to take down at most.
        push: called with the name when an event begins (NVTX).
        pop: called when it ends.
        on_full: called when it is found full between two events, with the last step or at the limit.
        events: as they have ended.

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
        """Whether there is no room for another event."""
        return self.steps <= 0 or len(self.events) >= self.limit

    def begin(self, name: str) -> None:
        """Tell the profiler."""
        if self.push:
            self.push(name)

    def end(self, name: str, category: str, begin: float, end: float) -> None:
        """Take an event down; to be called for each `begin`."""
        if self.pop:
            self.pop()
        self.add(name, category, begin, end)

    def add(self, name: str, category: str, begin: float, end: float) -> None:
        """Take an event down if there is room."""
        if not self.is_full:
            self.events.append(Event(name, category, begin, end))

    def add_rest(self, begin: float, end: float) -> None:
        """Take down as ``mix`` what the events since the last call leave of the time from `begin` to `end`."""
        known = [event for event in self.events[self._shown :] if event.category not in ("", "mix")]
        for event in [*sorted(known, key=lambda event: event.begin), Event("", "", end, end)]:
            if event.begin - begin >= SHORTEST_S:
                self.add("mix", "mix", begin, event.begin)
            begin = max(begin, event.end)
        self._shown = len(self.events)
        if self.is_full and self.on_full:
            self.on_full()

    def add_idle(self, begin: float, end: float) -> None:
        """Take down as ``idle`` the time from `begin` to `end`; what follows on idle time at once is one event with it.

        The work between two looks for something to do counts for it then.
        """
        last = self.events[-1] if self.events else None
        if last and last.name == "idle" and begin - last.end < IDLE_S and not self.is_full:
            self.events[-1] = last._replace(end=end)
        else:
            self.add("idle", "wait", begin, end)
        self._shown = len(self.events)

    def end_step(self, begin: float, end: float) -> None:
        """Take a step down, with what its events leave of it."""
        self.add_rest(begin, end)
        self.add("step", "", begin, end)
        self._shown = len(self.events)
        self.steps -= 1
        if self.is_full and self.on_full:
            self.on_full()


class _Clock:
    """The seconds of a thread, the part that it is inside of, and since when it counts for that."""

    __slots__ = ("now", "part", "recorder", "seconds", "since", "taken")

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.part: str | None = None
        self.since = 0.0
        self.taken = 0.0  # seconds of exchanges that `take_seconds` has given out
        self.now: Callable[[], float] = time.perf_counter
        self.recorder: Recorder | None = None


class _Clocks(threading.local):
    """That of the calling thread; looked up once a call, because that takes longer than all else."""

    def __init__(self) -> None:
        self.own = _Clock()


_clocks = _Clocks()


def timed(part: str, event: str | None = None, *, is_event: bool = True) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a function so that its wall-clock seconds are added under `part`.

    Args:
        part: of a step.
        event: its name for a `Recorder`; by default that of the function.
        is_event: whether a `Recorder` takes it down.

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
    """Decorate a function so that a `Recorder` takes it down; its seconds stay those of the part that it is in.

    `category` is for where it is in none.
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
    """Counts under `HIDDEN` the seconds in which messages are under way behind other work.

    They go from the end of the timed function that makes this, to the begin of the one that calls `arrived`, without
    what other functions of the part ``exchange`` take meanwhile: those seconds are exposed, and none is counted twice.
    """

    def __init__(self) -> None:
        self._is_over = False
        self._before = self._elsewhere()

    def arrived(self) -> None:
        """Count the time so far; once only."""
        if not self._is_over:
            self._is_over = True
            _clocks.own.seconds[HIDDEN] += self._elsewhere() - self._before

    @staticmethod
    def _elsewhere() -> float:
        """Return the time that was not spent in exchanges, from any origin."""
        clock = _clocks.own
        assert clock.part == "exchange"
        return clock.since - clock.seconds["exchange"] - clock.taken


def take_seconds() -> dict[str, float]:
    """Return the seconds by part since the last call on this thread, and start again from zero."""
    clock = _clocks.own
    seconds = dict(clock.seconds)
    clock.taken += seconds.get("exchange", 0.0)
    clock.seconds.clear()
    return seconds


def now() -> float:
    """Return the time in seconds, by the clock of this thread."""
    return _clocks.own.now()


def use_clock(now: Callable[[], float]) -> None:
    """Measure the seconds of this thread by `now` from here on: in a simulation, by its time."""
    _clocks.own.now = now


def record(recorder: Recorder | None) -> None:
    """Let `recorder` take down the events of this thread from here on."""
    _clocks.own.recorder = recorder


def recorder() -> Recorder | None:
    """Return what takes down the events of this thread."""
    return _clocks.own.recorder
