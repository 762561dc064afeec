"""SketchedAMSGrad and its count sketch against transcriptions in NumPy, torch's own AMSGrad, and identities."""

import numpy as np
import pytest
import torch
from support import small
from support.quadratic import DIM, Quadratic, centers, curvature, top_k, train
from support.steps import one_step

from mpicomp import kernels
from mpicomp.algorithms import SketchedAMSGrad
from mpicomp.algorithms.sums.count_sketch import CountSketch
from mpicomp.errors import ConfigError, DivergenceError, TopologyError
from mpicomp.exchange import loopback
from mpicomp.topology import ring, star, torus

LR = 0.05
NUMBERS = {"beta1": 0.8, "beta2": 0.97, "epsilon": 1e-3}
RATES = [0.1 / (1 + step) ** 0.5 for step in range(25)]

over_graphs = pytest.mark.parametrize("graph", [ring(5), ring(2), star(4), ring(1)], ids=lambda g: f"{g.name}{g.size}")


def close(a, b, tolerance=1e-12):
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)


def vector(n, seed=0):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Matrix:
    """A sketch as matrices of -1, 0 and 1, (rows, columns, n)."""

    def __init__(self, n, rows, columns, seed=0):
        sketch = CountSketch(torch.zeros(n, dtype=torch.float64), rows, columns, seed)
        self.s = np.stack([sketch.of(unit).numpy() for unit in torch.eye(n, dtype=torch.float64)], axis=2)

    def of(self, x):
        return self.s @ x

    def read(self, table):
        return np.median(np.einsum("rcn,rc->rn", self.s, table), axis=0)


class TestSketch:
    @pytest.mark.parametrize(("n", "columns"), [(24, 7), (100, 10), (1, 3), (13, 1), (200_000, 999)])
    def test_every_entry_has_one_bucket_in_each_row_and_buckets_are_of_equal_size(self, n, columns):
        x = vector(n)
        sketch = CountSketch(x, 3, columns, seed=1)
        places = (sketch._places.abs() - 1).long()
        for place in places:
            assert torch.equal(place.sort().values, torch.arange(n))
        close(sketch._places.sign().double().mean(), 0, 4 / (3 * n) ** 0.5)
        expected = torch.zeros(3, min(columns, n), dtype=torch.float64)
        for row, place, signs in zip(expected, places, sketch._places.sign(), strict=True):
            row.index_add_(0, place % min(columns, n), x * signs)
        close(sketch.of(x), expected, 1e-9)

    def test_it_is_linear(self):
        sketch, x, y = CountSketch(vector(500), 5, 40, seed=0), vector(500, 1), vector(500, 2)
        close(sketch.of(3 * x - y), 3 * sketch.of(x) - sketch.of(y), 1e-11)

    def test_large_entries_are_found(self):
        x = 0.01 * vector(5000)
        x[[7, 1234, 4321]] = torch.tensor([3.0, -2.0, 1.0], dtype=torch.float64)
        sketch = CountSketch(x, 5, 200, seed=0)
        found = sketch.read(sketch.of(x), torch.empty_like(x))
        assert set(found.abs().topk(3).indices.tolist()) == {7, 1234, 4321}
        close(found, x, 0.5)

    @pytest.mark.parametrize("columns", [64, 1000])
    def test_with_as_many_columns_as_entries_nothing_is_lost(self, columns):
        x = vector(64)
        sketch = CountSketch(x, 3, columns, seed=0)
        assert sketch.shape == (3, 64)
        assert torch.equal(sketch.read(sketch.of(x), torch.empty_like(x)), x)

    def test_estimates_have_no_bias_and_the_variance_of_the_definition(self):
        """Of one row, over seeds: (|x|^2 - x_i^2) / columns, a little less as buckets are of equal size."""
        x = vector(60)
        found = torch.stack(
            [(s := CountSketch(x, 1, 6, seed)).read(s.of(x), torch.empty_like(x)) for seed in range(4000)]
        )
        variance = (x.square().sum() - x.square()) * (10 - 1) / (60 - 1)
        close(found.mean(dim=0) - x, 0, 4.5 * float(variance.max() / 4000) ** 0.5)
        close(found.var(dim=0) / variance, 1, 0.15)

    def test_seeds_and_rows_differ(self):
        x = vector(50)
        tables = [CountSketch(x, 3, 10, seed).of(x) for seed in (0, 0, 1)]
        assert torch.equal(tables[0], tables[1]) and not torch.equal(tables[0], tables[2])
        assert not torch.equal(tables[0][0], tables[0][1])


