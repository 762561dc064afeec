"""Local steps with an outer step: transcriptions in NumPy, identities, traffic, memory and bad input."""

from functools import partial

import numpy as np
import pytest
import torch
from support import small
from support.quadratic import DIM, centers, curvature, top_k, train

from mpicomp.algorithms import DPSGD, SSGD, Choco, DiLoCo, LocalSGD, MoTEF, NoLoCo, SparseLoCo, StreamingDiLoCo
from mpicomp.compression import (
    QSGD,
    BlockTopK,
    ErrorFeedback,
    HardThreshold,
    Identity,
    PerTensor,
    RandomK,
    SampledTopK,
    TopK,
)
from mpicomp.errors import ConfigError, TopologyError
from mpicomp.exchange import loopback
from mpicomp.replica.distribute import distribute
from mpicomp.topology import OnePeerExponential, RandomMatching, Topology, chain, complete, ring, star, torus

LR = 0.1
KEPT = 6
TOP = TopK(ratio=KEPT / DIM)
STEPS = 26
"""8 outer steps of a period of 3, and 2 local steps more."""

PAIRED = [RandomMatching(5, seed=1), RandomMatching(6), RandomMatching(1), ring(2)]


def close(a, b, tolerance=1e-12):
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)


def local_steps(theta, steps):
    for _ in range(steps):
        theta = theta - LR * curvature() * (theta - centers(len(theta)))
    return theta


def slow_models(trained):
    return np.stack([state.phi for state in trained.states])


