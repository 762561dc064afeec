"""Asynchronous methods behind a loop of one's own: every rank at its own pace, in simulated time."""

import copy

import pytest
import torch
from support import small
from torch import nn

from mpicomp.algorithms import ADPSGD, ASGD, DCASGD, Choco, DCGossip
from mpicomp.compression import TopK, UniformGrid
from mpicomp.errors import CheckpointError, ConfigError
from mpicomp.exchange.loopback import run
from mpicomp.exchange.loopback.network import Links
from mpicomp.exchange.mailbox.slots import SlotMailbox
from mpicomp.replica.distribute import distribute
from mpicomp.topology import chain, complete_bipartite, ring, star

TOP = TopK(ratio=0.3)
LINKS = Links(latency_s=0.02, bytes_per_s=1e5)
STEPS = 12


def two_hubs(size):
    return complete_bipartite(size, hubs=2)


METHODS = {
    "gossip": (DCGossip(0.3, TOP), ring),
    "gossip_bounded": (DCGossip(0.3, TOP, max_staleness=1), chain),
    "gossip_in_step": (DCGossip(0.3, TOP, max_staleness=0, lambda0=0.0), ring),
    "ad_psgd": (ADPSGD(), ring),
    "asgd": (ASGD(), star),
    "dc_asgd": (DCASGD(TOP, downlink=UniformGrid(bits=4)), star),
    "dc_asgd_two_hubs": (DCASGD(TOP, hubs=2), two_hubs),
}


@pytest.fixture(params=METHODS)
def method(request):
    return METHODS[request.param]


def simulate(size, function, *args):
    return run(size, function, *args, simulated=LINKS)


def pace(world):
    """Take the time that a gradient of this rank takes."""
    world.sleep(0.1 + 0.07 * world.rank)


def train(gossip, closure, world, steps, begin=0, by_loop=False, **serving):
    """Train to the end; this rank makes the steps from `begin` to `steps`."""
    if gossip.is_hub:
        gossip.serve(**serving)
        return
    for step in range(begin, steps):
        if by_loop:
            gossip.begin()
            pace(world)
            closure(step)().backward()
            gossip.optimizer.step()
            gossip.optimizer.zero_grad()
        else:
            gossip.step(lambda step=step: (pace(world), closure(step)())[1])
    gossip.finish()


def outcome(gossip):
    with gossip.averaged() as model:
        mean = nn.utils.parameters_to_vector(model.parameters()).clone()
    return gossip.local.x.clone(), mean, gossip.steps, gossip.bytes_sent


def equal(ours, theirs):
    return all(
        torch.equal(x, y) and torch.equal(mean, other) and rest == others
        for (x, mean, *rest), (y, other, *others) in zip(ours, theirs, strict=True)
    )


def by_closure(world, method, steps=STEPS):
    gossip, closure = small.make(world, *method)
    train(gossip, closure, world, steps)
    return outcome(gossip)


def test_the_loop_is_the_closure(method):
    def by_loop(world):
        gossip, closure = small.make(world, *method)
        train(gossip, closure, world, STEPS, by_loop=True)
        return outcome(gossip)

    assert equal(simulate(4, by_loop), simulate(4, by_closure, method))


@pytest.mark.parametrize("algorithm", [ADPSGD(), DCGossip(0.5, TopK(0.3))], ids=lambda a: a.name)
def test_a_parameter_without_a_gradient_is_left_alone(algorithm):
    """As in plain PyTorch: no weight decay moves it."""

    def serve(world):
        model = nn.ModuleList([nn.Linear(3, 1), nn.Linear(3, 1)])
        for p in model.parameters():
            nn.init.ones_(p)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
        gossip = distribute(model, optimizer, algorithm, ring, world=world)
        for _ in range(5):
            gossip.step(lambda: model[0](torch.ones(3)).sum())
        gossip.finish()
        return [p.detach().clone() for p in model.parameters()]

    for used, _, *unused in run(2, serve):
        assert (used < 1).all()
        assert all((p == 1).all() for p in unused)


