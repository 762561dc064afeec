"""The consensus step that finds itself."""

from functools import partial

import numpy as np
import pytest
import torch
from support.quadratic import DIM, centers, curvature, top_k, train

from mpicomp.algorithms import AdaGossip, Choco, DeepSqueeze, LocalSGD, MoTEF
from mpicomp.algorithms.gossip.automatic_step import (
    FIRST_DELTA,
    MEASURED_EVERY,
    AutomaticStep,
    delta_of_normal_numbers,
    largest_move,
    steps_to_all,
)
from mpicomp.compression import (
    QSGD,
    ByRank,
    HardThreshold,
    Identity,
    PerTensor,
    RandomBlock,
    RandomK,
    SignNorm,
    Spec,
    TopK,
)
from mpicomp.errors import ConfigError, TopologyError
from mpicomp.topology import (
    OnePeerExponential,
    RandomMatching,
    Topology,
    chain,
    complete,
    directed_ring,
    hypercube,
    ring,
    star,
    torus,
)

LR = 0.1
KEPT = 6
TOP = TopK(ratio=KEPT / DIM)
SPEC, CPU = Spec.flat(DIM, torch.float64), torch.device("cpu")


def first(mu, compressor=TOP):
    """The first gamma."""
    return min(0.4 * delta_of_normal_numbers(compressor, SPEC, CPU) / mu, 1)


class Measured:
    """The sums of each rank, and their weighted means over windows of K steps."""

    def __init__(self, size, window):
        self.sums, self.means = np.zeros((6, size)), np.zeros((3, size))
        self.keep = 0.5 ** (window / 128)

    def add(self, wanted, q, apart):
        """Look at d_i, q_i and r_i, the rows of (size, DIM) matrices."""
        sent = np.divide(abs(q), abs(wanted), out=np.ones_like(q), where=wanted != 0).clip(max=1)
        parts = (wanted**2, (wanted - q) ** 2, q * wanted, q**2, apart**2 * sent, apart**2)
        self.sums += [part.sum(axis=1) for part in parts]

    def least(self):
        """The least delta, infinity where nothing differed; the sums begin anew."""
        deltas = [np.inf]
        for rank, (d, r, s, q, a, b) in enumerate(self.sums.T):
            if d and b:
                now = np.array([(1 - r / d) * s / q, a / b, 1])
                self.means[:, rank] = self.keep * self.means[:, rank] + (1 - self.keep) * now
                p, a, weight = self.means[:, rank]
                deltas.append(max(0.8 * p, 0.5 * a) / weight)
        self.sums[:] = 0
        return np.float32(min(deltas))


def transcription(graph, steps, window, overlap=False):
    """The rule in matrix form; `window` is K."""
    mu = 1 - graph.mixing.diagonal().min()
    x, hat = np.zeros((graph.size, DIM)), np.zeros((graph.size, DIM))
    gamma, least, measured = first(mu), None, Measured(graph.size, window)
    for step in range(steps):
        y = x - LR * curvature() * (x - centers(graph.size))
        difference = (x if overlap else y) - hat
        q = top_k(difference, KEPT)
        if step % MEASURED_EVERY == 0:
            measured.add(difference, q, graph.mixing @ hat - hat)
        if step % window == 0:
            least = measured.least()
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
    expected, gamma = transcription(graph, steps, 8, overlap)
    trained = train(Choco("auto", TOP, overlap=overlap), graph, steps)
    np.testing.assert_allclose(trained.x, expected, rtol=0, atol=1e-9)
    assert [state.automatic.gamma for state in trained.states] == pytest.approx([gamma] * graph.size, rel=1e-6)


def test_all_ranks_of_a_long_graph_change_to_the_same_step_at_once():
    size = 40
    assert steps_to_all(chain(size)) == 2 * (size - 1)
    for steps in (2 * (size - 1), 2 * (size - 1) + 1, 200):  # before and after the end of the first window
        automatic = [state.automatic for state in train(Choco("auto", TOP), chain(size), steps).states]
        assert len({state.gamma for state in automatic}) == 1
        assert {state.window for state in automatic} == {2 * (size - 1)}
    assert automatic[0].gamma != first(automatic[0].mu)


