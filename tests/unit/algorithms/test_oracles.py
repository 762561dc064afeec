"""What theory says of each method: transcriptions of the papers' listings in NumPy, identities and known optima."""

from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from support.quadratic import DIM, centers, curvature, top_k, train

from mpicomp.algorithms import DEFATC, DPSGD, LEAD, SGD, SGP, SSGD, AdaGossip, Choco, DeepSqueeze, LocalSGD, MoTEF
from mpicomp.compression import Identity, RandomK, SignNorm, TopK
from mpicomp.state import flatten
from mpicomp.topology import (
    OnePeerExponential,
    Topology,
    chain,
    complete,
    directed_ring,
    exponential,
    hypercube,
    random_digraph,
    ring,
    star,
    torus,
)
from mpicomp.topology.sparse import SparseMatrix
from mpicomp.topology.weights import push

LR = 0.1
KEPT = 6
TOP = TopK(ratio=KEPT / DIM)
DIGRAPHS = [random_digraph(6), random_digraph(9, degree=3, seed=2), star(4, weights="push"), directed_ring(4)]
GRAPHS = [ring(5), ring(2), chain(3), star(4), torus(6), ring(1)]


def gradients(x):
    return curvature() * (x - centers(len(x)))


def spread(size):
    return np.random.default_rng(3).normal(size=(size, DIM))


def close(a, b, tolerance=1e-12):
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)


