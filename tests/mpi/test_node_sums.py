"""Sums inside nodes by gloo and between them by MPI, beside those of MPI alone, on nodes that are made up."""

import socket
import threading

import pytest
import torch
import torch.distributed
from support import small
from support.libraries import LEFT_TO_OTHERS, skip_module_if_left

from mpicomp.algorithms import SSGD
from mpicomp.errors import ConfigError, ExchangeError
from mpicomp.exchange.mpi import node_group as node_module
from mpicomp.exchange.mpi.node_group import NodeGroup
from mpicomp.exchange.mpi.probe import attempt, try_sum
from mpicomp.exchange.mpi.world import MpiWorld
from mpicomp.topology import ring

skip_module_if_left(LEFT_TO_OTHERS)

CPU = torch.device("cpu")

# The node of each rank, by rank.
SPLITS = {
    "one_node": lambda rank: 0,
    "two_nodes": lambda rank: int(rank >= 2),  # of 5 ranks: 2 and 3
    "round_robin": lambda rank: rank % 2,
    "one_each": lambda rank: rank,
}


@pytest.fixture
def gloo():
    """A world whose sums go over gloo inside its node."""
    world = MpiWorld.from_environment("cpu", node_sums="gloo")
    yield world
    if group := world.node_group():
        group.close()
    world.comm.Free()


@pytest.fixture(params=SPLITS)
def group(world, request):
    node = world.comm.Split(SPLITS[request.param](world.rank), key=world.rank)
    group = NodeGroup(world, node, "gloo", CPU)
    yield group
    group.close()


