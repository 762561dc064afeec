"""Ratios and thresholds from volumes: by hand, the figures of the docstring, properties, and what is refused."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpicomp.compression import (
    QSGD,
    BlockTopK,
    ByRank,
    ErrorFeedback,
    HardThreshold,
    Identity,
    PerTensor,
    TopK,
    allocate,
)
from mpicomp.compression.wrap.allocation import bandwidth_ratios, dagc_ratios, dagc_thresholds, summary
from mpicomp.errors import ConfigError

volume_lists = st.lists(st.integers(1, 10**6), min_size=1, max_size=12)


def psi(volumes, ratios):
    """The criterion ``sum_i p_i / sqrt(delta_i)``."""
    return (np.array(volumes) / np.sum(volumes) / np.sqrt(ratios)).sum()


def two_thirds(volumes):
    """The ratios of the smallest psi, which sum to one."""
    a = np.array(volumes) ** (2 / 3)
    return a / a.sum()


def log_spaced(skew):
    """Ten volumes as the authors' code makes them: the last one twice."""
    return [*np.logspace(math.log10(skew), 0, 9).tolist(), 1.0]


def test_dagc_ratios_by_hand():
    # a = 4, 1, 9, 1 and S = 15. Candidates: a 1 gives 15 + 14 * 15 = 225, the 8 gives 8 * 12 + 11 * 12 = 228, the 27
    # gives 27 * 7 + 6 * 7 = 231. So a 1 is pinned, and all are 4 * 0.1 * a / 15.
    expected = [0.4 * a / 15 for a in (4, 1, 9, 1)]
    assert dagc_ratios([8, 1, 27, 1], 0.1) == pytest.approx(expected, rel=1e-12)


def test_the_largest_rank_may_be_pinned_to_the_smallest_ratio():
    # a = 9, 1, 1. A 1 gives 11 + 10 * 11 = 121, the 27 gives 27 * 3 + 2 * 3 = 87: d = 1 / (1 + 2) for all.
    assert dagc_ratios([27, 1, 1], 0.1) == pytest.approx([0.1] * 3, rel=1e-12)


def test_dagc_thresholds_by_hand():
    # a = 4, 1, 1 of mean 2
    assert dagc_thresholds([8, 1, 1], 0.3) == pytest.approx([0.15, 0.6, 0.6], rel=1e-12)


@pytest.mark.parametrize(
    ("volumes", "mean", "ratios", "thresholds"),
    [
        (
            [50, 20, 9, 4, 2],
            0.05,
            [0.1119565973, 0.06077939203, 0.03569149126, 0.02078625968, 0.02078625968],
            [0.02164305357, 0.03986684554, 0.06788964395, 0.1165713635, 0.1850455051],
        ),
        (
            [1000, 500, 500, 100, 100, 30],
            0.02,
            [0.04129030188, 0.02601126025, 0.02601126025, 0.008895725874, 0.008895725874, 0.008895725874],
            [0.009291189755, 0.01474884439, 0.01474884439, 0.04312588262, 0.04312588262, 0.09623295608],
        ),
    ],
)
def test_both_rules_give_what_the_authors_code_gives(volumes, mean, ratios, thresholds):
    """Recorded from DAGC_R and DAGC_A of MFL/algo.py, Jiang-Yutong/DAGC, commit 7075492, with volumes in this order."""
    assert dagc_ratios(volumes, mean) == pytest.approx(ratios, rel=1e-9)
    assert dagc_thresholds(volumes, mean) == pytest.approx(thresholds, rel=1e-9)


@pytest.mark.parametrize(("skew", "dagc", "smallest"), [(10, 2.901, 2.877), (100, 2.389, 2.374)])
def test_the_criterion_of_the_rules(skew, dagc, smallest):
    """The table of the module, and that the criterion prefers DAGC to uniform ratios where the authors' does not."""
    volumes = log_spaced(skew)
    rules = dagc_ratios(volumes, 0.1), [0.1] * 10, two_thirds(volumes)
    assert [psi(volumes, ratios) for ratios in rules] == pytest.approx([dagc, 10**0.5, smallest], abs=5e-4)
    authors = [psi(volumes, ratios) / math.sqrt(min(ratios)) for ratios in rules[:2]]
    assert authors == pytest.approx([{10: 13.63, 100: 19.31}[skew], 10.0], abs=0.005)