@pytest.mark.parametrize("graph", GRAPHS, ids=lambda g: f"{g.name}{g.size}")
class TestTranscriptions:
    def test_dpsgd_adapt_then_combine(self, graph):
        x = np.zeros((graph.size, DIM))
        for _ in range(20):
            x = graph.mixing @ (x - LR * gradients(x))
        close(train(DPSGD(), graph, 20).x, x)

    def test_dpsgd_combine_then_adapt(self, graph):
        x = np.zeros((graph.size, DIM))
        for _ in range(20):
            x = graph.mixing @ x - LR * gradients(x)
        close(train(DPSGD(order="combine_then_adapt"), graph, 20).x, x)

    def test_dpsgd_diffusion_rate(self, graph):
        x = np.zeros((graph.size, DIM))
        for _ in range(20):
            y = x - LR * gradients(x)
            x = y + 0.7 * (graph.mixing @ y - y)
        close(train(DPSGD(gamma=0.7), graph, 20).x, x)

    def test_choco(self, graph):
        x, hat = np.zeros((graph.size, DIM)), np.zeros((graph.size, DIM))
        for _ in range(30):
            y = x - LR * gradients(x)
            hat = hat + top_k(y - hat, KEPT)
            x = y + 0.2 * (graph.mixing @ hat - hat)
        trained = train(Choco(0.2, TOP), graph, 30)
        close(trained.x, x)
        close(np.stack([state.x_hat for state in trained.states]), hat)
        close(np.stack([state.s for state in trained.states]), graph.mixing @ hat)

    def test_choco_overlapped(self, graph):
        x, hat = np.zeros((graph.size, DIM)), np.zeros((graph.size, DIM))
        for _ in range(30):
            y = x - LR * gradients(x)
            hat = hat + top_k(x - hat, KEPT)
            x = y + 0.2 * (graph.mixing @ hat - hat)
        close(train(Choco(0.2, TOP, overlap=True), graph, 30).x, x)

    @pytest.mark.parametrize("bias_correction", [True, False])
    @pytest.mark.parametrize("clip", [1.0, np.inf])
    def test_adagossip(self, graph, bias_correction, clip):
        x, hat, v = (np.zeros((graph.size, DIM)) for _ in range(3))
        beta, gamma, epsilon = 0.9, 0.05, 1e-4
        for t in range(1, 31):
            y = x - LR * gradients(x)
            hat = hat + top_k(y - hat, KEPT)
            r = graph.mixing @ hat - hat
            v = beta * v + (1 - beta) * r * r
            corrected = v / (1 - beta**t) if bias_correction else v
            x = y + np.minimum(gamma / (np.sqrt(corrected) + epsilon), clip) * r
        method = AdaGossip(gamma, TOP, beta, epsilon, bias_correction, clip)
        close(train(method, graph, 30).x, x, 1e-11)

    @pytest.mark.parametrize("overlap", [True, False])
    def test_adagossip_quasi_global_momentum(self, graph, overlap):
        x, hat, v, m = (np.zeros((graph.size, DIM)) for _ in range(4))
        for t in range(1, 21):
            y = x - LR * (gradients(x) + 0.5 * m)
            hat = hat + top_k((x if overlap else y) - hat, KEPT)
            r = graph.mixing @ hat - hat
            v = 0.9 * v + 0.1 * r * r
            new = y + np.minimum(0.05 / (np.sqrt(v / (1 - 0.9**t)) + 1e-4), 1) * r
            x, m = new, (x - new) / LR
        method = AdaGossip(0.05, TOP, beta=0.9, epsilon=1e-4, quasi_global_momentum=0.5, overlap=overlap)
        close(train(method, graph, 20).x, x, 1e-10)

    @pytest.mark.parametrize("overlap", [True, False])
    @pytest.mark.parametrize(
        "rates",
        [
            [0.0, *[LR] * 6, LR / 100, *[LR / 1000] * 4, 0.0, *[LR] * 6],
            [*[LR / 1000] * 4, *[LR / 5] * 3, *[LR * 2 / 5] * 3, *[LR] * 3],
        ],
        ids=["a warm restart", "a warm-up by epochs"],
    )
    def test_rates_that_rise_do_not_let_the_quasi_global_momentum_explode(self, graph, overlap, rates):
        """Below a hundredth of the largest rate it stays; it moves the model by at most 4 times what it is made of."""
        x, hat, v, m = (np.zeros((graph.size, DIM)) for _ in range(4))
        largest = formed = 0.0
        for t, lr in enumerate(rates, start=1):
            largest = max(largest, lr)
            y = x - lr * gradients(x) - 0.5 * min(lr, 4 * formed) * m
            hat = hat + top_k((x if overlap else y) - hat, KEPT)
            r = graph.mixing @ hat - hat
            v = 0.9 * v + 0.1 * r * r
            new = y + np.minimum(0.05 / (np.sqrt(v / (1 - 0.9**t)) + 1e-4), 1) * r
            x, m, formed = (new, (x - new) / lr, lr) if lr and lr >= largest / 100 else (new, m, formed)
        method = AdaGossip(0.05, TOP, beta=0.9, epsilon=1e-4, quasi_global_momentum=0.5, overlap=overlap)
        trained = train(method, graph, len(rates), lr=rates)
        close(trained.x, x, 1e-10)
        assert flatten(trained.states[0])["largest_lr/0"] == LR  # a restart does not forget it

    def test_deep_squeeze(self, graph):
        x, e = np.zeros((graph.size, DIM)), np.zeros((graph.size, DIM))
        for _ in range(30):
            y = x - LR * gradients(x)
            q = top_k(y + e, KEPT)
            e = y + e - q
            x = y + 0.05 * (graph.mixing @ q - q)
        close(train(DeepSqueeze(0.05, TOP), graph, 30).x, x)

    @pytest.mark.parametrize("zeta", [1.0, 0.6])
    def test_def_atc(self, graph, zeta):
        x, hat, e = (np.zeros((graph.size, DIM)) for _ in range(3))
        for _ in range(30):
            v = x - LR * gradients(x) - hat + e
            q = top_k(v, KEPT)
            e = v - q
            hat = hat + zeta * q
            x = 0.8 * hat + 0.2 * graph.mixing @ hat
        trained = train(DEFATC(0.2, TOP, zeta), graph, 30)
        close(trained.x, x)
        for name, expected in (("x_hat", hat), ("s", graph.mixing @ hat), ("e", e)):
            close(np.stack([getattr(state, name) for state in trained.states]), expected)

    @pytest.mark.parametrize("weight", [0.9, 1.0])
    def test_motef(self, graph, weight):
        x, hat, v_hat = (np.zeros((graph.size, DIM)) for _ in range(3))
        m = v = gradients(x)
        for step in range(30):
            if step:
                new = (1 - weight) * m + weight * gradients(x)
                v = v + 0.2 * (graph.mixing @ v_hat - v_hat) + new - m
                m = new
            x = x + 0.2 * (graph.mixing @ hat - hat) - LR * v
            hat = hat + top_k(x - hat, KEPT)
            v_hat = v_hat + top_k(v - v_hat, KEPT)
        trained = train(MoTEF(0.2, TOP, weight), graph, 30)
        close(trained.x, x)
        close(np.stack([state.v for state in trained.states]), v)
        close(v.mean(axis=0), m.mean(axis=0))

    def test_local_sgd(self, graph):
        x = np.zeros((graph.size, DIM))
        for step in range(1, 18):
            x = x - LR * gradients(x)
            if step % 4 == 0:
                x = graph.mixing @ x
        close(train(LocalSGD(period=4), graph, 17).x, x)

    def test_local_sgd_with_choco(self, graph):
        x, hat = np.zeros((graph.size, DIM)), np.zeros((graph.size, DIM))
        for step in range(1, 32):
            x = x - LR * gradients(x)
            if step % 3 == 0:
                hat = hat + top_k(x - hat, KEPT)
                x = x + 0.2 * (graph.mixing @ hat - hat)
        trained = train(LocalSGD(3, Choco(0.2, TOP)), graph, 31)
        close(trained.x, x)
        close(np.stack([state.inner.x_hat for state in trained.states]), hat)
        assert [state.step for state in trained.states] == [31] * graph.size

    def test_local_sgd_with_deep_squeeze(self, graph):
        x, e = np.zeros((graph.size, DIM)), np.zeros((graph.size, DIM))
        for step in range(1, 32):
            x = x - LR * gradients(x)
            if step % 3 == 0:
                q = top_k(x + e, KEPT)
                e = x + e - q
                x = x + 0.05 * (graph.mixing @ q - q)
        close(train(LocalSGD(3, DeepSqueeze(0.05, TOP)), graph, 31).x, x)


