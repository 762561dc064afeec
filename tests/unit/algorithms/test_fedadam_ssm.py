"""FedAdam-SSM against a transcription in NumPy, torch's own Adam, and bad input."""

import numpy as np
import pytest
import torch
from support import small
from support.quadratic import DIM, Quadratic, centers, curvature, top_k, train
from support.steps import one_step

from mpicomp.algorithms import FedAdamSSM
from mpicomp.compression import BlockTopK, ErrorFeedback, PerTensor, TopK
from mpicomp.errors import ConfigError, TopologyError
from mpicomp.exchange import loopback
from mpicomp.replica.consistency import EVERY_STEPS
from mpicomp.replica.distribute import distribute
from mpicomp.topology import ring, star, torus

KEPT = 6
TOP = TopK(ratio=KEPT / DIM)
LR = 0.05
NUMBERS = {"beta1": 0.8, "beta2": 0.97, "epsilon": 1e-3}


def close(a, b, tolerance=1e-12):
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)


@pytest.mark.parametrize("graph", [ring(5), ring(2), star(4), ring(1)], ids=lambda g: f"{g.name}{g.size}")
@pytest.mark.parametrize(
    ("period", "weighted", "bias_correction"), [(3, False, True), (1, False, False), (4, True, True)]
)
def test_the_listing(graph, period, weighted, bias_correction):
    volumes = tuple(range(1, graph.size + 1)) if weighted else (1,) * graph.size
    common = np.zeros((3, DIM))
    w, m, v = (np.zeros((graph.size, DIM)) for _ in range(3))
    for t in range(1, 15):
        g = curvature() * (w - centers(graph.size))
        m = 0.8 * m + 0.2 * g
        v = 0.97 * v + 0.03 * g * g
        c1, c2 = (1 - 0.8**t, 1 - 0.97**t) if bias_correction else (1, 1)
        w = (1 - LR * 0.1) * w - LR * (m / c1) / (np.sqrt(v / c2) + 1e-3)
        if t % period == 0:
            mask = top_k(w - common[0], KEPT) != 0
            moved = np.stack([np.where(mask, own - old, 0) for own, old in zip((w, m, v), common, strict=True)], axis=1)
            common = common + np.average(moved, axis=0, weights=volumes)
            w, m, v = (np.tile(part, (graph.size, 1)) for part in common)
    method = FedAdamSSM(
        TOP, "volume" if weighted else "equal", volumes, period, bias_correction=bias_correction, **NUMBERS
    )
    trained = train(method, graph, 14, lr=LR, weight_decay=0.1)
    close(trained.x, w)
    for state, own_m, own_v in zip(trained.states, m, v, strict=True):
        close(state.m, own_m)
        close(state.v, own_v)
        close(state.common.view(3, -1), common)


@pytest.mark.parametrize("compressor", [TopK(1.0), None], ids=["top", "identity"])
@pytest.mark.parametrize("period", [1, 3])
def test_with_all_entries_one_rank_is_torch_adam(compressor, period):
    x = torch.nn.Parameter(torch.zeros(DIM, dtype=torch.float64))
    optimizer = torch.optim.AdamW([x], lr=LR, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1)
    for _ in range(25):
        x.grad = torch.as_tensor(curvature()) * (x.detach() - torch.as_tensor(centers(1)[0]))
        optimizer.step()
    given = {} if compressor is None else {"compressor": compressor}
    method = FedAdamSSM(**given, period=period, beta2=0.99, epsilon=1e-6)
    close(train(method, ring(1), 25, lr=LR, weight_decay=0.1).x[0], x.detach().numpy())


def test_all_ranks_are_equal_after_an_exchange_and_between_them_they_are_not():
    trained = train(FedAdamSSM(TOP, period=3), ring(4), 6, lr=LR)
    assert all(np.array_equal(x, trained.x[0]) for x in trained.x)
    for state in trained.states:
        for name in ("m", "v", "common"):
            assert torch.equal(getattr(state, name), getattr(trained.states[0], name))
    x = train(FedAdamSSM(TOP, period=3), ring(4), 7, lr=LR).x
    assert not np.array_equal(x[0], x[1])


def test_second_moments_stay_above_zero_where_all_ranks_take_them_away():
    """Six sixths of a number, summed one by one, may be more than the number."""
    method = FedAdamSSM(period=1, beta2=0.0)

    def serve(world):
        local = Quadratic(torch.zeros(DIM), torch.zeros(DIM))
        exchange = world.exchange(ring(world.size))
        state = method.init(local, exchange)
        v = torch.rand(DIM, generator=torch.Generator().manual_seed(0))
        state.common[2 * DIM :] = v  # the next gradients are zero
        one_step(method, local, state, exchange)
        return v, state

    for v, state in loopback.run(6, serve):
        assert (state.v >= 0).all() and torch.equal(state.v, state.common[2 * DIM :])
        assert state.v.max() < 1e-6 < v.min()


