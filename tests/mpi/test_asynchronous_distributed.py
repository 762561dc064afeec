"""Asynchronous methods behind a loop of one's own, on MPI ranks with unequal numbers of batches."""

import pytest
import torch
from support import small
from support.libraries import LEFT_TO_OTHERS, skip_module_if_left
from torch import nn

from mpicomp.algorithms import ADPSGD, DCASGD, DCGossip
from mpicomp.compression import TopK
from mpicomp.errors import ConfigError
from mpicomp.topology import chain, ring, star

skip_module_if_left(LEFT_TO_OTHERS)

METHODS = {
    "gossip": (DCGossip(0.3, TopK(ratio=0.3)), ring),
    "gossip_bounded": (DCGossip(0.3, TopK(ratio=0.3), max_staleness=2), ring),
    "ad_psgd": (ADPSGD(), chain),
    "dc_asgd": (DCASGD(TopK(ratio=0.3)), star),
}


def trained(gossip):
    with gossip.averaged() as model:
        inputs, labels = small.batch(7777, 0)
        loss = nn.functional.cross_entropy(model(inputs), labels).item()
        return loss, nn.utils.parameters_to_vector(model.parameters()).detach().clone()


@pytest.mark.parametrize("by_loop", [False, True], ids=["closure", "loop"])
@pytest.mark.parametrize("name", METHODS)
def test_it_learns_meets_stores_and_goes_on(world, name, by_loop, shared_tmp_path):
    algorithm, graph = METHODS[name]
    if name == "dc_asgd" and world.size == 1:
        pytest.skip("a hub needs a worker")
    gossip, closure = small.make(world, algorithm, graph)
    before, _ = trained(gossip)

    def step(number):
        if not by_loop:
            gossip.step(closure(number))
            return
        closure(number)().backward()
        gossip.optimizer.step()
        gossip.optimizer.zero_grad()

    if gossip.is_hub:
        gossip.serve()
    else:
        for number in range(30 + 20 * world.rank):
            step(number)
        middle, _ = trained(gossip)
        assert middle < before / 2
        gossip.save(shared_tmp_path, {"rank": world.rank})
        for number in range(10 * world.rank):
            step(1000 + number)
        gossip.finish()
    after, mean = trained(gossip)
    assert after < before / 2
    assert all(torch.equal(mean, other) for other in world.all_gather(mean))
    other, _ = small.make(world, algorithm, graph, seed=1)
    extra = other.resume(shared_tmp_path)
    if not gossip.is_hub:
        assert extra == {"rank": world.rank} and other.steps == 30 + 20 * world.rank
    loss, _ = trained(other)
    assert loss < before / 2
    for finished in (gossip, other):
        finished.mailbox.free()


def test_ranks_that_come_for_different_things_are_told_so(world):
    if world.size == 1:
        pytest.skip("needs two ranks")
    gossip, closure = small.make(world, *METHODS["gossip"])
    gossip.step(closure(0))
    with pytest.raises(
        ConfigError, match=r"in different calls: consensus_distance\(\) on rank 0, averaged\(\) on rank 1"
    ):
        if world.rank == 0:
            gossip.consensus_distance()
        else:
            trained(gossip)
    gossip.mailbox.free()