def vectors(world, numel, dtype, is_whole):
    generator = torch.Generator().manual_seed(numel)
    shape = (world.size, numel)
    if is_whole:
        return torch.randint(-1000, 1000, shape, generator=generator).to(dtype) * world.size
    return torch.randn(shape, generator=generator, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_mean_is_that_of_mpi(world, group, dtype):
    exchange = world.exchange(ring(world.size))
    for numel in (0, 1, 2, 7, 10_007):
        everyone = vectors(world, numel, dtype, is_whole=True)
        x = everyone[world.rank].clone()
        group.mean_(x)
        assert torch.equal(x, everyone.sum(0) / world.size), numel
        ours = vectors(world, numel, dtype, is_whole=False)[world.rank]
        theirs = ours.clone()
        group.mean_(ours)
        exchange.mean_(theirs)
        torch.testing.assert_close(ours, theirs)
        sums = world.all_gather(ours.double().sum().item())
        assert sums == [sums[0]] * world.size  # the same bits on all ranks
    exchange.free()


def test_part_of_a_vector_leaves_the_rest_alone(world, group):
    x = torch.arange(30.0)
    group.mean_(x[7:20])
    assert torch.equal(x, torch.arange(30.0))


def test_many_sums_in_a_row(world, group):
    for step in range(20):
        x = torch.full((11,), float(world.rank + step))
        group.mean_(x)
        assert torch.equal(x, torch.full((11,), (world.size - 1) / 2 + step))


def test_the_exchange_uses_it_and_counts_the_same_bytes(world, gloo):
    assert gloo.node_sums == ("gloo" if world.size > 1 else None)
    notice = ("dense sums: gloo inside nodes, MPI between them",)
    assert gloo.notices == (notice if world.size > 1 else ())
    ours, theirs = gloo.exchange(ring(world.size)), world.exchange(ring(world.size))
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.full((3, 5), float(world.rank), dtype=dtype)
        y = x.clone()
        ours.mean_(x)
        theirs.mean_(y)
        assert torch.equal(x, y)
    assert ours.bytes_sent == theirs.bytes_sent
    assert gloo.node_group() is gloo.node_group()
    assert world.node_group() is None
    ours.free()
    theirs.free()


def test_what_the_ranks_cannot_have_is_refused_on_all_of_them(world):
    with pytest.raises(ConfigError, match=r"node_sums = 'nccl': .*node_sums=mpi"):
        MpiWorld.from_environment("cpu", node_sums="nccl")
    world.barrier()


def test_ssgd_agrees_with_mpi_to_rounding(world, gloo):
    (x, loss, sent), (x_mpi, loss_mpi, sent_mpi) = small.train(gloo, SSGD()), small.train(world, SSGD())
    torch.testing.assert_close(x, x_mpi, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(loss, loss_mpi, rtol=1e-6, atol=1e-6)
    assert sent == sent_mpi


def test_the_doctor_tries_it(world, gloo):
    if world.size == 1:
        return
    trial = attempt(gloo, try_sum)
    assert trial.problem == ""
    assert trial.how == "gloo inside nodes, MPI between them"
    assert trial.latency_us > 0
    assert trial.mb_per_s > 0


def test_the_default_group_is_the_users(world, shared_tmp_path):
    name = f"file://{shared_tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=name, rank=world.rank, world_size=world.size)
    try:
        group = NodeGroup(world, world.comm.Split(0, key=world.rank), "gloo", CPU)
        x, y = torch.full((3,), float(world.rank)), torch.ones(3)
        group.mean_(x)
        group.close()
        torch.distributed.all_reduce(y)
        assert torch.equal(x, torch.full((3,), (world.size - 1) / 2))
        assert torch.equal(y, torch.full((3,), float(world.size)))
    finally:
        torch.distributed.destroy_process_group()


def test_nothing_is_left_after_closing(world):
    def connections():
        return len(list(filter(None, map(_socket_of, range(256)))))

    threads, sockets = threading.active_count(), connections()
    group = NodeGroup(world, world.comm.Split(0, key=world.rank), "gloo", CPU)
    if world.size > 1:
        assert connections() > sockets
    group.close()
    group.close()  # a second time changes nothing
    assert threading.active_count() == threads
    assert connections() == sockets


def _socket_of(descriptor):
    try:
        duplicate = socket.socket(fileno=descriptor)
    except OSError:
        return False
    duplicate.detach()
    return True


def test_ranks_that_do_not_meet_are_an_error_on_all_ranks(world, monkeypatch):
    if world.size == 1:
        return
    monkeypatch.setattr(node_module, "LIMIT_S", 0.5)
    if world.rank == world.size - 1:
        monkeypatch.setattr(NodeGroup, "_meet", lambda self, port, listener: None)
        monkeypatch.setattr(NodeGroup, "_try_out", lambda self, device: None)
    with pytest.raises(ExchangeError, match=r"the sum inside .* fails: .*run\.node_sums=mpi"):
        NodeGroup(world, world.comm.Split(0, key=world.rank), "gloo", CPU)
    for thread in threading.enumerate():
        if thread.name == "node group":
            thread.join(10)
            assert not thread.is_alive()
    world.barrier()


def test_a_wrong_sum_is_an_error(world, monkeypatch):
    if world.size == 1:
        return
    if world.rank == 0:
        monkeypatch.setattr(NodeGroup, "_try_out", _wrong)
    with pytest.raises(ExchangeError, match=r"add up to .* where the sum is .*\(on rank 0\)"):
        NodeGroup(world, world.comm.Split(0, key=world.rank), "gloo", CPU)


def _wrong(self, device):
    self._group.allreduce([torch.zeros(1)], torch.distributed.AllreduceOptions()).wait()
    raise ExchangeError("its ranks add up to 0 where the sum is 3")


@pytest.mark.parametrize("is_asked_for", [True, False])
def test_without_a_group_mpi_adds_up_unless_the_group_was_asked_for(world, gloo, monkeypatch, capfd, is_asked_for):
    if world.size == 1:
        return

    def fail(*args):
        raise ExchangeError("no connection")

    gloo._may_fall_back = not is_asked_for
    with monkeypatch.context() as patch:
        patch.setattr(NodeGroup, "_meet", fail)
        exchange, x = gloo.exchange(ring(world.size)), torch.full((3,), float(world.rank))
        if is_asked_for:
            with pytest.raises(ExchangeError, match=r"no connection.*\(on all ranks\)"):
                exchange.mean_(x)
        else:
            exchange.mean_(x)
            assert torch.equal(x, torch.full((3,), (world.size - 1) / 2))
            assert gloo.node_sums is None
            assert capfd.readouterr().err.count("warning: dense sums by MPI alone: ") == (world.rank == 0)
        exchange.free()


def test_a_rank_that_is_gone_is_an_error_on_its_mates(world):
    """What is left of a rank that has died: its connections are closed, and it takes part in nothing."""
    if world.size == 1:
        return
    group = NodeGroup(world, world.comm.Split(0, key=world.rank), "gloo", CPU)
    if world.rank == world.size - 1:
        group._drop()
    else:
        with pytest.raises(ExchangeError, match=r"gloo inside nodes.*A rank of the node may have ended"):
            for _ in range(100):
                group.mean_(torch.ones(1000))
        with pytest.raises(ExchangeError, match="its connections are closed"):
            group.mean_(torch.ones(1000))
    world.barrier()
    group.close()


def test_uneven_nodes_have_as_many_shards_as_the_smallest_has_ranks(world):
    node = world.comm.Split(int(world.rank >= 2), key=world.rank)
    group = NodeGroup(world, node, "gloo", CPU)
    smallest = min(2, world.size - 2) if world.size > 2 else world.size
    assert group._shards == smallest
    owns = world.size > 2 and group._place < smallest
    assert bool(group._owners) == owns
    if owns:
        assert group._owners.Get_size() == 2
    group.close()
