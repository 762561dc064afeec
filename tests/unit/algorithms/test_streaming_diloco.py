"""Streaming DiLoCo: a transcription in NumPy, DiLoCo as its limit, the cut into fragments, traffic, bad input."""

import itertools

import numpy as np
import pytest
import torch
from support.quadratic import DIM, Quadratic, centers, curvature, train
from support.steps import one_step

from mpicomp.algorithms import DiLoCo, StreamingDiLoCo
from mpicomp.algorithms.sums.streaming_diloco import fragments_of
from mpicomp.compression import Spec
from mpicomp.errors import ConfigError, TopologyError
from mpicomp.exchange import loopback
from mpicomp.topology import ring, star, torus

LR = 0.1
SHAPES = (5,), (2, 3), (1,), (12,)
PARTS = [slice(0, 11), slice(11, 12), slice(12, 24)]
"""The largest of three fragments has at least 12 entries."""

STEPS = 30


def transcribed(size, offsets, period, delay, alpha, beta, nesterov):
    """Return the models, the slow model and its momentum; fragment p is sent after its step ``offsets[p]`` of a period.

    The gradient of a fragment does not depend on the others here, but when it is sent and arrives does.
    """
    theta, phi, v, sent = np.zeros((size, DIM)), np.zeros(DIM), np.zeros(DIM), {}
    for step in range(1, STEPS + 1):
        theta = theta - LR * curvature() * (theta - centers(size))
        for part, offset in zip(PARTS, offsets, strict=True):
            if step % period == offset % period:
                sent[step + delay] = part, (phi - theta)[:, part]
        if step in sent:
            part, d = sent[step]
            mean = d.mean(axis=0)
            v[part] = beta * v[part] + mean
            phi[part] -= 0.7 * (mean + beta * v[part] if nesterov else v[part])
            theta[:, part] = alpha * theta[:, part] + (1 - alpha) * phi[part]
    return theta, phi, v