@over_graphs
@pytest.mark.parametrize("bias_correction", [True, False])
def test_the_listing_of_the_paper(graph, bias_correction):
    """With momentum and error memory as vectors of each rank, and the sketch of their sum; at falling rates."""
    sketch = Matrix(DIM, 3, 8)
    x, v, largest = np.zeros(DIM), np.zeros(DIM), np.zeros(DIM)
    m, e = np.zeros((graph.size, DIM)), np.zeros((graph.size, DIM))
    before = 1.0
    for t, lr in enumerate(RATES, start=1):
        c1, c2 = (1 - 0.8**t, 1 - 0.97**t) if bias_correction else (1, 1)
        alpha = lr / c1
        g = curvature() * (x - centers(graph.size))
        h = sketch.read(np.mean([sketch.of(row) for row in g], axis=0))
        m = 0.8 * m + 0.2 * g
        v = 0.97 * v + 0.03 * h * h
        largest = np.maximum(largest, v)
        p = m + before / alpha * e
        read = sketch.read(np.mean([sketch.of(row) for row in p], axis=0))
        d = top_k((read / (np.sqrt(largest / c2) + 1e-3))[None], 6)[0]
        e = p - np.where(d != 0, read, 0)
        x = x * (1 - lr * 0.1) - alpha * d
        before = alpha
    method = SketchedAMSGrad(8, 6, rows=3, bias_correction=bias_correction, **NUMBERS)
    trained = train(method, graph, len(RATES), lr=RATES, weight_decay=0.1)
    close(trained.x, np.tile(x, (graph.size, 1)), 1e-10)
    assert all(np.array_equal(own, trained.x[0]) for own in trained.x)
    for state in trained.states:
        close(state.error, sketch.of(before * e.mean(axis=0)), 1e-10)
        close(state.largest, largest, 1e-10)


@over_graphs
@pytest.mark.parametrize("rows", [1, 3])
def test_without_loss_it_is_amsgrad_of_torch_on_the_mean_gradient(graph, rows):
    x = torch.nn.Parameter(torch.zeros(DIM, dtype=torch.float64))
    optimizer = torch.optim.AdamW([x], lr=LR, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1, amsgrad=True)
    for _ in range(25):
        x.grad = torch.as_tensor(curvature()) * (x.detach() - torch.as_tensor(centers(graph.size).mean(axis=0)))
        optimizer.step()
    method = SketchedAMSGrad(columns=DIM, k=DIM, rows=rows, beta2=0.99, epsilon=1e-6)
    trained = train(method, graph, 25, lr=LR, weight_decay=0.1)
    close(trained.x, np.tile(x.detach().numpy(), (graph.size, 1)), 1e-11)
    close(trained.states[0].error, 0, 1e-14)


def test_what_was_applied_and_what_is_left_are_all_that_came_in(monkeypatch):
    """Of sketches: all ``alpha_t M`` are the applied p, read where the model moved, and E."""
    method, came_in, applied = SketchedAMSGrad(8, 3, rows=3, **NUMBERS), 0, 0
    sketched, made = CountSketch.of, []
    monkeypatch.setattr(CountSketch, "of", lambda self, x: made.append(x.clone()) or sketched(self, x))

    def serve(world):
        nonlocal came_in, applied
        local = Quadratic(torch.zeros(DIM, dtype=torch.float64), torch.as_tensor(centers(1)[0]), LR)
        exchange = world.exchange(ring(1))
        state = method.init(local, exchange)
        for t in range(1, 21):
            made.clear()
            one_step(method, local, state, exchange)
            gradient, moved = made
            assert (moved != 0).sum() == 3 and (gradient != 0).all()
            came_in += state.momentum * LR / (1 - 0.8**t)
            applied += moved
        return state

    (state,) = loopback.run(1, serve)
    left = came_in - sketched(state.sketch, applied)
    assert left.abs().max() > 1e-3
    close(state.error, left)


