"""``distribute(model, [muon, adamw], ...)``: several optimizers of one model."""

import copy

import pytest
import torch
from torch import nn

from mpicomp.algorithms import ASGD, DPSGD, EFSGD, Choco, DeMo, DiLoCo
from mpicomp.compression import TopK
from mpicomp.errors import CheckpointError, ConfigError
from mpicomp.exchange import loopback
from mpicomp.replica.distribute import distribute
from mpicomp.replica.several_optimizers import SeveralOptimizers
from mpicomp.state import TORCH_GENERATOR
from mpicomp.topology import complete_bipartite, ring

METHODS = {
    "choco": Choco(0.2, TopK(0.2)),
    "choco_overlapped": Choco(0.2, TopK(0.2), overlap=True),
    "ef_sgd": EFSGD(TopK(0.2)),
    "diloco": DiLoCo(period=3, outer_lr=0.7),
}


def network(seed=0):
    with TORCH_GENERATOR, torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Embedding(10, 4), nn.Flatten(), nn.Linear(12, 6), nn.LayerNorm(6), nn.Linear(6, 6))


def split(model):
    """Return the hidden matrices of `model`, and its other parameters."""
    matrices = [model[2].weight, model[4].weight]
    return matrices, [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]


def muon_and_adamw(model):
    matrices, others = split(model)
    return [torch.optim.Muon(matrices, lr=0.05, weight_decay=0.01), torch.optim.AdamW(others, lr=0.02)]


def closure(model, step, rank):
    inputs = torch.randint(10, (16, 3), generator=torch.Generator().manual_seed(7 * step + rank))
    return lambda: nn.functional.cross_entropy(model(inputs), inputs[:, 0] % 6)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_two_optimizers_are_one_with_two_groups(method):
    def make(model, is_split):
        matrices, others = split(model)
        if is_split:
            return [torch.optim.SGD(matrices, lr=0.1, momentum=0.9), torch.optim.SGD(others, lr=0.03, weight_decay=0.1)]
        groups = [{"params": matrices, "lr": 0.1, "momentum": 0.9}, {"params": others, "weight_decay": 0.1}]
        return torch.optim.SGD(groups, lr=0.03)

    def train(world, is_split):
        model = network()
        gossip = distribute(model, make(model, is_split), method, ring, world=world)
        for step in range(6):
            gossip.step(closure(model, step, world.rank))
        return gossip.local.x.clone()

    for ours, theirs in zip(loopback.run(3, train, True), loopback.run(3, train, False), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_muon_and_adamw_with_schedulers_of_their_own_and_an_exact_restart(method):
    def train(world, stored=None):
        model = network(seed=0 if stored is None else 1)
        optimizers = muon_and_adamw(model)
        gossip = distribute(model, optimizers, method, ring, world=world)
        schedulers = [torch.optim.lr_scheduler.LinearLR(each, 1.0, 0.1, total_iters=20) for each in optimizers]
        saved, losses, first = None, [], 0
        if stored is not None:
            gossip.load_state_dict(stored[world.rank][0])
            for scheduler, state in zip(schedulers, stored[world.rank][1], strict=True):
                scheduler.load_state_dict(state)
            first = 10
        for step in range(first, 30):
            if step == 10:
                saved = copy.deepcopy((gossip.state_dict(), [each.state_dict() for each in schedulers]))
            loss = closure(model, step % 3, world.rank)()
            loss.backward()
            gossip.optimizer.step()
            gossip.optimizer.zero_grad()
            for scheduler in schedulers:
                scheduler.step()
            losses.append(float(loss.detach()))
        assert optimizers[0].state[model[2].weight]["momentum_buffer"].norm() > 0
        assert [each.param_groups[0]["lr"] for each in optimizers] == pytest.approx([0.005, 0.002])
        return gossip.local.x.clone(), losses, saved

    whole = loopback.run(3, train)
    again = loopback.run(3, train, [saved for _, _, saved in whole])
    for (x, losses, _), (x_again, losses_again, _) in zip(whole, again, strict=True):
        assert torch.equal(x, x_again) and losses[10:] == losses_again
        assert sum(losses[-3:]) < 0.7 * sum(losses[:3])


def test_a_state_of_other_optimizers_is_refused():
    def serve(world):
        model = network()
        gossip = distribute(model, muon_and_adamw(model), DPSGD(), ring, world=world)
        gossip.step(closure(model, 0, world.rank))
        other = network()
        adamw = distribute(other, torch.optim.AdamW(other.parameters()), DPSGD(), ring, world=world)
        with pytest.raises(CheckpointError, match="another optimizer"):
            adamw.load_state_dict(gossip.state_dict())

    loopback.run(2, serve)


def test_a_step_of_a_single_optimizer_is_refused_and_so_is_another_training():
    def serve(world):
        model = network()
        optimizers = muon_and_adamw(model)
        distribute(model, optimizers, DPSGD(), ring, world=world)
        for optimizer in optimizers:
            with pytest.raises(ConfigError, match="would train this rank alone"):
                optimizer.step()
        with pytest.raises(ConfigError, match="this optimizer is distributed already"):
            distribute(network(), optimizers, DPSGD(), ring, world=world)

    loopback.run(2, serve)


def of_both(model):
    return [torch.optim.SGD(model.parameters()), torch.optim.AdamW(model[0].parameters())]


def of_some(model):
    return muon_and_adamw(model)[:1]


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda model: [], "the list of optimizers is empty"),
        (lambda model: model.parameters(), "the optimizer is generator: give a torch.optim.Optimizer, or a list"),
        (lambda model: [torch.optim.SGD(model.parameters()), None], "the optimizer is NoneType"),
        (of_both, r"SGD and AdamW hold the same parameter of shape \(10, 4\)"),
        (of_some, r"the optimizer does not hold: 0.weight, 2.bias.* or to a second one"),
        (lambda model: [torch.optim.LBFGS(model.parameters())], "LBFGS computes several gradients"),
    ],
    ids=["empty", "parameters", "none", "of_both", "of_some", "lbfgs"],
)
def test_optimizers_that_do_not_fit_are_refused(make, match):
    def serve(world):
        model = network()
        with pytest.raises(ConfigError, match=match):
            distribute(model, make(model), DPSGD(), ring, world=world)

    loopback.run(1, serve)


