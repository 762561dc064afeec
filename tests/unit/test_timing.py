"""Seconds by part, hidden seconds, and events, by a clock that only the test moves."""

import threading

import pytest
import torch

from mpicomp import timing
from mpicomp.compression.message import Field, Layout
from mpicomp.exchange import loopback
from mpicomp.timing import HIDDEN, Recorder, record, take_seconds, timed, traced, use_clock
from mpicomp.topology import ring

LAYOUT = Layout((Field("x", torch.float32, 4),))


class Clock(threading.local):
    """The time of a thread."""

    time = 0.0

    def __call__(self):
        return self.time

    def go(self, seconds):
        self.time += seconds


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(timing, "_clocks", timing._Clocks())
    clock = Clock()
    use_clock(clock)
    return clock


def functions(clock):
    @traced("pack")
    def pack():
        clock.go(0.25)

    @timed("exchange", "send")
    def send():
        clock.go(1)
        pack()

    @timed("gradient")
    def layer():
        clock.go(0.5)

    @timed("gradient")
    def gradient(fails=False):
        clock.go(10)
        send()
        layer()
        if fails:
            raise ValueError

    return gradient, send


def test_every_instant_is_counted_once(clock):
    gradient, send = functions(clock)
    gradient()
    send()
    assert take_seconds() == {"gradient": 10.5, "exchange": 2.5}
    assert take_seconds() == {}


def test_an_error_ends_a_part(clock):
    gradient, send = functions(clock)
    with pytest.raises(ValueError):
        gradient(fails=True)
    clock.go(100)
    send()
    assert take_seconds() == {"gradient": 10.5, "exchange": 2.5}


def test_events_nest_and_a_step_has_no_gap(clock):
    gradient, send = functions(clock)
    profiled, full = [], []
    recorder = Recorder(
        2, 100, profiled.append, lambda: profiled.append("end"), lambda: full.append(len(recorder.events))
    )
    record(recorder)
    for _ in range(3):
        begin = clock()
        clock.go(3)
        gradient()
        clock.go(2)
        send()
        recorder.end_step(begin, clock())
    first = [event for event in recorder.events if event.end <= 18]
    assert sorted(first, key=lambda event: (event.begin, -event.end)) == [
        ("step", "", 0, 18),
        ("mix", "mix", 0, 3),
        ("gradient", "gradient", 3, 14.75),
        ("send", "exchange", 13, 14.25),
        ("pack", "exchange", 14, 14.25),
        ("layer", "gradient", 14.25, 14.75),
        ("mix", "mix", 14.75, 16.75),
        ("send", "exchange", 16.75, 18),
        ("pack", "exchange", 17.75, 18),
    ]
    assert recorder.is_full and len(recorder.events) == 2 * len(first)
    assert full[0] == 2 * len(first)
    assert profiled[:8] == ["gradient", "send", "pack", "end", "end", "layer", "end", "end"]


def test_no_more_events_than_the_limit(clock):
    _, send = functions(clock)
    recorder = Recorder(10**9, 7)
    record(recorder)
    for _ in range(100):
        send()
    assert len(recorder.events) == 7


def test_idle_times_that_follow_on_each_other_are_one(clock):
    recorder = Recorder(9, 9)
    for begin, end in ((0, 1), (1 + 5e-5, 2), (3, 4)):
        recorder.add_idle(begin, end)
    assert recorder.events == [("idle", "wait", 0, 2), ("idle", "wait", 3, 4)]


def hidden(world, clock, behind):
    """Return the seconds of an exchange, where `behind` is done while it is under way."""
    use_clock(clock)
    exchange = world.exchange(ring(world.size))
    pending = exchange.start({"x": torch.ones(4)}, LAYOUT, exchange.schedule)
    world.barrier()  # all messages are there
    behind(pending)
    pending.wait()
    clock.go(50)
    return take_seconds()


def test_hidden_seconds_end_where_messages_are_seen(clock):
    def look(pending):
        clock.go(2)
        assert pending.test()
        clock.go(30)
        assert pending.test()

    for seconds in loopback.run(3, hidden, clock, look):
        assert seconds == {"exchange": 0, HIDDEN: 2}


def test_hidden_seconds_are_at_most_those_until_the_wait(clock):
    for seconds in loopback.run(3, hidden, clock, lambda _: clock.go(7)):
        assert seconds == {"exchange": 0, HIDDEN: 7}


def test_seconds_that_are_taken_meanwhile_are_not_hidden():
    """With messages under way from one step into the next."""

    def serve(world):
        use_clock(clock := Clock())
        exchange = world.exchange(ring(world.size))
        timed("exchange")(clock.go)(100)
        pending = exchange.start({"x": torch.ones(4)}, LAYOUT, exchange.schedule)
        clock.go(1)
        first = take_seconds()
        timed("exchange")(clock.go)(10)
        clock.go(2)
        pending.wait()
        return first, take_seconds()

    assert loopback.run(2, serve) == [({"exchange": 100}, {"exchange": 10, HIDDEN: 3})] * 2


def test_nothing_is_hidden_without_work_or_without_neighbors(clock):
    assert loopback.run(2, hidden, clock, lambda _: None) == [{"exchange": 0, HIDDEN: 0}] * 2
    assert loopback.run(1, hidden, clock, lambda _: clock.go(7)) == [{"exchange": 0}]


def test_exposed_seconds_are_not_hidden_too(clock):
    """Of two messages, one behind the other, as in a relay."""

    def serve(world):
        use_clock(clock)
        exchange = world.exchange(ring(world.size))
        waste = timed("exchange")(lambda: clock.go(100))
        pending = exchange.start({"x": torch.ones(4)}, LAYOUT, exchange.schedule)
        clock.go(1)
        waste()
        clock.go(2)
        pending.wait()
        return take_seconds()

    assert loopback.run(2, serve) == [{"exchange": 100, HIDDEN: 3}] * 2