class TestTranscription:
    @pytest.mark.parametrize("nesterov", [True, False])
    @pytest.mark.parametrize("beta", [0.0, 0.9])
    @pytest.mark.parametrize(
        ("offsets", "period", "delay"),
        [
            ((2, 4, 7), 7, 0),
            ((2, 4, 7), 7, 1),
            ((2, 4, 7), 7, 4),  # two under way at a time, of pieces that differ by one entry, or none of the shortest
            ((2, 4, 7), 7, 6),
            ((1, 2, 3), 3, 2),
            ((3, 6, 10), 10, 3),
        ],
    )
    @pytest.mark.parametrize("graph", [ring(5), star(4), ring(2), ring(1)], ids=str)
    def test_fragments_that_travel_behind_the_steps(self, graph, offsets, period, delay, beta, nesterov):
        theta, phi, v = transcribed(graph.size, offsets, period, delay, 0.5, beta, nesterov)
        method = StreamingDiLoCo(period, 3, delay, 0.5, outer_momentum=beta, nesterov=nesterov)
        trained = train(method, graph, STEPS, shapes=SHAPES)
        np.testing.assert_allclose(trained.x, theta, rtol=0, atol=1e-12)
        for state in trained.states:
            np.testing.assert_allclose(state.phi, phi, rtol=0, atol=1e-12)
            assert (state.v is None) == (beta == 0)
            if state.v is not None:
                np.testing.assert_allclose(state.v, v, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("alpha", [0.0, 0.25, 0.9])
    def test_local_weight_is_that_of_the_own_model(self, alpha):
        theta, _, _ = transcribed(3, (2, 4, 7), 7, 2, alpha, 0.9, True)
        trained = train(StreamingDiLoCo(7, 3, 2, alpha), ring(3), STEPS, shapes=SHAPES)
        np.testing.assert_allclose(trained.x, theta, rtol=0, atol=1e-12)


class TestIdentities:
    @pytest.mark.parametrize("nesterov", [True, False])
    @pytest.mark.parametrize("graph", [ring(1), ring(2), star(2), ring(5), star(4)], ids=str)
    def test_one_fragment_that_is_waited_for_is_diloco(self, graph, nesterov):
        """Sums of two numbers have the same bits in any order; those of more agree to rounding."""
        streaming = train(StreamingDiLoCo(3, 1, 0, 0.0, nesterov=nesterov), graph, STEPS, momentum=0.9)
        whole = train(DiLoCo(3, nesterov=nesterov), graph, STEPS, momentum=0.9)
        for found, expected in zip(streaming.states, whole.states, strict=True):
            np.testing.assert_allclose(found.phi, expected.phi, rtol=0, atol=1e-13)
        if graph.size <= 2:
            np.testing.assert_array_equal(streaming.x, whole.x)

    def test_the_mean_of_the_ranks_reaches_the_common_optimum(self):
        rates = [LR] * 200 + [LR * 0.97**step for step in range(400)]
        trained = train(StreamingDiLoCo(8, 3, 5), ring(6), len(rates), lr=rates, shapes=SHAPES)
        np.testing.assert_allclose(trained.x, np.tile(centers(6).mean(axis=0), (6, 1)), rtol=0, atol=1e-3)


class TestFragments:
    def test_the_largest_is_as_small_as_it_can_be(self):
        draw = np.random.default_rng(5)
        for _ in range(100):
            sizes = draw.integers(1, 40, draw.integers(1, 8)).tolist()
            spec = Spec(tuple(map(str, range(len(sizes)))), tuple((size,) for size in sizes))
            bounds = [0, *itertools.accumulate(sizes)]
            for count in range(1, len(sizes) + 1):
                parts = fragments_of(spec, count)
                ends = [part.stop for part in parts]
                assert len(parts) == count and set(ends) <= set(bounds) and ends[-1] == spec.numel
                assert [part.start for part in parts] == [0, *ends[:-1]] and sorted(set(ends)) == ends
                cuts = itertools.combinations(bounds[1:-1], count - 1)
                best = min(int(np.diff([0, *inner, spec.numel]).max()) for inner in cuts)
                assert max(part.stop - part.start for part in parts) == best

    def test_those_of_the_tests(self):
        assert fragments_of(Spec(tuple("abcd"), SHAPES), 3) == PARTS

    @pytest.mark.parametrize("count", [2, 40])
    def test_tensors_without_entries(self, count):
        parts = fragments_of(Spec(tuple(map(str, range(40))), ((0,),) * 39 + ((7,),)), count)
        assert len(parts) == count and parts[-1].stop == 7


def bytes_by_step(method, graph, steps, shapes):
    """Return what each step sends, of the last rank."""

    def serve(world):
        x = torch.zeros(DIM, dtype=torch.float64)
        local = Quadratic(x, torch.as_tensor(centers(world.size)[world.rank]), shapes=shapes)
        exchange = world.exchange(graph)
        state, sent = method.init(local, exchange), [0]
        for _ in range(steps):
            one_step(method, local, state, exchange)
            sent.append(exchange.bytes_sent)
        return np.diff(sent).tolist()

    return loopback.run(graph.size, serve)[-1]


class TestTraffic:
    @pytest.mark.parametrize(("period", "delay"), [(7, 0), (7, 1), (7, 4), (10, 3), (3, 2)])
    def test_a_step_sends_no_more_than_the_largest_fragment_and_a_period_the_model(self, period, delay):
        sent = bytes_by_step(StreamingDiLoCo(period, 3, delay), star(3), 4 * period, SHAPES)
        assert max(sent) <= 12 * 8
        assert sum(sent[2 * period : 3 * period]) == DIM * 8
        assert max(bytes_by_step(DiLoCo(period), star(3), period, SHAPES)) > DIM * 8

    def test_what_is_sent_can_be_the_same_in_every_step(self):
        sent = bytes_by_step(StreamingDiLoCo(6, 2, 3), star(3), 20, ((12,), (3, 4)))
        assert sent == [0] * 3 + [4 * 8] * 17

    def test_a_ring_sends_its_pieces_twice_but_for_one(self):
        sent = bytes_by_step(StreamingDiLoCo(6, 2, 1), ring(4), 12, ((12,), (3, 4)))
        assert sent == [0] * 3 + [2 * 3 * 12 * 8 // 4, 0, 0] * 3


@pytest.mark.parametrize(
    ("method", "under_way"),
    [
        (StreamingDiLoCo(7, 3, 0), 1),
        (StreamingDiLoCo(7, 3, 2), 1),
        (StreamingDiLoCo(7, 3, 4), 2),
        (StreamingDiLoCo(7, 3, 6), 3),
    ],
)
def test_memory(method, under_way):
    (state,) = train(method, ring(1), 8, shapes=SHAPES).states
    assert (state.phi.shape, state.v.shape, state.d.shape) == ((DIM,), (DIM,), (under_way, 12))


class TestBadInput:
    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ({"period": 0}, r"algorithm\.period = 0 must be at least 1"),
            ({"fragments": 0}, r"algorithm\.fragments = 0 must be at least 1 and at most algorithm\.period = 50"),
            ({"period": 3}, r"algorithm\.fragments = 4 must be at least 1 and at most algorithm\.period = 3"),
            ({"period": 5, "delay": 5}, r"algorithm\.delay = 5 must be at least 0 and less than .*period = 5"),
            ({"delay": -1}, r"algorithm\.delay = -1 must be at least 0"),
            ({"local_weight": 1.0}, r"algorithm\.local_weight = 1\.0 must be in \[0, 1\)"),
            ({"outer_momentum": -0.1}, r"algorithm\.outer_momentum = -0\.1 must be in \[0, 1\)"),
            ({"outer_lr": 0.0}, r"algorithm\.outer_lr = 0\.0 must be a finite number > 0"),
        ],
        ids=str,
    )
    def test_numbers(self, wrong, message):
        with pytest.raises(ConfigError, match=message):
            StreamingDiLoCo(**wrong)

    def test_more_fragments_than_tensors(self):
        with pytest.raises(ConfigError, match=r"algorithm\.fragments = 5 must be at most 4, the tensors of the model"):
            train(StreamingDiLoCo(fragments=5), ring(2), 1, shapes=SHAPES)

    def test_it_needs_a_star_or_a_ring(self):
        with pytest.raises(TopologyError, match=r"Use topology\.kind = 'ring' or 'star'"):
            StreamingDiLoCo().check(torus(6))
