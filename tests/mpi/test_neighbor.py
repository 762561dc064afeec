"""The neighbor exchange over MPI: the table of the contract, and what only MPI has."""

import numpy as np
import pytest
import torch
from support.exchange_table import TABLE, VARIABLE, message

from mpicomp.compression.message import Field, Layout
from mpicomp.errors import ExchangeError
from mpicomp.exchange.mpi import neighbor
from mpicomp.exchange.mpi.library import MPI
from mpicomp.topology import Topology, complete, erdos_renyi, ring, star, torus


@pytest.mark.parametrize("check", TABLE, ids=lambda check: check.__name__)
def test_contract(world, check):
    check(world)


@pytest.mark.parametrize("check", TABLE, ids=lambda check: check.__name__)
def test_contract_when_ranks_outnumber_cores(world, check):
    if world.is_polite:
        return  # they do: `test_contract` was that
    world.is_polite = True
    check(world)


@pytest.mark.parametrize("check", TABLE, ids=lambda check: check.__name__)
def test_contract_with_memory_that_neighbors_read(world, check, monkeypatch):
    monkeypatch.setattr(neighbor, "SHORTEST", 1)
    check(world)


def test_grids_have_a_cartesian_communicator(world):
    exchange = world.exchange(torus(world.size, dims=(world.size, 1)))
    assert exchange.comm.Get_topology() == MPI.CART
    assert exchange.comm.Get_rank() == world.rank
    exchange.free()


def test_other_graphs_have_a_graph_communicator(world):
    topology = star(world.size)
    exchange = world.exchange(topology)
    assert exchange.comm.Get_topology() == MPI.DIST_GRAPH
    sources, targets, _ = exchange.comm.Get_dist_neighbors()
    assert sorted(sources) == topology.sources(world.rank)
    assert sorted(targets) == topology.targets(world.rank)
    exchange.free()


def test_a_grid_whose_edges_are_not_its_own_gets_a_graph_communicator(world):
    wrong = Topology("not a grid", np.eye(world.size), dims=(world.size,), periods=(True,))
    exchange = world.exchange(wrong)
    assert exchange.comm.Get_topology() == (MPI.CART if world.size == 1 else MPI.DIST_GRAPH)
    exchange.free()


def test_ranks_with_different_graphs_are_refused(world):
    if world.size < 3:
        pytest.skip("needs three ranks for two different connected graphs")
    mine = ring(world.size) if world.rank == 0 else star(world.size)
    if world.size == 3:
        mine = complete(3) if world.rank == 0 else star(3)
    with pytest.raises(ExchangeError, match="another graph than rank 0"):
        world.exchange(mine)


def test_an_edge_that_was_not_announced_is_refused(world):
    if world.size < 2:
        pytest.skip("needs two ranks")
    exchange = world.exchange(Topology("nobody", np.eye(world.size)))
    with pytest.raises(ExchangeError, match="did not announce"):
        exchange.start(message(world.rank, 0), VARIABLE, complete(world.size))


def test_buffers_are_used_again(world):
    topology = ring(world.size)
    exchange = world.exchange(topology)
    places = set()
    for step in range(5):
        received = exchange.start(message(world.rank, step), VARIABLE, topology).wait()
        places.add(tuple(payload["sign"].data_ptr() for payload in received.values()))
    # The sign bits follow the variable indices, so compare the buffers that hold them.
    sizes = {place for pointers in places for place in (pointer // 4096 for pointer in pointers)}
    assert len(sizes) <= 2 * len(topology.sources(world.rank))


def test_many_steps_on_a_random_graph(world):
    if world.size < 3:
        pytest.skip("needs three ranks")
    topology = erdos_renyi(world.size, probability=0.7, seed=1)
    exchange = world.exchange(topology)
    layout = Layout((Field("x", torch.float32, 1000, True),))
    for step in range(300):
        x = torch.full((step % 1000,), float(world.rank))
        received = exchange.start({"x": x}, layout, topology).wait()
        assert all(
            payload["x"].numel() == step and torch.equal(payload["x"], torch.full((step,), float(source)))
            for source, payload in received.items()
        )
