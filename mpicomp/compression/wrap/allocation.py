"""Allocation: how much each rank may send, by how many samples it has, and by the bandwidth of its link.

    p_i = n_i / sum_k n_k                    the part of the samples, which is the weight of rank i in the sum
    budget: mean of the ratios delta_i, or the harmonic mean of the thresholds lambda_i

DAGC-R (ratios) and DAGC-A (thresholds): one ratio for all hurts where volumes differ, so ranks with many samples are
compressed less. Lu et al., INFOCOM 2023 and arXiv 2311.07324. The rules are those of the authors' code (DAGC, ``MFL``).
That code sorts the volumes; here any order will do. Everything is computed in float64 from the volumes alone, so every
rank finds the same result.

What they are near to. The error of a compressor that keeps a fraction delta_i of the entries grows as the ratio falls,

    Psi(delta) = sum_i p_i / sqrt(delta_i)

and of two rules with one budget the one of smaller Psi was the faster in simulations of the published rounds. The
smallest Psi is that of ``delta_i ~ p_i^(2/3)``, which is DAGC-R but for one rank (and, inverted, DAGC-A). With volumes
spaced evenly on a log scale over ten ranks, the last two equal, and ratios that sum to one, Psi is

    largest / smallest     uniform     dagc_ratios     smallest
    10                     3.162       2.901           2.877
    100                    3.162       2.389           2.374

With few ranks that one may matter: for volumes 27, 1, 1, `dagc_ratios` gives all the same (1.732; 1.258 is possible).

The paper's text was not at hand. Every number by which the authors' code chooses that rank equals
``Psi(delta) / sqrt(min_i delta_i)``. This does not predict which rule is faster: it prefers uniform ratios (10.00, and
13.63 and 19.31 for `dagc_ratios` in the table), and decides nothing here but that rank.

BCRS, bandwidth-aware ratios (arXiv 2408.14736): the uploads of all ranks end together. `bandwidth_ratios` has the
equation, from the paper's description, because its text was not at hand. What the ranks send grows: the base ratio is
that of the slowest rank, and nobody sends less. Together with DAGC (ours), a rank has the smaller of both ratios.

At least one entry is kept (of each tensor, with `PerTensor`), however small the ratio, so a small model may exceed its
budget. The smallest ratio decides the gamma of CHOCO-SGD; see `mpicomp.compression.wrap.by_rank`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal, get_args

from mpicomp.compression.base import Compressor, Wrapper
from mpicomp.compression.ratio import check_ratio
from mpicomp.compression.wrap.by_rank import ByRank, by_rank_of, strength_of, with_strength
from mpicomp.errors import ConfigError

Rule = Literal["uniform", "dagc", "bandwidth", "dagc_bandwidth"]
"""The rule that sets each rank's ratio; ``"uniform"`` gives all ranks the same."""

BY_SAMPLES = ("dagc", "dagc_bandwidth")
"""The rules that need the number of samples of each rank."""

BY_BANDWIDTH = ("bandwidth", "dagc_bandwidth")
"""The rules that need the bandwidth of each rank."""

SHOWN = 4
"""The number of ranks whose values a summary shows, besides the smallest and the largest value."""


def dagc_ratios(volumes: Sequence[float], mean_ratio: float) -> tuple[float, ...]:
    """Return the ratios of DAGC-R, in the order of `volumes`.

    Let a_k = p_k^(2/3), S = sum_k a_k, and ranks be sorted by descending volume. Each rank j in turn is a candidate for
    the smallest ratio, together with the smallest m of the others:

        Q = (S - a_j) / a_m;   keep the j of the smallest  p_j (1 + Q) + p_m Q (1 + Q)
        d_j = 1 / (1 + Q);   d_k = a_k / (a_m (1 + Q));   delta_i = n mean_ratio d_i

    So all ranks but j follow ``delta ~ p^(2/3)``, and the ratios sum to ``n mean_ratio``. Among ranks of equal volume
    only the last is a candidate. The chosen rank may lie in the middle; it then gets less than a rank with fewer
    samples. A ratio above 1 means no compression, so it is cut to 1. As in the authors' code, the excess is not given
    to other ranks, and the mean stays below the budget.

    Raises:
        ConfigError: a rank without samples, or a `mean_ratio` outside (0, 1].

    """
    check_ratio(mean_ratio)
    shares = _shares(volumes)
    if len(shares) == 1:
        return (mean_ratio,)
    order = sorted(range(len(shares)), key=lambda rank: -shares[rank])
    p = [shares[rank] for rank in order]
    a = [share ** (2 / 3) for share in p]
    total, last = math.fsum(a), len(p) - 1
    best = (math.inf, last, last - 1, 0.0)
    for j in range(last, -1, -1):
        m = last - 1 if j == last else last
        if j < last and p[j] == p[j + 1]:
            continue
        q = (total - a[j]) / a[m]
        bound = p[j] * (1 + q) + p[m] * q * (1 + q)
        if bound < best[0]:
            best = (bound, j, m, q)
    _, pinned, m, q = best
    ratios = [0.0] * len(p)
    for k, rank in enumerate(order):
        d = (1.0 if k == pinned else a[k] / a[m]) / (1 + q)
        ratios[rank] = min(1.0, len(p) * mean_ratio * d)
    return tuple(ratios)


