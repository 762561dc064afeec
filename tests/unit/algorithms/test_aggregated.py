"""Sums of compressed gradients: transcriptions of the listings in NumPy, identities, bytes, memory and bad input."""

import numpy as np
import pytest
import torch
from support.quadratic import DIM, Quadratic, centers, curvature, top_k, train
from support.steps import one_step

from mpicomp.algorithms import DGC, EFSGD, GMC, SGD, Choco
from mpicomp.compression import ByRank, ErrorFeedback, Identity, PerTensor, RandomBlock, SignNorm, TopK
from mpicomp.errors import CheckpointError, ConfigError, TopologyError
from mpicomp.exchange import loopback
from mpicomp.replica.flat import FlatModel
from mpicomp.state import flatten, restore_
from mpicomp.topology import OnePeerExponential, chain, complete, ring, star, torus

LR = 0.1
KEPT = 6
TOP = TopK(ratio=KEPT / DIM)
GRAPHS = [ring(5), star(4), ring(4), star(3), ring(2), ring(1), chain(3)]


def gradients(x):
    return curvature() * (x - centers(len(x)))


def close(a, b, tolerance=1e-12):
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)


def everywhere(x, size):
    """The model (DIM,) of all ranks, (size, DIM)."""
    return np.tile(x, (size, 1))


