"""Models whose parameters are in half precision: what methods remember is in float32."""

import copy

import pytest
import torch
from torch import nn

from mpicomp.algorithms import (
    DGC,
    EFSGD,
    GMC,
    AdaGossip,
    Choco,
    DeMo,
    EfficientAdam,
    FedAdamSSM,
    MoTEF,
    OneBitAdam,
    PowerSGD,
    SketchedAMSGrad,
)
from mpicomp.compression import SignNorm, TopK
from mpicomp.exchange import loopback
from mpicomp.replica.distribute import distribute
from mpicomp.topology import ring

GOSSIP = {
    "choco": Choco(gamma=0.3, compressor=TopK(0.3)),
    "adagossip": AdaGossip(gamma=0.01, compressor=TopK(0.3)),
    "motef": MoTEF(gamma=0.2, compressor=TopK(0.3)),
}
SUMS = {
    "ef_sgd": EFSGD(TopK(0.3)),
    "dgc": DGC(TopK(0.3)),
    "gmc": GMC(TopK(0.3)),
    "powersgd": PowerSGD(rank=1),
    "fedadam_ssm": FedAdamSSM(TopK(0.3), period=4),
    "efficient_adam": EfficientAdam(TopK(0.3), downlink=TopK(0.5)),
    "onebit_adam": OneBitAdam(SignNorm(), downlink=SignNorm(), freeze_step=3),
    "sketched_amsgrad": SketchedAMSGrad(columns=20, k=3, epsilon=0.1),
    "demo": DeMo(k=4),
}
METHODS = GOSSIP | SUMS
HALF = [torch.float16, torch.bfloat16]


def make(world, method, dtype, seed=0):
    """Return a small model with parameters of `dtype`, and what trains it on this rank."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
    for p in model.parameters():
        p.data = (torch.randn(p.shape, generator=torch.Generator().manual_seed(seed + p.numel())) * 0.4).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, weight_decay=1e-3)
    return model, distribute(model, optimizer, method, ring, world=world)


def step(model, gossip, dtype, seed):
    """Make a step on a batch that `seed` tells; return the loss."""
    inputs = torch.randn(16, 6, generator=torch.Generator().manual_seed(seed))
    labels = inputs[:, :3].argmax(dim=1)
    return float(gossip.step(lambda: nn.functional.cross_entropy(model(inputs.to(dtype)).float(), labels)))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_training_and_an_exact_restart(method, dtype):
    def train(world, stored=None):
        model, gossip = make(world, method, dtype, seed=0 if stored is None else 1)
        saved, losses, first = None, [], 0
        if stored is not None:
            gossip.load_state_dict(stored[world.rank])
            first = 6
        for t in range(first, 40):
            if t == 6:
                saved = copy.deepcopy(gossip.state_dict())
            losses.append(step(model, gossip, dtype, 3 * (t % 4) + world.rank))
        assert {p.dtype for p in model.parameters()} == {dtype}
        return gossip.local.x.clone(), losses, saved

    whole = loopback.run(3, train)
    again = loopback.run(3, train, [saved for _, _, saved in whole])
    for (x, losses, saved), (x_again, losses_again, _) in zip(whole, again, strict=True):
        assert torch.equal(x, x_again) and losses[6:] == losses_again
        assert sum(losses[-4:]) < 0.95 * sum(losses[:4])
        kept = [
            leaf for path, leaf in saved.items() if path.startswith("algorithm/") and isinstance(leaf, torch.Tensor)
        ]
        assert not any(leaf.dtype in HALF for leaf in kept)
        if method in SUMS.values():
            assert torch.equal(x, whole[0][0])  # after 40 steps, a multiple of the period


@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["choco", "adagossip"])
def test_the_sum_of_public_copies_does_not_drift(name, dtype):
    """Each rank adds up what its neighbors send; in half precision the sum would soon be that of other copies."""

    def train(world):
        model, gossip = make(world, GOSSIP[name], dtype)
        for t in range(300):
            step(model, gossip, dtype, 3 * t + world.rank)
        return gossip.state.x_hat, gossip.state.s

    results = loopback.run(3, train)
    mean = torch.stack([x_hat for x_hat, _ in results]).double().mean(dim=0)  # all weights of a ring of 3 are 1/3
    for _, s in results:
        assert (s.double() - mean).abs().max() < 1e-5