def test_it_is_the_algorithm_itself(method):
    """Drive `AsynchronousAlgorithm.step` and `serve` by hand, as `mpicomp train` does, to the same bits."""
    algorithm, graph = method

    def by_hand(world):
        gossip, closure = small.make(world, algorithm, graph)
        gossip.local.model._forward_pre_hooks.clear()
        local, state, mailbox = gossip.local, gossip.state, gossip.mailbox
        computed, total = 0, STEPS * len(algorithm.trainers(world.size))

        def next_loss():
            nonlocal computed
            computed += 1
            pace(world)
            return closure(computed - 1)()

        local.closure = next_loss
        while algorithm.updates(state) < total if gossip.is_hub else computed < STEPS or algorithm.is_unfinished(state):
            if not (algorithm.serve if gossip.is_hub else algorithm.step)(local, state, mailbox):
                mailbox.pause()
        train(gossip, closure, world, 0)
        return local.x.clone()

    ours, theirs = simulate(4, by_hand), simulate(4, by_closure, method)
    assert all(torch.equal(x, y) for x, (y, *_) in zip(ours, theirs, strict=True))


def test_one_worker_trains_as_it_would_alone():
    def alone(world):
        gossip, closure = small.make(world, ASGD(), star)
        if gossip.is_hub:
            gossip.serve()
            outcome(gossip)
            return
        plain = small.network()
        optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
        for step in range(STEPS):
            loss = gossip.step(closure(step))
            optimizer.zero_grad()
            inputs, labels = small.batch(step, world.rank)
            expected = nn.functional.cross_entropy(plain(inputs), labels)
            expected.backward()
            optimizer.step()
            assert torch.equal(loss, expected.detach())
        gossip.finish()
        assert torch.equal(outcome(gossip)[1], nn.utils.parameters_to_vector(plain.parameters()))

    simulate(2, alone)


def test_without_a_lead_it_is_choco():
    def synchronous(world):
        gossip, closure = small.make(world, Choco(0.3, TOP, overlap=True), ring)
        for step in range(STEPS):
            gossip.step(closure(step))
        return gossip.local.x.clone()

    ours = simulate(4, by_closure, METHODS["gossip_in_step"])
    for (x, *_), y in zip(ours, run(4, synchronous), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-5)


def test_ranks_end_when_they_like(method):
    def serve(world):
        gossip, closure = small.make(world, *method)
        train(gossip, closure, world, 3 + 9 * world.rank)
        done = gossip.steps
        if not gossip.is_hub:
            assert done == 3 + 9 * world.rank
        _, mean, *_ = outcome(gossip)
        return mean, done

    means, steps = zip(*simulate(4, serve), strict=True)
    assert all(torch.equal(means[0], mean) for mean in means)
    hubs = getattr(method[0], "hubs", 0)
    assert all(done == sum(steps[hubs:]) for done in steps[:hubs])


def test_ranks_may_meet_in_the_middle_and_after_unequal_steps(method, tmp_path):
    def serve(world):
        gossip, closure = small.make(world, *method)
        if gossip.is_hub:
            gossip.serve(extra=lambda: {"of": "hub"})
        else:
            for step in range(4 + 3 * world.rank):
                gossip.step(lambda step=step: (pace(world), closure(step)())[1])
            with gossip.averaged() as model:
                assert not model.training
                pace(world)
            distance = gossip.consensus_distance()
            assert distance > 0
            record = gossip.metrics()
            assert record.loss > 0 and record.step > 0
            gossip.averaged_state_dict()
            if world.rank < world.size - 1:  # the last rank goes on alone
                gossip.finish(extra=lambda: {"of": "finished"})
            else:
                gossip.step(closure(99))
                gossip.save(tmp_path, {"of": "last"})
                gossip.step(closure(100))
                gossip.finish()
        other, _ = small.make(world, *method, seed=1)
        kind = "hub" if gossip.is_hub else "last" if world.rank == world.size - 1 else "finished"
        assert other.resume(tmp_path) == {"of": kind}
        if kind == "finished":
            assert other.steps == 4 + 3 * world.rank

    simulate(4, serve)