def dagc_thresholds(volumes: Sequence[float], mean_threshold: float) -> tuple[float, ...]:
    """Return the thresholds of DAGC-A, in the order of `volumes`.

        lambda_i = mean_threshold (sum_k a_k / n) / a_i,   a_k = p_k^(2/3)

    More samples mean a smaller threshold. The harmonic mean of the thresholds is `mean_threshold`.

    Raises:
        ConfigError: a rank without samples, or a `mean_threshold` that is not a finite number > 0.

    """
    if not 0 < mean_threshold < math.inf:
        raise ConfigError(f"compression.threshold = {mean_threshold} must be a finite number > 0")
    a = [share ** (2 / 3) for share in _shares(volumes)]
    mean = math.fsum(a) / len(a)
    return tuple(mean_threshold * (mean / each) for each in a)


def bandwidth_ratios(bandwidths: Sequence[float], base_ratio: float) -> tuple[float, ...]:
    """Return the ratios of BCRS, in the order of `bandwidths`.

        rho_k = min(1, base_ratio B_k / min_j B_j)

    So the ratio of the slowest rank is `base_ratio`, and a message of rank k takes as long as one of the slowest:
    ``rho_k / B_k`` is the same for all that are not cut to 1. With the same ratio for all, fast ranks would wait for
    the slowest; here they send more meanwhile. The bytes of all ranks together grow, by the factor ``mean_k rho_k /
    base_ratio``: to send as many as before, lower `base_ratio` by it.

    Args:
        bandwidths: B_k, in any unit: the rate at which a message of rank k reaches all that it is for.
        base_ratio: the ratio of the slowest rank, and so the smallest.

    Raises:
        ConfigError: a bandwidth that is not a finite number > 0, none at all, or a `base_ratio` outside (0, 1].

    """
    check_ratio(base_ratio)
    if not bandwidths:
        raise ConfigError("compression.bandwidths: give the bandwidth of each rank; none is given")
    for rank, bandwidth in enumerate(bandwidths):
        if not 0 < bandwidth < math.inf:
            raise ConfigError(
                f"compression.bandwidths: that of rank {rank} is {bandwidth}, and must be a finite number of bytes a "
                "second > 0"
            )
    slowest = min(bandwidths)
    return tuple(min(1.0, base_ratio * (bandwidth / slowest)) for bandwidth in bandwidths)


def check_rule(compressor: Compressor, rule: str) -> None:
    """Raise ConfigError if `compressor` has no ratio or threshold that `rule` can allocate."""
    if rule not in get_args(Rule):
        raise ConfigError(f"compression.allocation = {rule!r} must be one of {', '.join(map(repr, get_args(Rule)))}")
    if rule == "uniform":
        return
    strength = strength_of(compressor)
    if rule in BY_BANDWIDTH and (strength is None or strength[0] != "ratio"):
        raise ConfigError(
            f"compression.allocation = {rule!r} gives each rank a ratio of its own, and this compressor has none: use "
            "compression.kind = 'topk', or compression.allocation = 'uniform'"
        )
    if strength is None:
        raise ConfigError(
            f"compression.allocation = {rule!r} gives each rank a ratio or a threshold of its own, and this compressor "
            "has neither: use compression.kind = 'topk' or 'threshold', or compression.allocation = 'uniform'"
        )
    if not compressor.reads_any_strength:
        raise ConfigError(
            f"compression.allocation = {rule!r} gives each rank a ratio of its own, and this compressor reads "
            "messages of its own ratio only: use compression.kind = 'topk', or compression.allocation = 'uniform'"
        )