@dataclass(frozen=True)
class Alternating:
    """Two digraphs in turn, neither of them strongly connected: a chain in one direction, and in the other."""

    size: int
    name = "alternating"

    @property
    def union(self):
        return chain(self.size)

    def __call__(self, step):
        return Topology(self.name, push(SparseMatrix.from_dense(np.eye(self.size, k=1 if step % 2 else -1))))


class TestPush:
    """SGP on graphs whose weights have columns that sum to one, and rows that do not."""

    @pytest.mark.parametrize("overlap", [False, True])
    @pytest.mark.parametrize("gamma", [1.0, 0.6])
    @pytest.mark.parametrize("graph", [*DIGRAPHS, OnePeerExponential(5), Alternating(5), ring(1)], ids=str)
    def test_transcription(self, graph, gamma, overlap):
        x, w = np.zeros((graph.size, DIM)), np.ones((graph.size, 1))
        for step in range(30):
            shares = (1 - gamma) * np.eye(graph.size) + gamma * graph(step).mixing
            half = -LR * gradients(x / w)
            x = shares @ x + half if overlap else shares @ (x + half)
            w = shares @ w
        trained = train(SGP(gamma, overlap=overlap), graph, 30)
        close(trained.x, x / w)
        close(weights(trained), w)

    @pytest.mark.parametrize("overlap", [False, True])
    @pytest.mark.parametrize("graph", [*DIGRAPHS, ring(1)], ids=str)
    def test_transcription_with_public_copies(self, graph, overlap):
        x, hat, w = np.zeros((graph.size, DIM)), np.zeros((graph.size, DIM)), np.ones((graph.size, 1))
        for _ in range(30):
            y = x - LR * gradients(x / w)
            hat = hat + top_k((x if overlap else y) - hat, KEPT)
            x = y + 0.2 * (graph.mixing @ hat - hat)
            w = w + 0.2 * (graph.mixing @ w - w)
        trained = train(SGP(0.2, TOP, overlap), graph, 30)
        close(trained.x, x / w)
        close(weights(trained), w)
        close(np.stack([state.copies.x_hat for state in trained.states]), hat)

    def test_public_copies_start_at_the_common_model(self):
        """At rate 0 the first step moves no model, though numerators and weights, and in the end all are back."""
        start = np.tile(spread(1), (6, 1))
        for steps in (1, 600):
            trained = train(SGP(0.2, TOP), random_digraph(6), steps, lr=0.0, start=start)
            close(trained.x, start, 1e-10 if steps > 1 else 1e-15)
            assert np.abs(weights(trained) - 1).max() > 0.05

    @pytest.mark.parametrize("overlap", [False, True])
    @pytest.mark.parametrize("graph", [*DIGRAPHS, OnePeerExponential(5), Alternating(5)], ids=str)
    def test_consensus_on_the_mean_of_the_starts(self, graph, overlap):
        start = spread(graph.size)
        for steps in (1, 7, 600):
            trained = train(SGP(overlap=overlap), graph, steps, lr=0.0, start=start)
            w = weights(trained)
            close((w * trained.x).sum(axis=0), start.sum(axis=0))
            assert w.sum() == pytest.approx(graph.size, abs=1e-12)
        close(trained.x, np.tile(start.mean(axis=0), (graph.size, 1)), 1e-10)

    def test_consensus_with_public_copies(self):
        rates = [0.05] * 20
        graph, method = random_digraph(6), SGP(0.2, TOP)
        apart = train(method, graph, 20, lr=rates)
        total = (weights(apart) * apart.x).sum(axis=0)
        trained = train(method, graph, 1000, lr=rates + [0.0] * 980)
        close(trained.x, np.tile(total / 6, (6, 1)), 1e-10)
        assert np.abs(apart.x - total / 6).max() > 0.1

    @pytest.mark.parametrize("graph", [ring(6), torus(6), star(4), exponential(5), OnePeerExponential(8)], ids=str)
    @pytest.mark.parametrize(("overlap", "order"), [(False, "adapt_then_combine"), (True, "combine_then_adapt")])
    def test_it_is_dpsgd_where_weights_are_doubly_stochastic(self, graph, overlap, order):
        pushed = train(SGP(overlap=overlap), graph, 25, momentum=0.9, weight_decay=0.1)
        close(weights(pushed), 1, 1e-14)
        close(pushed.x, train(DPSGD(order), graph, 25, momentum=0.9, weight_decay=0.1).x)

    @pytest.mark.parametrize("overlap", [False, True])
    def test_with_public_copies_it_is_choco_on_symmetric_weights(self, overlap):
        close(train(SGP(0.2, TOP, overlap), ring(5), 25).x, train(Choco(0.2, TOP, overlap), ring(5), 25).x)

    def test_memory(self):
        for method, vectors in ((SGP(), 0), (SGP(overlap=True), 1), (SGP(0.2, TOP), 3), (SGP(0.2, TOP, True), 4)):
            state = train(method, random_digraph(6), 1).states[0]
            held = [*vars(state).values(), *(vars(state.copies).values() if state.copies else ())]
            assert sum(len(value) for value in held if isinstance(value, torch.Tensor)) == vectors * DIM + 1

    @pytest.mark.parametrize("method", [SGP(), SGP(overlap=True), SGP(0.2, TOP)], ids=str)
    def test_optimum_up_to_the_bias_of_a_constant_rate(self, method):
        """All ranks count alike, though their weights differ by a factor of 2.5."""
        optimum = centers(6).mean(axis=0)
        distance = [np.linalg.norm(train(method, random_digraph(6), 500, lr=lr).x - optimum) for lr in (0.04, 0.02)]
        assert distance[1] < 0.7 * distance[0]
        assert distance[1] < 2.5