def test_a_star_is_a_ring():
    on_star, on_ring = (train(FedAdamSSM(TOP, period=2), graph(4), 6, lr=LR) for graph in (star, ring))
    assert np.array_equal(on_star.x, on_ring.x)
    assert torch.equal(on_star.states[1].common, on_ring.states[1].common)


def test_one_list_of_indices_for_three_of_values():
    """On a ring of 3, in two of five steps: values of 8 bytes, and a count and a code of 3 bytes."""
    sent = train(FedAdamSSM(TOP, period=2), ring(3), 5, lr=LR).bytes_sent
    assert sent == [2 * 2 * (3 * 8 * KEPT + 4 + 3)] * 3


def test_restart_within_a_period_on_a_star_is_exact():
    small.assert_restart_is_exact(FedAdamSSM(TOP, period=4), star)


def test_a_skipped_step_neither_moves_nor_counts():
    """As with torch's Adam, which `GradScaler` does not call after an overflow."""
    skipped = {0, 1, 4, 7}

    def serve(world):
        x = torch.nn.Parameter(torch.linspace(-1, 1, 6, dtype=torch.float64))
        reference = torch.nn.Parameter(x.detach().clone())
        adam = torch.optim.AdamW([reference], lr=LR, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1)
        model = torch.nn.Module()
        model.x = x
        optimizer = torch.optim.SGD([x], lr=LR, weight_decay=0.1)
        gossip = distribute(model, optimizer, FedAdamSSM(period=3, beta2=0.99, epsilon=1e-6), ring, world=world)
        for step in range(12):
            before = x.detach().clone()
            x.grad = 2 * x.detach() + step
            gossip.optimizer.found_inf = torch.tensor(float(step in skipped))  # as `GradScaler.step` does
            gossip.optimizer.step()
            if step in skipped:
                assert torch.equal(x.detach(), before)
                continue
            reference.grad = 2 * reference.detach() + step
            adam.step()
        close(x.detach(), reference.detach())

    loopback.run(1, serve)


def test_a_rank_that_skips_takes_part_in_the_exchange():
    def serve(world):
        gossip, closure = small.make(world, FedAdamSSM(period=2), ring)
        for step in range(4):
            before = gossip.local.x.clone()
            gossip.optimizer.zero_grad()
            closure(step)().backward()
            gossip.step_with_gradients(is_skipped=world.rank == 0)
            assert torch.equal(gossip.local.x, before) == (world.rank == 0 and step % 2 == 0)
        return gossip.local.x.clone()

    models = loopback.run(3, serve)
    assert all(torch.equal(model, models[0]) for model in models)


def test_a_comparison_of_models_between_exchanges_does_not_stop_a_script():
    """The check every `EVERY_STEPS` steps comes where models differ, which is right for this method."""
    period = 7
    assert EVERY_STEPS % period

    def serve(world):
        gossip, closure = small.make(world, FedAdamSSM(TopK(0.2), period=period), ring)
        apart = []
        for step in range(EVERY_STEPS + 4):
            gossip.optimizer.zero_grad()
            closure(step)().backward()
            gossip.optimizer.step()
            if gossip.steps == EVERY_STEPS:
                apart.append(gossip.local.x.clone())
        return gossip.steps, apart[0]

    (steps, x), (_, other) = loopback.run(2, serve)
    assert steps == EVERY_STEPS + 4 and not torch.allclose(x, other)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FedAdamSSM(period=0), "algorithm.period = 0 must be at least 1"),
        (lambda: FedAdamSSM(beta2=1.0), r"algorithm.beta2 = 1.0 must be in \[0, 1\)"),
        (lambda: FedAdamSSM(ErrorFeedback(TOP)), "compression.error_feedback = true"),
        (lambda: FedAdamSSM(PerTensor(TOP)), "Use compression.kind = 'topk' with values = 'full'"),
        (lambda: FedAdamSSM(BlockTopK(0.2)), "Use compression.kind = 'topk' with values = 'full'"),
        (lambda: FedAdamSSM(TopK(0.2, values="int8")), "Use compression.kind = 'topk' with values = 'full'"),
        (lambda: train(FedAdamSSM(TOP), ring(2), 1, momentum=0.9), r"optimizer.momentum = 0.9"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_other_graphs_are_refused():
    with pytest.raises(TopologyError, match="'ring' or 'star'"):
        FedAdamSSM().check(torus(6))
