"""Every algorithm on MPI ranks whose messages are staged on a simulated GPU: no races, and the bits of the loopback.

Copies between the GPU and the host run as late as they may; what has not been copied, or not been received, is 0xFF.
What may go wrong does so before or behind the library, so MPICH alone has these tests.
"""

import pytest
import torch
from support import exchange_table, mailbox_table, small
from support.libraries import IS_OPEN_MPI
from support.methods import DETERMINISTIC
from support.simulated_gpu import on_simulated_gpu, simulate_staging

from mpicomp.compression.message import Field, Layout
from mpicomp.exchange import loopback
from mpicomp.exchange.mpi import neighbor
from mpicomp.exchange.mpi.library import MPI
from mpicomp.replica.replica import Replica
from mpicomp.topology import ring, star

if IS_OPEN_MPI or MPI.COMM_WORLD.size != 3:
    pytest.skip("staging is simulated on 3 ranks of MPICH", allow_module_level=True)

STEPS = 6
SENDS_NOTHING = {"local_sgd"}
"""Averages by all-reduce alone."""


@pytest.fixture(autouse=True)
def _simulated(monkeypatch):
    simulate_staging(monkeypatch, neighbor)
    monkeypatch.setattr(Replica, "check_finite", lambda self: None)  # it reads the loss, as a step on a GPU does not


def compare(world, algorithm, topology=None):
    with on_simulated_gpu() as gpu:
        found = small.train(world, algorithm, STEPS, topology)
    assert gpu.races == []
    found = world.all_gather(found)
    expected = loopback.run(world.size, small.train, algorithm, STEPS, topology) if world.rank == 0 else found
    for ours, theirs in zip(found, expected, strict=True):
        assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(ours, theirs, strict=True))
    return gpu


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_same_bits_and_no_races(world, name):
    gpu = compare(world, DETERMINISTIC[name])
    if world.size > 1 and name not in SENDS_NOTHING:
        assert gpu.delayed and gpu.ordered
        assert any(site.startswith("unpack") for site in gpu.sites)


def gossip(world, **options):
    """Average dense vectors, which nothing but the exchange makes the host wait for; return the simulated GPU."""
    with on_simulated_gpu(**options) as gpu:
        topology = ring(world.size)
        exchange = world.exchange(topology)
        x = torch.full((100,), float(world.rank))
        for numel in (10, 100, 50, 100):
            pending = exchange.start({"x": x[:numel]}, Layout((Field("x", torch.float32, numel),)), topology)
            x *= 0.5
            while numel == 50 and not pending.test():
                pass
            for message in pending.wait().values():
                x[:numel] += 0.5 * message["x"]
    return gpu


def test_each_wait_is_needed(world):
    gpu = gossip(world)
    assert gpu.races == [] and len(gpu.sites) == 6
    for site in gpu.sites:
        assert gossip(world, is_late=False, left_out=site).races, site  # in time: nobody must send garbage


@pytest.mark.parametrize("name", ["ef_sgd", "ef_sgd_block", "gmc", "dgc", "efficient_adam", "onebit_adam", "powersgd"])
def test_same_bits_and_no_races_over_a_star(world, name):
    compare(world, DETERMINISTIC[name], star)


@pytest.mark.parametrize("check", exchange_table.TABLE, ids=lambda check: check.__name__)
def test_contract_of_exchanges_and_sums(world, check):
    with on_simulated_gpu() as gpu:
        check(world)
    assert gpu.races == []


@pytest.mark.parametrize("check", mailbox_table.TABLE, ids=lambda check: check.__name__)
def test_contract_of_mailboxes(world, check):
    with on_simulated_gpu() as gpu:
        check(world, lambda world, *args, **options: world.mailbox(*args, **options))
    assert gpu.races == []
