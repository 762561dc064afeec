"""The meter by a clock that only the test moves, and `Distributed.metrics` against numbers made by hand."""

import math

import pytest
import torch
from torch import nn

from mpicomp import timing
from mpicomp.algorithms import DPSGD, Choco
from mpicomp.compression import TopK
from mpicomp.errors import ConfigError
from mpicomp.exchange import loopback
from mpicomp.replica.distribute import distribute
from mpicomp.replica.meter import SAMPLED_ENTRIES, Meter, sampled_consensus_distance
from mpicomp.timing import timed, use_clock
from mpicomp.topology import ring


class Clock:
    def __init__(self):
        self.time = 100.0

    def __call__(self):
        return self.time

    def go(self, seconds):
        self.time += seconds


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(timing, "_clocks", timing._Clocks())
    use_clock(clock := Clock())
    return clock


def make_meter():
    return Meter(torch.zeros((), dtype=torch.float64))


def step(meter, clock, loss=None):
    with meter:
        timed("gradient")(clock.go)(3)
        clock.go(0.5)
        timed("exchange")(clock.go)(2)
        if loss is not None:
            meter.add(torch.tensor(loss))


def test_seconds_of_steps_and_between_them(clock):
    meter = make_meter()
    clock.go(1000)  # before the first step: nobody's
    step(meter, clock)
    clock.go(7)
    step(meter, clock)
    _, seconds = meter.take()
    assert seconds == {"gradient": 6, "compress": 0, "exchange": 4, "mix": 1, "exchange_hidden": 0, "other": 7}
    assert meter.total_seconds == 11
    assert set(meter.take()[1].values()) == {0}


def test_an_exchange_between_steps_is_not_the_callers_time(clock):
    meter = make_meter()
    step(meter, clock)
    clock.go(5)
    timed("exchange")(clock.go)(1)
    step(meter, clock)
    seconds = meter.take()[1]
    assert (seconds["other"], seconds["exchange"]) == (5, 5)
    assert sum(seconds.values()) == clock.time - 100


def test_a_meeting_is_exchange_and_what_is_skipped_is_nothing(clock):
    meter = make_meter()
    step(meter, clock)
    clock.go(1)
    with meter.meeting():
        timed("exchange")(clock.go)(10)
    clock.go(2)
    meter.skip()
    step(meter, clock)
    seconds = meter.take()[1]
    assert (seconds["other"], seconds["exchange"]) == (1, 14)
    assert meter.total_seconds == 21


def test_the_loss_is_the_mean_over_steps_that_know_it(clock):
    meter = make_meter()
    for loss in (1.0, None, [4.0]):  # a loss may be a vector of one entry
        step(meter, clock, loss)
    assert meter.take()[0] == 2.5
    step(meter, clock)
    assert meter.take()[0] is None