@pytest.mark.parametrize("graph", GRAPHS, ids=lambda g: f"{g.name}{g.size}")
class TestTranscriptions:
    @pytest.mark.parametrize("mu", [0.0, 0.9])
    def test_ef_sgd(self, graph, mu):
        n = graph.size
        x, e, u = np.zeros(DIM), np.zeros((n, DIM)), np.zeros((n, DIM))
        for _ in range(30):
            u = mu * u + gradients(everywhere(x, n))
            q = top_k(e + u, KEPT)
            e = e + u - q
            x = x - LR * q.mean(axis=0)
        trained = train(EFSGD(TOP, momentum=mu), graph, 30)
        close(trained.x, everywhere(x, n))
        close(np.stack([state.feedback.residual for state in trained.states]), e)

    @pytest.mark.parametrize("overlap", [False, True])
    @pytest.mark.parametrize("mu", [0.0, 0.9])
    def test_loco(self, graph, mu, overlap):
        """The listing, with an error in the unit of a gradient and a reset after every seventh message."""
        n, beta = graph.size, 0.8
        x, last, e, u = np.zeros(DIM), np.zeros(DIM), np.zeros((n, DIM)), np.zeros((n, DIM))
        for step in range(30):
            u = mu * u + gradients(everywhere(x, n))
            q = top_k(u + e, KEPT)
            e = beta * e + (1 - beta) * (u + e - q)
            if step % 7 == 6:
                e = np.zeros((n, DIM))
            arrived, last = (last, q.mean(axis=0)) if overlap else (q.mean(axis=0), last)
            x = x - LR * arrived
        method = EFSGD(TOP, momentum=mu, overlap=overlap, error_average=beta, error_reset_steps=7)
        trained = train(method, graph, 30)
        close(trained.x, everywhere(x, n))
        close(np.stack([state.feedback.residual for state in trained.states]), e)

    def test_loco_adds_a_part_of_all_that_is_not_sent_and_loses_nothing(self, graph):
        """Its other form, in the unit of a parameter, with a rate that changes."""
        n, beta, rates = graph.size, 0.8, [0.0, 0.05, *(0.1 / (1 + 0.2 * t) for t in range(28))]
        x, unsent = np.zeros(DIM), np.zeros((n, DIM))
        for lr in rates:
            moved = lr * gradients(everywhere(x, n))
            q = top_k(moved + (1 - beta) * unsent, KEPT)
            unsent = unsent + moved - q
            x = x - q.mean(axis=0)
        trained = train(EFSGD(TOP, error_average=beta), graph, 30, lr=rates)
        close(trained.x, everywhere(x, n))
        errors = np.stack([state.feedback.residual for state in trained.states])
        close(rates[-1] * errors / (1 - beta), unsent)

    @pytest.mark.parametrize("mu", [0.0, 0.9])
    def test_ef_sgd_whose_rate_changes(self, graph, mu):
        """The listing of the papers: the error is of what moves the model, lr u."""
        n, rates = graph.size, [0.0, 0.05, *(0.1 / (1 + 0.2 * t) for t in range(28))]
        x, e, u = np.zeros(DIM), np.zeros((n, DIM)), np.zeros((n, DIM))
        for lr in rates:
            u = mu * u + gradients(everywhere(x, n))
            p = e + lr * u
            q = top_k(p, KEPT)
            e = p - q
            x = x - q.mean(axis=0)
        trained = train(EFSGD(TOP, momentum=mu), graph, 30, lr=rates)
        close(trained.x, everywhere(x, n))
        close(np.stack([rates[-1] * state.feedback.residual.numpy() for state in trained.states]), e)

    @pytest.mark.parametrize("overlap", [False, True])
    def test_ef_sgd_with_weight_decay(self, graph, overlap):
        n = graph.size
        x, b, last, e, u = np.zeros(DIM), np.zeros(DIM), np.zeros(DIM), np.zeros((n, DIM)), np.zeros((n, DIM))
        for step in range(30):
            u = 0.6 * u + gradients(everywhere(x, n))
            q = top_k(e + u, KEPT)
            e = e + u - q
            arrived, last = (last, q.mean(axis=0)) if overlap else (q.mean(axis=0), last)
            if step or not overlap:
                b = 0.6 * b + 0.1 * x
                x = x - LR * (arrived + b)
        trained = train(EFSGD(TOP, momentum=0.6, overlap=overlap), graph, 30, weight_decay=0.1)
        close(trained.x, everywhere(x, n))

    @pytest.mark.parametrize("nesterov", [False, True])
    def test_dgc_with_weight_decay(self, graph, nesterov):
        """The authors' optimizer: weight decay has a momentum of its own, beside the sum, and no mask."""
        n = graph.size
        x, b, u, v = np.zeros(DIM), np.zeros(DIM), np.zeros((n, DIM)), np.zeros((n, DIM))
        for _ in range(30):
            g = gradients(everywhere(x, n))
            u = 0.9 * (u + g) if nesterov else 0.9 * u + g
            v = v + u + (g if nesterov else 0)
            q = top_k(v, KEPT)
            v, u = v - q, np.where(q != 0, 0, u)
            b = 0.9 * b + 0.1 * x
            x = x - LR * (q.mean(axis=0) + (0.1 * x + 0.9 * b if nesterov else b))
        trained = train(DGC(TOP, momentum=0.9, nesterov=nesterov), graph, 30, weight_decay=0.1)
        close(trained.x, everywhere(x, n))

    @pytest.mark.parametrize("detachment", [0.0, 0.3])
    def test_gmc(self, graph, detachment):
        n = graph.size
        x, before, e = np.zeros(DIM), np.zeros(DIM), np.zeros((n, DIM))
        for _ in range(30):
            g = gradients(everywhere(x, n) - detachment * LR * e)
            p = e + g - 0.9 / LR * (x - before)
            q = top_k(p, KEPT)
            e = p - q
            before, x = x, x - LR * q.mean(axis=0)
        trained = train(GMC(TOP, momentum=0.9, detachment=detachment), graph, 30)
        close(trained.x, everywhere(x, n), 1e-10)
        close(np.stack([state.feedback.residual for state in trained.states]), e, 1e-10)

    @pytest.mark.parametrize("overlap", [False, True])
    def test_gmc_has_no_momentum_below_a_hundredth_of_the_largest_rate(self, graph, overlap):
        """As in a warm restart: over such a rate it would be large, and move the model by the rate after it."""
        n = graph.size
        x, before, last, e = np.zeros(DIM), np.zeros(DIM), np.zeros(DIM), np.zeros((n, DIM))
        rates = [0.0, *[LR] * 6, *[LR / 1000] * 3, *[LR] * 6]
        for lr in rates:
            g = gradients(everywhere(x, n))
            if overlap:
                before, x = x, x - lr * last
            p = e + g - (0.6 / lr * (x - before) if lr > LR / 100 else 0)
            q = top_k(p, KEPT)
            e, last = p - q, q.mean(axis=0)
            if not overlap:
                before, x = x, x - lr * last
        trained = train(GMC(TOP, momentum=0.6, overlap=overlap), graph, len(rates), lr=rates)
        close(trained.x, everywhere(x, n), 1e-10)
        close(np.stack([state.feedback.residual for state in trained.states]), e, 1e-10)

    @pytest.mark.parametrize("overlap", [False, True])
    def test_gmc_with_the_error_memory_of_loco(self, graph, overlap):
        n = graph.size
        x, before, last, e = np.zeros(DIM), np.zeros(DIM), np.zeros(DIM), np.zeros((n, DIM))
        for step in range(30):
            new = gradients(everywhere(x, n) - 0.3 * LR * e)
            if overlap:
                before, x = x, x - LR * last
            new = new - 0.6 / LR * (x - before)
            q = top_k(e + new, KEPT)
            e = 0.5 * e + 0.5 * (e + new - q)
            if step % 7 == 6:
                e = np.zeros((n, DIM))
            last = q.mean(axis=0)
            if not overlap:
                before, x = x, x - LR * last
        memory = {"error_average": 0.5, "error_reset_steps": 7}
        trained = train(GMC(TOP, momentum=0.6, detachment=0.3, overlap=overlap, **memory), graph, 30)
        close(trained.x, everywhere(x, n), 1e-10)
        close(np.stack([state.feedback.residual for state in trained.states]), e, 1e-10)

    @pytest.mark.parametrize("nesterov", [False, True])
    @pytest.mark.parametrize("masking", [False, True])
    def test_dgc(self, graph, nesterov, masking):
        n = graph.size
        x, u, v = np.zeros(DIM), np.zeros((n, DIM)), np.zeros((n, DIM))
        for _ in range(30):
            g = gradients(everywhere(x, n))
            g = g * np.minimum(1, 2.0 / np.sqrt(n) / np.linalg.norm(g, axis=1, keepdims=True))
            u = 0.9 * (u + g) if nesterov else 0.9 * u + g
            v = v + u + (g if nesterov else 0)
            q = top_k(v, KEPT)
            v = v - q
            u = np.where((q != 0) & masking, 0, u)
            x = x - LR * q.mean(axis=0)
        method = DGC(TOP, momentum=0.9, nesterov=nesterov, masking=masking, clip="norm", clip_norm=2.0)
        trained = train(method, graph, 30)
        close(trained.x, everywhere(x, n))
        close(np.stack([state.u for state in trained.states]), u)
        close(np.stack([state.v for state in trained.states]), v)

    @pytest.mark.parametrize("mu", [0.0, 0.9])
    def test_ef_sgd_overlapped(self, graph, mu):
        n = graph.size
        x, e, u, last = np.zeros(DIM), np.zeros((n, DIM)), np.zeros((n, DIM)), np.zeros(DIM)
        for _ in range(30):
            u = mu * u + gradients(everywhere(x, n))
            q = top_k(e + u, KEPT)
            e = e + u - q
            x, last = x - LR * last, q.mean(axis=0)
        trained = train(EFSGD(TOP, momentum=mu, overlap=True), graph, 30)
        close(trained.x, everywhere(x, n))
        close(np.stack([state.feedback.residual for state in trained.states]), e)

    @pytest.mark.parametrize("detachment", [0.0, 0.3])
    def test_gmc_overlapped(self, graph, detachment):
        n = graph.size
        x, e, last = np.zeros(DIM), np.zeros((n, DIM)), np.zeros(DIM)
        for _ in range(30):
            g = gradients(everywhere(x, n) - detachment * LR * e)
            x = x - LR * last
            p = e + g + 0.6 * last
            q = top_k(p, KEPT)
            e, last = p - q, q.mean(axis=0)
        trained = train(GMC(TOP, momentum=0.6, detachment=detachment, overlap=True), graph, 30)
        close(trained.x, everywhere(x, n), 1e-10)
        close(np.stack([state.feedback.residual for state in trained.states]), e, 1e-10)

    def test_dgc_overlapped(self, graph):
        n = graph.size
        x, u, v, last = np.zeros(DIM), np.zeros((n, DIM)), np.zeros((n, DIM)), np.zeros(DIM)
        for step in range(30):
            u = 0.6 * u + gradients(everywhere(x, n))
            v = v + u
            q = top_k(v, DIM // 2 if step < 4 else KEPT)
            v, u = v - q, np.where(q != 0, 0, u)
            x, last = x - LR * last, q.mean(axis=0)
        trained = train(DGC(TOP, momentum=0.6, warmup=(0.5,), warmup_steps=4, overlap=True), graph, 30)
        close(trained.x, everywhere(x, n))
        close(np.stack([state.v for state in trained.states]), v)
        close(np.stack([state.u for state in trained.states]), u)

    def test_weights_by_volume(self, graph):
        n = graph.size
        volumes = tuple(range(1, n + 1))
        share = np.array(volumes)[:, None] / sum(volumes)
        x, e = np.zeros(DIM), np.zeros((n, DIM))
        for _ in range(30):
            p = e + gradients(everywhere(x, n))
            q = top_k(p, KEPT)
            e = p - q
            x = x - LR * (share * q).sum(axis=0)
        close(train(EFSGD(TOP, "volume", volumes), graph, 30).x, everywhere(x, n))


class TestIdentities:
    @pytest.mark.parametrize("graph", GRAPHS, ids=lambda g: f"{g.name}{g.size}")
    def test_gmc_without_compression_is_heavy_ball_on_the_mean_gradient(self, graph):
        x, before = np.zeros(DIM), np.zeros(DIM)
        for _ in range(200):
            mean = gradients(everywhere(x, graph.size)).mean(axis=0)
            before, x = x, x - LR * mean + 0.9 * (x - before)
        close(train(GMC(Identity(), momentum=0.9), graph, 200).x, everywhere(x, graph.size))

    @pytest.mark.parametrize("graph", GRAPHS, ids=lambda g: f"{g.name}{g.size}")
    @pytest.mark.parametrize("method", [EFSGD(overlap=True), DGC(Identity(), overlap=True)], ids=lambda m: m.name)
    def test_overlap_without_compression_is_sgd_delayed_by_a_step(self, graph, method):
        x, last = np.zeros(DIM), np.zeros(DIM)
        for _ in range(100):
            x, last = x - LR * last, gradients(everywhere(x, graph.size)).mean(axis=0)
        close(train(method, graph, 100).x, everywhere(x, graph.size))

    @pytest.mark.parametrize("graph", GRAPHS, ids=lambda g: f"{g.name}{g.size}")
    def test_overlapped_gmc_without_compression_is_heavy_ball_on_gradients_of_the_step_before(self, graph):
        x, before, last = np.zeros(DIM), np.zeros(DIM), np.zeros(DIM)
        for _ in range(100):
            mean = gradients(everywhere(x, graph.size)).mean(axis=0)
            before, x, last = x, x - LR * last + 0.6 * (x - before), mean
        close(train(GMC(momentum=0.6, overlap=True), graph, 100).x, everywhere(x, graph.size))

    def test_an_overlapped_run_goes_to_the_optimum_below_half_the_learning_rate(self):
        """Delayed SGD on a curvature L is stable below 1 / L, SGD below 2 / L; here L = 1.5."""
        optimum = centers(5).mean(axis=0)
        stable, unstable = (train(EFSGD(overlap=True), ring(5), 400, lr=lr).x[0] for lr in (0.6, 0.7))
        assert np.abs(stable - optimum).max() < 1e-3
        assert np.abs(unstable - optimum).max() > 1
        assert np.abs(train(EFSGD(), ring(5), 400, lr=1.2).x[0] - optimum).max() < 1e-3

    def test_gmc_keeps_the_size_of_the_last_step_when_the_rate_drops(self):
        """Heavy ball: the displacement counts, not the velocity of torch's SGD."""

        def serve(world):
            local = Quadratic(torch.zeros(DIM, dtype=torch.float64), torch.as_tensor(centers(3)[world.rank]))
            exchange = world.exchange(ring(3))
            method = GMC(Identity(), momentum=0.9)
            state = method.init(local, exchange)
            for step in range(40):
                local.lr = 0.1 if step < 20 else 0.01
                one_step(method, local, state, exchange)
            return local.x.numpy()

        x, before = np.zeros(DIM), np.zeros(DIM)
        for step in range(40):
            mean = gradients(everywhere(x, 3)).mean(axis=0)
            before, x = x, x - (0.1 if step < 20 else 0.01) * mean + 0.9 * (x - before)
        close(np.stack(loopback.run(3, serve)), everywhere(x, 3))

    @pytest.mark.parametrize("overlap", [False, True])
    def test_loco_that_averages_over_one_message_is_ef_sgd_bit_for_bit(self, overlap):
        """1 - 1e-300 is 1: the average takes the whole new error, as it is."""
        plain = train(EFSGD(TOP, momentum=0.5, overlap=overlap), ring(4), 30)
        loco = train(EFSGD(TOP, momentum=0.5, overlap=overlap, error_average=1e-300), ring(4), 30)
        assert (plain.x == loco.x).all()

    @pytest.mark.parametrize("method", [EFSGD, GMC])
    def test_loco_without_compression_has_no_error(self, method):
        plain = train(method(momentum=0.5), star(3), 30)
        loco = train(method(momentum=0.5, error_average=0.8, error_reset_steps=4), star(3), 30)
        assert (plain.x == loco.x).all()

    def test_a_reset_after_every_message_remembers_nothing(self):
        forgets = train(EFSGD(TOP, error_reset_steps=1), star(3), 1)
        assert all(not state.feedback.residual.any() for state in forgets.states)
        x = np.zeros(DIM)
        for _ in range(30):
            x = x - LR * top_k(gradients(everywhere(x, 3)), KEPT).mean(axis=0)
        close(train(EFSGD(TOP, error_reset_steps=1), star(3), 30).x, everywhere(x, 3))

    def test_gmc_plus_without_an_error_is_gmc_bit_for_bit(self):
        a, b = (train(GMC(Identity(), detachment=detachment), ring(5), 20) for detachment in (0.0, 1.0))
        assert np.array_equal(a.x, b.x)

    def test_dgc_that_sends_and_masks_all_is_sgd(self):
        mean = train(EFSGD(), ring(5), 25).x
        assert np.array_equal(train(DGC(TopK(ratio=1.0)), ring(5), 25).x, train(DGC(TopK(1.0)), star(5), 25).x)
        close(train(DGC(TopK(ratio=1.0)), ring(5), 25).x, mean)

    def test_dgc_without_masking_that_sends_all_is_sgd_with_momentum(self):
        x, m = np.zeros(DIM), np.zeros(DIM)
        for _ in range(25):
            m = 0.9 * m + gradients(everywhere(x, 5)).mean(axis=0)
            x = x - LR * m
        close(train(DGC(TopK(ratio=1.0), masking=False), ring(5), 25).x, everywhere(x, 5))

    @pytest.mark.parametrize("nesterov", [False, True])
    def test_without_compression_momentum_and_weight_decay_are_those_of_torch(self, nesterov):
        x = torch.zeros(DIM, dtype=torch.float64)
        optimizer = torch.optim.SGD([x], lr=LR, momentum=0.9, weight_decay=0.1, nesterov=nesterov)
        for _ in range(25):
            x.grad = torch.from_numpy(gradients(everywhere(x.numpy(), 5)).mean(axis=0))
            optimizer.step()
        methods = [DGC(TopK(1.0), masking=False, nesterov=nesterov), *([] if nesterov else [EFSGD(momentum=0.9)])]
        for method in methods:
            close(train(method, ring(5), 25, weight_decay=0.1).x, everywhere(x.numpy(), 5))

    @pytest.mark.parametrize("ratio", [0.25, 1.0])
    def test_each_group_of_parameters_changes_its_own_rate(self, ratio):
        """One rank, two groups: an error memory of what moves the model, by the papers' listing for each tensor."""

        def serve(world):
            a, b = (torch.nn.Parameter(torch.zeros(8, dtype=torch.float64)) for _ in range(2))
            model = torch.nn.ParameterList([a, b])
            optimizer = torch.optim.SGD([{"params": [a], "lr": 0.1}, {"params": [b], "lr": 0.2}])
            local, exchange, method = (
                FlatModel(model, optimizer),
                world.exchange(ring(1)),
                EFSGD(PerTensor(TopK(ratio))),
            )
            state = method.init(local, exchange)
            for lr_a, lr_b, g in steps:
                optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = lr_a, lr_b
                local.gradient = lambda meanwhile=None, g=g: local.g.copy_(torch.from_numpy(g))
                with torch.no_grad():
                    one_step(method, local, state, exchange)
            return local.x.numpy()

        random = np.random.default_rng(3)
        steps = [(0.1 / (1 + t), 0.2 / (1 + t * t), random.normal(size=16)) for t in range(6)]
        x, e = np.zeros((2, 8)), np.zeros((2, 8))
        for lr_a, lr_b, g in steps:
            p = e + np.array([[lr_a], [lr_b]]) * g.reshape(2, 8)
            q = top_k(p, round(8 * ratio))
            x, e = x - q, p - q
        close(loopback.run(1, serve)[0], x.ravel())

    @pytest.mark.parametrize("around", [lambda inner: inner, lambda inner: ByRank((inner,) * 5)], ids=["", "by_rank"])
    def test_dgc_sends_tensors_of_one_dimension_whole_and_does_not_mask_them(self, around):
        x, m = np.zeros(DIM), np.zeros(DIM)
        for _ in range(25):
            m = 0.9 * m + gradients(everywhere(x, 5)).mean(axis=0)
            x = x - LR * m
        trained = train(DGC(around(PerTensor(TOP, dense_1d=True))), ring(5), 25).x
        close(trained[:, : DIM // 2], everywhere(x, 5)[:, : DIM // 2])  # tensor "a"
        assert np.abs(trained - x)[:, DIM // 2 :].max() > 1e-3

    @pytest.mark.parametrize(
        "method",
        [EFSGD(TOP, momentum=0.9), GMC(TOP), DGC(TOP), GMC(TOP, momentum=0.5, overlap=True)],
        ids=["ef_sgd", "gmc", "dgc", "gmc_overlapped"],
    )
    def test_star_and_ring_agree_bit_for_bit(self, method):
        on_a_star, on_a_ring = train(method, star(5), 30), train(method, ring(5), 30)
        assert np.array_equal(on_a_star.x, on_a_ring.x)
        assert (on_a_star.x == on_a_star.x[0]).all()

    @pytest.mark.parametrize(
        "compressor", [RandomBlock(0.25), PerTensor(RandomBlock(0.25)), Identity()], ids=lambda c: type(c).__name__
    )
    def test_an_all_reduce_round_the_ring_agrees_to_rounding(self, compressor):
        on_a_star, on_a_ring = (train(GMC(compressor), graph, 30) for graph in (star(5), ring(5)))
        close(on_a_star.x, on_a_ring.x, 1e-11)
        assert (on_a_ring.x == on_a_ring.x[0]).all()

    @pytest.mark.parametrize("method", [EFSGD(), DGC(Identity())], ids=lambda m: m.name)
    def test_one_rank_is_plain_sgd(self, method):
        assert np.array_equal(train(method, ring(1), 15).x, train(SGD(), ring(1), 15).x)

    def test_clipping_by_the_root_mean_square(self):
        def serve(world):
            local = Quadratic(torch.zeros(DIM, dtype=torch.float64), torch.zeros(DIM, dtype=torch.float64), lr=1.0)
            local.gradient = lambda meanwhile: local.g.zero_().index_fill_(
                0, torch.tensor([2]), -10.0 * (world.rank == 1)
            )
            exchange = world.exchange(ring(3))
            method = DGC(clip="rms")
            one_step(method, local, method.init(local, exchange), exchange)
            return local.x[2].item()

        assert loopback.run(3, serve) == pytest.approx([10 / np.sqrt(3) / 3] * 3, rel=1e-12)

    def test_warmup_sends_more_at_first(self):
        method = DGC(TopK(ratio=1 / DIM), warmup=(0.5, 0.25), warmup_steps=3)
        kept = [method.compressor_at(step).ratio for step in (0, 2, 3, 5, 6, 100)]
        assert kept == [0.5, 0.5, 0.25, 0.25, 1 / DIM, 1 / DIM]
        official = DGC(PerTensor(TopK(ratio=0.001)), warmup_stages=5, warmup_steps=1)
        ratios = [official.compressor_at(step).inner.ratio for step in range(6)]
        np.testing.assert_allclose(ratios, [0.316, 0.1, 0.0316, 0.01, 0.00316, 0.001], rtol=2e-3)


class TestConvergence:
    """To the known optimum, of ranks whose own optima lie apart."""

    @pytest.mark.parametrize("compressor", [TopK(1 / DIM), RandomBlock(1 / 8), SignNorm()], ids=str)
    @pytest.mark.parametrize("graph", [star(8), ring(8)], ids=lambda g: g.name)
    def test_error_feedback_finds_it(self, compressor, graph):
        x = train(EFSGD(compressor), graph, 600, lr=0.01).x
        assert np.abs(x - centers(8).mean(axis=0)).max() < 0.06

    def test_global_momentum_is_nearer_than_that_of_each_rank(self):
        """With 1 of 24 entries sent and a momentum of 0.9, as the paper claims for ranks that differ."""
        distances = {
            method.name: np.linalg.norm(train(method, star(8), 600, lr=0.01).x[0] - centers(8).mean(axis=0))
            for method in (GMC(TopK(1 / DIM)), DGC(TopK(1 / DIM)), EFSGD(TopK(1 / DIM), momentum=0.9))
        }
        assert distances["GMC"] < 0.8 * min(distances["DGC"], distances["EFSGD"]), distances


class TestTraffic:
    STEPS = 7

    def test_relay(self):
        one = 8 + 2  # a float64 value and a 16-bit index: shorter than a code
        assert train(EFSGD(TopK(1 / DIM)), ring(5), self.STEPS).bytes_sent == [self.STEPS * 4 * one] * 5

    def test_star(self):
        one = 8 + 2
        hub, *workers = train(EFSGD(TopK(1 / DIM)), star(5), self.STEPS).bytes_sent
        assert workers == [self.STEPS * one] * 4
        # Two counts, and at most 5 values with a bitmap, to 4 workers: never a dense vector.
        assert hub <= self.STEPS * 4 * (2 * 4 + 5 * 8 + DIM // 8)

    @pytest.mark.parametrize("graph", [ring(5), star(5), ring(1)], ids=lambda g: f"{g.name}{g.size}")
    @pytest.mark.parametrize("compressor", [TopK(1 / DIM), RandomBlock(0.25)], ids=lambda c: type(c).__name__)
    def test_overlap_sends_as_much_a_step_and_nothing_in_the_first(self, graph, compressor):
        workers = slice(1, None) if graph.name == "star" else slice(None)  # a hub sends the zeros of a sum as a bitmap
        sent = train(EFSGD(compressor), graph, self.STEPS - 1).bytes_sent[workers]
        assert train(EFSGD(compressor, overlap=True), graph, self.STEPS).bytes_sent[workers] == sent
        assert sum(train(EFSGD(compressor, overlap=True), graph, 1).bytes_sent) == 0

    def test_ring_all_reduce_of_a_block(self):
        block = DIM // 4 * 8
        # Two and a half pieces of the block, padded to 2: 2 (n - 1) pieces a rank, which know nothing of the offset.
        assert train(GMC(RandomBlock(0.25)), ring(3), self.STEPS).bytes_sent == [self.STEPS * 2 * 2 * block // 3] * 3
        assert train(GMC(RandomBlock(0.25)), ring(5), self.STEPS).bytes_sent == [self.STEPS * 2 * 4 * 2 * 8] * 5

    def test_ring_all_reduce_of_a_block_of_each_tensor(self):
        compressor = PerTensor(RandomBlock(0.25))  # 3 entries of each of two tensors: as many as in one block
        assert train(GMC(compressor), ring(3), self.STEPS).bytes_sent == [self.STEPS * 2 * 2 * DIM // 4 * 8 // 3] * 3

    def test_star_of_a_block(self):
        block = 4 + 4 + DIM // 4 * 8  # its offset, its count, its values
        hub, *workers = train(GMC(RandomBlock(0.25)), star(5), self.STEPS).bytes_sent
        assert workers == [self.STEPS * block] * 4
        assert hub == self.STEPS * 4 * block


@pytest.mark.parametrize(
    ("method", "decay", "vectors"),
    [
        *((EFSGD(TOP), 0, 1), (EFSGD(TOP, momentum=0.9), 0, 2), (GMC(TOP), 0, 2), (DGC(TOP), 0, 3)),
        *((EFSGD(TOP, error_average=0.8), 0, 2), (GMC(TOP, error_average=0.8), 0, 3)),
        *((EFSGD(TOP), 0.1, 1), (EFSGD(TOP, momentum=0.9), 0.1, 3), (GMC(TOP), 0.1, 2), (DGC(TOP), 0.1, 4)),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_memory(method, decay, vectors):
    (state, *_) = train(method, ring(5), 1, weight_decay=decay).states
    memory = getattr(state, "feedback", None)
    held = [*flatten(state).values(), getattr(state, "scratch", None), getattr(memory, "previous", None)]
    assert [len(leaf) for leaf in held if isinstance(leaf, torch.Tensor)] == [DIM] * vectors


def test_a_state_from_before_the_rates_is_refused():
    (state,) = train(EFSGD(TOP), ring(1), 2).states
    old = {path: leaf for path, leaf in flatten(state).items() if not path.startswith("rates/")}
    with pytest.raises(CheckpointError, match=r"missing \['rates/0', 'rates/1'\]"):
        restore_(train(EFSGD(TOP), ring(1), 1).states[0], old)


def test_other_groups_than_at_the_start_are_refused():
    def serve(world):
        local = Quadratic(torch.zeros(DIM, dtype=torch.float64), torch.zeros(DIM, dtype=torch.float64))
        exchange, method = world.exchange(ring(1)), EFSGD(TOP)
        state = method.init(local, exchange)
        state.rates.append(0.1)
        with pytest.raises(ConfigError, match="groups are now 2 parts of the model, and were 3"):
            one_step(method, local, state, exchange)

    loopback.run(1, serve)


def test_overlap_keeps_a_message():
    for method, nbytes in ((EFSGD(TOP, overlap=True), KEPT * 8), (GMC(overlap=True), DIM * 8)):
        (state, *_) = train(method, ring(3), 2).states
        assert state.delayed.dtype == torch.uint8
        assert nbytes <= len(state.delayed) <= nbytes + 2 * KEPT


class TestBadInput:
    @pytest.mark.parametrize("graph", [torus(8), chain(4), complete(4), OnePeerExponential(4)], ids=lambda g: g.name)
    def test_another_graph(self, graph):
        with pytest.raises(TopologyError, match=r"Use topology\.kind = 'ring' or 'star'"):
            EFSGD(TOP).check(graph)

    @pytest.mark.parametrize("method", [EFSGD, GMC, DGC])
    def test_error_feedback_twice(self, method):
        with pytest.raises(ConfigError, match="twice"):
            method(ErrorFeedback(TOP))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"momentum": 1.0}, r"algorithm\.momentum"),
            ({"weights": "mass"}, r"algorithm\.weights = 'mass'"),
            ({"volumes": (3, 0), "weights": "volume"}, "rank 1 has 0 samples"),
            ({"clip": "hard"}, r"algorithm\.clip"),
            ({"clip_norm": 0.0}, r"algorithm\.clip_norm"),
            ({"warmup": (0.5,)}, r"algorithm\.warmup_steps = 0"),
            ({"warmup": (1.5,), "warmup_steps": 2}, r"algorithm\.warmup: 1\.5"),
            ({"warmup": (0.5,), "warmup_stages": 2, "warmup_steps": 2}, "leave out"),
            ({"warmup_stages": -1}, "at least 0"),
            ({"clip": "rms", "overlap": True}, r"algorithm\.clip = 'norm', or no overlap"),
        ],
        ids=str,
    )
    def test_parameters(self, arguments, message):
        with pytest.raises(ConfigError, match=message):
            DGC(TOP, **arguments)

    @pytest.mark.parametrize("method", [EFSGD, GMC])
    @pytest.mark.parametrize(
        "arguments", [{"error_average": 1.0}, {"error_average": -0.1}, {"error_reset_steps": -1}], ids=str
    )
    def test_error_memory(self, method, arguments):
        ((key, value),) = arguments.items()
        with pytest.raises(ConfigError, match=rf"algorithm\.{key} = {value} must be"):
            method(TOP, **arguments)

    def test_detachment(self):
        with pytest.raises(ConfigError, match=r"algorithm\.detachment"):
            GMC(detachment=2.0)

    def test_a_warmup_needs_a_ratio(self):
        with pytest.raises(ConfigError, match="keeps no fraction"):
            DGC(SignNorm(), warmup=(0.5,), warmup_steps=2)

    def test_a_warmup_gives_all_ranks_one_ratio(self):
        with pytest.raises(ConfigError, match=r"compression\.allocation = 'uniform', or leave out the warm-up"):
            DGC(ByRank((TopK(0.1), TopK(0.2))), warmup=(0.5,), warmup_steps=2)

    def test_volumes_of_another_number_of_ranks(self):
        with pytest.raises(ConfigError, match="each of 3 ranks"):
            train(EFSGD(TOP, "volume", (1, 2)), ring(3), 1)

    @pytest.mark.parametrize("method", [GMC(), DGC(), EFSGD(momentum=0.9)], ids=lambda m: m.name)
    def test_momentum_twice(self, method):
        with pytest.raises(ConfigError, match=r"optimizer\.momentum = 0\.9"):
            train(method, ring(3), 1, momentum=0.9)
        train(Choco(0.1), ring(3), 1, momentum=0.9)