def weights(trained):
    return np.stack([state.w for state in trained.states])


class TestIdentities:
    def test_choco_with_identity_and_gamma_one_is_dpsgd(self):
        close(train(Choco(1.0, Identity()), ring(5), 25).x, train(DPSGD(), ring(5), 25).x)

    def test_adagossip_with_huge_gamma_is_choco_with_gamma_one_bit_for_bit(self):
        ada = train(AdaGossip(gamma=1e30, compressor=TOP, start="zero"), ring(5), 10, start=spread(5))
        choco = train(Choco(1.0, TOP, start="zero"), ring(5), 10, start=spread(5))
        assert np.array_equal(ada.x, choco.x)

    def test_adagossip_with_identity_and_huge_gamma_is_dpsgd(self):
        close(train(AdaGossip(gamma=1e30), ring(5), 25).x, train(DPSGD(), ring(5), 25).x)

    def test_def_atc_with_identity_is_diffusion(self):
        """Adapt then combine, with the weights (1 - gamma) I + gamma W; nothing is left out."""
        trained = train(DEFATC(0.7), ring(5), 25)
        close(trained.x, train(DPSGD(gamma=0.7), ring(5), 25).x)
        assert max(state.e.abs().max() for state in trained.states) < 1e-15
        close(train(DEFATC(1.0), ring(5), 25).x, train(DPSGD(), ring(5), 25).x)

    def test_def_atc_keeps_the_model_that_it_starts_with(self):
        start = np.tile(spread(1), (5, 1))
        close(train(DEFATC(0.2, TopK(1 / DIM)), ring(5), 1, lr=0.0, start=start).x, start)
        with pytest.raises(TypeError, match="start"):
            DEFATC(0.2, start="zero")

    def test_def_atc_damped_without_compression_moves_the_copies_part_of_the_way(self):
        start = np.tile(spread(1), (5, 1))
        damped = train(DEFATC(1.0, damping=0.6), ring(5), 12, start=start).x
        x, hat = start, start
        for _ in range(12):
            hat = 0.4 * hat + 0.6 * (x - LR * gradients(x))
            x = ring(5).mixing @ hat
        close(damped, x)

    def test_motef_on_one_rank_steps_along_the_moving_average(self):
        """With lambda 1 and one rank the estimate is the gradient itself, but for rounding."""
        close(train(MoTEF(0.2, TOP, 1.0), ring(1), 15).x, train(SGD(), ring(1), 15).x, 1e-14)

    def test_local_sgd_of_period_one_is_dpsgd(self):
        assert np.array_equal(train(LocalSGD(1), ring(5), 9).x, train(DPSGD(), ring(5), 9).x)

    @pytest.mark.parametrize(
        "inner",
        [
            DPSGD(gamma=0.7),
            Choco(0.2, TOP),
            Choco(0.1, RandomK(0.3, shared=False)),
            AdaGossip(0.05, TOP),
            DeepSqueeze(0.05, TOP),
            DEFATC(0.2, TOP),
        ],
        ids=str,
    )
    def test_local_sgd_of_period_one_is_its_inner_algorithm_bit_for_bit(self, inner):
        local, plain = (train(method, ring(5), 25, momentum=0.9) for method in (LocalSGD(1, inner), inner))
        assert np.array_equal(local.x, plain.x)
        assert local.bytes_sent == plain.bytes_sent

    def test_local_sgd_mixes_on_each_graph_of_a_varying_schedule_in_turn(self):
        """Two local steps at rate 0 and a mixing: after log2 n of them the mean is exact."""
        start = spread(8)
        trained = train(LocalSGD(2), OnePeerExponential(8), 6, lr=0.0, start=start)
        close(trained.x, np.tile(start.mean(axis=0), (8, 1)), 1e-15)

    def test_dpsgd_on_the_complete_graph_is_ssgd(self):
        close(train(DPSGD(), complete(5), 20).x, train(SSGD(), ring(5), 20).x)

    def test_one_peer_exponential_averages_exactly_after_log2_steps(self):
        start = spread(8)
        trained = train(DPSGD(), OnePeerExponential(8), 3, lr=0.0, start=start)
        close(trained.x, np.tile(start.mean(axis=0), (8, 1)), 1e-15)

    @pytest.mark.parametrize(
        "method",
        [
            SSGD(),
            LocalSGD(2),
            LocalSGD(2, Choco(0.2, TOP)),
            DPSGD(),
            Choco(0.2, TOP),
            Choco(0.2, TOP, overlap=True),
            AdaGossip(0.1, TOP),
            SGP(),
            SGP(overlap=True),
        ],
        ids=lambda m: m.name,
    )
    def test_one_rank_is_plain_sgd_bit_for_bit(self, method):
        alone = train(SGD(), ring(1), 15, momentum=0.9)
        assert np.array_equal(train(method, ring(1), 15, momentum=0.9).x, alone.x)


