"""Plans: a step of one rank takes as long, and sends as much, as those of all ranks in simulated time."""

import itertools

import pytest
import torch
from torch import nn

from mpicomp.algorithms import (
    DPSGD,
    GMC,
    SGP,
    SSGD,
    AdaGossip,
    Choco,
    DeMo,
    DiLoCo,
    LocalSGD,
    NoLoCo,
    PowerGossip,
    PowerSGD,
    SparseLoCo,
    StreamingDiLoCo,
)
from mpicomp.compression import QSGD, BlockTopK, Identity, TopK
from mpicomp.config.config import RunConfig
from mpicomp.errors import ConfigError, TopologyError
from mpicomp.exchange.loopback import Links, run
from mpicomp.exchange.loopback.symmetric import SymmetricExchange
from mpicomp.replica.flat import FlatModel
from mpicomp.replica.gradient_delay import GradientDelay
from mpicomp.run.plan import DDP, Computing, Steps, choose, methods, plan, predict_ddp
from mpicomp.topology import make_topology

LINKS = Links(latency_s=3e-3, bytes_per_s=1e6)
GRADIENT_S = 0.05
SMALL = ["data.kind=synthetic", "data.samples=200", "model.kind=mlp", "model.hidden=[64]", "training.batch_size=8"]


def model():
    """Return a model whose gradient is always the same."""
    torch.manual_seed(1)
    own = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 7))
    local = FlatModel(own, torch.optim.SGD(own.parameters(), lr=0.01))
    g = torch.randn(local.x.shape, generator=torch.Generator().manual_seed(2))
    local.gradient = lambda: local.g.copy_(g)
    return local


def in_simulated_time(algorithm, schedule, count):
    """Return seconds and bytes of steps on all ranks, on the one that sends most."""

    def train(world):
        local, exchange = model(), world.exchange(schedule)
        state, delay = algorithm.init(local, exchange), GradientDelay(gradient_s=GRADIENT_S)
        delay.sleep = world.sleep
        for _ in range(count):
            for meanwhile in algorithm.phases(local, state, exchange):
                local.gradient()
                delay.keep(0.0, meanwhile)
        return world.now(), exchange.bytes_sent

    ends = run(schedule.size, train, simulated=LINKS)
    return max(seconds for seconds, _ in ends), max(nbytes for _, nbytes in ends)


def planned(algorithm, schedule, count, rank=0):
    local = model()
    exchange = SymmetricExchange(rank, schedule, LINKS, LINKS, lambda: 0.0)
    seconds, _, nbytes = Steps(algorithm, local, exchange, GRADIENT_S).run(count)
    return seconds, nbytes


TOPK = TopK(0.1)
METHODS = {
    "ssgd": SSGD(),
    "dpsgd": DPSGD(),
    "dpsgd overlap": DPSGD("combine_then_adapt"),
    "choco": Choco(0.1, TOPK),
    "choco overlap": Choco(0.1, TOPK, overlap=True),
    "choco, 4 bits": Choco(0.1, QSGD(4, contractive=True)),
    "adagossip": AdaGossip(0.001, TOPK),
    "adagossip overlap": AdaGossip(0.001, TOPK, overlap=True),
    "local sgd": LocalSGD(3),
    "local sgd of choco": LocalSGD(2, Choco(0.1, TOPK)),
    "diloco": DiLoCo(3),
    "power gossip": PowerGossip(),
}
SUMS = {
    "gmc": GMC(TOPK),
    "gmc overlap": GMC(TOPK, overlap=True),
    "gmc dense": GMC(Identity()),
    "powersgd": PowerSGD(2),
    "demo": DeMo(k=4),
    "streaming diloco": StreamingDiLoCo(6, 2, delay=2),
    "sparse loco": SparseLoCo(BlockTopK(0.1), period=3),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("kind", "size"), [("ring", 2), ("ring", 5), ("torus", 9), ("complete", 4)])
def test_gossip_is_planned_as_simulated(name, kind, size):
    schedule = make_topology(kind, size)
    seconds, nbytes = planned(METHODS[name], schedule, 6)
    expected_s, expected_nbytes = in_simulated_time(METHODS[name], schedule, 6)
    assert seconds == pytest.approx(expected_s, rel=1e-6)
    # Models of neighbors differ by their public copies alone, whose messages are coded to a few bytes more or less.
    assert nbytes == pytest.approx(expected_nbytes, rel=1e-6)


@pytest.mark.parametrize("name", SUMS)
@pytest.mark.parametrize("size", [2, 3, 6])
def test_sums_round_a_ring_are_planned_as_simulated(name, size):
    schedule = make_topology("ring", size)
    assert planned(SUMS[name], schedule, 6) == pytest.approx(in_simulated_time(SUMS[name], schedule, 6), rel=1e-6)


def test_pairs_are_planned_as_simulated():
    schedule, algorithm = make_topology("random_matching", 4), NoLoCo(2)
    assert planned(algorithm, schedule, 6) == pytest.approx(in_simulated_time(algorithm, schedule, 6), rel=1e-6)


def test_a_directed_graph_is_planned_as_simulated():
    schedule = make_topology("directed_ring", 4)
    algorithm = SGP()
    assert planned(algorithm, schedule, 4) == pytest.approx(in_simulated_time(algorithm, schedule, 4), rel=1e-6)


