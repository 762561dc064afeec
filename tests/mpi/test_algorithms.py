"""mpiexec and loopback train to the same parameters, bit for bit, with every synchronous algorithm and compressor."""

import pytest
import torch
from support import small
from support.libraries import at_these_ranks
from support.methods import ALL_REDUCE, DETERMINISTIC

from mpicomp.algorithms import EFSGD, SGP, Choco, DeepSqueeze
from mpicomp.compression import HardThreshold, Identity, TopK, allocate
from mpicomp.exchange import loopback
from mpicomp.topology import OnePeerExponential, chain, random_digraph, star, torus


def both(world, *args):
    """Return the results of all ranks under MPI and, on rank 0, over the loopback."""
    ours = world.all_gather(small.train(world, *args))
    return ours, loopback.run(world.size, small.train, *args) if world.rank == 0 else ours


@pytest.mark.parametrize("name", at_these_ranks(DETERMINISTIC))
def test_same_bits(world, name):
    for (x, loss, sent), (x_loop, loss_loop, sent_loop) in zip(*both(world, DETERMINISTIC[name]), strict=True):
        assert torch.equal(x, x_loop)
        assert torch.equal(loss, loss_loop)
        assert sent == sent_loop


@pytest.mark.parametrize("topology", [chain, star, torus], ids=lambda t: t.__name__)
def test_same_bits_on_other_graphs(world, topology):
    for ours, theirs in zip(*both(world, Choco(0.1, TopK(0.2)), 10, topology), strict=True):
        assert torch.equal(ours[0], theirs[0])


@pytest.mark.parametrize("method", [lambda c: Choco(0.1, c), EFSGD], ids=["choco", "ef_sgd"])
@pytest.mark.parametrize("compressor", [TopK(0.2), HardThreshold(0.05)], ids=["topk", "threshold"])
def test_same_bits_if_ranks_send_unequal_parts(world, method, compressor):
    by_rank = allocate(compressor, world.all_gather((world.rank + 1) ** 3))
    for ours, theirs in zip(*both(world, method(by_rank)), strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert ours[2] == theirs[2]


def test_same_bits_on_a_varying_graph(world):
    for ours, theirs in zip(*both(world, DeepSqueeze(0.05, TopK(0.2)), 10, OnePeerExponential), strict=True):
        assert torch.equal(ours[0], theirs[0])


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("compressor", [Identity(), TopK(0.2)], ids=["identity", "topk"])
def test_same_bits_on_a_digraph(world, compressor, overlap):
    method = SGP(0.3, compressor, overlap)
    for ours, theirs in zip(*both(world, method, 10, digraph), strict=True):
        assert torch.equal(ours[0], theirs[0])


def digraph(size):
    return random_digraph(size, degree=1 if size < 3 else 2)


@pytest.mark.parametrize("name", ALL_REDUCE)
def test_all_reduce_agrees_to_rounding(world, name):
    for (x, _, sent), (x_loop, _, sent_loop) in zip(*both(world, ALL_REDUCE[name]), strict=True):
        torch.testing.assert_close(x, x_loop, rtol=1e-6, atol=1e-6)
        assert sent == sent_loop
