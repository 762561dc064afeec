"""MPI ranks and threads of one process compute the same, bit for bit."""

import pytest
import torch

from mpicomp.compression.message import Field, Layout
from mpicomp.exchange import loopback
from mpicomp.topology import OnePeerExponential, RandomMatching, complete, ring, torus

NUMEL = 5000
LAYOUT = Layout((Field("index", torch.int16, NUMEL, True), Field("value", torch.float32, NUMEL, True)))


def gossip(world, make, steps=12):
    """Average the largest entries of random vectors; return the vector, its mean over ranks and the bytes sent."""
    schedule = make(world.size)
    exchange = world.exchange(schedule)
    x = torch.randn(NUMEL, generator=torch.Generator().manual_seed(world.rank))
    for step in range(steps):
        topology = schedule(step)
        index = x.abs().topk(100 + 11 * (world.rank + step) % 50).indices
        payload = {"index": index.to(torch.int16), "value": x[index]}
        received = exchange.start(payload, LAYOUT, topology).wait()
        for source, other in received.items():
            x.index_add_(0, other["index"].to(torch.int32), other["value"], alpha=topology.weight(world.rank, source))
    mean = x.clone()
    world.mean_(mean)
    return x, mean, exchange.bytes_sent


@pytest.mark.parametrize(
    "make",
    [ring, complete, torus, OnePeerExponential, lambda size: RandomMatching(size, seed=5)],
    ids=["ring", "complete", "torus", "one_peer_exponential", "random_matching"],
)
def test_same_bits_and_bytes(world, make):
    ours = world.all_gather(gossip(world, make))
    theirs = loopback.run(world.size, gossip, make) if world.rank == 0 else ours
    for rank, ((x, mean, sent), (x_loop, mean_loop, sent_loop)) in enumerate(zip(ours, theirs, strict=True)):
        assert torch.equal(x, x_loop), f"rank {rank}"
        assert torch.equal(mean, mean_loop), f"rank {rank}"
        assert sent == sent_loop
