"""LEAD: the listing in NumPy, NIDS where nothing is lost, and the optimum of all ranks with a constant step."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from support.quadratic import DIM, Quadratic, centers, curvature, top_k, train
from support.steps import one_step

from mpicomp.algorithms import DPSGD, LEAD, SGD, Choco
from mpicomp.algorithms.gossip.base import SMALLEST_RATE
from mpicomp.compression import QSGD, Cast, Identity, Natural, PerTensor, RandomK, SignNorm, TopK, UniformGrid
from mpicomp.compression.base import Wrapper
from mpicomp.errors import ConfigError
from mpicomp.exchange.loopback import run
from mpicomp.topology import chain, ring, star, torus

LR = 0.1
KEPT = 6
GRAPHS = [ring(5), ring(2), chain(3), star(4), torus(6), ring(1)]
over_graphs = pytest.mark.parametrize("graph", GRAPHS, ids=lambda g: f"{g.name}{g.size}")


@dataclass(frozen=True)
class Replayable(Wrapper):
    """Says that it is unbiased, so that LEAD takes messages that NumPy can make, too; too few steps to diverge."""

    @property
    def is_unbiased(self):
        return True


@dataclass
class TwoRates(Quadratic):
    """Two groups of parameters: from entry `FIRST` on, the learning rate is `part` of the other."""

    FIRST = 7
    part: float = 1.0

    @property
    def groups(self):
        return [(slice(0, self.FIRST), {"lr": self.lr}), (slice(self.FIRST, DIM), {"lr": self.lr * self.part})]

    def update(self, part=None):
        for place, group in self.groups:
            self.x[place].sub_(self.g[place], alpha=group["lr"])


TOP = Replayable(TopK(ratio=KEPT / DIM))


def gradients(x):
    return curvature() * (x - centers(len(x)))


def close(a, b, tolerance=1e-12):
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)


def stacked(trained, name):
    return np.stack([getattr(state, name).numpy() for state in trained.states])


@over_graphs
@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize(("gamma", "alpha"), [(1.0, 0.5), (0.3, 0.8)])
def test_listing(graph, gamma, alpha, momentum):
    """With rates that change from step to step; where one is 0, the dual variable stays."""
    rates = [0.0, 0.02, *np.linspace(0.1, 0.05, 17), 0.0]
    x, d, h, h_w, u = (np.zeros((graph.size, DIM)) for _ in range(5))
    for lr in rates:
        u = momentum * u + gradients(x)
        y = x - lr * u - lr * d
        q = top_k(y - h, KEPT)
        y_hat, y_hat_w = h + q, h_w + graph.mixing @ q
        h, h_w = (1 - alpha) * h + alpha * y_hat, (1 - alpha) * h_w + alpha * y_hat_w
        if lr:
            d = d + gamma / (2 * lr) * (y_hat - y_hat_w)
            x = x - lr * u - lr * d
        else:
            x = y - gamma / 2 * (y_hat - y_hat_w)  # the limit of the line above
        close(d.sum(axis=0), np.zeros(DIM), 1e-10)
    trained = train(LEAD(gamma, TOP, alpha), graph, len(rates), lr=rates, momentum=momentum)
    scale = max(1.0, np.abs(d).max())
    close(trained.x, x)
    close(stacked(trained, "dual"), d, 1e-12 * scale)
    close(stacked(trained, "x_hat"), h)
    close(stacked(trained, "ahead"), h_w - h)


@pytest.mark.parametrize("part", [2**-7, 2**-10])  # exact, so that rounding decides nothing
@pytest.mark.parametrize("falls", [False, True])
def test_every_group_is_corrected_at_its_own_rate(part, falls):
    """However small it is beside another group's; and still at a hundredth of the largest so far."""
    graph, steps = ring(5), 20
    schedule = [1.0] * 10 + [SMALLEST_RATE if falls else 1.0] * (steps - 10)

    def serve(world):
        x, center = torch.zeros(DIM, dtype=torch.float64), torch.as_tensor(centers(world.size)[world.rank])
        local = TwoRates(x, center, part=part)
        exchange, method = world.exchange(graph), LEAD(0.6, TOP, 0.5)
        state = method.init(local, exchange)
        for scale in schedule:
            local.lr = LR * scale
            one_step(method, local, state, exchange)
        return x.numpy(), state.dual.numpy()

    found = [np.stack(arrays) for arrays in zip(*run(graph.size, serve), strict=True)]
    x, d, h, h_w = (np.zeros((graph.size, DIM)) for _ in range(4))
    for scale in schedule:
        lr = LR * scale * np.where(np.arange(DIM) < TwoRates.FIRST, 1.0, part)
        y = x - lr * (gradients(x) + d)
        q = top_k(y - h, KEPT)
        ahead = h_w + graph.mixing @ q - h - q
        h, h_w = h + 0.5 * q, h_w + 0.5 * graph.mixing @ q
        x, d = y + 0.3 * ahead, d - 0.3 / lr * ahead
    assert np.abs(d[:, TwoRates.FIRST :]).max() > 1e-3
    close(found[0], x)
    close(found[1], d, 1e-12 * np.abs(d).max())


