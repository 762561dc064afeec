"""What a method remembers of frozen parameters waits: it is neither sent nor lost, and takes nobody's place."""

import pytest
import torch
from torch import nn

import mpicomp
from mpicomp.algorithms import (
    DEFATC,
    DGC,
    EFSGD,
    GMC,
    DeMo,
    DiLoCo,
    EfficientAdam,
    LocalSGD,
    OneBitAdam,
    PowerSGD,
    SparseLoCo,
)
from mpicomp.compression import SignNorm, TopK
from mpicomp.exchange.loopback import run
from mpicomp.state import waiting
from mpicomp.topology import ring, star

TOP = TopK(0.1)
METHODS = {
    "ef_sgd": EFSGD(TOP),
    "ef_sgd_momentum": EFSGD(TOP, momentum=0.9),
    "ef_sgd_sign": EFSGD(SignNorm()),
    "ef_sgd_overlap": EFSGD(TOP, momentum=0.9, overlap=True),
    "loco": EFSGD(TOP, error_average=0.5, error_reset_steps=4),
    "gmc": GMC(TOP),
    "gmc_plus": GMC(TOP, detachment=0.3),
    "dgc": DGC(TOP),
    "powersgd": PowerSGD(rank=1, momentum=0.9),
    "demo": DeMo(k=2),
    "efficient_adam": EfficientAdam(TOP, downlink=TOP),
    "onebit_adam": OneBitAdam(TOP, downlink=TOP, freeze_step=2),
    "sparse_loco": SparseLoCo(TOP, period=1),
    "def_atc": DEFATC(0.1, TOP),
    "local_sgd_def_atc": LocalSGD(3, DEFATC(0.1, TOP)),
    "diloco_def_atc": DiLoCo(3, inner=DEFATC(0.1, TOP)),
}
LR = 0.05
FIRST = slice(0, 7 * 8)  # the entries of the first layer


def trained(world, algorithm, topology=ring, groups=None):
    """Return the replica and how to train it for some steps."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64) / 4
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, weight_decay=1e-3)
    gossip = mpicomp.distribute(model, optimizer, algorithm, topology, None, world, groups=groups)
    samples = torch.Generator().manual_seed(world.rank)

    def train(steps):
        for _ in range(steps):
            inputs, targets = (torch.randn(8, n, generator=samples, dtype=torch.float64) for n in (6, 3))
            gossip.step(lambda x=inputs, y=targets: nn.functional.mse_loss(model(x), y))

    train(6)
    return gossip, train


def memory(gossip):
    """Return copies of what waits of the first layer, of this rank."""
    return [vector[part].clone() for vector in waiting(gossip.state) for part in gossip.part.frozen_parts()]


def freeze(world, algorithm, forgets, groups=None):
    """Train with a frozen layer; return its memory before and after, and the model. `forgets`: that memory is 0."""
    gossip, train = trained(world, algorithm, star if world.size == 2 else ring, groups)
    gossip.local.model[0].requires_grad_(False)
    if getattr(algorithm, "overlap", False):
        train(1)  # what is under way
    for vector in waiting(gossip.state) if forgets else ():
        for part in gossip.part.frozen_parts():
            vector[part] = 0.0
    before = memory(gossip)
    train(5)
    return before, memory(gossip), gossip.local.x.clone()


@pytest.mark.parametrize("name", METHODS)
def test_what_is_not_sent_of_a_frozen_layer_waits(name):
    for (before, after, x), (_, _, alone) in zip(
        run(2, freeze, METHODS[name], False), run(2, freeze, METHODS[name], True), strict=True
    ):
        assert any(values.any() for values in before)
        for values, kept in zip(before, after, strict=True):
            assert torch.equal(values, kept)
        assert torch.equal(x, alone)  # it takes no place in the messages of other layers


def test_it_waits_on_nodes_of_several_ranks():
    ranks = run(4, freeze, EFSGD(TOP, momentum=0.9), False, [[0, 1], [2, 3]])
    assert any(values.any() for before, _, _ in ranks for values in before)
    assert all(torch.equal(*pair) for before, after, _ in ranks for pair in zip(before, after, strict=True))


def test_errors_of_ef_sgd_keep_their_unit_when_the_rate_changes():
    """``lr e`` is what will move the model when the layer is thawed."""

    def serve(world):
        gossip, train = trained(world, EFSGD(TOP))
        gossip.local.model[0].requires_grad_(False)
        before = gossip.state.feedback.residual[FIRST].clone()
        gossip.optimizer.param_groups[0]["lr"] = LR / 4
        train(2)
        return before, gossip.state.feedback.residual[FIRST]

    for before, after in run(2, serve):
        assert before.any()
        assert torch.allclose(after, 4 * before, rtol=1e-12, atol=0)


@pytest.mark.parametrize("algorithm", [EFSGD(TOP), GMC(TOP), DGC(TOP)], ids=lambda a: a.name)
def test_a_layer_thawed_between_forward_pass_and_step_is_trained(algorithm):
    """As the judge of a GAN, whose step begins in the forward pass for the generator."""

    def serve(world):
        gossip, train = trained(world, algorithm)
        first, x = gossip.local.model[0], gossip.local.x.clone()
        first.requires_grad_(False)
        gossip.begin()
        first.requires_grad_(True)
        train(1)
        return gossip.local.x - x, gossip.state

    for moved, state in run(2, serve):
        assert moved[FIRST].any()
        assert all(vector.isfinite().all() for vector in waiting(state))