def linear(world, algorithm=None, features=2):
    """Return a model of `features` weights, all zero, whose loss has the gradient 1 everywhere."""
    model = nn.Linear(features, 1, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    gossip = distribute(model, optimizer, algorithm or DPSGD(), ring, world=world)
    return gossip, lambda: model.weight.sum()


def test_metrics_are_the_means_over_ranks():
    """Three ranks on a ring, all weights 1/3: D-PSGD averages in each step, and then everybody moves alike."""

    def serve(world):
        gossip, loss = linear(world)
        first = gossip.metrics()
        for _ in range(2):
            gossip.step(lambda: loss() + world.rank)
        second = gossip.metrics()
        gossip.local.x.fill_(float(world.rank))
        gossip.step(lambda: loss() + 5)
        gossip.local.x.fill_(float(world.rank))
        return first, second, gossip.metrics(), gossip.meter

    outcomes = loopback.run(3, serve)
    first, second, third, _ = outcomes[0]
    assert [outcome[:3] for outcome in outcomes] == [(first, second, third)] * 3
    assert (first.step, first.loss, first.epoch, first.bytes_sent) == (0, None, None, 0)
    # Weights 0, then -0.5: losses rank, then rank - 1.
    assert (second.step, second.loss, second.lr) == (2, pytest.approx(0.5), 0.5)
    assert second.bytes_sent == 3 * 2 * 2 * 8  # ranks, steps, neighbors, two float32
    assert second.consensus_distance == 0
    assert second.test_accuracy is None
    assert third.loss == pytest.approx(5 + 2 * (0 + 1 + 2) / 3)  # since the last call alone
    assert third.bytes_sent == 3 * 3 * 2 * 8
    assert third.consensus_distance == pytest.approx(math.sqrt(2 * 2 / 3))  # two entries of variance 2/3
    assert list(third.seconds) == ["gradient", "compress", "exchange", "mix", "exchange_hidden", "other"]
    assert third.seconds["gradient"] > 0 and third.seconds["exchange"] > 0


def test_the_seconds_are_all_the_time_since_the_last_call():
    def serve(world, clock):
        use_clock(clock)
        gossip, loss = linear(world)

        def slow():
            clock.go(4)
            return loss()

        gossip.metrics()
        clock.go(9)
        gossip.step(slow)
        clock.go(1)
        return gossip.metrics().seconds

    (seconds,) = loopback.run(1, serve, Clock())
    assert seconds == {"gradient": 4, "compress": 0, "exchange": 0, "mix": 0, "exchange_hidden": 0, "other": 10}


def test_the_caller_may_give_the_loss():
    def serve(world):
        gossip, loss = linear(world)
        gossip.step(loss)
        given = torch.tensor(float(world.rank), requires_grad=True) if world.rank < 2 else None
        return gossip.metrics(given).loss, gossip.metrics(loss=2.0).loss

    for first, second in loopback.run(3, serve):
        assert first == pytest.approx((0 + 1 + 0) / 3)  # rank 2: the mean over its one step, whose loss was 0
        assert second == 2


def test_where_the_caller_makes_the_backward_pass_it_gives_the_loss():
    def serve(world):
        gossip, loss = linear(world)
        records = []
        for _ in range(3):
            value = loss() + world.rank
            value.backward()
            gossip.optimizer.step()
            gossip.optimizer.zero_grad()
            records.append(gossip.metrics(value if len(records) else None))
        return records

    for unknown, *known in loopback.run(2, serve):
        assert unknown.loss is None
        assert [record.loss for record in known] == [pytest.approx(-1 + 0.5), pytest.approx(-2 + 0.5)]
        assert [record.step for record in known] == [2, 3]
        assert known[0].bytes_sent == 2 * 2 * 8
        assert known[0].seconds["other"] > 0 and known[0].seconds["exchange"] > 0


def test_messages_behind_the_callers_own_passes_are_hidden():
    """Begun with the forward pass; the rest of its four seconds and the backward pass are the caller's own."""

    def serve(world):
        use_clock(clock := Clock())
        model = nn.Linear(2, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        gossip = distribute(model, optimizer, Choco(0.1, TopK(0.5), overlap=True), ring, world=world)
        gossip.metrics()
        for _ in range(2):
            loss = model(torch.ones(2)).sum()
            clock.go(4)
            loss.backward()
            gossip.optimizer.step()
            clock.go(1)
        return gossip.metrics().seconds

    for seconds in loopback.run(2, serve):
        assert seconds["other"] == 10
        # the mean over two ranks: on each a message may be there before anybody looks
        assert seconds["exchange_hidden"] in (0, 2, 4, 6, 8)
        assert seconds["exchange"] == 0


def test_there_are_no_metrics_of_half_a_step():
    def serve(world):
        model = nn.Linear(2, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        gossip = distribute(model, optimizer, Choco(0.1, TopK(0.5), overlap=True), ring, world=world)
        loss = model(torch.ones(2)).sum()
        with pytest.raises(ConfigError, match=r"gossip.metrics\(\) in the middle of a step"):
            gossip.metrics()
        loss.backward()
        gossip.optimizer.step()
        return gossip.metrics().step

    assert loopback.run(2, serve) == [1, 1]


def test_the_compression_error_is_the_mean_of_the_ranks():
    def serve(world):
        gossip, loss = linear(world, Choco(0.1, TopK(0.5)))
        gossip.step(loss)
        return gossip.metrics().diagnostics, gossip.algorithm.diagnostics(gossip.local, gossip.state)

    outcomes = loopback.run(2, serve)
    mean = sum(own["compression_error"] for _, own in outcomes) / 2
    assert mean > 0
    assert [record for record, _ in outcomes] == [{"compression_error": pytest.approx(mean)}] * 2


def test_the_consensus_distance_is_estimated_from_some_entries():
    def serve(world):
        gossip, _ = linear(world, features=4 * SAMPLED_ENTRIES)
        gossip.local.x.copy_(torch.randn(gossip.local.x.shape, generator=torch.Generator().manual_seed(world.rank)))
        return sampled_consensus_distance(gossip, gossip.steps), gossip.consensus_distance()

    for estimated, exact in loopback.run(3, serve):
        assert estimated != exact
        assert estimated == pytest.approx(exact, rel=0.05)
