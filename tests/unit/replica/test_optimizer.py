"""The loop of a script of one's own, ``backward(); gossip.optimizer.step()``, is the closure form, bit for bit."""

import copy
from functools import partial

import pytest
import torch
from support import small
from support.methods import DETERMINISTIC

import mpicomp
from mpicomp.algorithms import DGC, DPSGD, EFSGD, GMC, AdaGossip, Choco, DeMo, EfficientAdam, PowerSGD
from mpicomp.compression import TopK
from mpicomp.errors import ConfigError
from mpicomp.exchange import loopback
from mpicomp.topology import ring

STEPS = 6


def by_closure(world, algorithm):
    return small.train(world, algorithm, STEPS)[0]


def by_loop(world, algorithm, zero_grad=lambda gossip: gossip.optimizer.zero_grad()):
    gossip, closure = small.make(world, algorithm)
    for step in range(STEPS):
        zero_grad(gossip)
        closure(step)().backward()
        gossip.optimizer.step()
    assert gossip.steps == STEPS
    return gossip.local.x.clone()


def equal(ours, theirs):
    return all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_the_loop_is_the_closure(name):
    algorithm = DETERMINISTIC[name]
    assert equal(loopback.run(3, by_loop, algorithm), loopback.run(3, by_closure, algorithm))


@pytest.mark.parametrize("algorithm", [Choco(0.2, TopK(0.2), overlap=True), EFSGD(TopK(0.2))], ids=["choco", "ef_sgd"])
@pytest.mark.parametrize(
    "zero_grad",
    [
        lambda gossip: gossip.local.optimizer.zero_grad(),
        lambda gossip: gossip.local.optimizer.zero_grad(set_to_none=False),
        lambda gossip: gossip.local.model.zero_grad(),
    ],
    ids=["own", "own_in_place", "model"],
)
def test_gradients_may_be_zeroed_in_any_way(algorithm, zero_grad):
    assert equal(loopback.run(3, by_loop, algorithm, zero_grad), loopback.run(3, by_closure, algorithm))


@pytest.mark.parametrize("name", ["choco", "choco_overlapped", "ef_sgd", "gmc_plus", "efficient_adam"])
@pytest.mark.parametrize("through_optimizer", [True, False])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_closure_may_zero_and_go_backward_by_itself(name, through_optimizer, set_to_none):
    def serve(world):
        gossip, closure = small.make(world, DETERMINISTIC[name])

        def whole(step):
            gossip.local.optimizer.zero_grad(set_to_none=set_to_none)
            loss = closure(step)()
            loss.backward()
            return loss

        losses = [
            (gossip.optimizer.step if through_optimizer else gossip.step)(lambda step=step: whole(step))
            for step in range(STEPS)
        ]
        assert not any(loss.requires_grad for loss in losses)
        return gossip.local.x.clone()

    assert equal(loopback.run(3, serve), loopback.run(3, by_closure, DETERMINISTIC[name]))


def test_the_own_optimizer_alone_is_refused():
    def serve(world):
        gossip, closure = small.make(world, DPSGD())
        closure(0)().backward()
        with pytest.raises(ConfigError, match=r"would train this rank alone: call gossip.optimizer.step\(\)"):
            gossip.local.optimizer.step()
        gossip.optimizer.step()

    loopback.run(2, serve)


def test_another_optimizer_of_the_same_parameters_is_refused_but_not_one_of_a_copy():
    def serve(world):
        gossip, closure = small.make(world, DPSGD())
        gossip.step(closure(0))
        model = gossip.local.model
        with pytest.raises(ConfigError, match=r"train this rank alone.* use copy.deepcopy\(model\)"):
            torch.optim.AdamW(model.parameters()).step()
        with gossip.averaged():
            torch.optim.AdamW(model.parameters()).step()  # undone at the end of the block
        torch.optim.AdamW(copy.deepcopy(model).parameters()).step()
        gossip.step(closure(1))

    loopback.run(2, serve)