def test_on_an_irregular_graph_the_rank_with_most_neighbors_is_planned():
    schedule = make_topology("star", 5)
    algorithm = DPSGD()
    assert planned(algorithm, schedule, 4) == pytest.approx(in_simulated_time(algorithm, schedule, 4), rel=1e-6)


def test_what_a_rank_computes_is_part_of_its_step():
    clock = itertools.count()
    schedule, local = make_topology("ring", 4), model()
    exchange = SymmetricExchange(0, schedule, LINKS, LINKS, lambda: 1e-3 * next(clock))
    steps = Steps(Choco(0.1, TOPK), local, exchange, GRADIENT_S)
    seconds, waited_s, _ = steps.run(1)
    without_s, _ = planned(Choco(0.1, TOPK), schedule, 1)
    assert seconds - waited_s >= GRADIENT_S + 2e-3
    assert without_s < seconds < without_s + 0.02


def test_ddp_sums_buckets_one_after_another_as_they_are_complete():
    buckets = ((0.02, 100_000), (0.03, 20_000), (0.2, 40_000))
    computing = Computing(0.2, 0.0, 40_000, buckets)
    found = predict_ddp(computing, 0.01, 4, LINKS)
    # Each rank sends 1.5 vectors at 1 byte/us, in 6 steps of 3 ms: the first two sums end at 0.02 + 0.168 + 0.048 s.
    assert found.seconds == pytest.approx(0.236 + 0.078 + 0.01)
    assert found.nbytes == 240_000 and found.computing_s == pytest.approx(0.21)
    fast = predict_ddp(computing, 0.01, 4, Links())
    assert fast.seconds == pytest.approx(0.21) and fast.waiting_s == pytest.approx(0)


def ticking(tick_s=1e-4):
    clock = itertools.count()
    return lambda: tick_s * next(clock)


def planned_at(bytes_per_s, ranks=4, *overrides, **kwargs):
    config = RunConfig.load("configs/methods/choco.toml", [*SMALL, "compression.ratio=0.01", *overrides])
    return plan(config, ranks, Links(1e-5, bytes_per_s), stopwatch=ticking(), **kwargs)


def test_the_choice_flips_with_the_bandwidth():
    slow, fast = planned_at(1e5), planned_at(1e11)
    assert choose(fast.predictions).is_dense
    chosen = choose(slow.predictions)
    assert not chosen.is_dense and chosen.seconds < slow.predictions[0].seconds / 5
    assert not slow.refused and len(slow.predictions) == 1 + len(methods(TOPK))


def test_a_choice_is_the_first_as_fast_as_the_fastest():
    found = {prediction.name: prediction for prediction in planned_at(1e5).predictions}
    overlapped = found["CHOCO, 1 %, overlap"]
    assert choose([found[DDP], found["CHOCO, 1 %"], overlapped]).seconds <= 1.15 * overlapped.seconds
    assert choose([found[DDP], overlapped]) is overlapped
    assert choose([found[DDP], found["all-reduce after the gradient (ssgd)"]]) is found[DDP]


def test_more_ranks_change_what_sums_send_and_not_what_neighbors_send():
    few, many = ({p.name: p.nbytes for p in planned_at(1e7, ranks).predictions} for ranks in (4, 64))
    assert many["D-PSGD"] == few["D-PSGD"]
    assert many["CHOCO, 1 %"] == pytest.approx(few["CHOCO, 1 %"], rel=0.05)
    assert many["GMC, 1 %"] == pytest.approx(21 * few["GMC, 1 %"], rel=0.05)
    assert many[DDP] == pytest.approx(63 / 64 / (3 / 4) * few[DDP], rel=1e-3)


def test_the_model_is_held_but_a_few_times_for_any_number_of_ranks(monkeypatch):
    held, init = [], FlatModel.__init__

    def counted(self, *args):
        held.append(None)
        init(self, *args)

    monkeypatch.setattr(FlatModel, "__init__", counted)
    planned_at(1e7, 4)
    few = len(held)
    planned_at(1e7, 64)
    assert len(held) == 2 * few == 2 * (1 + len(methods(TOPK)))


def test_slower_sums_slow_all_reduces_down_but_not_ddp():
    plain = {p.name: p for p in planned_at(1e7).predictions}
    slow = {p.name: p for p in planned_at(1e7, sums=Links(1e-5, 1e6)).predictions}
    name = "all-reduce after the gradient (ssgd)"
    assert slow[name].seconds > 5 * plain[name].seconds
    assert slow[DDP].seconds == pytest.approx(plain[DDP].seconds, rel=0.01)


def test_methods_that_cannot_be_used_are_named_with_the_reason():
    found = planned_at(1e7, 4, "topology.kind=random_matching")
    assert "changes from step to step" in found.refused["CHOCO, 1 %"]
    assert "D-PSGD" in {prediction.name for prediction in found.predictions}


def test_one_rank_is_refused():
    with pytest.raises(ConfigError, match=r"--ranks 1: .* at least 2"):
        planned_at(1e7, 1)


def test_a_graph_that_does_not_exist_is_refused():
    with pytest.raises(TopologyError, match="hypercube"):
        planned_at(1e7, 6, "topology.kind=hypercube")


def test_a_batch_needs_as_many_samples():
    with pytest.raises(ConfigError, match=r"training\.batch_size = 8192"):
        planned_at(1e7, 4, "training.batch_size=8192")