def test_it_goes_on_from_a_checkpoint_bit_for_bit(method, tmp_path):
    """A scheduler at the hub included; the ranks are at unequal steps when they meet."""

    def schedule(gossip):
        scheduler = torch.optim.lr_scheduler.StepLR(gossip.optimizer, 7, gamma=0.5)
        is_used = gossip.is_hub or not gossip._owners
        serving = {"after_update": scheduler.step, "extra": scheduler.state_dict} if gossip.is_hub else {}
        return scheduler, is_used and not gossip.is_hub, serving

    def steps_before(world):
        return 4 + world.rank

    def whole(world):
        gossip, closure = small.make(world, *method)
        scheduler, is_stepped, serving = schedule(gossip)
        if gossip.is_hub:
            gossip.serve(**serving)
        else:
            for step in range(STEPS):
                if step == steps_before(world):
                    gossip.save(tmp_path, scheduler.state_dict())
                gossip.step(lambda step=step: (pace(world), closure(step)())[1])
                if is_stepped:
                    scheduler.step()
            gossip.finish()
        return outcome(gossip)

    def rest(world):
        gossip, closure = small.make(world, *method, seed=5)
        scheduler, is_stepped, serving = schedule(gossip)
        scheduler.load_state_dict(gossip.resume(tmp_path))
        if gossip.is_hub:
            gossip.serve(**serving)
        else:
            assert gossip.steps == steps_before(world)
            for step in range(steps_before(world), STEPS):
                gossip.step(lambda step=step: (pace(world), closure(step)())[1])
                if is_stepped:
                    scheduler.step()
            gossip.finish()
        return outcome(gossip)

    theirs = simulate(4, whole)
    assert equal([(x, mean, steps) for x, mean, steps, _ in simulate(4, rest)], [row[:3] for row in theirs])


def test_training_may_go_on_after_the_end(method):
    def in_epochs(world):
        gossip, closure = small.make(world, *method)
        for begin in range(0, STEPS, 4):
            train(gossip, closure, world, begin + 4, begin)
            outcome(gossip)
        return gossip.steps

    hubs = getattr(method[0], "hubs", 0)
    assert simulate(4, in_epochs) == [STEPS * (4 - hubs)] * hubs + [STEPS] * (4 - hubs)


@pytest.mark.parametrize("name", ["gossip", "dc_asgd"])
def test_a_skipped_step_leaves_the_gradient_out(name):
    def serve(world):
        gossip, closure = small.make(world, *METHODS[name])
        if gossip.is_hub:
            gossip.serve()
            return gossip.steps
        for step in range(STEPS):
            closure(step)().backward()
            if step % 2:
                gossip.local.g.fill_(torch.inf)
            gossip.step_with_gradients(is_skipped=step % 2 == 1)
            gossip.optimizer.zero_grad()
        gossip.finish()
        assert gossip.local.x.isfinite().all()
        return gossip.steps

    assert simulate(3, serve) == ([STEPS] * 3 if name == "gossip" else [STEPS // 2 * 2, STEPS, STEPS])


@pytest.mark.parametrize(
    ("name", "rank", "misuse", "message"),
    [
        ("asgd", 0, lambda gossip, closure: gossip.step(closure(0)), "rank 0 is a hub of ASGD and computes no gradie"),
        ("asgd", 0, lambda gossip, closure: gossip.optimizer.step(), r"'if gossip.is_hub: gossip.serve\(\)'"),
        ("asgd", 0, lambda gossip, closure: gossip.finish(), r"finish\(\) on rank 0, which is a hub: call serve"),
        ("asgd", 1, lambda gossip, closure: gossip.serve(), r"serve\(\) on rank 1: a worker of ASGD"),
        ("asgd", 1, lambda gossip, closure: gossip.optimizer.step(), "before the first forward pass: call the model"),
        ("gossip", 1, lambda gossip, closure: gossip.serve(), "DCGossip has no hubs"),
        ("gossip", 1, lambda gossip, closure: gossip.join(), r"join\(\) is for methods whose ranks wait"),
    ],
)
def test_misuse_of_a_rank_is_refused(name, rank, misuse, message):
    def serve(world):
        gossip, closure = small.make(world, *METHODS[name])
        if world.rank == rank:
            with pytest.raises(ConfigError, match=message):
                misuse(gossip, closure)
        train(gossip, closure, world, 2)

    simulate(3, serve)


@pytest.mark.parametrize("change", ["rate", "frozen"])
def test_a_worker_cannot_change_what_its_hub_does(change):
    def serve(world):
        gossip, closure = small.make(world, ASGD(), star)
        if gossip.is_hub:
            gossip.serve()
            return
        gossip.step(closure(0))
        if change == "rate":
            gossip.optimizer.param_groups[0]["lr"] *= 0.1
        else:
            gossip.local.model[0].requires_grad_(False)
        with pytest.raises(ConfigError, match=r"has no effect: its hub makes the optimizer's step"):
            gossip.step(closure(1))
        gossip.finish()
        if change == "frozen":  # all may change their mind together
            gossip._require_trainer()

    simulate(2, serve)


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        (("averaged", "save"), r"in different calls: averaged\(\) on rank 0, save\(\) on rank 1"),
        (("resume", "finish"), r"resume\(\) on rank 0, serve\(\) or finish\(\) on rank 1"),
    ],
)
def test_ranks_that_come_for_different_things_are_told_so(calls, message, tmp_path):
    def serve(world):
        gossip, closure = small.make(world, *METHODS["gossip"])
        gossip.step(closure(0))
        with pytest.raises(ConfigError, match=rf"(?s){message}.*in the same order"):
            call(gossip, calls[world.rank], tmp_path)

    run(2, serve)