@over_graphs
@pytest.mark.parametrize("alpha", [1.0, 0.3])
@pytest.mark.parametrize("gamma", [1.0, 0.6])
def test_uncompressed_it_is_nids(graph, gamma, alpha):
    """D is eliminated: -lr D = x - x_before + lr g_before. With gamma = 1 the weights are (I + W) / 2."""
    mixing = np.eye(graph.size) - gamma / 2 * (np.eye(graph.size) - graph.mixing)
    before = np.zeros((graph.size, DIM))
    x = mixing @ (before - LR * gradients(before))
    for _ in range(24):
        x, before = mixing @ (2 * x - before - LR * (gradients(x) - gradients(before))), x
    close(train(LEAD(gamma, copy_weight=alpha), graph, 25).x, x)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_on_one_rank_it_is_sgd(momentum):
    trained = train(LEAD(compressor=Natural()), ring(1), 20, momentum=momentum)
    close(trained.x, train(SGD(), ring(1), 20, momentum=momentum).x, 0)


@pytest.mark.parametrize(
    ("method", "momentum"),
    [
        (LEAD(compressor=Natural()), 0.0),
        (LEAD(compressor=Natural()), 0.5),
        (LEAD(compressor=QSGD(bits=3)), 0.0),
        (LEAD(0.3, RandomK(0.5, shared=False, unbiased=True)), 0.0),
    ],
    ids=str,
)
def test_a_constant_rate_leads_to_the_optimum_of_all_ranks(method, momentum):
    """The dual variables there undo the steps of the ranks, of gradients over 1 - momentum."""
    optimum = np.tile(centers(5).mean(axis=0), (5, 1))
    trained = train(method, ring(5), 220, lr=0.2, momentum=momentum)
    close(trained.x, optimum, 1e-6)
    duals = stacked(trained, "dual")
    close(duals.sum(axis=0), np.zeros(DIM), 1e-10)
    close(duals, -gradients(optimum) / (1 - momentum), 1e-4)


@pytest.mark.parametrize("method", [DPSGD(), Choco(0.3, TopK(0.25))], ids=lambda m: m.name)
def test_other_methods_stop_short_of_it(method):
    assert np.abs(train(method, ring(5), 120, lr=0.2).x - centers(5).mean(axis=0)).max() > 1e-2


def test_duals_keep_their_meaning_when_the_rate_falls():
    optimum = np.tile(centers(5).mean(axis=0), (5, 1))
    rates = [0.3] * 120 + [0.03] * 3
    trained = train(LEAD(compressor=QSGD(bits=4)), ring(5), len(rates), lr=rates)
    close(trained.x, optimum, 1e-6)
    close(stacked(trained, "dual"), -gradients(optimum), 1e-4)


@pytest.mark.parametrize("low", [1e-2, 1e-4, 1e-6, 0.0])
def test_a_rate_that_rises_again_finds_duals_of_the_old_length(low):
    far = [
        np.abs(train(LEAD(compressor=Natural()), ring(5), len(rates), lr=rates).x - centers(5).mean(axis=0)).max()
        for rates in ([0.2] * 10, [0.2] * 10 + [low] * 10 + [0.2] * 3)
    ]
    assert far[1] < 3 * far[0]


def test_the_mean_moves_by_the_mean_of_the_steps():
    before, after = (train(LEAD(compressor=Natural()), ring(6), steps).x for steps in (9, 10))
    close(after.mean(axis=0), before.mean(axis=0) - LR * gradients(before).mean(axis=0))


def test_bytes_are_those_of_choco():
    sent = [train(method, ring(5), 7).bytes_sent for method in (LEAD(compressor=Natural()), Choco(0.5, Natural()))]
    assert sent[0] == sent[1] == [7 * 2 * (DIM + DIM // 8)] * 5


@pytest.mark.parametrize(
    "compressor",
    [TopK(0.1), SignNorm(), UniformGrid(bits=4), RandomK(0.5), QSGD(contractive=True), PerTensor(TopK(0.1))],
    ids=str,
)
def test_biased_messages_are_refused(compressor):
    with pytest.raises(ConfigError, match=rf"compression.kind = '{type(compressor).__name__}' is biased .* 'natural'"):
        LEAD(compressor=compressor)


def test_messages_that_are_nearly_exact_are_taken():
    for compressor in (Identity(), Cast("bfloat16"), PerTensor(QSGD(bits=8))):
        LEAD(compressor=compressor)


@pytest.mark.parametrize("weight", [0.0, 1.1, float("nan")])
def test_the_weight_of_a_copy_is_a_fraction(weight):
    with pytest.raises(ConfigError, match=r"algorithm.copy_weight = .* must be in \(0, 1\]"):
        LEAD(copy_weight=weight)
