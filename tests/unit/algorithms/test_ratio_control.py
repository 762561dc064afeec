"""GraVAC's control of the ratio: a transcription in NumPy, identities, bytes, and bad input."""

import numpy as np
import pytest
import torch
from support.quadratic import DIM, centers, curvature, top_k, train

from mpicomp.algorithms import EFSGD, GMC
from mpicomp.algorithms.sums.ratio_control import RatioControl
from mpicomp.compression import ByRank, PerTensor, RandomBlock, RandomK, SampledTopK, SignNorm, Spec, TopK
from mpicomp.errors import ConfigError
from mpicomp.topology import ring, star

LR = 0.1
STEPS = 60
CONTROL = {"smallest_ratio": 0.125, "ratio_period": 6, "gain_window": 3, "least_gain": 0.75}


def run(method, graph):
    """The model after training, and the ratios at the end."""
    trained = train(method, graph, STEPS)
    return trained.x, [method.control.ratio(state.feedback.ratio.level) for state in trained.states]


@pytest.mark.parametrize("graph", [ring(4), star(3), ring(1)], ids=lambda g: f"{g.name}{g.size}")
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("least_gain", [0.3, 0.75, 0.9])
def test_transcription(graph, overlap, least_gain):
    n, ratios, level = graph.size, [0.5, 0.25, 0.125], 0
    x, e, waiting, seen = np.zeros(DIM), np.zeros((n, DIM)), [], []
    had = carried = heard = 0
    gain = 1.0
    for _ in range(STEPS):
        p = e + curvature() * (np.tile(x, (n, 1)) - centers(n))
        for stage in ("receive", "send") if overlap else ("send", "receive"):
            if stage == "send":
                q = top_k(p, int(ratios[level] * DIM))
                e = p - q
                waiting.append((q, p))
                seen.append(level)
            elif waiting:
                q, p_of_q = waiting.pop()
                x = x - LR * q.mean(axis=0)
                had = 0.95 * had + np.linalg.norm(p_of_q, axis=1).mean()
                carried = 0.95 * carried + np.linalg.norm(q, axis=1).mean()
                heard += 1
                if heard % 3 == 0:
                    gain = carried / had
                    if gain < least_gain:
                        level = max(level - 1, 0)
                    elif heard % 6 == 0:
                        level = min(level + 1, 2)
                    had = carried = 0
    assert len(set(seen)) > 1
    method = EFSGD(TopK(0.5), overlap=overlap, **{**CONTROL, "least_gain": least_gain})
    trained = train(method, graph, STEPS)
    np.testing.assert_allclose(trained.x, np.tile(x, (n, 1)), rtol=0, atol=1e-12)
    found = [method.diagnostics(None, state) for state in trained.states]
    assert [numbers["ratio"] for numbers in found] == [ratios[level]] * n
    assert [numbers["gain"] for numbers in found] == pytest.approx([gain] * n)


@pytest.mark.parametrize("graph", [ring(4), star(4), star(3)], ids=lambda g: f"{g.name}{g.size}")
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(
    ("method", "compressor"),
    [
        (EFSGD, TopK(0.25)),
        (GMC, TopK(0.25, values="int8")),
        (EFSGD, RandomK(0.25, shared=False)),
        (GMC, SampledTopK(0.2)),
    ],
    ids=str,
)
def test_equal_bounds_are_a_fixed_ratio_bit_for_bit(graph, overlap, method, compressor):
    fixed = train(method(compressor, overlap=overlap, momentum=0.5), graph, 30)
    bounds = {"smallest_ratio": compressor.ratio, "ratio_period": 1, "gain_window": 1, "least_gain": 0.01}
    controlled = train(method(compressor, overlap=overlap, momentum=0.5, **bounds), graph, 30)
    assert (controlled.x == fixed.x).all()
    assert controlled.bytes_sent != fixed.bytes_sent


@pytest.mark.parametrize("compressor", [RandomBlock(0.25), PerTensor(RandomBlock(0.25))], ids=str)
def test_equal_bounds_in_an_all_reduce_are_a_fixed_ratio_to_rounding(compressor):
    """The pieces of the ring have other bounds, and so another order of summation."""
    bounds = {"smallest_ratio": 0.25, "ratio_period": 1, "gain_window": 1, "least_gain": 0.01}
    fixed, controlled = (train(EFSGD(compressor, **more), ring(4), 30) for more in ({}, bounds))
    np.testing.assert_allclose(controlled.x, fixed.x, rtol=0, atol=1e-12)
    assert all((controlled.x == controlled.x[0]).all(axis=1))