class TestMean:
    """Symmetric weights: gossip moves the mean over ranks only by the mean gradient step."""

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    @pytest.mark.parametrize("compressor", [TOP, SignNorm()], ids=["topk", "sign"])
    @pytest.mark.parametrize("method", [partial(Choco, start="zero"), DeepSqueeze], ids=["choco", "deep_squeeze"])
    def test_preserved(self, method, compressor, dtype):
        start = spread(8)
        trained = train(method(0.05, compressor), hypercube(8), 200, lr=0.0, start=start, dtype=dtype)
        assert np.abs(trained.x - start).max() > 0.1  # it did move
        close(trained.x.mean(axis=0), start.mean(axis=0), 1e-13 if dtype == torch.float64 else 1e-5)

    def test_not_preserved_by_adagossip(self):
        start = spread(8)
        trained = train(AdaGossip(0.05, TOP, start="zero"), ring(8), 500, lr=0.0, start=start)
        assert np.abs(trained.x.mean(axis=0) - start.mean(axis=0)).max() > 1e-2


class TestConvergence:
    """To the known optimum, which no rank has alone."""

    @pytest.mark.parametrize("method", [Choco(0.2, TOP), Choco(0.2, TOP, overlap=True), DPSGD()], ids=str)
    def test_optimum_up_to_the_bias_of_a_constant_rate(self, method):
        distance = []
        for lr in (0.04, 0.02, 0.01):
            trained = train(method, ring(8), 800, lr=lr)
            distance.append(np.linalg.norm(trained.x - centers(8).mean(axis=0)))
        # the stationary error of decentralized gradient descent is proportional to the rate
        assert distance[1] < 0.7 * distance[0]
        assert distance[1] < 2.5

    @pytest.mark.parametrize("weight", [0.9, 1.0])
    def test_gradient_tracking_reaches_the_optimum_of_all_with_a_constant_rate(self, weight):
        compressor, optimum = TopK(ratio=0.1), centers(6).mean(axis=0)
        tracking = train(MoTEF(0.2, compressor, weight), ring(6), 900, lr=0.05)
        assert np.abs(tracking.x - optimum).max() < 1e-6
        for method in (Choco(0.2, compressor), DPSGD()):
            assert np.abs(train(method, ring(6), 400, lr=0.05).x - optimum).max() > 1e-2

    @pytest.mark.parametrize("zeta", [1.0, 0.7])
    def test_def_atc_ends_where_dpsgd_does_and_half_as_far_at_half_the_rate(self, zeta):
        """What D-PSGD leaves as it is solves x = M (x - lr D (x - c)), with M = (1 - gamma) I + gamma W."""
        far, c = [], centers(5)
        mixing = 0.6 * np.eye(5) + 0.4 * ring(5).mixing
        for lr in (0.04, 0.02, 0.01):
            fixed = [
                np.linalg.solve(np.eye(5) - (1 - lr * d) * mixing, lr * d * mixing @ c[:, k])
                for k, d in enumerate(curvature())
            ]
            x = train(DEFATC(0.4, TOP, zeta), ring(5), round(30 / lr), lr=lr).x
            close(x, np.stack(fixed, axis=1), 1e-4)
            far.append(np.linalg.norm(x - c.mean(axis=0)))
        assert far[1] < 0.56 * far[0] and far[2] < 0.53 * far[1]  # towards 1/2

    def test_the_mean_of_def_atc_moves_by_what_was_sent(self):
        """Mean of x and e: what the mean gradient step adds, and mixing does not change."""
        trained = train(DEFATC(0.3, TOP), ring(6), 40)
        x, e = trained.x.mean(axis=0), np.stack([state.e for state in trained.states]).mean(axis=0)
        before = train(DEFATC(0.3, TOP), ring(6), 39)
        x_before, e_before = before.x.mean(axis=0), np.stack([state.e for state in before.states]).mean(axis=0)
        close(x + e, x_before + e_before - LR * gradients(before.x).mean(axis=0))

    def test_consensus_of_choco_is_linear(self):
        start = spread(8)
        errors = []
        for steps in (0, 300, 600):
            x = train(Choco(0.2, TopK(0.25), start="zero"), ring(8), steps, lr=0.0, start=start).x
            errors.append(np.abs(x - start.mean(axis=0)).max())
        assert errors[1] < 1e-2 * errors[0]
        assert errors[2] < 1e-2 * errors[1] or errors[2] < 1e-12

    def test_too_large_a_gamma_diverges(self):
        method = Choco(1.0, TopK(1 / DIM), start="zero")
        trained = train(method, ring(8), 400, lr=0.0, start=spread(8))
        assert np.abs(trained.x).max() > 1e3