@pytest.mark.parametrize("graph", [ring(2), complete(4)], ids=lambda graph: f"{graph.name}{graph.size}")
def test_what_leaves_nothing_out_is_mixed_by_the_whole_step(graph):
    (state, *_) = train(Choco("auto", Identity()), graph, 70).states
    assert state.automatic.gamma == 1


@pytest.mark.parametrize("compressor", [TOP, TopK(ratio=1 / DIM), SignNorm(), RandomK(0.3, shared=False)], ids=str)
def test_the_ranks_come_together(compressor):
    start = np.random.default_rng(3).normal(size=(8, DIM))
    trained = train(Choco("auto", compressor, start="zero"), ring(8), 1500, lr=0.0, start=start)
    np.testing.assert_allclose(trained.x.mean(axis=0), start.mean(axis=0), rtol=0, atol=1e-12)
    assert np.abs(trained.x - start.mean(axis=0)).max() < 1e-3 * np.abs(start).max()


@pytest.mark.parametrize("method", [Choco, AdaGossip, MoTEF])
def test_where_nothing_has_differed_the_step_stays_as_it_is(method):
    (state, *_) = train(method("auto", TOP), ring(4), 80, lr=0.0).states
    assert state.automatic.gamma == first(state.automatic.mu)


@pytest.mark.parametrize(
    ("measured", "found"), [({}, 0.3), ({1: 0.2}, 0.2), ({3: 0.6}, 0.6), ({0: 0.8, 4: 0.5}, 0.5), ({2: 1.0}, 1.0)]
)
def test_ranks_that_have_measured_nothing_leave_the_word_to_the_others(measured, found):
    """A rank that says its present share would keep gamma from rising, one that says 1 would have it leap."""
    graph = chain(5)
    steps = [AutomaticStep.start(graph, TOP, SPEC, CPU) for _ in range(5)]
    for rank, step in enumerate(steps):
        step.gamma = 0.8 * 0.3 / step.mu
        if rank in measured:
            step.measured[:] = torch.tensor([2.0, 2.0 * (1 - measured[rank]), 1.0, 1.0, 0.0, 1.0])
    for _ in range(steps[0].window):
        messages = [step.with_delta({}) for step in steps]
        for rank, step in enumerate(steps):
            step.hear(messages[neighbor] for neighbor in graph.sources(rank))
    for step in steps:
        assert step.gamma == pytest.approx(min(0.8 * found / step.mu, 1.0), rel=1e-6)


def test_adagossip_gives_the_usual_entry_the_step_of_choco():
    graph, beta, epsilon = ring(5), 0.999, 1e-8
    trained = train(AdaGossip("auto", TOP), graph, 100)
    mu = 1 - graph.mixing.diagonal().min()
    x, hat, v, scale = (np.zeros((graph.size, DIM)) for _ in range(4))
    gamma, least, measured = first(mu), None, Measured(graph.size, 8)
    for step in range(100):
        y = x - LR * curvature() * (x - centers(graph.size))
        q = top_k(y - hat, KEPT)
        if step % MEASURED_EVERY == 0:
            measured.add(y - hat, q, graph.mixing @ hat - hat)
        if step % 8 == 0:
            least = measured.least()
        hat = hat + q
        if step % 8 == 7 and least < np.inf:
            gamma = min(float(least) / mu, 1)
        if step and step % MEASURED_EVERY == 0:
            scale = np.sqrt(v.mean(axis=1, keepdims=True) / (1 - beta**step))
        error = graph.mixing @ hat - hat
        v = beta * v + (1 - beta) * error**2
        x = y + np.minimum(gamma * scale / (np.sqrt(v / (1 - beta ** (step + 1))) + epsilon), 1) * error
    np.testing.assert_allclose(trained.x, x, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "schedule", [ring(5), directed_ring(4), OnePeerExponential(8)], ids=lambda schedule: schedule.name
)
def test_deep_squeeze_takes_half_of_what_choco_would(schedule):
    size = schedule.size
    mu = 2 * (1 - min(schedule(step).mixing.diagonal().min() for step in range(8)))
    x, e = np.zeros((size, DIM)), np.zeros((size, DIM))
    gamma, least, measured = first(mu), None, Measured(size, 8)
    for step in range(100):
        y = x - LR * curvature() * (x - centers(size))
        q = top_k(y + e, KEPT)
        if step % 8 == 0:
            least = measured.least()
        if step % MEASURED_EVERY == 0:
            measured.add(y + e, q, y)
        e = y + e - q
        x = y + gamma * (schedule(step).mixing @ q - q)
        if step % 8 == 7 and least < np.inf:
            gamma = min(float(least) / mu, 1)
    trained = train(DeepSqueeze("auto", TOP), schedule, 100)
    np.testing.assert_allclose(trained.x, x, rtol=0, atol=1e-9)
    assert gamma != first(mu)