def test_an_optimizer_may_be_wrapped_around_the_distributed_one():
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, base):
            super().__init__(base.param_groups, {})
            self.base = base

        def step(self, closure=None):
            self.base.step()

    def serve(world):
        gossip, closure = small.make(world, DPSGD())
        wrapper = Wrapper(gossip.optimizer)
        closure(0)().backward()
        wrapper.step()
        assert gossip.steps == 1

    loopback.run(2, serve)


def test_it_shares_groups_state_and_defaults():
    def serve(world):
        gossip, closure = small.make(world, DPSGD())
        own, optimizer = gossip.local.optimizer, gossip.optimizer
        assert isinstance(optimizer, torch.optim.Optimizer)
        gossip.step(closure(0))
        assert optimizer.param_groups is own.param_groups and optimizer.state is own.state
        assert repr(optimizer.state_dict()) == repr(own.state_dict())
        optimizer.load_state_dict(own.state_dict())
        assert optimizer.param_groups is own.param_groups
        optimizer.param_groups[0]["lr"] = 0.0
        before = gossip.local.x.clone()
        gossip.step(closure(1))
        assert torch.equal(before, gossip.local.x) == (world.size == 1)
        with pytest.raises(ConfigError, match="cannot be added after"):
            optimizer.add_param_group({"params": []})

    loopback.run(1, serve)


@pytest.mark.parametrize(
    "algorithm", [Choco(0.2, TopK(0.2)), EfficientAdam(TopK(0.2))], ids=["choco", "efficient_adam"]
)
@pytest.mark.parametrize("which", ["own", "distributed"])
def test_schedulers_take_either_optimizer_and_do_not_warn(algorithm, which):
    def serve(world):
        gossip, closure = small.make(world, algorithm)
        optimizer = gossip.optimizer if which == "distributed" else gossip.local.optimizer
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.1)
        rates = []
        for step in range(4):
            rates.append(gossip.optimizer.param_groups[0]["lr"])
            closure(step)().backward()
            gossip.optimizer.step()
            gossip.optimizer.zero_grad()
            scheduler.step()
        return rates

    for rates in loopback.run(2, serve):
        assert rates == pytest.approx([0.05, 0.05, 0.005, 0.005])


@pytest.mark.parametrize(
    "algorithm",
    [
        EFSGD(TopK(0.2), momentum=0.9),
        GMC(TopK(0.2)),
        DGC(TopK(0.2)),
        DeMo(k=2),
        PowerSGD(rank=1, momentum=0.9),
        AdaGossip(0.1, quasi_global_momentum=0.9),
    ],
    ids=lambda a: a.name,
)
def test_a_scheduler_must_not_turn_on_a_momentum_beside_that_of_the_method(algorithm):
    def serve(world, cycle_momentum):
        gossip, closure = small.make(world, algorithm)
        optimizer = gossip.local.optimizer
        torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=5, cycle_momentum=cycle_momentum)
        gossip.step(closure(0))

    loopback.run(2, serve, False)
    with pytest.raises(ConfigError, match=r"optimizer.momentum .*OneCycleLR\(..., cycle_momentum=False\)"):
        loopback.run(2, serve, True)


def steps(world, algorithm, optimizer, slope=1.0):
    """Return the parameters after some steps, where every gradient is `slope`."""
    model = small.network()
    gossip = mpicomp.distribute(model, optimizer(model.parameters()), algorithm, ring, world=world)
    for _ in range(4):
        gossip.step(lambda: slope * sum(p.sum() for p in model.parameters()))
    return gossip.local.x.clone()


@pytest.mark.parametrize(
    ("algorithm", "decay"),
    [
        (EFSGD(momentum=0.9), 0.1),
        (DGC(), 0.1),
        (GMC(), 0.0),
        (AdaGossip(0.1, quasi_global_momentum=0.9), 0.0),
    ],
    ids=lambda a: getattr(a, "name", ""),
)
def test_an_optimizer_that_maximizes_must_not_change_the_sign_of_what_the_method_adds(algorithm, decay):
    uphill = partial(torch.optim.SGD, lr=0.1, maximize=True)
    with pytest.raises(ConfigError, match=r"optimizer.maximize = True: .* Change the sign of the loss"):
        loopback.run(2, steps, algorithm, partial(uphill, weight_decay=decay))
    if decay:  # without, there is nothing to add
        (up, _), (down, _) = (
            loopback.run(2, steps, algorithm, *case)
            for case in ((uphill, -1.0), (partial(uphill, maximize=False), 1.0))
        )
        assert torch.equal(up, down)