@pytest.mark.parametrize("name", ["averaged", "save", "finish", "consensus_distance", "metrics"])
def test_the_middle_of_a_step_is_refused_on_all_ranks(name, tmp_path):
    def serve(world):
        gossip, closure = small.make(world, *METHODS["gossip"])
        if world.rank == 1:
            closure(0)()
        with pytest.raises(ConfigError, match=r"in the middle of a step of ranks \[1\]: a forward pass in training"):
            call(gossip, name, tmp_path)

    run(2, serve)


def call(gossip, name, folder):
    found = getattr(gossip, name)(*([folder] if name in ("save", "resume") else []))
    if name == "averaged":
        with found:
            pass


def test_different_folders_are_refused(tmp_path):
    def serve(world):
        gossip, _ = small.make(world, *METHODS["gossip"])
        with pytest.raises(ConfigError, match="All ranks must name the same folder"):
            gossip.save(tmp_path / str(world.rank))

    run(2, serve)


def test_a_checkpoint_of_another_method_is_refused(tmp_path):
    def serve(world):
        small.make(world, *METHODS["gossip"])[0].save(tmp_path)
        with pytest.raises(CheckpointError, match="is of the algorithm DCGossip"):
            small.make(world, *METHODS["asgd"])[0].resume(tmp_path)

    run(2, serve)


def test_statistics_cannot_be_averaged_after_so_many_steps():
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match="buffers = 5: ASGD has no common steps"):
        run(2, lambda world: distribute(model, optimizer, ASGD(), star, world=world, buffers=5))


def test_a_copy_of_the_model_carries_nothing_of_the_training(monkeypatch):
    """A mean of models over time (EMA) is a copy; over some transports hooks on the model call its mailbox."""
    pokes = []
    monkeypatch.setattr(SlotMailbox, "needs_poke", True)
    monkeypatch.setattr(SlotMailbox, "poke", lambda mailbox: pokes.append(mailbox), raising=False)

    def body(world):
        gossip, closure = small.make(world, *METHODS["gossip"])
        gossip.step(closure(0))
        gossip.finish()
        ema = copy.deepcopy(gossip.local.model)
        found = len(pokes)
        ema(small.batch(1, 0)[0])
        after_copy = len(pokes)
        gossip.local.model(small.batch(1, 0)[0])
        return found, after_copy, len(pokes)

    ((found, after_copy, after_model),) = run(1, body)
    assert 0 < found == after_copy < after_model
