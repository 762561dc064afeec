"""Nodes of two ranks train as over the loopback, bit for bit, wherever their ranks lie."""

import pytest
import torch
from support.nodes import METHODS, train_nodes

from mpicomp.compression import PerTensor, TopK
from mpicomp.exchange import loopback
from mpicomp.exchange.mpi.library import MPI
from mpicomp.exchange.mpi.world import MpiWorld

RANKS = 4
IN_ORDER = [name for name in METHODS if name != "ssgd"]  # whose sum between nodes is in the order of the library


@pytest.fixture
def four(world):
    """A world of the first four ranks; None on the others."""
    if world.size < RANKS:
        pytest.skip("two nodes of two ranks")
    comm = MPI.COMM_WORLD.Split(0 if world.rank < RANKS else MPI.UNDEFINED, key=world.rank)
    return MpiWorld(comm, device="cpu") if comm else None


@pytest.mark.parametrize("groups", [[[0, 1], [2, 3]], [[0, 2], [1, 3]]])
@pytest.mark.parametrize("name", IN_ORDER)
def test_nodes_train_as_over_the_loopback(four, name, groups):
    if four is None:
        return
    compressor = None if name in {"dpsgd", "streaming_diloco"} else PerTensor(TopK(0.3))
    found = four.all_gather(tuple(map(_plain, train_nodes(four, METHODS[name], groups, compressor))))
    if four.rank == 0:
        expected = loopback.run(RANKS, train_nodes, METHODS[name], groups, compressor)
        assert found == [tuple(map(_plain, each)) for each in expected]


def test_long_shards_travel_in_blocks(four, monkeypatch):
    if four is None:
        return
    monkeypatch.setattr("mpicomp.exchange.mpi.node._BLOCK", 7)
    found = four.all_gather(tuple(map(_plain, train_nodes(four, METHODS["choco"], [[0, 1], [2, 3]]))))
    expected = loopback.run(RANKS, train_nodes, METHODS["choco"], [[0, 1], [2, 3]]) if four.rank == 0 else []
    assert four.rank != 0 or found == [tuple(map(_plain, each)) for each in expected]


def test_an_all_reduce_between_nodes(four):
    if four is None:
        return
    x, _ = train_nodes(four, METHODS["ssgd"], [[0, 1], [2, 3]])
    expected, _ = loopback.run(RANKS, train_nodes, METHODS["ssgd"], [[0, 1], [2, 3]])[four.rank]
    assert torch.allclose(x, expected, rtol=1e-12)


def test_gloo_inside_nodes(four, world):
    """What takes the place of NCCL on the CPU: ranks of a node hold the same bits, near those of MPI."""
    if four is None:
        return
    by_gloo = MpiWorld(four.comm, device="cpu", node_sums="gloo")
    groups = [[0, 2], [1, 3]]
    x, _ = train_nodes(by_gloo, METHODS["choco"], groups)
    expected, _ = loopback.run(RANKS, train_nodes, METHODS["choco"], groups)[four.rank]
    assert torch.allclose(x, expected, rtol=1e-12)
    bits = [values.numpy().tobytes() for values in by_gloo.all_gather(x)]
    assert bits[0] == bits[2] and bits[1] == bits[3]


def _plain(value):
    return value.tolist() if isinstance(value, torch.Tensor) else value