class TestTranscriptions:
    @pytest.mark.parametrize("beta", [0.0, 0.9])
    @pytest.mark.parametrize("nesterov", [True, False])
    @pytest.mark.parametrize("size", [1, 2, 5])
    def test_diloco_takes_the_outer_step_of_torch(self, size, nesterov, beta):
        """The outer optimizer of the paper is SGD with Nesterov's momentum on the pseudo-gradient."""
        phi = torch.zeros(DIM, dtype=torch.float64, requires_grad=True)
        outer = torch.optim.SGD([phi], lr=0.7, momentum=beta, nesterov=nesterov and beta > 0)
        for _ in range(STEPS // 3):
            start = np.tile(phi.detach().numpy(), (size, 1))
            phi.grad = torch.from_numpy((start - local_steps(start, 3)).mean(axis=0))
            outer.step()
        start = np.tile(phi.detach().numpy(), (size, 1))
        trained = train(DiLoCo(3, 0.7, beta, nesterov), chain(size), STEPS)
        close(slow_models(trained), start)
        close(trained.x, local_steps(start, STEPS % 3))

    @pytest.mark.parametrize("nesterov", [True, False])
    @pytest.mark.parametrize("graph", [ring(5), star(4), torus(6), ring(2)], ids=str)
    def test_diloco_with_choco(self, graph, nesterov):
        phi, v, hat = (np.zeros((graph.size, DIM)) for _ in range(3))
        for _ in range(STEPS // 3):
            d = phi - local_steps(phi, 3)
            v = 0.9 * v + d
            y = phi - 0.7 * (d + 0.9 * v if nesterov else v)
            hat = hat + top_k(y - hat, KEPT)
            phi = y + 0.2 * (graph.mixing @ hat - hat)
        trained = train(DiLoCo(3, nesterov=nesterov, inner=Choco(0.2, TOP)), graph, STEPS)
        close(slow_models(trained), phi)
        close(trained.x, local_steps(phi, STEPS % 3))
        close(np.stack([state.v for state in trained.states]), v)

    @pytest.mark.parametrize("schedule", PAIRED, ids=str)
    def test_noloco(self, schedule):
        n = schedule.size
        phi, delta = np.zeros((n, DIM)), np.zeros((n, DIM))
        for step in range(STEPS // 3):
            moved = local_steps(phi, 3) - phi
            pairs = [[i, *schedule(step).sources(i)] for i in range(n)]
            mean_moved = np.stack([moved[pair].mean(axis=0) for pair in pairs])
            mean_phi = np.stack([phi[pair].mean(axis=0) for pair in pairs])
            delta = 0.5 * delta + 0.7 * mean_moved - 0.6 * (phi - mean_phi)
            phi = phi + delta
        trained = train(NoLoCo(3, 0.7, 0.5, 0.6), schedule, STEPS)
        close(slow_models(trained), phi)
        close(trained.x, local_steps(phi, STEPS % 3))

    @pytest.mark.parametrize("schedule", PAIRED, ids=str)
    def test_compressed_noloco(self, schedule):
        n = schedule.size
        phi, delta, e = (np.zeros((n, DIM)) for _ in range(3))
        for step in range(STEPS // 3):
            p = 0.9 * e + local_steps(phi, 3) - phi
            q = top_k(p, KEPT)
            e = p - q
            rounded = phi.astype(np.float32)
            for i in range(n):
                pair = [i, *schedule(step).sources(i)]
                moved = (q[pair] != 0).any(axis=0)
                apart = (rounded[i].astype(float) - rounded[pair].astype(float).mean(axis=0)) * moved
                delta[i] = 0.3 * delta[i] + 0.8 * q[pair].mean(axis=0) - 0.6 * apart
            phi = phi + delta
        trained = train(NoLoCo(3, 0.8, 0.3, 0.6, TOP, 0.9), schedule, STEPS)
        close(slow_models(trained), phi)
        close(trained.x, local_steps(phi, STEPS % 3))
        close(np.stack([state.feedback.residual for state in trained.states]), e)

    @pytest.mark.parametrize("graph", [ring(5), star(4), ring(2), ring(1)], ids=str)
    def test_sparse_loco(self, graph):
        n = graph.size
        phi, e = np.zeros(DIM), np.zeros((n, DIM))
        for _ in range(STEPS // 3):
            start = np.tile(phi, (n, 1))
            p = 0.95 * e + start - local_steps(start, 3)
            q = top_k(p, KEPT)
            e = p - q
            phi = phi - 0.8 * q.mean(axis=0)
        start = np.tile(phi, (n, 1))
        trained = train(SparseLoCo(TOP, period=3, outer_lr=0.8), graph, STEPS)
        close(slow_models(trained), start)
        close(trained.x, local_steps(start, STEPS % 3))
        close(np.stack([state.feedback.residual for state in trained.states]), e)

    def test_sparse_loco_that_counts_ranks_by_their_volume(self):
        phi, e, shares = np.zeros(DIM), np.zeros((3, DIM)), np.array([0.5, 0.3, 0.2])
        for _ in range(4):
            start = np.tile(phi, (3, 1))
            p = 0.95 * e + start - local_steps(start, 3)
            q = top_k(p, KEPT)
            e, phi = p - q, phi - shares @ q
        trained = train(SparseLoCo(TOP, "volume", (5, 3, 2), period=3), star(3), 12)
        close(trained.x, np.tile(phi, (3, 1)))


class TestIdentities:
    @pytest.mark.parametrize(
        "method",
        [
            DiLoCo(1, 1.0, 0.0),
            DiLoCo(1, 1.0, 0.0, inner=DPSGD()),
            SparseLoCo(period=1),
            SparseLoCo(TopK(1.0), period=1),
        ],
        ids=str,
    )
    def test_a_period_of_one_is_sgd_on_the_mean_gradient(self, method):
        graph = complete(5) if isinstance(method, DiLoCo) else ring(5)
        close(train(method, graph, 20).x, train(SSGD(), graph, 20).x)

    @pytest.mark.parametrize("error_decay", [0.0, 0.95])
    @pytest.mark.parametrize("graph", [ring(5), star(4)], ids=str)
    @pytest.mark.parametrize("compressor", [Identity(), TopK(1.0), BlockTopK(1.0)], ids=lambda c: type(c).__name__)
    def test_sparse_loco_without_loss_is_diloco_without_momentum(self, graph, compressor, error_decay):
        sparse = train(
            SparseLoCo(compressor, period=3, outer_lr=0.8, error_decay=error_decay), graph, STEPS, momentum=0.9
        )
        close(sparse.x, train(DiLoCo(3, 0.8, 0.0), graph, STEPS, momentum=0.9).x)
        assert not any(state.feedback.residual.any() for state in sparse.states)

    @pytest.mark.parametrize("graph", [complete(5), ring(2)], ids=str)
    def test_noloco_of_all_ranks_is_diloco_with_heavy_ball_momentum(self, graph):
        """A pair of 2 is all ranks; on a complete graph the pair is widened. Equal slow models draw on none."""
        for gamma in (1e-300, 0.7):
            paired = train(NoLoCo(3, 0.7, 0.5, gamma), graph, STEPS, momentum=0.9)
            close(paired.x, train(DiLoCo(3, 0.7, 0.5, nesterov=False), graph, STEPS, momentum=0.9).x)

    @pytest.mark.parametrize("size", [5, 6])
    def test_the_mean_of_noloco_moves_as_diloco_with_heavy_ball_momentum(self, size):
        """On a quadratic with a common curvature, the mean of the ranks' moves is the move from their mean."""
        paired = train(NoLoCo(3, 0.7, 0.5), RandomMatching(size), STEPS)
        whole = train(DiLoCo(3, 0.7, 0.5, nesterov=False), ring(size), STEPS)
        close(paired.x.mean(axis=0), whole.x.mean(axis=0))
        assert np.abs(paired.x - whole.x).max() > 1e-2

    @pytest.mark.parametrize("nesterov", [True, False])
    @pytest.mark.parametrize("inner", [DPSGD(), Choco(0.2, TOP)], ids=str)
    def test_the_mean_with_neighbors_only_moves_as_with_an_all_reduce(self, inner, nesterov):
        method = partial(DiLoCo, 3, nesterov=nesterov)
        neighbors, whole = train(method(inner=inner), ring(6), STEPS), train(method(), ring(6), STEPS)
        close(neighbors.x.mean(axis=0), whole.x.mean(axis=0))
        assert np.abs(neighbors.x - whole.x).max() > 1e-2

    def test_with_dpsgd_on_a_complete_graph_it_is_diloco(self):
        close(train(DiLoCo(3, inner=DPSGD()), complete(5), STEPS).x, train(DiLoCo(3), complete(5), STEPS).x)

    @pytest.mark.parametrize("inner", [DPSGD(gamma=0.7), Choco(0.2, TOP)], ids=str)
    def test_a_plain_outer_step_is_local_sgd(self, inner):
        """With eta = 1 and beta = 0 the slow model is where the local steps ended."""
        close(train(DiLoCo(3, 1.0, 0.0, inner=inner), ring(5), STEPS).x, train(LocalSGD(3, inner), ring(5), STEPS).x)

    @pytest.mark.parametrize(
        "method",
        [DiLoCo(2), StreamingDiLoCo(2, 2), NoLoCo(2), SparseLoCo(TopK(0.2), period=2)],
        ids=lambda m: m.name,
    )
    def test_ranks_that_are_given_different_models_start_from_one(self, method):
        def serve(world):
            gossip, closure = small.make(world, method, seed=world.rank)
            first = gossip.state.phi.clone()
            for step in range(2):
                gossip.step(closure(step))
            return first, gossip.state.phi

        (first, slow), *others = loopback.run(2, serve)
        assert not torch.equal(first, slow)
        for other_first, other_slow in others:
            assert torch.equal(first, other_first)
            assert torch.equal(slow, other_slow) or isinstance(method, NoLoCo)


class TestConvergence:
    def test_the_pairs_of_noloco_agree_as_the_learning_rate_falls(self):
        rates = [LR] * 200 + [LR * 0.97**step for step in range(400)]
        far = train(NoLoCo(4), RandomMatching(6), 200)
        near = train(NoLoCo(4), RandomMatching(6), 600, lr=rates)
        spread = [np.linalg.norm(trained.x - trained.x.mean(axis=0)) for trained in (far, near)]
        assert spread[1] < 1e-3 * spread[0]
        close(near.x, np.tile(centers(6).mean(axis=0), (6, 1)), 1e-3)

    @pytest.mark.parametrize("compressor", [TOP, BlockTopK(0.25)], ids=str)
    def test_compressed_pairs_agree_as_the_learning_rate_falls(self, compressor):
        method, rates = (
            NoLoCo(4, 0.8, 0.0, compressor=compressor),
            [LR] * 400 + [LR * 0.985**step for step in range(800)],
        )
        far, near = train(method, RandomMatching(6), 400), train(method, RandomMatching(6), 1200, lr=rates)
        spread = [np.linalg.norm(trained.x - trained.x.mean(axis=0)) for trained in (far, near)]
        assert spread[1] < 1e-2 * spread[0]
        close(near.x, np.tile(centers(6).mean(axis=0), (6, 1)), 2e-2)


class TestTraffic:
    def test_bytes_are_sent_once_in_a_period(self):
        n = DIM * 8
        for steps, exchanges in ((2, 0), (3, 1), (8, 2), (9, 3)):
            assert train(DiLoCo(3), ring(4), steps).bytes_sent == [exchanges * 2 * 3 * n // 4] * 4
            assert train(DiLoCo(3, inner=DPSGD()), ring(4), steps).bytes_sent == [exchanges * 2 * n] * 4
            assert train(NoLoCo(3), RandomMatching(4), steps).bytes_sent == [exchanges * 2 * n] * 4
            assert train(SparseLoCo(period=3), ring(4), steps).bytes_sent == [exchanges * 2 * 3 * n // 4] * 4

    def test_who_has_no_partner_sends_nothing(self):
        schedule = RandomMatching(5)
        rests = [sum(schedule(step).partner(rank) is None for step in range(8)) for rank in range(5)]
        assert sum(rests) == 8
        sent = train(NoLoCo(3), schedule, STEPS).bytes_sent
        assert sent == [(8 - count) * 2 * DIM * 8 for count in rests]
        # A place of 2 bytes and a value of 8, and of what either of the two has sent, half a value.
        sent = train(NoLoCo(3, compressor=TopK(ratio=1 / DIM)), schedule, STEPS).bytes_sent
        assert all(
            (8 - rested) * (10 + 4) <= nbytes <= (8 - rested) * (10 + 8)
            for nbytes, rested in zip(sent, rests, strict=True)
        )

    def test_a_sparse_message_is_that_of_ef_sgd(self):
        one = TopK(ratio=1 / DIM)
        assert train(SparseLoCo(one, period=3), star(3), 8).bytes_sent[1:] == [2 * (8 + 2)] * 2

    @pytest.mark.parametrize(
        ("method", "vectors"),
        [
            (DiLoCo(3), 2),
            (DiLoCo(3, outer_momentum=0.0), 1),
            (NoLoCo(3), 2),
            (NoLoCo(3, compressor=TOP), 3),
            (SparseLoCo(TOP, period=3), 2),
        ],
        ids=str,
    )
    def test_memory(self, method, vectors):
        state = train(method, ring(2), 3).states[0]
        held = [*vars(state).values(), *(vars(state.feedback).values() if getattr(state, "feedback", None) else ())]
        assert [len(value) for value in held if isinstance(value, torch.Tensor)] == [DIM] * vectors


class TestBadInput:
    @pytest.mark.parametrize("method", [DiLoCo, NoLoCo, SparseLoCo])
    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ({"period": 0}, "algorithm.period = 0 must be at least 1"),
            ({"outer_lr": 0.0}, "algorithm.outer_lr = 0.0 must be a finite number > 0"),
            ({"outer_lr": float("nan")}, "algorithm.outer_lr = nan must be a finite number > 0"),
        ],
        ids=str,
    )
    def test_numbers_of_all(self, method, wrong, message):
        with pytest.raises(ConfigError, match=message):
            method(**wrong)

    @pytest.mark.parametrize("value", [-0.1, 1.0, float("nan")])
    def test_fractions(self, value):
        pairs = [(method, "outer_momentum") for method in (DiLoCo, NoLoCo)]
        for method, key in (*pairs, *((method, "error_decay") for method in (NoLoCo, SparseLoCo))):
            with pytest.raises(ConfigError, match=rf"algorithm.{key} = {value} must be in \[0, 1\)"):
                method(**{key: value})

    @pytest.mark.parametrize(
        "compressor", [RandomK(0.1, unbiased=True), QSGD(bits=2), PerTensor(QSGD(bits=2))], ids=str
    )
    @pytest.mark.parametrize("method", [NoLoCo, SparseLoCo, partial(MoTEF, 0.1)], ids=["NoLoCo", "SparseLoCo", "MoTEF"])
    def test_errors_that_are_remembered_must_not_grow(self, method, compressor):
        with pytest.raises(ConfigError, match="grows without bound"):
            method(compressor=compressor)

    @pytest.mark.parametrize("compressor", [HardThreshold(0.05), SampledTopK(0.2, sample=0.5)], ids=str)
    def test_a_message_may_be_empty_if_it_adds_no_error(self, compressor):
        for method, schedule in (
            (NoLoCo(3, 0.7, 0.0, compressor=compressor), RandomMatching(4)),
            (SparseLoCo(compressor, period=3), ring(4)),
        ):
            far = np.abs(train(method, schedule, 60).x.mean(axis=0) - centers(4).mean(axis=0)).max()
            assert far < 0.2 < np.abs(centers(4).mean(axis=0)).max()

    def test_large_entries_and_short_types(self):
        """In half precision an entry above 65,504 is infinite, and a pair would make a NaN of two of them."""

        def serve(world):
            model = torch.nn.Linear(4, 1, bias=False)
            with torch.no_grad():
                model.weight.copy_(torch.tensor([[1e5, -1e6, 1.0, 2.0]]))
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            gossip = distribute(model, optimizer, NoLoCo(1, compressor=TopK(0.5)), RandomMatching, world=world)
            inputs = torch.tensor([[0.0, 0.0, 1.0, world.rank]])
            for _ in range(4):
                gossip.step(lambda: model(inputs).square().mean())
            return model.weight.detach()

        for weight in loopback.run(2, serve):
            assert weight.isfinite().all() and weight[0, 1] == -1e6

    def test_consensus_step_of_noloco(self):
        with pytest.raises(ConfigError, match=r"algorithm.gamma = 0.0 must be a finite number > 0"):
            NoLoCo(gamma=0.0)

    def test_inner_must_mix_without_a_gradient(self):
        with pytest.raises(ConfigError, match=r"algorithm.inner: SSGD has no mixing .* Use a gossip method"):
            DiLoCo(inner=SSGD())
        with pytest.raises(ConfigError, match=r"algorithm.overlap = true: Choco would send behind one gradient"):
            DiLoCo(inner=Choco(0.1, overlap=True))

    def test_graph_of_the_inner_method(self):
        DiLoCo().check(star(4, weights="uniform"))
        with pytest.raises(TopologyError, match="'one_peer_exponential' changes from step to step"):
            DiLoCo(inner=Choco(0.1)).check(OnePeerExponential(4))

    @pytest.mark.parametrize("graph", [ring(3), complete(4), star(4), OnePeerExponential(4)], ids=str)
    def test_noloco_needs_pairs(self, graph):
        with pytest.raises(TopologyError, match=r"not consist of disjoint pairs: .* 'random_matching'; .* 'diloco'"):
            NoLoCo().check(graph)

    def test_noloco_needs_pairs_that_change(self):
        pairs = np.kron(np.eye(2), np.full((2, 2), 0.5))
        with pytest.raises(TopologyError, match=r"'pairs' stays as it is, and pairs that never change"):
            NoLoCo().check(Topology("pairs", pairs))
        for schedule in (RandomMatching(5), RandomMatching(6), ring(2), ring(1), OnePeerExponential(2)):
            NoLoCo().check(schedule)

    def test_sparse_loco_needs_a_star_or_a_ring_and_no_second_error_memory(self):
        with pytest.raises(TopologyError, match=r"Use topology.kind = 'ring' or 'star'"):
            SparseLoCo().check(torus(6))
        with pytest.raises(ConfigError, match=r"compression.error_feedback = true: SparseLoCo sends by itself"):
            SparseLoCo(ErrorFeedback(TOP))
