import pytest
import torch
from support import small
from torch import nn

from mpicomp import Clip
from mpicomp.algorithms import DPSGD, EFSGD, SSGD, EfficientAdam
from mpicomp.compression import TopK
from mpicomp.errors import ConfigError
from mpicomp.exchange import loopback


@pytest.mark.parametrize("limits", [{"norm": 0.5}, {"norm": 1e3}, {"value": 0.1}, {"norm": 0.5, "value": 0.1}])
def test_it_clips_as_torch_does(limits):
    p = nn.Parameter(torch.zeros(50))
    g = torch.randn(50, generator=torch.Generator().manual_seed(0))
    p.grad = g.clone()
    if "norm" in limits:
        nn.utils.clip_grad_norm_([p], limits["norm"])
    if "value" in limits:
        nn.utils.clip_grad_value_([p], limits["value"])
    Clip(**limits)(g)
    torch.testing.assert_close(g, p.grad)


@pytest.mark.parametrize("limits", [{}, {"norm": 0.0}, {"value": -1.0}, {"norm": float("nan")}])
def test_bad_limits(limits):
    with pytest.raises(ConfigError, match=r"Clip\("):
        Clip(**limits)


@pytest.mark.parametrize("algorithm", [DPSGD(), EFSGD(TopK(0.2))], ids=["gossip", "sum"])
def test_each_rank_clips_its_own_gradient_as_a_loop_would(algorithm):
    def by_option(world):
        gossip, closure = small.make(world, algorithm, clip=Clip(norm=0.3))
        for step in range(5):
            gossip.step(closure(step))
        return gossip.local.x.clone()

    def by_loop(world):
        gossip, closure = small.make(world, algorithm)
        for step in range(5):
            gossip.optimizer.zero_grad()
            closure(step)().backward()
            nn.utils.clip_grad_norm_(gossip.local.model.parameters(), 0.3)
            gossip.optimizer.step()
        return gossip.local.x.clone()

    for ours, theirs in zip(loopback.run(3, by_option), loopback.run(3, by_loop), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_sum_is_clipped_as_with_an_all_reduce_of_gradients():
    def by_option(world):
        gossip, closure = small.make(world, SSGD(), clip=Clip(norm=0.3, after_sum=True))
        for step in range(5):
            gossip.step(closure(step))
        return gossip.local.x.clone()

    def by_hand(world):
        gossip, closure = small.make(world, DPSGD())  # for its model alone
        own = gossip.local.optimizer
        gossip.local._is_updating = True
        for step in range(5):
            gossip.local.zero_grad()
            closure(step)().backward()
            world.mean_(gossip.local.g)
            nn.utils.clip_grad_norm_(gossip.local.model.parameters(), 0.3)
            own.step()
        return gossip.local.x.clone()

    for ours, theirs in zip(loopback.run(3, by_option), loopback.run(3, by_hand), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("algorithm", [DPSGD(), EfficientAdam(TopK(0.2))], ids=["gossip", "adam"])
def test_without_a_sum_it_cannot_be_clipped(algorithm):
    with pytest.raises(ConfigError, match="has no sum of gradients to clip"):
        loopback.run(2, lambda world: small.make(world, algorithm, clip=Clip(norm=1.0, after_sum=True)))
