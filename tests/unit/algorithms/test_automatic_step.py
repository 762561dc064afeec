"""The consensus step that finds itself."""

import numpy as np
import pytest
import torch
from support.quadratic import DIM, centers, curvature, top_k, train

from mpicomp.algorithms import AdaGossip, Choco, MoTEF
from mpicomp.algorithms.gossip.automatic_step import FIRST_DELTA, MEASURED_EVERY, AutomaticStep, eccentricity
from mpicomp.compression import Identity, RandomK, SignNorm, TopK
from mpicomp.errors import ConfigError
from mpicomp.topology import chain, complete, hypercube, ring, star, torus

LR = 0.1
KEPT = 6
TOP = TopK(ratio=KEPT / DIM)


def carried(d, r):
    """The delta of each rank; infinity where nothing differed."""
    return np.float32(
        [1 - left_out / differed if differed else np.inf for differed, left_out in zip(d, r, strict=True)]
    )


def transcription(graph, steps, window, overlap=False):
    """The rule in matrix form; `window` is K."""
    mu = 1 - np.linalg.eigvalsh(graph.mixing)[0]
    x, hat = np.zeros((graph.size, DIM)), np.zeros((graph.size, DIM))
    gamma, least, d, r = FIRST_DELTA / mu, None, 0, 0
    for step in range(steps):
        y = x - LR * curvature() * (x - centers(graph.size))
        difference = (x if overlap else y) - hat
        q = top_k(difference, KEPT)
        if step % MEASURED_EVERY == 0:
            d = d + (difference**2).sum(axis=1)
            r = r + ((difference - q) ** 2).sum(axis=1)
        if step % window == 0:
            least, d, r = carried(d, r).min(), 0, 0
        hat = hat + q
        if step % window == window - 1 and least < np.inf:
            gamma = min(float(least) / mu, 1)
        x = y + gamma * (graph.mixing @ hat - hat)
    return x, gamma


@pytest.mark.parametrize(
    "graph", [ring(5), torus(6), star(4), hypercube(8)], ids=lambda graph: f"{graph.name}{graph.size}"
)
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("steps", [50, 100])
def test_the_rule(graph, overlap, steps):
    expected, gamma = transcription(graph, steps, 32, overlap)
    trained = train(Choco("auto", TOP, overlap=overlap), graph, steps)
    np.testing.assert_allclose(trained.x, expected, rtol=0, atol=1e-9)
    assert [state.automatic.gamma for state in trained.states] == pytest.approx([gamma] * graph.size, rel=1e-6)


def test_all_ranks_of_a_long_graph_change_to_the_same_step_at_once():
    size = 40
    assert eccentricity(chain(size)) == size - 1
    for steps in (2 * (size - 1), 2 * (size - 1) + 1, 200):  # before and after the end of the first window
        automatic = [state.automatic for state in train(Choco("auto", TOP), chain(size), steps).states]
        assert len({state.gamma for state in automatic}) == 1
        assert {state.window for state in automatic} == {2 * (size - 1)}
    assert automatic[0].gamma != FIRST_DELTA / automatic[0].mu


@pytest.mark.parametrize("graph", [ring(1), ring(2), complete(4)], ids=lambda graph: f"{graph.name}{graph.size}")
def test_what_leaves_nothing_out_is_mixed_as_far_as_the_graph_allows(graph):
    (state, *_) = train(Choco("auto", Identity()), graph, 70).states
    assert state.automatic.gamma == pytest.approx(1.0)


@pytest.mark.parametrize("compressor", [TOP, TopK(ratio=1 / DIM), SignNorm(), RandomK(0.3, shared=False)], ids=str)
def test_the_ranks_come_together(compressor):
    start = np.random.default_rng(3).normal(size=(8, DIM))
    trained = train(Choco("auto", compressor, start="zero"), ring(8), 1500, lr=0.0, start=start)
    np.testing.assert_allclose(trained.x.mean(axis=0), start.mean(axis=0), rtol=0, atol=1e-12)
    assert np.abs(trained.x - start.mean(axis=0)).max() < 1e-3 * np.abs(start).max()


@pytest.mark.parametrize("method", [Choco, AdaGossip, MoTEF])
def test_where_nothing_has_differed_the_step_stays_as_it_is(method):
    (state, *_) = train(method("auto", TOP), ring(4), 80, lr=0.0).states
    assert state.automatic.gamma == pytest.approx(FIRST_DELTA / state.automatic.mu)


@pytest.mark.parametrize(
    ("measured", "found"), [({}, 0.3), ({1: 0.2}, 0.2), ({3: 0.6}, 0.6), ({0: 0.8, 4: 0.5}, 0.5), ({2: 1.0}, 1.0)]
)
def test_ranks_that_have_measured_nothing_leave_the_word_to_the_others(measured, found):
    """A rank that says its present share would keep gamma from rising, one that says 1 would have it leap."""
    graph = chain(5)
    steps = [AutomaticStep.start(graph, torch.device("cpu")) for _ in range(5)]
    for rank, step in enumerate(steps):
        step.gamma = 0.3 / step.mu
        if rank in measured:
            step.carried[:] = torch.tensor([2.0, 2.0 * (1 - measured[rank])])
    for _ in range(steps[0].window):
        messages = [step.with_delta({}) for step in steps]
        for rank, step in enumerate(steps):
            step.hear(messages[neighbor] for neighbor in graph.sources(rank))
    for step in steps:
        assert step.gamma == pytest.approx(min(found / step.mu, 1.0), rel=1e-6)


def test_adagossip_gives_the_usual_entry_the_step_of_choco():
    graph, beta, epsilon = ring(5), 0.999, 1e-8
    trained = train(AdaGossip("auto", TOP), graph, 100)
    mu = 1 - np.linalg.eigvalsh(graph.mixing)[0]
    x, hat, v, scale = (np.zeros((graph.size, DIM)) for _ in range(4))
    gamma, least, d, r = FIRST_DELTA / mu, None, 0, 0
    for step in range(100):
        y = x - LR * curvature() * (x - centers(graph.size))
        q = top_k(y - hat, KEPT)
        if step % MEASURED_EVERY == 0:
            d = d + ((y - hat) ** 2).sum(axis=1)
            r = r + ((y - hat - q) ** 2).sum(axis=1)
        if step % 32 == 0:
            least, d, r = np.float32(1 - r / d).min(), 0, 0
        hat = hat + q
        if step % 32 == 31:
            gamma = min(float(least) / mu, 1)
        if step and step % MEASURED_EVERY == 0:
            scale = np.sqrt(v.mean(axis=1, keepdims=True) / (1 - beta**step))
        error = graph.mixing @ hat - hat
        v = beta * v + (1 - beta) * error**2
        x = y + np.minimum(gamma * scale / (np.sqrt(v / (1 - beta ** (step + 1))) + epsilon), 1) * error
    np.testing.assert_allclose(trained.x, x, rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", [Choco, MoTEF, AdaGossip])
def test_gamma_is_a_number_or_found(method):
    with pytest.raises(ConfigError, match=r"algorithm.gamma = 'much' must be a number > 0, or 'auto'"):
        method("much")


def test_gradient_tracking_finds_a_step_of_the_model_and_one_of_the_estimate():
    trained = train(MoTEF("auto", TopK(ratio=0.125)), ring(6), 900, lr=0.05)
    assert np.abs(trained.x - centers(6).mean(axis=0)).max() < 1e-6
    steps = {(state.automatic.gamma, state.automatic_of_v.gamma) for state in trained.states}
    assert len(steps) == 1 and all(0.05 < gamma < 0.7 for gamma in steps.pop())