def allocate(
    compressor: Compressor, volumes: Sequence[float] = (), rule: Rule = "dagc", bandwidths: Sequence[float] = ()
) -> Compressor:
    """Return `compressor` with a ratio or threshold of its own on each rank.

    For a script of one's own, with `TopK` (DAGC-R), `HardThreshold` (DAGC-A), or these in `PerTensor`::

        world = MpiWorld.from_environment()                      # mpicomp.exchange.mpi.world
        install_excepthook(world)                                # mpicomp.exchange.guard: an error ends all ranks
        volumes = world.all_gather(len(dataset))                 # one number for each rank, the same list on all
        compressor = allocate(TopK(ratio=0.01), volumes)         # 1 % is the mean over ranks
        gossip = mpicomp.distribute(model, optimizer, Choco(gamma=0.02), ring, compressor, world)

    With BCRS, store the bandwidths: a restart needs the same ratios, and would measure others::

        file = Path("checkpoints/bandwidths.json")
        stored = json.loads(file.read_text()) if world.rank == 0 and file.exists() else None
        bandwidths = world.broadcast(stored) or measure_bandwidths(world, graph)     # mpicomp.exchange.bandwidths
        if world.rank == 0:
            file.write_text(json.dumps(bandwidths))
        compressor = allocate(TopK(ratio=0.01), rule="bandwidth", bandwidths=bandwidths)   # 1 % is the slowest rank's

    gamma must suit the smallest of the ratios.

    Args:
        compressor: by DAGC its ratio is the mean of all ranks, its threshold the harmonic mean; by BCRS its ratio is
            that of the slowest rank, and all ranks together send more than with this ratio for all.
        volumes: the number of samples of each rank, for DAGC.
        rule: ``"dagc"``; ``"bandwidth"``, which is BCRS; ``"dagc_bandwidth"``, the smaller of both ratios on each rank;
            or ``"uniform"``, which returns `compressor` itself.
        bandwidths: of each rank, in bytes a second, for BCRS.

    Raises:
        ConfigError: the compressor has no ratio or threshold that `rule` can allocate, a rank has no samples, a
            bandwidth is not a finite number > 0, or there are not as many of them as volumes.

    """
    check_rule(compressor, rule)
    if rule == "uniform":
        return compressor
    if isinstance(compressor, Wrapper) and compressor.remembers_errors:
        return dataclasses.replace(compressor, inner=allocate(compressor.inner, volumes, rule, bandwidths))
    strength = strength_of(compressor)
    assert strength is not None
    name, value = strength
    values: tuple[float, ...]
    if rule == "bandwidth":
        values = bandwidth_ratios(bandwidths, value)
    else:
        values = (dagc_ratios if name == "ratio" else dagc_thresholds)(volumes, value)
    if rule == "dagc_bandwidth":
        if len(bandwidths) != len(volumes):
            raise ConfigError(f"compression.bandwidths has {len(bandwidths)} entries for {len(volumes)} ranks")
        values = tuple(map(min, values, bandwidth_ratios(bandwidths, value)))
    return ByRank(tuple(with_strength(compressor, each) for each in values))


def summary(compressor: Compressor) -> str | None:
    """Return a short line with the ratio or threshold of each rank; None if all are equal."""
    by_rank = by_rank_of(compressor)
    strengths = [strength for each in by_rank.compressors if (strength := strength_of(each))] if by_rank else []
    if not strengths:
        return None
    values = [value for _, value in strengths]
    first = ", ".join(f"{value:.3g}" for value in values[:SHOWN])
    more = ", ..." if len(values) > SHOWN else ""
    return f"{strengths[0][0]}s of the ranks: {min(values):.3g} to {max(values):.3g} ({first}{more})"


def _shares(volumes: Sequence[float]) -> list[float]:
    """Return each rank's fraction of all samples."""
    for rank, volume in enumerate(volumes):
        if not 0 < volume < math.inf:
            raise ConfigError(
                f"compression.allocation: rank {rank} has {volume} samples, and so no part of the budget: give it some "
                "(data.partition), or set compression.allocation = 'uniform'"
            )
    if not volumes:
        raise ConfigError("compression.allocation: give the number of samples of each rank; none is given")
    total = math.fsum(volumes)
    return [volume / total for volume in volumes]