@given(volumes=st.lists(st.integers(1, 10**6), min_size=2, max_size=8), seed=st.integers(0, 2**32))
def test_no_ratios_of_that_sum_have_a_smaller_criterion_than_the_power_two_thirds(volumes, seed):
    best, n = two_thirds(volumes), len(volumes)
    others = [np.full(n, 1 / n), *np.random.default_rng(seed).dirichlet(np.ones(n), 5)]
    for other in [*others, *(0.9 * best + 0.1 * other for other in others)]:
        assert psi(volumes, best) <= psi(volumes, np.maximum(other, 1e-12)) * (1 + 1e-9)


@given(volumes=volume_lists, mean=st.floats(0.001, 1.0))
def test_the_budget_is_met_or_what_is_above_one_is_cut(volumes, mean):
    ratios = dagc_ratios(volumes, mean)
    assert len(ratios) == len(volumes)
    assert all(0 < ratio <= 1 for ratio in ratios)
    if max(ratios) < 1:
        assert math.fsum(ratios) == pytest.approx(len(volumes) * mean, rel=1e-9)
    else:
        assert math.fsum(ratios) <= len(volumes) * mean * (1 + 1e-9)


@pytest.mark.parametrize("rule", [dagc_ratios, dagc_thresholds])
@given(n=st.integers(1, 70), volume=st.integers(1, 10**6), mean=st.floats(0.001, 1.0))
def test_equal_volumes_get_the_mean(rule, n, volume, mean):
    assert rule([volume] * n, mean) == pytest.approx([mean] * n, rel=1e-9)


@pytest.mark.parametrize("rule", [dagc_ratios, dagc_thresholds])
@given(volumes=st.lists(st.integers(1, 10**6), min_size=1, max_size=9, unique=True), data=st.data())
def test_the_order_of_ranks_does_not_matter(rule, volumes, data):
    order = data.draw(st.permutations(range(len(volumes))))
    expected = rule(volumes, 0.05)
    found = rule([volumes[i] for i in order], 0.05)
    assert found == pytest.approx([expected[i] for i in order], rel=1e-9)


@given(volumes=st.lists(st.integers(1, 10**6), min_size=2, max_size=12))
def test_all_but_one_rank_follow_the_power_two_thirds(volumes):
    ratios = dagc_ratios(volumes, 0.5 / len(volumes))
    scales = sorted(ratio / volume ** (2 / 3) for ratio, volume in zip(ratios, volumes, strict=True))
    # the one that is pinned gets less than its volume asks for, or more if it has the smallest
    others = min(scales[1:], scales[:-1], key=lambda kept: kept[-1] / kept[0])
    assert others == pytest.approx([others[0]] * len(others), rel=1e-9)
    assert sorted(ratios)[:2] == pytest.approx([min(ratios)] * 2, rel=1e-9)


@given(volumes=volume_lists, mean=st.floats(1e-6, 1e3))
def test_thresholds_have_the_harmonic_mean_and_follow_the_power(volumes, mean):
    thresholds = dagc_thresholds(volumes, mean)
    assert len(volumes) / math.fsum(1 / each for each in thresholds) == pytest.approx(mean, rel=1e-9)
    products = [each * volume ** (2 / 3) for each, volume in zip(thresholds, volumes, strict=True)]
    assert products == pytest.approx([products[0]] * len(products), rel=1e-9)


def test_what_is_above_one_goes_to_nobody():
    volumes = [64, 27, 8, 1]
    assert dagc_ratios(volumes, 0.6)[0] == 1.0
    assert sum(dagc_ratios(volumes, 0.6)) < 4 * 0.6 - 0.1


def test_bandwidth_ratios_by_hand():
    assert bandwidth_ratios([2e6, 1e6, 4e6, 30e6], 0.05) == pytest.approx([0.1, 0.05, 0.2, 1.0], rel=1e-12)
    dagc = dagc_ratios([1, 1, 8, 8], 0.05)
    assert dagc[0] < 0.05 < dagc[2]
    both = allocate(TopK(0.05), [1, 1, 8, 8], "dagc_bandwidth", [2e6, 1e6, 1e6, 30e6])
    assert both == ByRank(tuple(map(TopK, (dagc[0], dagc[1], 0.05, dagc[3]))))


@pytest.mark.parametrize(
    ("compressor", "rule", "bandwidths", "message"),
    [
        (TopK(0.1), "bandwidth", [1.0, 0.0], "compression.bandwidths: that of rank 1 is 0.0, and must be a finite"),
        (TopK(0.1), "bandwidth", [math.nan, 1.0], "compression.bandwidths: that of rank 0 is nan"),
        (TopK(0.1), "bandwidth", [], "compression.bandwidths: give the bandwidth of each rank; none is given"),
        (TopK(0.1), "dagc_bandwidth", [1.0], "compression.bandwidths has 1 entries for 2 ranks"),
        (HardThreshold(0.1), "bandwidth", [1, 2], "allocation = 'bandwidth' gives each rank a ratio of its own"),
    ],
)
def test_bandwidths_that_give_no_ratios_are_refused(compressor, rule, bandwidths, message):
    with pytest.raises(ConfigError, match=message):
        allocate(compressor, [1, 2], rule, bandwidths)