@pytest.mark.parametrize("overlap", [False, True])
def test_star_and_ring_agree_bit_for_bit(overlap):
    method = EFSGD(TopK(0.5), overlap=overlap, **CONTROL)
    (x, ratios), (y, others) = run(method, star(4)), run(method, ring(4))
    assert (x == y).all()
    assert ratios == others


@pytest.mark.parametrize("compressor", [TopK(0.5), PerTensor(TopK(0.5)), RandomBlock(0.5)], ids=str)
def test_a_small_least_gain_goes_down_to_the_smallest_ratio_and_a_large_one_stays(compressor):
    low, high = (EFSGD(compressor, **{**CONTROL, "least_gain": gain}) for gain in (0.01, 1.0))
    assert run(low, ring(3))[1] == [0.125] * 3
    assert run(high, ring(3))[1] == [0.5] * 3


def test_messages_are_as_long_as_the_ratio_says_and_two_numbers_more():
    """An entry of float64 takes 8 bytes and an index; the ratio halves after steps 6 and 12."""
    low = {**CONTROL, "least_gain": 0.01}
    for step, kept in ((6, 12), (7, 6), (13, 3)):
        before, after = (train(EFSGD(TopK(0.5), **low), ring(2), steps).bytes_sent[0] for steps in (step - 1, step))
        assert kept * 8 + 2 * 8 <= after - before <= kept * 10 + 2 * 8 + 8


def test_the_gain_is_in_the_metrics():
    method = EFSGD(TopK(0.5), **{**CONTROL, "least_gain": 0.01, "gain_window": 6})
    before, after = (method.diagnostics(None, train(method, ring(3), steps).states[0]) for steps in (5, 6))
    assert (before["ratio"], before["gain"]) == (0.5, 1.0)
    assert after["ratio"] == 0.25
    assert 0.5 < after["gain"] < 1


def test_memory_is_one_vector():
    (state,) = train(EFSGD(TopK(0.5), **CONTROL), ring(1), 1).states
    assert state.feedback.ratio.room.shape == (DIM + 2,)
    assert train(EFSGD(TopK(0.5)), ring(1), 1).states[0].feedback.ratio is None


@pytest.mark.parametrize(
    ("largest", "smallest", "factor", "ratios"),
    [
        (0.5, 0.5, 0.5, [0.5]),
        (0.5, 0.125, 0.5, [0.5, 0.25, 0.125]),
        (0.1, 0.03, 0.5, [0.1, 0.05, 0.03]),
        (1.0, 0.001, 0.1, [1.0, 0.1, 0.01, 0.001]),
        (0.3, 0.29, 0.1, [0.3, 0.29]),
    ],
)
def test_ratios_end_at_the_smallest(largest, smallest, factor, ratios):
    control = RatioControl(TopK(largest), smallest, factor, 2000, 0.75, 25)
    assert [control.ratio(level) for level in control.levels] == pytest.approx(ratios)
    assert control.ratio(control.levels[-1]) == smallest


@pytest.mark.parametrize("method", [EFSGD, GMC])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"smallest_ratio": 0.2}, r"algorithm\.smallest_ratio = 0\.2 must be .* at most compression\.ratio = 0\.1"),
        ({"smallest_ratio": -0.1}, r"algorithm\.smallest_ratio = -0\.1 must be > 0"),
        ({"smallest_ratio": float("nan")}, r"algorithm\.smallest_ratio = nan"),
        ({"ratio_factor": 1.0}, r"algorithm\.ratio_factor = 1\.0 must be in \(0, 1\)"),
        ({"least_gain": 0.0}, r"algorithm\.least_gain = 0\.0 must be in \(0, 1\]"),
        ({"gain_window": 0}, r"algorithm\.gain_window = 0 must be at least 1"),
        ({"ratio_period": 30}, r"algorithm\.ratio_period = 30 must be a multiple of algorithm\.gain_window = 25"),
        ({"ratio_period": 0}, r"algorithm\.ratio_period = 0 must be"),
        ({"compressor": SignNorm()}, "keeps no fraction of the entries"),
        ({"compressor": ByRank((TopK(0.1), TopK(0.2)))}, r"compression\.allocation = 'uniform'"),
    ],
    ids=str,
)
def test_bad_input(method, arguments, message):
    with pytest.raises(ConfigError, match=message):
        method(**{"compressor": TopK(0.1), "smallest_ratio": 0.01, **arguments})


def test_of_a_gradient_of_zero_all_is_carried():
    control = RatioControl(TopK(0.5), 0.1, 0.5, 1, 0.75, 1)
    state = control.init(Spec.flat(DIM), torch.device("cpu"))
    control.hear(torch.zeros(2), state)
    assert state.level == 1
    assert control.numbers(state) == {"ratio": 0.25, "gain": 1.0}