@pytest.mark.parametrize(
    "optimizer",
    [
        partial(torch.optim.AdamW, betas=(0.0, 0.99)),
        partial(torch.optim.Adafactor),
    ],
    ids=["adamw", "adafactor"],
)
def test_decoupled_weight_decay_gets_no_momentum(optimizer):
    """Without gradients it alone moves the model."""
    decaying = partial(optimizer, lr=0.1, weight_decay=0.1)
    (x, _), (plain, _) = (loopback.run(2, steps, EFSGD(momentum=m), decaying, 0.0) for m in (0.9, 0.0))
    assert torch.equal(x, plain)


def test_hooks_run_around_the_whole_step_and_around_the_local_one():
    def serve(world):
        gossip, closure = small.make(world, EFSGD(TopK(0.2)))
        seen = []
        gossip.optimizer.register_step_pre_hook(lambda *_: seen.append(gossip.local.g.clone()))
        gossip.local.optimizer.register_step_pre_hook(lambda *_: seen.append(gossip.local.g.clone()))
        gossip.optimizer.register_step_post_hook(lambda *_: seen.append(gossip.steps))
        gossip.optimizer.zero_grad()
        closure(0)().backward()
        gradient = gossip.local.g.clone()
        gossip.optimizer.step()
        own, summed, steps = seen
        assert torch.equal(own, gradient) and not torch.equal(summed, gradient) and steps == 1
        return summed

    first, *others = loopback.run(3, serve)
    assert equal([first] * 2, others)


def test_gmc_plus_needs_to_see_the_forward_pass():
    def serve(world):
        gossip, closure = small.make(world, GMC(TopK(0.2), detachment=0.3))
        gossip.local.model.eval()
        closure(0)().backward()
        with pytest.raises(
            ConfigError, match=r"call the model itself, in training mode, or use gossip.step\(closure\)"
        ):
            gossip.optimizer.step()

    loopback.run(2, serve)


@pytest.mark.parametrize("name", ["dpsgd", "dpsgd_overlapped", "ef_sgd"])
def test_micro_batches_are_one_step_of_their_mean(name):
    def closures(world):
        gossip, closure = small.make(world, DETERMINISTIC[name])
        batches = iter([closure(step) for step in range(6)])

        def forgetful():
            gossip.local.optimizer.zero_grad()  # loses no gradient of an earlier micro-batch
            return next(batches)()

        losses = [float(gossip.step(forgetful, micro_batches=3)) for _ in range(2)]
        return gossip.local.x.clone(), losses

    def loop(world):
        gossip, closure = small.make(world, DETERMINISTIC[name])
        losses = []
        for first in (0, 3):
            gossip.optimizer.zero_grad()
            parts = [closure(step)() for step in range(first, first + 3)]
            for loss in parts:
                (loss / 3).backward()
            losses.append(float(sum(loss.detach() for loss in parts) / 3))
            gossip.optimizer.step()
        return gossip.local.x.clone(), losses

    for (x, losses), (x_loop, losses_loop) in zip(loopback.run(3, closures), loopback.run(3, loop), strict=True):
        torch.testing.assert_close(x, x_loop)
        assert losses == pytest.approx(losses_loop)


def test_a_closure_that_has_gone_backward_may_return_nothing():
    def serve(world):
        gossip, closure = small.make(world, DPSGD())
        for step in range(STEPS):
            gossip.optimizer.step(lambda step=step: closure(step)().backward())
        return gossip.local.x.clone()

    assert equal(loopback.run(2, serve), loopback.run(2, by_closure, DPSGD()))