def test_a_share_below_one_entry_is_one_entry():
    from mpicomp.compression import Spec

    (large, small) = allocate(TopK(0.001), [1, 1]), allocate(TopK(0.001), [10**6, 1, 1, 1]).compressors[3]
    assert small.ratio * 100 < 1
    assert small.layout(Spec.flat(100)).fields[0].numel == 1
    assert large.layout(Spec.flat(100)) == TopK(0.001).layout(Spec.flat(100))


@pytest.mark.parametrize("rule", [dagc_ratios, dagc_thresholds])
@pytest.mark.parametrize(
    ("volumes", "message"),
    [
        ([5, 5, 0], "rank 2 has 0 samples, and so no part of the budget: give it some"),
        ([5, -1], "rank 1 has -1 samples"),
        ([math.nan], "rank 0 has nan samples"),
        ([], "none is given"),
    ],
)
def test_ranks_without_samples_are_named(rule, volumes, message):
    with pytest.raises(ConfigError, match=f"compression.allocation: .*{message}"):
        rule(volumes, 0.1)


@pytest.mark.parametrize("mean", [0, -1, 1.01, math.nan])
def test_a_budget_that_no_ratio_meets_is_refused(mean):
    with pytest.raises(ConfigError, match=r"compression.ratio = .* must be in \(0, 1\]"):
        dagc_ratios([1, 2], mean)


@pytest.mark.parametrize("mean", [0, -1, math.inf, math.nan])
def test_a_threshold_out_of_its_range_is_refused(mean):
    with pytest.raises(ConfigError, match=r"compression.threshold = .* must be a finite number > 0"):
        dagc_thresholds([1, 2], mean)


def test_error_feedback_stays_outside_and_per_tensor_goes_inside():
    ratios = dagc_ratios([8, 1, 27, 1], 0.1)
    made = allocate(ErrorFeedback(PerTensor(TopK(0.1, values="int8"), dense_1d=True)), [8, 1, 27, 1])
    inner = tuple(PerTensor(TopK(ratio, values="int8"), dense_1d=True) for ratio in ratios)
    assert made == ErrorFeedback(ByRank(inner))
    thresholds = dagc_thresholds([8, 1], 0.2)
    assert allocate(HardThreshold(0.2), [8, 1]) == ByRank(tuple(map(HardThreshold, thresholds)))


def test_uniform_leaves_a_compressor_as_it_is():
    assert allocate(TopK(0.1), [8, 1], "uniform") == TopK(0.1)
    assert allocate(QSGD(), [8, 1], "uniform") == QSGD()


@pytest.mark.parametrize(
    ("compressor", "rule", "message"),
    [
        (
            QSGD(),
            "dagc",
            "allocation = 'dagc' gives each rank a ratio or a threshold of its own, and this compressor has",
        ),
        (PerTensor(Identity()), "dagc", "has neither: use compression.kind = 'topk'"),
        (TopK(0.1), "dacg", "allocation = 'dacg' must be one of 'uniform', 'dagc', 'bandwidth', 'dagc_bandwidth'$"),
        (allocate(TopK(0.1), [1, 2]), "dagc", "has neither"),
        (PerTensor(BlockTopK(0.1)), "dagc", "reads messages of its own ratio only: use compression.kind = 'topk'"),
    ],
)
def test_what_a_rule_cannot_share_out_is_refused(compressor, rule, message):
    with pytest.raises(ConfigError, match=message):
        allocate(compressor, [1, 2], rule)


def test_the_summary_is_short_for_many_ranks():
    assert summary(allocate(TopK(0.1), [8, 1, 27, 1])) == (
        "ratios of the ranks: 0.0267 to 0.24 (0.107, 0.0267, 0.24, 0.0267)"
    )
    line = summary(ErrorFeedback(allocate(PerTensor(HardThreshold(0.1)), range(1, 65))))
    assert line.startswith("thresholds of the ranks: ") and line.endswith(", ...)")
    assert len(line) < 90
    assert summary(TopK(0.1)) is None
    assert summary(ErrorFeedback(TopK(0.1))) is None
