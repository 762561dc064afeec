"""What only a world of MPI ranks has: its own communicator, its place on the node, waiting."""

import time

import pytest
import torch

from mpicomp.algorithms import DPSGD
from mpicomp.errors import ConfigError, DataError, ExchangeError
from mpicomp.exchange.guard import agree, together
from mpicomp.exchange.mpi.library import MPI
from mpicomp.exchange.mpi.wait import poll, wait_all
from mpicomp.exchange.mpi.world import MpiWorld
from mpicomp.replica.distribute import distribute
from mpicomp.topology import ring


def test_messages_of_others_are_not_mistaken_for_ours(world):
    others = MPI.COMM_WORLD
    request = others.isend("not ours", dest=(world.rank + 1) % world.size, tag=0)
    assert world.all_gather(world.rank) == list(range(world.size))
    assert others.recv(source=(world.rank - 1) % world.size, tag=0) == "not ours"
    request.wait()


def test_cores_are_shared_out(world):
    shares = world.all_gather(world.core_share)
    assert all(share > 0 for share in shares)
    assert world.is_polite == (world.core_share < 1 - 1e-9)
    assert torch.get_num_threads() >= 1
    if world.is_polite:
        assert torch.get_num_threads() == 1


def test_a_run_without_gpu_says_so(world):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    auto = MpiWorld.from_environment(device="auto")
    assert auto.device.type == "cpu"
    assert auto.notices == ("no GPU: running on the CPU",)
    assert world.notices == ()
    with pytest.raises(ConfigError, match="sees no GPU"):
        MpiWorld.from_environment(device="cuda")


def test_the_mean_is_the_same_bit_for_bit_on_all_ranks(world):
    x = torch.randn(1_100_003, generator=torch.Generator().manual_seed(world.rank))
    world.mean_(x)
    sums = world.all_gather((float(x.double().sum()), float(x[:7].sum()), float(x[-7:].sum())))
    assert sums == [sums[0]] * world.size
    vectors = [torch.randn(1_100_003, generator=torch.Generator().manual_seed(rank)) for rank in range(world.size)]
    assert torch.allclose(x, torch.stack(vectors).mean(0), atol=1e-6)


def test_agreeing_that_all_is_well(world):
    agree(world, None)
    with together(world):
        pass


def test_an_error_on_one_rank_is_raised_on_all(world):
    last = world.size - 1
    error = DataError("shard.h5 is damaged") if world.rank == last else None
    where = f" (on rank {last})" if world.size > 1 else ""
    with pytest.raises(DataError) as caught:
        agree(world, error)
    assert str(caught.value) == f"shard.h5 is damaged{where}"
    assert caught.value.exit_code == 3


def test_an_error_on_all_ranks_is_raised_once(world):
    with pytest.raises(ConfigError) as caught, together(world):
        raise ConfigError("no such key")
    assert str(caught.value) == "no such key" + (" (on all ranks)" if world.size > 1 else "")


def test_different_errors_are_all_named_and_the_first_decides_the_code(world):
    with pytest.raises(ConfigError) as caught:
        agree(world, ConfigError("key") if world.rank == 0 else DataError("file"))
    rest = "".join(f", {rank}" for rank in range(2, world.size))
    expected = {1: "key", 2: "key (on rank 0)\nfile (on rank 1)"}
    assert str(caught.value) == expected.get(world.size, f"key (on rank 0)\nfile (on ranks 1{rest})")


def test_a_message_longer_than_its_buffer_is_an_error(world):
    data, short = torch.zeros(100).numpy(), torch.zeros(10).numpy()
    to_the_right = world.comm.Isend(data, (world.rank + 1) % world.size)
    from_the_left = world.comm.Irecv(short, (world.rank - 1) % world.size)
    with pytest.raises(ExchangeError, match=r"(?i)trunc"):
        wait_all([from_the_left], [MPI.Status()], is_polite=world.is_polite)
    wait_all([to_the_right], is_polite=world.is_polite)


@pytest.mark.parametrize("is_polite", [False, True])
def test_waiting(world, is_polite):
    target, source = (world.rank + 1) % world.size, (world.rank - 1) % world.size
    inbox = torch.zeros(1).numpy()
    receive = world.comm.Irecv(inbox, source)
    time.sleep(0.002 * world.rank)
    send = world.comm.Isend(torch.full((1,), float(world.rank)).numpy(), target)
    statuses = [MPI.Status(), MPI.Status()]
    wait_all([receive, send], statuses, is_polite=is_polite)
    assert inbox[0] == source == statuses[0].Get_source()
    wait_all([], [], is_polite=is_polite)


def test_polling_sleeps():
    until = time.perf_counter() + 0.1
    calls = 0

    def is_done():
        nonlocal calls
        calls += 1
        return time.perf_counter() > until

    before = time.thread_time()
    poll(is_done)
    assert time.thread_time() - before < 0.05
    assert calls > 50


def test_a_mask_of_least_numbers_survives_the_averaging_of_buffers(world):
    model = torch.nn.Linear(2, 2)
    least = torch.finfo(torch.float32).min
    model.register_buffer("mask", torch.full((2,), least))
    gossip = distribute(model, torch.optim.SGD(model.parameters()), DPSGD(), ring, world=world, buffers=1)
    gossip.step(lambda: model(torch.ones(1, 2)).sum())
    assert model.mask.isfinite().all() and model.mask[0] == pytest.approx(least, rel=1e-6)
