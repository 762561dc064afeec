import os
import signal
import time

import pytest

from mpicomp.errors import ConfigError
from mpicomp.exchange import loopback
from mpicomp.run.stopping import Agreement, Reason, Status, StopRequests, signal_number


@pytest.fixture(autouse=True)
def handler():
    """Put the handler of the signal back after each test."""
    before = signal.getsignal(signal.SIGUSR1)
    yield
    signal.signal(signal.SIGUSR1, before)


def test_nothing_asks_at_first(tmp_path):
    requests = StopRequests()
    requests.watch(tmp_path / "stop", time.time() + 1000, lead_s=10)
    assert requests.reason() is Reason.NONE


def test_a_signal_asks_and_a_second_one_does_no_harm():
    requests = StopRequests("SIGUSR1")
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGUSR1)
        assert requests.reason() is Reason.SIGNAL


def test_a_file_asks(tmp_path):
    requests = StopRequests()
    requests.watch(tmp_path / "stop", None, lead_s=10)
    (tmp_path / "stop").touch()
    assert requests.reason() is Reason.STOP_FILE


@pytest.mark.parametrize(("limit", "lead", "asks_at"), [(1000, 120, 880), (100, 120, 75), (100, 0, 100)])
def test_the_clock_asks_ahead_of_the_limit_but_never_before_three_quarters_of_it(
    tmp_path, monkeypatch, limit, lead, asks_at
):
    now = time.time()
    requests = StopRequests()
    monkeypatch.setattr(time, "time", lambda: now)
    requests.watch(tmp_path / "stop", now + limit, lead)
    monkeypatch.setattr(time, "time", lambda: now + asks_at - 1)
    assert requests.reason() is Reason.NONE
    monkeypatch.setattr(time, "time", lambda: now + asks_at)
    assert requests.reason() is Reason.TIME_LIMIT


@pytest.mark.parametrize("name", ["KILL", "STOP", "USR3", ""])
def test_signals_that_cannot_be_caught_are_refused(name):
    with pytest.raises(ConfigError, match=r"run\.stop_signal"):
        signal_number(name)


def test_all_ranks_learn_at_the_same_step_what_one_knows():
    def serve(world):
        agreement, heard = Agreement(world, 10), []
        for step in range(10, 60):
            if agreement.is_due(step):
                mine = Status(stop=Reason.SIGNAL if world.rank == 2 and step >= 12 else Reason.NONE, writing=world.rank)
                heard.append((step, agreement.next_round(step, mine)))
        agreement.finish()
        return [(step, signs.stop, signs.writing) for step, signs in heard]

    first, *others = loopback.run(4, serve)
    assert all(other == first for other in others)
    assert first[0] == (10, 0, 0)  # nothing is known at first
    heard = [stop for _, stop, _ in first]
    assert heard[:2] == [0, 0]
    assert heard[-1] == Reason.SIGNAL
    assert {writing for _, _, writing in first[1:]} == {3}


def test_rounds_become_rarer_when_steps_are_short(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def serve(world):
        agreement, due = Agreement(world, 0), []
        for step in range(2000):
            if agreement.is_due(step):
                due.append(step)
                agreement.next_round(step, Status())
            clock[0] += 0.001
        agreement.finish()
        return due

    (due,) = loopback.run(1, serve)
    assert due[-1] - due[-2] == 250
    assert len(due) < 20