@pytest.mark.parametrize(
    ("make", "name"), [(muon_and_adamw, "Muon"), (lambda model: torch.optim.Adafactor(model.parameters()), "Adafactor")]
)
def test_several_hubs_refuse_optimizers_of_whole_tensors(make, name):
    def serve(world):
        model = network()
        with pytest.raises(ConfigError, match=rf"algorithm.hubs = 2: {name} needs the whole gradient of a tensor"):
            distribute(model, make(model), ASGD(hubs=2), lambda size: complete_bipartite(size, 2), world=world)

    loopback.run(3, serve)


def test_methods_that_make_their_own_direction_take_several_sgd_and_nothing_else():
    def serve(world):
        model = network()
        matrices, others = split(model)
        pair = [torch.optim.SGD(matrices, lr=0.1), torch.optim.AdamW(others)]
        with pytest.raises(ConfigError, match=r"optimizer.kind = 'AdamW': DeMo makes the direction of its steps"):
            distribute(model, pair, DeMo(k=4), ring, world=world)
        model = network()
        matrices, others = split(model)
        pair = [torch.optim.SGD(matrices, lr=0.1), torch.optim.SGD(others, lr=0.01)]
        gossip = distribute(model, pair, DeMo(k=4), ring, world=world)
        losses = [float(gossip.step(closure(model, 0, world.rank))) for _ in range(10)]
        assert losses[-1] < losses[0]

    loopback.run(2, serve)


def test_a_group_cannot_be_added():
    with pytest.raises(ConfigError, match="add the parameter group to one of the optimizers"):
        SeveralOptimizers(muon_and_adamw(network())).add_param_group({"params": []})


def test_with_a_closure_the_gradient_is_computed_once():
    model = network()
    optimizer, calls = SeveralOptimizers(muon_and_adamw(model)), []

    def compute():
        calls.append(1)
        optimizer.zero_grad()
        loss = closure(model, 0, 0)()
        loss.backward()
        return loss

    losses = [float(optimizer.step(compute).detach()) for _ in range(20)]
    assert len(calls) == 20 and losses[-1] < 0.5 * losses[0]
