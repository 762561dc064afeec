"""The partition of the training samples over the ranks, and the order in which a rank visits its samples.

Everything here is a pure function of its arguments, so a restarted run needs no generator state and every rank can
compute the share of every other. Random bits come from the counter-based Philox generator (Salmon et al. 2011, SC'11)
keyed by a tuple of integers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from mpicomp.errors import ConfigError, DataError
from mpicomp.plugins import make

Indices = npt.NDArray[np.int64]

# The first entry of every key, so that no two uses ever share their random bits.
_ORDER, _IID, _DIRICHLET, _VOLUMES = 1, 2, 3, 4

MAX_DRAWS = 100
"""How often `dirichlet` draws anew before it gives up on ``min_samples``."""


def philox(*key: int) -> np.random.Philox:
    """Return a bit generator that depends on the tuple `key` alone (each entry in ``[0, 2**64)``)."""
    # SeedSequence alone cannot tell (0,) from (0, 0), nor (2**32,) from (0, 1).
    words = np.array([len(key), *key], dtype="<u8").view("<u4")
    return np.random.Philox(np.random.SeedSequence(words.tolist()))


def permutation(n: int, *key: int) -> Indices:
    """Return a uniformly random permutation of ``0..n-1``, (n,), that depends on `n` and `key` alone.

    It sorts raw 64-bit draws, because NumPy keeps the raw stream of a bit generator fixed between versions, but not
    that of ``Generator.permutation``.
    """
    return np.argsort(philox(*key).random_raw(n), kind="stable").astype(np.int64)


def iid(labels: npt.NDArray[np.int64], ranks: int, seed: int) -> list[Indices]:
    """Deal all samples at random; the sizes differ by at most one."""
    order = permutation(len(labels), _IID, seed)
    return [np.sort(part) for part in np.array_split(order, ranks)]


def dirichlet(
    labels: npt.NDArray[np.int64], ranks: int, seed: int, alpha: float = 1.0, min_samples: int = 1
) -> list[Indices]:
    """Skew the labels: rank i gets the fraction ``q_c[i]`` of class c, with ``q_c ~ Dir(alpha, ..., alpha)``.

    The smaller `alpha`, the fewer classes a rank sees; sizes differ too. Drawn anew until every rank has at least
    `min_samples` (Yurochkin et al. 2019, arXiv 1905.12022, section 4).

    Raises:
        ConfigError: `alpha` is not positive, or the labels hold one class only.
        DataError: `min_samples` was not reached in `MAX_DRAWS` draws.

    """
    _require_alpha(alpha)
    _require_enough(len(labels), ranks, min_samples)
    members = _by_class(labels, "dirichlet", _DIRICHLET, seed)
    generator = np.random.Generator(philox(_DIRICHLET, seed))
    for _ in range(MAX_DRAWS):
        shares = [_cut(indices, generator.dirichlet(np.full(ranks, alpha))) for indices in members]
        parts = [np.sort(np.concatenate(of_rank)) for of_rank in zip(*shares, strict=True)]
        if min(map(len, parts)) >= min_samples:
            return parts
    raise DataError(
        f"data.partition = 'dirichlet' with data.alpha = {alpha:g} left a rank with fewer than data.min_samples = "
        f"{min_samples} samples in each of {MAX_DRAWS} draws for {ranks} ranks. Raise data.alpha, or take "
        "data.partition = 'volumes' with data.skew = 1, which skews the labels at equal sizes."
    )


def volumes(
    labels: npt.NDArray[np.int64], ranks: int, seed: int, skew: float = 10.0, alpha: float | None = None
) -> list[Indices]:
    """Give ranks unequal numbers of samples, ``n_i ~ logspace(log10(skew), 0, ranks)``, rank 0 the most.

    The largest share is `skew` times the smallest. With `alpha`, rank i also prefers classes by
    ``q_i ~ Dir(alpha * prior)`` over classes, as long as they last; the last ranks take what is left. DAGC's authors
    (arXiv 2311.07324) space one rank fewer on the log scale and give the last two ranks the same share.

    Raises:
        ConfigError: `skew` is below 1, `alpha` is not positive, or `alpha` is given but the labels hold one class only.

    """
    if not (np.isfinite(skew) and skew >= 1):
        raise ConfigError(f"data.skew = {skew:g}: the largest share over the smallest must be at least 1.")
    weights = np.logspace(np.log10(skew), 0, ranks)
    sizes = 1 + apportion(len(labels) - ranks, weights)
    if alpha is None:
        order = permutation(len(labels), _VOLUMES, seed)
        return [np.sort(part) for part in np.split(order, np.cumsum(sizes)[:-1])]
    _require_alpha(alpha)
    return _preferred(labels, sizes, seed, alpha)


Partitioner = Callable[..., list[Indices]]

PARTITIONS: dict[str, Partitioner] = {"iid": iid, "dirichlet": dirichlet, "volumes": volumes}


def partition(
    kind: str, labels: npt.NDArray[np.int64], ranks: int, seed: int, **params: float | int | None
) -> list[Indices]:
    """Split the training samples over ranks: ascending indices a rank, disjoint, together all of them.

    Args:
        kind: a name in `PARTITIONS`, or an import path.
        labels: (n,) the class of each training sample.
        ranks: how many parts to make.
        seed: the seed of the run.
        params: the further arguments of that partition, e.g. ``alpha``.

    Raises:
        ConfigError: an unknown `kind` or parameter, or a value out of its range.
        DataError: fewer samples than ranks, or a rank that would get too few.

    """
    _require_enough(len(labels), ranks, 1)
    parts: list[Indices] = make("data.partition", kind, PARTITIONS, list, labels, ranks, seed, **params)
    if len(parts) != ranks or not all(map(len, parts)):
        sizes = ", ".join(str(len(part)) for part in parts)
        raise ConfigError(f"data.partition = {kind!r} must give each of {ranks} ranks samples, and gives: {sizes}")
    return parts


def steps_per_epoch(samples: int, ranks: int, batch_size: int) -> int:
    """Return the steps of an epoch, the same on all ranks: ``max(1, samples // (ranks * batch_size))``."""
    return max(1, samples // (ranks * batch_size))


def epoch_indices(
    partition: Sequence[Indices], seed: int, epoch: int, rank: int, steps: int, batch_size: int
) -> Indices:
    """Return the samples that `rank` visits in `epoch`, in order: (steps * batch_size,).

    A rank reads its samples as an endless stream, one fresh permutation after the other, and each epoch takes the next
    ``steps * batch_size`` of it. So a rank with fewer samples repeats them, a rank with more sees another part every
    epoch, and none is favored. The order depends on the arguments alone, not on what was drawn before.
    """
    own = partition[rank]
    start, stop = epoch * steps * batch_size, (epoch + 1) * steps * batch_size
    first, last = start // len(own), -(-stop // len(own))
    stream = np.concatenate([permutation(len(own), _ORDER, seed, rank, cycle) for cycle in range(first, last)])
    order: Indices = own[stream[start - first * len(own) : stop - first * len(own)]]
    return order


def apportion(total: int, weights: npt.NDArray[np.float64]) -> Indices:
    """Split `total` into integers proportional to `weights` (any positive scale), by largest remainder."""
    exact = total * weights / weights.sum()
    whole: Indices = np.floor(exact).astype(np.int64)
    missing = total - int(whole.sum())
    whole[np.argsort(whole - exact, kind="stable")[:missing]] += 1
    return whole


def _require_alpha(alpha: float) -> None:
    if not (np.isfinite(alpha) and alpha > 0):
        raise ConfigError(f"data.alpha = {alpha:g}: the concentration of the Dirichlet distribution must be positive.")


def _require_enough(samples: int, ranks: int, minimum: int) -> None:
    if samples < ranks * minimum:
        raise DataError(
            f"{samples} training samples are too few for {ranks} ranks: each needs at least {minimum}. Use fewer ranks "
            "or more data."
        )


def _by_class(labels: npt.NDArray[np.int64], kind: str, use: int, seed: int) -> list[Indices]:
    """Return an array of shuffled samples for each class."""
    classes = np.unique(labels)
    if len(classes) < 2:
        raise ConfigError(
            f"data.partition = {kind!r} skews class labels, but data.kind gives one class only (text has none). "
            "Use data.partition = 'iid', or 'volumes' without data.alpha."
        )
    members = [np.flatnonzero(labels == c) for c in classes]
    return [of[permutation(len(of), use, seed, c)] for c, of in enumerate(members)]


def _cut(indices: Indices, fractions: npt.NDArray[np.float64]) -> list[Indices]:
    """Cut `indices` into consecutive parts by `fractions`, which sum to one."""
    return np.split(indices, np.rint(np.cumsum(fractions)[:-1] * len(indices)).astype(np.int64))


def _preferred(labels: npt.NDArray[np.int64], sizes: Indices, seed: int, alpha: float) -> list[Indices]:
    """Deal ``sizes[i]`` samples to rank i by its preference over classes."""
    members = _by_class(labels, "volumes", _VOLUMES, seed)
    left = np.array([len(of) for of in members])
    concentration = alpha * left / left.mean()
    generator = np.random.Generator(philox(_VOLUMES, seed))
    parts = []
    for size in sizes:
        taken = _take(int(size), generator.dirichlet(concentration), left)
        parts.append(np.sort(np.concatenate([of[n - t : n] for of, n, t in zip(members, left, taken, strict=True)])))
        left = left - taken
    return parts


def _take(size: int, preference: npt.NDArray[np.float64], left: Indices) -> Indices:
    """Return how many of each class to take: near ``size * preference``, at most `left`, `size` in all."""
    taken = np.zeros_like(left)
    while (missing := size - int(taken.sum())) > 0:
        free = left - taken
        # A preference that underflowed to zero must not block the last samples of a class.
        weights = np.where(free > 0, np.maximum(preference, 1e-12), 0.0)
        taken += np.minimum(apportion(missing, weights), free)
    return taken
