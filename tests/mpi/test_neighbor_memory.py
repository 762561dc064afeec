"""Memory that neighbors on the same machine read: what the contract of exchanges does not show."""

import gc
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from support import exchange_table

from mpicomp.compression.message import Field, Layout
from mpicomp.exchange.mpi import neighbor, neighbor_memory
from mpicomp.exchange.mpi.neighbor_memory import SHORTEST
from mpicomp.topology import Topology, complete, ring

LONG = Layout((Field("index", torch.int16, SHORTEST, True), Field("value", torch.float32, SHORTEST, True)))


@pytest.fixture(autouse=True)
def several_ranks_of_one_machine(world):
    if world.size == 1 or world.local_size < world.size:
        pytest.skip("needs ranks of one machine")


def message(rank, step):
    count = SHORTEST - (37 * rank + step) % 1000
    return {"index": torch.full((count,), rank, dtype=torch.int16), "value": torch.full((count,), float(step))}


def assert_arrived(payload, source, step):
    expected = message(source, step)
    assert all(torch.equal(payload[name], tensor) for name, tensor in expected.items())


def is_file_in_memory(descriptor):
    try:
        return str(descriptor.readlink()).startswith("/memfd:mpicomp ")
    except FileNotFoundError:  # that of the listing itself
        return False


def is_in_file_in_memory(tensor):
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(address, 16) for address in line.split()[0].split("-"))
        if begin <= tensor.data_ptr() < end:
            return "/memfd:mpicomp" in line
    return False


def open_files():
    gc.collect()
    return sum(is_file_in_memory(descriptor) for descriptor in Path("/proc/self/fd").iterdir())


def test_long_messages_are_read_where_the_sender_packed_them(world):
    topology = complete(world.size)
    exchange = world.exchange(topology)
    assert exchange.near == frozenset(topology.sources(world.rank))
    for step in range(6):
        received = exchange.start(message(world.rank, step), LONG, topology).wait()
        for source, payload in received.items():
            assert_arrived(payload, source, step)
            assert all(is_in_file_in_memory(tensor) for tensor in payload.values())
    assert len(exchange._memory._regions) <= 2  # a rank hears from each reader in each exchange


def test_a_sender_does_not_wait_for_readers_that_are_behind(world):
    mixing = np.eye(world.size)
    mixing[1, :2] = 0.5  # rank 0 sends to rank 1, which never answers
    topology = Topology("one edge", mixing)
    exchange = world.exchange(topology)
    if world.rank == 0:
        for step in range(5):
            exchange.start(message(0, step), LONG, topology).wait()
        assert len(exchange._memory._regions) == 5
    world.barrier()
    if world.rank == 1:
        for step in range(5):
            assert_arrived(exchange.start(message(1, step), LONG, topology).wait()[0], 0, step)
        exchange._memory.release()
    world.barrier()
    if world.rank == 0:
        assert all(map(exchange._memory._is_released, exchange._memory._regions))


def test_memory_of_shorter_messages_is_given_back(world):
    topology = ring(world.size)
    exchange = world.exchange(topology)
    for step, length in enumerate((SHORTEST, 4 * SHORTEST, 16 * SHORTEST, 16 * SHORTEST, 16 * SHORTEST)):
        layout = Layout((Field("value", torch.float32, length),))
        received = exchange.start({"value": torch.full((length,), float(step))}, layout, topology).wait()
        assert all(torch.equal(each["value"], torch.full((length,), float(step))) for each in received.values())
        world.barrier()
    regions = exchange._memory._regions
    assert {region.nbytes for region in regions} == {4 * 16 * SHORTEST}
    assert 512 * os.fstat(exchange._memory._messages.descriptor).st_blocks == sum(region.nbytes for region in regions)


def test_a_neighbor_that_cannot_see_the_memory_is_sent_messages(world, monkeypatch):
    if world.rank == 0:

        def refuse(pid, descriptor):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(neighbor_memory._File, "open", refuse)
    topology = complete(world.size)
    exchange = world.exchange(topology)
    others = set() if world.rank == 0 else set(topology.sources(world.rank)) - {0}
    assert exchange.near == others
    for step in range(6):
        received = exchange.start(message(world.rank, step), LONG, topology).wait()
        for source, payload in received.items():
            assert_arrived(payload, source, step)


MIXED = (exchange_table.on_a_ring, exchange_table.sending_each_neighbor_a_message_of_its_own)


@pytest.mark.parametrize("check", MIXED, ids=lambda check: check.__name__)
def test_contract_where_some_see_the_memory_and_others_do_not(world, check, monkeypatch):
    monkeypatch.setattr(neighbor, "SHORTEST", 1)
    if world.rank == 0:
        monkeypatch.delattr(neighbor_memory.os, "memfd_create")
    check(world)


def test_files_are_closed_with_the_exchange(world):
    before = open_files()
    exchange = world.exchange(ring(world.size))
    exchange.start(message(world.rank, 0), LONG, ring(world.size)).wait()
    assert open_files() > before
    exchange.free()
    del exchange
    assert open_files() == before
