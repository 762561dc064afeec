"""What the watchdog says, when it ends the process, and when it keeps quiet; the threads of the loopback."""

import os
import re
import subprocess
import sys
import threading
import time

import pytest

from mpicomp.exchange import loopback, watchdog
from mpicomp.exchange.watchdog import Member, Waiting, Watchdog, roster

TIMEOUT_S = 0.4
TOO_LONG_S = 2 * TIMEOUT_S


class Pair:
    """Rank 0 of two, as a watchdog sees it."""

    rank, size, host = 0, 2, "here"

    def all_gather(self, value):
        return [value, Member(1, "there", 4711)]


@pytest.fixture
def exits(monkeypatch):
    """The exit codes with which the process would have ended."""
    codes = []
    monkeypatch.setattr(watchdog.os, "_exit", codes.append)
    monkeypatch.setattr(watchdog, "GRACE_S", TIMEOUT_S)
    return codes


def wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_rank_that_computes_for_too_long_shows_its_stack_and_ends(exits, capsys):
    def brood():
        wait_until(lambda: exits)

    with Watchdog(Pair(), TIMEOUT_S) as dog:
        dog.moved(417)
        brood()
    assert exits[0] == 4
    error = capsys.readouterr().err
    assert re.match(
        r"mpicomp: error: rank 0 on here: no progress for 0\.4\d* s: computes in step 417; "
        r"ends in 0\.4 s unless it moves \(run\.hang_timeout_s = 0\.4\); its stack:\n  File ",
        error,
    )
    assert "in brood\n" in error
    assert error.count("mpicomp: error:") == 1


@pytest.mark.parametrize(
    ("missing", "named"),
    [
        (lambda: [1], "rank 1 on there (PID 4711) ("),
        (lambda: [1, 0, 1], f"rank 0 on here (PID {os.getpid()}), rank 1 on there (PID 4711) ("),
        (None, "all ranks ("),
        (list, "its turn ("),
    ],
    ids=["one", "some", "all", "none"],  # not the PID, which differs between the processes that run the tests
)
def test_a_rank_that_waits_says_for_whom(missing, named, exits, capsys):
    with Watchdog(Pair(), TIMEOUT_S), Waiting("message", missing):
        wait_until(lambda: exits)
    error = capsys.readouterr().err
    assert f": waits for {named}message before the first step); ends in" in error
    assert error.count("\n") == 1


def test_of_many_missing_ranks_some_are_named(exits, capsys):
    class Crowd(Pair):
        def all_gather(self, value):
            return [value, *(Member(rank, "there", 4711) for rank in range(1, 100))]

    with Watchdog(Crowd(), TIMEOUT_S), Waiting("message", lambda: range(1, 100)):
        wait_until(lambda: exits)
    assert "rank 8 on there (PID 4711) and 91 more (message" in capsys.readouterr().err


def test_a_slow_rank_that_moves_is_left_alone(exits, capsys):
    with Watchdog(Pair(), TIMEOUT_S) as dog:
        for step in range(8):
            dog.moved(step if step % 2 else None)
            time.sleep(TIMEOUT_S / 4)
    assert not exits
    assert capsys.readouterr().err == ""


def test_a_rank_that_moves_within_the_grace_goes_on(exits, monkeypatch, capsys):
    monkeypatch.setattr(watchdog, "GRACE_S", 20)
    told = []
    monkeypatch.setattr(watchdog, "_print", told.append)
    with Watchdog(Pair(), TIMEOUT_S) as dog:
        dog.moved(3)
        wait_until(lambda: told)
        dog.moved(4)
        wait_until(lambda: len(told) == 2)
        wait_until(lambda: len(told) == 3)
    assert told[1] == "mpicomp: warning: rank 0 on here: moves again in step 4"
    assert "no progress" in told[2], "it is watched as before"
    assert not exits


def test_a_process_that_was_stopped_does_not_age(exits, monkeypatch, capsys):
    real, leap = time.monotonic, 0.0
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: real() + leap)
    with Watchdog(Pair(), TIMEOUT_S) as dog:
        for _ in range(4):
            leap += 100 * TIMEOUT_S
            time.sleep(TIMEOUT_S / 4)
            dog.moved()
    assert not exits
    assert capsys.readouterr().err == ""


def test_zero_is_for_ever():
    with Watchdog(Pair(), 0) as dog:
        dog.moved(1)
        assert not [thread for thread in threading.enumerate() if thread.name == "watchdog"]


def test_its_thread_ends_with_the_block():
    with pytest.raises(KeyError), Watchdog(Pair(), TIMEOUT_S):
        raise KeyError
    assert not [thread for thread in threading.enumerate() if thread.name == "watchdog"]


def test_notes_are_nested_and_end_with_the_block(exits, capsys):
    with Watchdog(Pair(), TIMEOUT_S), Waiting("mail", lambda: [1]):
        with pytest.raises(KeyError), Waiting("turn"):
            raise KeyError
        wait_until(lambda: exits)
    assert "(mail before" in capsys.readouterr().err


def test_the_roster_tells_where_each_rank_runs():
    for members in loopback.run(3, roster):
        assert [member.rank for member in members] == [0, 1, 2]
        assert {member.pid for member in members} == {os.getpid()}


LOOPBACK = """
import sys, time, torch
from mpicomp.compression.message import Field, Layout
from mpicomp.exchange import loopback
from mpicomp.exchange.watchdog import Watchdog
from mpicomp.topology import ring

def brood():
    time.sleep(60)

def rank(world):
    topology, layout = ring(world.size), Layout((Field("x", torch.float32, 4),))
    with Watchdog(world, 1.0) as dog:
        exchange = world.exchange(topology)
        for step in range(9):
            dog.moved(step)
            is_time = step == 3
            BODY

loopback.run(5, rank, cores=CORES)
"""


def run_loopback(body, cores):
    code = LOOPBACK.replace("BODY", body).replace("CORES", str(cores))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert done.returncode == 4, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("mpicomp: error: ")]
    found = {int(re.search(r"error: rank (\d)", line)[1]): line for line in lines}
    assert sorted(found) == [0, 1, 2, 3, 4], done.stderr
    assert done.stderr.count("in brood\n") == 1
    return found


def waits(line):
    """Return the ranks that a line says are waited for."""
    return [int(rank) for rank in re.findall(r"rank (\d) on", line.split("waits for", 1)[1])]


def test_threads_say_whom_they_wait_for():
    exchange = "exchange.start({'x': torch.zeros(4)}, layout, topology).wait()"
    found = run_loopback(f"is_time and world.rank == 2 and brood(); {exchange}", cores=2)
    assert "computes in step 3" in found[2]
    assert waits(found[1]) == waits(found[3]) == [2]
    assert "(message in step 3)" in found[1]
    assert waits(found[0]) == [1]
    assert waits(found[4]) == [3]
    assert "(message in step 4)" in found[4]


def test_threads_know_who_is_missing_in_a_collective_operation():
    found = run_loopback("is_time and world.rank == 2 and brood(); world.barrier()", cores=2)
    assert all(waits(found[rank]) == [2] and "(barrier in step 3)" in found[rank] for rank in (0, 1, 3, 4))


def test_threads_that_have_no_core_wait_for_their_turn():
    found = run_loopback("world.barrier(); is_time and brood()", cores=1)
    assert sum("waits for its turn (barrier in step 3)" in line for line in found.values()) == 4
