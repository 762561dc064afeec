"""Partitions cover the samples disjointly; the order of a rank is a pure function of (seed, epoch, rank)."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpicomp.data.partition import (
    PARTITIONS,
    apportion,
    epoch_indices,
    partition,
    permutation,
    philox,
    steps_per_epoch,
)
from mpicomp.errors import ConfigError, DataError


def labels_of(n, classes=10):
    return np.arange(n, dtype=np.int64) % classes


def digest(array):
    return hashlib.sha256(np.ascontiguousarray(array, dtype="<i8").tobytes()).hexdigest()[:16]


def assert_disjoint_cover(parts, n):
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(n))
    assert all((np.diff(part) > 0).all() for part in parts)
    assert all(part.dtype == np.int64 and len(part) > 0 for part in parts)


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(["iid", "volumes", "volumes_with_labels", "dirichlet"]),
    n=st.integers(64, 400),
    ranks=st.integers(1, 8),
    seed=st.integers(0, 2**63),
)
def test_every_partition_covers_all_samples_once_and_repeats(kind, n, ranks, seed):
    params = {"volumes_with_labels": {"alpha": 0.1, "skew": 4.0}, "dirichlet": {"alpha": 5.0}}.get(kind, {})
    kind = kind.removesuffix("_with_labels")
    parts = partition(kind, labels_of(n), ranks, seed, **params)
    assert len(parts) == ranks
    assert_disjoint_cover(parts, n)
    again = partition(kind, labels_of(n), ranks, seed, **params)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))


@given(n=st.integers(1, 300), ranks=st.integers(1, 20))
def test_iid_sizes_differ_by_at_most_one(n, ranks):
    if ranks > n:
        with pytest.raises(DataError, match=f"{n} training samples are too few for {ranks} ranks"):
            partition("iid", labels_of(n), ranks, 0)
        return
    sizes = [len(part) for part in partition("iid", labels_of(n), ranks, 0)]
    assert max(sizes) - min(sizes) <= 1


def test_another_seed_gives_another_partition():
    for kind in PARTITIONS:
        first, second = (partition(kind, labels_of(500), 4, seed) for seed in (0, 1))
        assert not all(np.array_equal(a, b) for a, b in zip(first, second, strict=True)), kind


def shares(parts, labels):
    counts = np.array([np.bincount(labels[part], minlength=10) for part in parts])
    return counts / counts.sum(axis=1, keepdims=True)


def test_a_small_alpha_skews_labels_and_a_large_one_does_not():
    labels = labels_of(10_000)
    for kind, params in (("dirichlet", {}), ("volumes", {"skew": 1.0})):
        skewed = shares(partition(kind, labels, 8, 0, alpha=0.1, **params), labels).max(axis=1).mean()
        even = shares(partition(kind, labels, 8, 0, alpha=1000.0, **params), labels).max(axis=1).mean()
        assert skewed > 0.35, kind
        assert even < 0.13, kind


def test_volumes_are_log_spaced():
    sizes = np.array([len(part) for part in partition("volumes", labels_of(10_000), 5, 0, skew=16.0)])
    assert sizes[0] / sizes[-1] == pytest.approx(16, rel=0.02)
    assert sizes[:-1] / sizes[1:] == pytest.approx(2, rel=0.02)


def test_a_hundred_to_one_no_rank_waits_and_small_ones_repeat_their_samples():
    """60,000 samples on ten ranks of batch 64: an epoch has as many batches for each, whatever it holds."""
    parts = partition("volumes", labels_of(60_000), 10, 0, skew=100.0, alpha=1.0)
    sizes = [len(part) for part in parts]
    assert sizes[0] / sizes[-1] == pytest.approx(100, rel=0.05)
    steps = steps_per_epoch(60_000, 10, 64)
    assert steps == 93
    for rank in (0, 9):
        visited, counts = np.unique(epoch_indices(parts, 0, 0, rank, steps, 64), return_counts=True)
        assert set(visited) <= set(parts[rank].tolist())
        assert counts.sum() == 93 * 64
        assert counts.max() - counts.min() <= 1
        expected = 93 * 64 / sizes[rank]  # a quarter of the largest share; the smallest 25 times
        assert counts.mean() == pytest.approx(max(1.0, expected), rel=0.01)


def test_equal_volumes_with_extreme_label_skew_are_always_possible():
    labels = labels_of(1600)
    parts = partition("volumes", labels, 16, 3, skew=1.0, alpha=0.01)
    assert_disjoint_cover(parts, 1600)
    assert {len(part) for part in parts} == {100}


def test_dirichlet_reaches_the_minimum_or_says_what_to_do():
    parts = partition("dirichlet", labels_of(1000), 4, 0, alpha=0.5, min_samples=50)
    assert min(map(len, parts)) >= 50
    with pytest.raises(DataError, match=r"data\.alpha = 0\.001 .* data\.min_samples = 1 .*data\.skew = 1"):
        partition("dirichlet", labels_of(1000), 16, 0, alpha=0.001)
    with pytest.raises(DataError, match="each needs at least 50"):
        partition("dirichlet", labels_of(100), 4, 0, min_samples=50)


@pytest.mark.parametrize(
    ("kind", "params", "message"),
    [
        ("dirichlet", {"alpha": 0.0}, r"data\.alpha = 0:"),
        ("dirichlet", {"alpha": float("nan")}, r"data\.alpha = nan:"),
        ("volumes", {"alpha": -1.0}, r"data\.alpha = -1:"),
        ("volumes", {"skew": 0.5}, r"data\.skew = 0\.5:"),
        ("iid", {"alpha": 1.0}, r"data\.alpha is no parameter of data\.partition = 'iid'\. Known: none"),
        ("dirichlet", {"alhpa": 1.0}, r"Did you mean 'alpha'\?"),
        ("dirichlt", {}, r"data\.partition = 'dirichlt' is unknown\. Did you mean 'dirichlet'\?"),
    ],
)
def test_bad_arguments_are_named(kind, params, message):
    with pytest.raises(ConfigError, match=message):
        partition(kind, labels_of(100), 4, 0, **params)


def test_label_skew_needs_labels():
    with pytest.raises(ConfigError, match=r"data\.partition = 'dirichlet' skews class labels"):
        partition("dirichlet", np.zeros(100, dtype=np.int64), 4, 0)


@given(total=st.integers(0, 10_000), weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=20))
def test_apportionment_is_exact_and_within_one(total, weights):
    weights = np.array(weights)
    parts = apportion(total, weights)
    assert parts.sum() == total
    assert np.abs(parts - total * weights / weights.sum()).max() <= 1 + 1e-6


def test_steps_are_the_same_for_all_ranks():
    assert steps_per_epoch(60_000, 16, 32) == 117
    assert steps_per_epoch(10, 4, 32) == 1


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=5),
    seed=st.integers(0, 2**63),
    steps=st.integers(1, 6),
    batch=st.integers(1, 9),
)
def test_the_epochs_of_a_rank_visit_all_its_samples_equally_often(sizes, seed, steps, batch):
    parts = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    for rank, own in enumerate(parts):
        epochs = [epoch_indices(parts, seed, epoch, rank, steps, batch) for epoch in range(len(own))]
        assert all(epoch.shape == (steps * batch,) for epoch in epochs)
        # After n epochs of k visits each, every one of the n samples was visited k times.
        values, counts = np.unique(np.concatenate(epochs), return_counts=True)
        assert np.array_equal(values, own)
        assert (counts == steps * batch).all()


def test_a_rank_that_fits_sees_each_sample_once_an_epoch():
    parts = partition("iid", labels_of(64), 2, 0)
    for epoch in range(3):
        assert np.array_equal(np.sort(epoch_indices(parts, 0, epoch, 1, 4, 8)), parts[1])


def test_orders_differ_between_seeds_epochs_and_ranks():
    parts = [np.arange(32)] * 2
    orders = {
        digest(epoch_indices(parts, seed, epoch, rank, 4, 8))
        for seed in (0, 1, 2**32)
        for epoch in (0, 1)
        for rank in (0, 1)
    }
    assert len(orders) == 12


def test_keys_of_different_length_or_words_never_collide():
    keys = [(0,), (0, 0), (0, 1), (1, 0), (2**32,), (2**32, 0)]
    assert len({int(philox(*key).random_raw()) for key in keys}) == len(keys)


def test_orders_are_the_same_on_every_machine_and_for_ever():
    parts = partition("iid", labels_of(1000), 4, seed=7)
    assert permutation(8, 1, 2, 3).tolist() == GOLDEN_PERMUTATION
    assert digest(np.concatenate(parts)) == GOLDEN_PARTITION
    assert digest(epoch_indices(parts, 7, 3, 2, 10, 16)) == GOLDEN_ORDER


GOLDEN_PERMUTATION = [4, 3, 7, 0, 1, 5, 2, 6]
GOLDEN_PARTITION = "615e1dcc01bb0aec"
GOLDEN_ORDER = "019a61acad56ece0"