class TestTraffic:
    def test_bytes_are_messages_times_neighbors(self):
        one = TopK(ratio=1 / DIM)
        per_message = 8 + 2  # a float64 value and a 16-bit index: shorter than a code
        assert train(Choco(0.02, one), ring(5), 7).bytes_sent == [7 * 2 * per_message] * 5
        assert train(Choco(0.02, one), chain(3), 7).bytes_sent == [7 * d * per_message for d in (1, 2, 1)]
        for sent in train(Choco(0.2, TOP), ring(5), 7).bytes_sent:  # a count, and a bitmap that ends with its last one
            assert 7 * 2 * (KEPT * 8 + 4 + 1) <= sent <= 7 * 2 * (KEPT * 8 + 4 + DIM // 8)
        assert train(SGP(), directed_ring(5), 7).bytes_sent == [7 * (DIM * 8 + 8)] * 5
        assert train(LocalSGD(4), ring(5), 7).bytes_sent == [2 * DIM * 8] * 5
        assert train(LocalSGD(3, Choco(0.02, one)), ring(5), 7).bytes_sent == [2 * 2 * per_message] * 5
        assert train(SSGD(), ring(4), 7).bytes_sent == [7 * 2 * 3 * DIM * 8 // 4] * 4


class TestMemory:
    """Flat vectors beyond model, gradient and optimizer, whatever the degree."""

    @pytest.mark.parametrize(
        ("method", "vectors"),
        [
            (DPSGD(), 0),
            (Choco(0.1, TOP), 3),
            (AdaGossip(0.1, TOP), 4),
            (DeepSqueeze(0.05, TOP), 1),
            (DEFATC(0.1, TOP), 3),
            (MoTEF(0.1, TOP), 8),
            (LEAD(), 5),
        ],
        ids=lambda value: getattr(value, "name", value),
    )
    @pytest.mark.parametrize("graph", [ring(5), complete(5)], ids=lambda g: g.name)
    def test_vectors(self, graph, method, vectors):
        (state, *_) = train(method, graph, 1).states
        held = [value for value in vars(state).values() if isinstance(value, torch.Tensor)]
        assert [len(value) for value in held] == [DIM] * vectors