def test_local_steps_count_mixings_and_not_steps():
    states = train(LocalSGD(3, DeepSqueeze("auto", TOP)), ring(4), 30).states
    assert {state.inner.automatic.step for state in states} == {10}


def test_sign_is_given_a_step_though_entries_that_move_alike_on_all_ranks_are_far_behind():
    """Their squares are nearly all that the messages leave out, and gossip needs none of them."""
    size, dim = 4, 1000
    step = AutomaticStep.start(ring(size), SignNorm(), SPEC, CPU)
    wanted = torch.full((dim,), 0.01).double()
    wanted[0] = 100.0
    q = wanted.abs().mean() * wanted.sign()
    apart = torch.ones(dim).double()
    apart[0] = 0.0
    step.measure(wanted, wanted - q, apart)
    step.with_delta({})
    assert float(step.least) == 0.5


def test_samples_are_of_the_whole_vector_and_of_all_its_entries_in_turn():
    x = torch.arange(5 << 14, dtype=torch.float32)
    step = AutomaticStep.start(ring(4), TOP, SPEC, CPU)
    for step.step, first_entry in ((0, 0), (8, 1), (16, 2), (24, 0)):
        assert torch.equal(step.sample(x), x[first_entry::3].double())
        assert torch.equal(step.sample(x[:7]), x[:7].double())


@pytest.mark.parametrize(
    ("schedule", "steps"),
    [(ring(1), 0), (ring(8), 8), (directed_ring(5), 8), (star(6), 2), (OnePeerExponential(16), 4)],
    ids=lambda value: getattr(value, "name", None),
)
def test_the_steps_after_which_all_have_heard_of_all(schedule, steps):
    assert steps_to_all(schedule) == steps


def test_random_pairs_hear_of_all_in_about_twice_the_logarithm():
    assert 6 <= steps_to_all(RandomMatching(64)) <= 24


def test_graphs_that_never_join_all_ranks_need_a_number():
    class Halves:
        name, size = "halves", 4

        def __call__(self, step):
            return apart

    apart = Topology("apart", np.kron(np.eye(2), np.full((2, 2), 0.5)))
    with pytest.raises(TopologyError, match=r"'halves': after \d+ steps .* Give a number"):
        steps_to_all(Halves())


@pytest.mark.parametrize(
    ("compressor", "share"),
    [(TOP, 1), (RandomK(0.3), 2), (RandomK(0.3, shared=False), 1), (RandomBlock(0.3), 2)],
    ids=lambda value: getattr(value, "kind", None),
)
def test_where_all_ranks_send_the_same_entries_gamma_is_half_as_large(compressor, share):
    for wrapped in (compressor, PerTensor(compressor), ByRank((compressor,) * 8)):
        step = AutomaticStep.start(ring(8), wrapped, SPEC, CPU)
        assert step.mu == pytest.approx(share * 2 / 3)


@pytest.mark.parametrize("schedule", [ring(6), OnePeerExponential(8), star(5), RandomMatching(5)])
def test_the_mixing_matrix_moves_no_vector_by_more_than_mu(schedule):
    mu = 2 * largest_move(schedule, 8)
    for step in range(8):
        assert np.linalg.norm(np.eye(schedule.size) - schedule(step).mixing, ord=2) <= mu + 1e-12


