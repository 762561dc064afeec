"""Ranks as threads: results, failures, deadlocks, and what they leave behind."""

import subprocess
import sys
import threading
import time

import pytest
import torch

from mpicomp.compression.message import Field, Layout
from mpicomp.errors import ConfigError, DataError, ExchangeError
from mpicomp.exchange import loopback
from mpicomp.exchange.guard import describe, together
from mpicomp.topology import complete, ring

LAYOUT = Layout((Field("x", torch.float32, 4),))


def send(world, exchange, topology):
    return exchange.start({"x": torch.full((4,), float(world.rank))}, LAYOUT, topology)


def test_results_come_by_rank_and_arguments_are_passed_on():
    assert loopback.run(5, lambda world, a, b: (world.rank, a + b), 1, 2) == [(rank, 3) for rank in range(5)]


def test_no_rank_at_all_is_refused():
    with pytest.raises(ValueError, match="at least one rank"):
        loopback.run(0, lambda world: None)


def test_mpi_is_not_started():
    code = (
        "import sys; import mpicomp; from mpicomp.exchange import base, guard, loopback\n"
        "loopback.run(3, lambda world: world.barrier())\n"
        "assert 'mpi4py' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_an_error_stops_the_ranks_that_wait_for_messages():
    def function(world):
        topology = ring(world.size)
        exchange = world.exchange(topology)
        for step in range(10):
            if world.rank == 2 and step == 3:
                raise DataError("shard 2 is damaged")
            send(world, exchange, topology).wait()

    with pytest.raises(DataError, match="shard 2 is damaged") as caught:
        loopback.run(4, function)
    assert caught.value.exit_code == 3
    assert describe(caught.value) == "shard 2 is damaged\non rank 2 of 4 (loopback)"


def test_an_error_stops_the_ranks_that_wait_in_a_collective():
    def function(world):
        if world.rank == 0:
            raise KeyError("only here")
        world.barrier()

    with pytest.raises(KeyError, match="only here"):
        loopback.run(3, function)


def test_a_stopped_rank_cannot_go_on_by_catching_exceptions():
    reached = []

    def function(world):
        if world.rank == 0:
            raise ConfigError("bad")
        try:
            world.barrier()
        except Exception:
            reached.append(world.rank)

    with pytest.raises(ConfigError):
        loopback.run(3, function)
    assert reached == []


def test_cleanup_of_stopped_ranks_runs():
    closed = set()

    def function(world):
        try:
            if world.rank == 1:
                raise ConfigError("bad")
            world.barrier()
        finally:
            closed.add(world.rank)

    with pytest.raises(ConfigError):
        loopback.run(2, function)
    assert 1 in closed  # rank 0 is there too, unless it had not begun


def test_a_rank_that_leaves_early_is_a_deadlock():
    def function(world):
        topology = ring(world.size)
        exchange = world.exchange(topology)
        for _ in range(4 if world.rank == 1 else 5):
            send(world, exchange, topology).wait()

    with pytest.raises(ExchangeError, match=r"deadlock: 2 of 3 ranks.*rank 0 for \[1\].*rank 2 for \[1\]"):
        loopback.run(3, function)


def test_ranks_in_different_operations_are_a_deadlock():
    def function(world):
        topology = complete(world.size)
        exchange = world.exchange(topology)
        if world.rank == 0:
            world.barrier()
        else:
            send(world, exchange, topology).wait()

    with pytest.raises(ExchangeError, match="deadlock: 2 of 2 ranks"):
        loopback.run(2, function)


def test_a_missing_collective_is_a_deadlock():
    with pytest.raises(ExchangeError, match="wait for a collective operation"):
        loopback.run(4, lambda world: None if world.rank == 3 else world.all_gather(1))


def test_abort_ends_all_ranks():
    def function(world):
        if world.rank == 1:
            world.abort(7)
        world.barrier()

    with pytest.raises(SystemExit) as caught:
        loopback.run(3, function)
    assert caught.value.code == 7


def test_an_agreed_error_is_the_one_raised():
    def function(world):
        with together(world):
            if world.rank > 0:
                raise DataError("no file")

    with pytest.raises(DataError) as caught:
        loopback.run(3, function)
    assert str(caught.value) == "no file (on ranks 1, 2)"
    assert getattr(caught.value, "__notes__", []) == []


def test_no_thread_is_left_and_torch_keeps_its_threads():
    before = threading.active_count(), torch.get_num_threads()
    seen = loopback.run(4, lambda world: torch.get_num_threads())
    with pytest.raises(ConfigError):
        loopback.run(4, lambda world: (_ for _ in ()).throw(ConfigError("bad")))
    assert (threading.active_count(), torch.get_num_threads()) == before
    assert len(set(seen)) == 1


def test_waiting_ranks_do_not_burn_the_core():
    def function(world):
        if world.rank == 0:
            time.sleep(0.5)
        world.barrier()

    before = time.process_time()
    loopback.run(8, function)
    assert time.process_time() - before < 0.25


def test_hundreds_of_ranks():
    def function(world):
        topology = ring(world.size)
        exchange = world.exchange(topology)
        total = 0.0
        for _ in range(3):
            total += sum(float(payload["x"][0]) for payload in send(world, exchange, topology).wait().values())
        x = torch.full((10,), float(world.rank))
        world.mean_(x)
        return total, float(x[0])

    results = loopback.run(300, function)
    assert results[5] == (3 * (4 + 6), 149.5)


def test_one_packed_message_is_read_in_place_by_all_receivers():
    def function(world):
        topology = complete(world.size)
        received = send(world, world.exchange(topology), topology).wait()
        places = world.all_gather({source: payload["x"].data_ptr() for source, payload in received.items()})
        return {place[0] for rank, place in enumerate(places) if rank != 0}

    assert all(len(places) == 1 for places in loopback.run(4, function))


def test_buffers_are_used_again():
    def function(world):
        topology = ring(world.size)
        exchange = world.exchange(topology)
        places = set()
        for _ in range(30):
            places |= {payload["x"].data_ptr() for payload in send(world, exchange, topology).wait().values()}
        return len(places)

    assert max(loopback.run(5, function)) <= 2 * 4  # per source: one in use, and up to three while ranks drift apart
