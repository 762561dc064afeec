"""Algorithms whose ranks send unequal parts of their messages."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from support import small
from support.quadratic import DIM, centers, train, train_asynchronously

from mpicomp.algorithms import DGC, EFSGD, GMC, AdaGossip, Choco, DCGossip, DeepSqueeze
from mpicomp.checkpoint.folder import Checkpoints
from mpicomp.compression import ByRank, HardThreshold, PerTensor, RandomK, TopK, allocate
from mpicomp.exchange import loopback
from mpicomp.replica.resize import load_resized
from mpicomp.topology import ring, star

VOLUMES = [100, 30, 10, 3, 1]
TENSORS = PerTensor(TopK(0.3))


def unequal(size, compressor=TENSORS):
    return allocate(compressor, VOLUMES[:size])


GOSSIP = {
    "choco": lambda size: Choco(0.15, unequal(size)),
    "choco_overlapped": lambda size: Choco(0.15, unequal(size), overlap=True),
    "choco_threshold": lambda size: Choco(0.1, unequal(size, HardThreshold(0.05))),
    "choco_random": lambda size: Choco(0.1, unequal(size, RandomK(0.3, shared=False))),
    "adagossip": lambda size: AdaGossip(0.01, unequal(size)),
    "deep_squeeze": lambda size: DeepSqueeze(0.05, unequal(size)),
}
AGGREGATED = {
    "ef_sgd": lambda size: EFSGD(unequal(size), weights="volume", volumes=tuple(VOLUMES[:size])),
    "ef_sgd_threshold": lambda size: EFSGD(unequal(size, HardThreshold(0.05))),
    "gmc": lambda size: GMC(unequal(size)),
    "dgc": lambda size: DGC(unequal(size)),
}
METHODS = GOSSIP | AGGREGATED


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("name", METHODS)
def test_loss_falls_and_ranks_agree(name, size):
    def serve(world):
        gossip, closure = small.make(world, METHODS[name](size))
        losses = [float(gossip.step(closure(step))) for step in range(60)]
        return losses, gossip.consensus_distance(), float(gossip.local.x.norm())

    for losses, distance, norm in loopback.run(size, serve):
        assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
        assert distance < 0.5 * norm


@pytest.mark.parametrize("name", METHODS)
def test_equal_volumes_change_nothing_but_rounding_of_ratios(name):
    """Bit for bit: every rank with the same compressor is the method without ByRank."""
    method = METHODS[name](3)
    same = method.compressor.compressors[0]
    plain, by_rank = (
        loopback.run(3, small.train, dataclasses.replace(method, compressor=compressor))
        for compressor in (same, ByRank((same,) * 3))
    )
    for (x, _, sent), (x_by_rank, _, sent_by_rank) in zip(plain, by_rank, strict=True):
        assert torch.equal(x, x_by_rank)
        assert sent == sent_by_rank


@pytest.mark.parametrize("name", METHODS)
def test_restart_is_exact(name):
    def stored(world):
        gossip, closure = small.make(world, METHODS[name](3))
        for step in range(6):
            gossip.step(closure(step))
        saved = copy.deepcopy(gossip.state_dict())
        for step in range(6, 12):
            gossip.step(closure(step))
        return saved, gossip.local.x.clone(), gossip.bytes_sent

    def resumed(world, saved):
        gossip, closure = small.make(world, METHODS[name](3), seed=1)
        gossip.load_state_dict(saved[world.rank])
        for step in range(6, 12):
            gossip.step(closure(step))
        return gossip.local.x, gossip.bytes_sent

    first = loopback.run(3, stored)
    second = loopback.run(3, resumed, [saved for saved, _, _ in first])
    for (_, x, sent), (x_resumed, sent_resumed) in zip(first, second, strict=True):
        assert torch.equal(x, x_resumed)
        assert sent == sent_resumed


def test_choco_preserves_the_mean_and_knows_the_copies_of_its_neighbors():
    ratios = (1.0, 0.5, 0.05, 0.25, 0.1)
    method, graph = Choco(0.1, ByRank(tuple(map(TopK, ratios))), start="zero"), ring(5)
    start = np.random.default_rng(0).normal(size=(5, DIM))
    mixed = train(method, graph, 200, lr=0.0, start=start)
    np.testing.assert_allclose(mixed.x.mean(axis=0), start.mean(axis=0), atol=1e-12)
    assert np.abs(mixed.x - start.mean(axis=0)).max() < 0.2 * np.abs(start - start.mean(axis=0)).max()
    copies = np.stack([state.x_hat.numpy() for state in mixed.states])
    for rank, state in enumerate(mixed.states):
        np.testing.assert_allclose(state.s.numpy(), graph.mixing[rank] @ copies, atol=1e-12)
    # the more a rank keeps, the more it sends
    assert [rank for _, rank in sorted(zip(mixed.bytes_sent, range(5), strict=True))] == [2, 4, 3, 1, 0]


def test_dc_gossip_reads_its_neighbors():
    """All copies are known where all is taken in, the common optimum is found, and in lockstep it is CHOCO-SGD."""
    by_rank, graph, paces = unequal(4, TopK(0.3)), ring(4), [1.0, 1.0, 2.5, 1.0]
    trained = train_asynchronously(DCGossip(0.3, by_rank, share="equal"), graph, 200, paces, common=True)
    np.testing.assert_allclose(trained.x, np.tile(centers(4)[0], (4, 1)), rtol=0, atol=1e-3)
    hats, sums = (np.stack([getattr(state, name).numpy() for state in trained.states]) for name in ("x_hat", "s"))
    np.testing.assert_allclose(sums, graph.mixing @ hats, rtol=0, atol=1e-12)
    lockstep = train_asynchronously(DCGossip(0.2, by_rank, lambda0=0.0, max_staleness=0), graph, 25, paces)
    synchronous = train(Choco(0.2, by_rank, overlap=True), graph, 25)
    np.testing.assert_allclose(lockstep.x, synchronous.x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("topology", [ring, star])
def test_weights_by_volume_lead_to_the_weighted_optimum(topology):
    volumes = tuple(VOLUMES[:4])
    method = EFSGD(allocate(TopK(0.4), volumes), weights="volume", volumes=volumes)
    trained = train(method, topology(4), 400)
    expected = np.average(centers(4), axis=0, weights=volumes)
    # errors of compression keep it within a step of the optimum
    np.testing.assert_allclose(trained.x, np.tile(trained.x[0], (4, 1)), atol=0)
    assert np.linalg.norm(trained.x[0] - expected) < 0.05 * np.linalg.norm(expected)


def test_another_number_of_ranks_gets_its_own_ratios(tmp_path):
    def stored(world):
        gossip, closure = small.make(world, GOSSIP["choco_random"](3))
        for step in range(6):
            gossip.step(closure(step))
        gossip.save(tmp_path)

    def resized(world):
        gossip, closure = small.make(world, GOSSIP["choco_random"](5), seed=1)
        load_resized(gossip, Checkpoints(tmp_path).latest())
        compressor = gossip.state_dict()["algorithm/compressor/rank"], gossip.state.compressor.inner.step
        losses = [float(gossip.step(closure(step))) for step in range(6, 40)]
        return compressor, sum(losses[-5:]) < sum(losses[:5])

    loopback.run(3, stored)
    assert loopback.run(5, resized) == [((rank, 6), True) for rank in range(5)]
