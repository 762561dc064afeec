"""Ranks with unequal numbers of batches, skipped steps, and ranks that drift apart."""

import pytest
import torch
from support import small
from support.methods import DETERMINISTIC

from mpicomp.algorithms import DPSGD, EFSGD, SSGD
from mpicomp.compression import TopK
from mpicomp.errors import ConfigError
from mpicomp.exchange import loopback

NAMES = ["dpsgd", "choco", "choco_overlapped", "adagossip_overlapped", "ef_sgd", "gmc_plus", "gmc_overlapped"]


@pytest.mark.parametrize("name", [*NAMES, "efficient_adam", "powersgd"])
@pytest.mark.parametrize("form", ["loop", "closure"])
def test_unequal_numbers_of_batches(name, form):
    def serve(world):
        gossip, closure = small.make(world, DETERMINISTIC[name])
        with gossip.join():
            for step in range(3 + 2 * world.rank):
                if form == "closure":
                    gossip.step(closure(step))
                else:
                    gossip.optimizer.zero_grad()
                    closure(step)().backward()
                    gossip.optimizer.step()
        with gossip.averaged():
            pass
        return gossip.steps, gossip.local.x.clone()

    steps, models = zip(*loopback.run(3, serve), strict=True)
    assert steps == (7, 7, 7)
    if DETERMINISTIC[name].ranks_stay_equal:
        assert all(torch.equal(model, models[0]) for model in models)


def test_a_rank_that_has_left_mixes_and_does_not_move_by_itself():
    def serve(world):
        gossip, closure = small.make(world, DPSGD())
        with gossip.join():
            for step in range(4 if world.rank else 0):
                gossip.step(closure(step))
        return gossip.local.x.clone()

    def by_hand(world):
        gossip, closure = small.make(world, DPSGD())
        for step in range(4):
            gossip.optimizer.zero_grad()
            closure(step)().backward()
            gossip.step_with_gradients(is_skipped=world.rank == 0)
        return gossip.local.x.clone()

    for ours, theirs in zip(loopback.run(3, serve), loopback.run(3, by_hand), strict=True):
        assert torch.equal(ours, theirs)


def test_an_equal_number_of_batches_is_as_without_join():
    def serve(world, joining):
        gossip, closure = small.make(world, EFSGD(TopK(0.2), overlap=True))
        if joining:
            with gossip.join():
                for step in range(4):
                    gossip.step(closure(step))
        else:
            for step in range(4):
                gossip.step(closure(step))
        return gossip.local.x.clone(), gossip.steps

    for (x, steps), (x_plain, _) in zip(loopback.run(3, serve, True), loopback.run(3, serve, False), strict=True):
        assert torch.equal(x, x_plain) and steps == 4


@pytest.mark.parametrize("algorithm", [EFSGD(TopK(0.2)), SSGD()], ids=["ef_sgd", "ssgd"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda gossip: gossip.optimizer.param_groups[0].update(lr=0.01),
            "rank 1 has the learning rates 0.01, rank 0 0.05",
        ),
        (
            lambda gossip: gossip.local.model[0].requires_grad_(False),
            r"have frozen different parameters \(0.bias, 0.wei",
        ),
        (lambda gossip: gossip.local.x.mul_(2), "rank 1 holds another model than rank 0"),
    ],
    ids=["lr", "frozen", "model"],
)
def test_ranks_that_drift_apart_are_told_so_on_all_of_them(algorithm, change, message):
    def serve(world):
        gossip, closure = small.make(world, algorithm)
        gossip.step(closure(0))
        if world.rank == 1:
            change(gossip)
        with pytest.raises(ConfigError, match=message):
            for step in range(1, 60):
                gossip.step(closure(step))
        return gossip.steps

    assert loopback.run(2, serve) == [50, 50]


@pytest.mark.parametrize("algorithm", [SSGD(), DPSGD()])
def test_a_scheduler_stepped_within_join_is_refused_where_models_must_stay_equal(algorithm):
    def serve(world):
        gossip, closure = small.make(world, algorithm)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(gossip.optimizer, 0.5)
        with gossip.join():
            for step in range(3 if world.rank else 2):
                gossip.step(closure(step))
                scheduler.step()

    if algorithm.ranks_stay_equal:
        with pytest.raises(ConfigError, match=r"learning rates .* within join\(\).* after the block"):
            loopback.run(2, serve)
    else:
        loopback.run(2, serve)


@pytest.mark.parametrize("buffers", ["averaged", "own", 2])
def test_batch_norm_statistics(buffers):
    def serve(world):
        gossip, closure = small.make(world, DPSGD(), buffers=buffers)
        statistics = gossip.local.model[1].running_mean
        for step in range(2):
            gossip.step(closure(step))
        own = statistics.clone()
        with gossip.averaged():
            inside = statistics.clone()
        assert torch.equal(statistics, own)
        return own, inside

    own, inside = (torch.stack(each) for each in zip(*loopback.run(3, serve), strict=True))
    mean = own.mean(dim=0).expand(3, -1)
    assert torch.allclose(own, mean) == (buffers == 2)
    assert torch.allclose(inside, mean) == (buffers != "own")


def test_a_number_of_steps_for_buffers():
    with pytest.raises(ConfigError, match="buffers = 0 must be"):
        loopback.run(2, lambda world: small.make(world, DPSGD(), buffers=0))