def test_groups_with_rates_of_their_own():
    """A tenth of the rate is a tenth of the move."""

    class Grouped(Quadratic):
        groups = None

    def trained(factor):
        def serve(world):
            local = Grouped(torch.zeros(DIM, dtype=torch.float64), torch.as_tensor(centers(2)[world.rank]), LR)
            local.groups = [(slice(0, 7), {"lr": factor * LR}), (slice(7, DIM), {"lr": LR})]
            exchange, method = world.exchange(ring(2)), SketchedAMSGrad(8, 8, rows=3)
            one_step(method, local, method.init(local, exchange), exchange)
            return local.x.numpy()

        return loopback.run(2, serve)[0]

    plain, tenth, frozen = map(trained, (1.0, 0.1, 0.0))
    assert np.abs(plain[:7]).max() > 0
    close(tenth, np.concatenate([0.1 * plain[:7], plain[7:]]), 1e-15)
    assert not frozen[:7].any()


def test_it_comes_near_the_optimum_of_the_mean():
    optimum = centers(4).mean(axis=0)
    rates = [0.1 / (1 + step / 50) for step in range(500)]
    trained = train(SketchedAMSGrad(12, 3, epsilon=0.1), ring(4), 500, lr=rates)
    assert np.abs(trained.x - optimum).max() < 0.1 < np.abs(optimum).max()


@pytest.mark.parametrize(("graph", "each"), [(ring(4), 2 * 3 * 6), (star(4), 24)], ids=["ring", "star"])
def test_bytes_are_those_of_a_dense_sum_of_a_table(graph, each):
    """Of 3 x 8 numbers, on a ring in four pieces."""
    sent = train(SketchedAMSGrad(8, 6, rows=3), graph, 5).bytes_sent
    assert sent[1:] == [5 * 8 * each] * 3


def test_restart_on_a_star_is_exact():
    small.assert_restart_is_exact(SketchedAMSGrad(30, 5), star, store_after=4, steps=8)


def test_the_bits_of_the_definitions(monkeypatch):
    x = vector(3000).float()
    fast = CountSketch(x, 3, 70, seed=2)
    table = fast.of(x)
    monkeypatch.setattr(kernels, "compiled", lambda device: None)
    plain = CountSketch(x, 3, 70, seed=2)
    assert torch.equal(fast._places, plain._places)
    assert torch.equal(table, plain.of(x))


def test_a_nan_is_an_error_on_every_rank():
    def serve(world):
        center = torch.as_tensor(centers(2)[world.rank])
        if world.rank == 1:
            center[3] = torch.nan
        local = Quadratic(torch.zeros(DIM, dtype=torch.float64), center)
        exchange, method = world.exchange(ring(2)), SketchedAMSGrad(8, 6)
        with pytest.raises(DivergenceError, match="NaN"):
            one_step(method, local, method.init(local, exchange), exchange)

    loopback.run(2, serve)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SketchedAMSGrad(8, 0), "algorithm.k = 0 must be at least 1 and at most algorithm.columns = 8"),
        (lambda: SketchedAMSGrad(8, 9), "algorithm.k = 9 must be at least 1 and at most algorithm.columns = 8"),
        (lambda: SketchedAMSGrad(1, 1, rows=4), "algorithm.rows = 4 must be an odd number"),
        (lambda: SketchedAMSGrad(1, 1, rows=-1), "algorithm.rows = -1 must be an odd number"),
        (lambda: SketchedAMSGrad(1, 1, beta1=1.0), r"algorithm.beta1 = 1.0 must be in \[0, 1\)"),
        (lambda: train(SketchedAMSGrad(8, 6), ring(2), 1, momentum=0.9), r"optimizer.momentum = 0.9"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_other_graphs_are_refused():
    with pytest.raises(TopologyError, match="'ring' or 'star'"):
        SketchedAMSGrad(8, 6).check(torus(6))