@pytest.mark.parametrize(("bits", "size"), [(4, 25_000), (8, 1_000)])
def test_the_limit_is_the_ratio_of_random_k_and_more_than_the_squares_of_qsgd(bits, size):
    d = torch.from_numpy(np.random.default_rng(1).normal(size=size))
    spec = Spec.flat(size, torch.float64)
    apart = torch.zeros_like(d)
    apart[d.abs().argmin()] = 1  # where messages carry nothing

    def delta(compressor):
        step = AutomaticStep.start(ring(8), compressor, spec, CPU)
        q = torch.zeros_like(d)
        compressor.accumulate(compressor.compress(d, spec, compressor.init(spec, CPU)), spec, q)
        step.measure(d, d - q, apart)
        step.with_delta({})
        return float(step.least) / 0.8, 1 - float((d - q).square().sum() / d.square().sum())

    share, squares = delta(RandomK(0.1))
    assert share == pytest.approx(squares, rel=1e-6)
    share, squares = delta(QSGD(bits=bits, contractive=True))
    assert 1.01 * squares < share


@pytest.mark.parametrize("method", [Choco, MoTEF, AdaGossip, DeepSqueeze, partial(Choco, overlap=True)])
def test_messages_of_single_tensors_carry_it_too(method):
    states = train(method("auto", PerTensor(SignNorm())), ring(4), 70).states
    assert len({state.automatic.gamma for state in states}) == 1
    assert states[0].automatic.gamma != first(states[0].automatic.mu, SignNorm())


@pytest.mark.parametrize(
    ("compressor", "delta"),
    [
        (Identity(), 1.0),
        (RandomK(0.1), 0.1),
        (SignNorm(), 2 / np.pi),
        (PerTensor(SignNorm()), 2 / np.pi),
        (TopK(0.1), 0.44),  # 0.1 + 2 t phi(t), t = 1.645
        (TopK(0.01), 0.085),  # t = 2.576
    ],
    ids=str,
)
def test_the_first_step_is_the_one_for_normal_numbers(compressor, delta):
    spec = Spec(("a", "b"), ((100, 300), (20_000,)), torch.float32)
    assert delta_of_normal_numbers(compressor, spec, CPU) == pytest.approx(delta, rel=0.1)


def test_the_first_step_is_small_with_a_compressor_that_sends_nothing_of_small_vectors():
    step = AutomaticStep.start(ring(8), HardThreshold(0.1), SPEC, CPU)
    assert step.gamma == pytest.approx(0.4 * FIRST_DELTA / step.mu)


@pytest.mark.parametrize("method", [Choco, MoTEF, AdaGossip, DeepSqueeze])
def test_gamma_is_a_number_or_found(method):
    with pytest.raises(ConfigError, match=r"algorithm.gamma = 'much' must be a number > 0, or 'auto'"):
        method("much")


def test_gradient_tracking_finds_a_step_of_the_model_and_one_of_the_estimate():
    trained = train(MoTEF("auto", TopK(ratio=0.125)), ring(6), 900, lr=0.05)
    assert np.abs(trained.x - centers(6).mean(axis=0)).max() < 1e-6
    steps = {(state.automatic.gamma, state.automatic_of_v.gamma) for state in trained.states}
    assert len(steps) == 1 and all(0.05 < gamma < 0.7 for gamma in steps.pop())


def test_the_first_gamma_is_that_of_the_rank_that_sends_the_least():
    few, many = TopK(0.01), TopK(1.0)
    spec = Spec.flat(10_000)
    first = [
        AutomaticStep.start(ring(4), compressor, spec, CPU).gamma
        for compressor in (few, ByRank((many, few, few, few)), ByRank((few, few, few, many)))
    ]
    assert first[0] == first[1] == first[2]


def test_a_rank_without_a_part_of_the_model_measures_nothing():
    step = AutomaticStep.start(ring(4), TopK(0.1), Spec.flat(0), CPU)
    assert step.gamma > 0 and len(step.sample(torch.zeros(0))) == 0
