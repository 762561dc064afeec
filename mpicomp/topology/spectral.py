"""How fast a graph mixes, and whether an algorithm may use it.

With eigenvalues ``1 = l1 >= l2 >= ... >= ln`` of a symmetric W:

- spectral gap ``1 - max(|l2|, |ln|)``; ``1 - ||W - 11'/n||_2`` where W is doubly stochastic but not symmetric;
  ``1 - |second eigenvalue|`` (by modulus) where only the rows, or only the columns, sum to one;
- the best constant step of ``x <- x + step (W - I) x``: ``2 / ((1 - ln) + (1 - l2))`` (Xiao and Boyd 2004,
  doi 10.1016/j.sysconle.2004.02.022).

The gap of a connected graph is positive as long as every rank keeps some weight for itself.
"""

from __future__ import annotations

from contextlib import suppress
from functools import reduce
from typing import Protocol, cast
from weakref import WeakKeyDictionary

import numpy as np

from mpicomp.errors import TopologyError
from mpicomp.topology import lanczos
from mpicomp.topology.base import TOLERANCE, Schedule, Topology
from mpicomp.topology.implicit import Complete


class PeriodicSchedule(Schedule, Protocol):
    """A schedule whose graphs repeat after a period."""

    @property
    def period(self) -> int:
        """The number of steps after which the graphs repeat."""


DENSE_RANKS = 512
"""The number of ranks up to which eigenvalues are computed of the dense matrix."""

_gaps: WeakKeyDictionary[Schedule, float] = WeakKeyDictionary()


def spectral_gap(schedule: Schedule) -> float:
    """Return the spectral gap of a graph, of the product of all matrices of a period, or of the mean matrix of a step.

    The gap of a single rank is 1. Up to `DENSE_RANKS` ranks it comes from the dense matrix. Above, it comes from a
    Fourier transform where all ranks see the same graph (ring, torus, hypercube, exponential), else from the Lanczos
    iteration, to `lanczos.ACCURACY`. It is computed once for each graph.
    """
    # A schedule of one's own need not be hashable.
    with suppress(TypeError):
        if schedule in _gaps:
            return _gaps[schedule]
    gap = 1.0 if schedule.size == 1 else float(1 - _slowest(schedule))
    with suppress(TypeError):
        _gaps[schedule] = gap
    return gap


def _slowest(schedule: Schedule) -> float:
    """Return the factor by which the slowest part of the distance to consensus shrinks."""
    if isinstance(mean := getattr(schedule, "mean", None), Topology):
        schedule = mean
    if schedule.size > DENSE_RANKS:
        return _slowest_of_many(_factors(schedule))
    topology = schedule if isinstance(schedule, Topology) else period_product(cast(PeriodicSchedule, schedule))
    if topology.is_symmetric:
        eigenvalues = np.linalg.eigvalsh(topology.mixing)
        return float(max(abs(eigenvalues[-2]), abs(eigenvalues[0])))
    if topology.is_doubly_stochastic:
        return float(np.linalg.norm(topology.mixing - 1 / topology.size, ord=2))
    return float(np.sort(np.abs(np.linalg.eigvals(topology.mixing)))[-2])


def _factors(schedule: Schedule) -> list[Topology]:
    """Return the graph, or those of a period."""
    if isinstance(schedule, Topology):
        return [schedule]
    return [schedule(step) for step in range(cast(PeriodicSchedule, schedule).period)]


def _slowest_of_many(factors: list[Topology]) -> float:
    """Return what `_slowest` does for the product of `factors`, without a dense matrix."""
    spectra = [fourier_eigenvalues(factor) for factor in factors]
    known = [spectrum for spectrum in spectra if spectrum is not None]
    # Only matrices over the same group have the same eigenvectors, in the same order.
    if len(known) == len(factors) and len({factor.dims for factor in factors}) == 1:
        return float(np.abs(np.prod(known, axis=0)[1:]).max())
    if len(factors) == 1 and factors[0].is_symmetric:
        return max(map(abs, extreme_eigenvalues(factors[0])))

    def forth(x: np.ndarray) -> np.ndarray:
        return reduce(lambda done, factor: factor.matrix.times(done), factors, x)

    def back(x: np.ndarray) -> np.ndarray:
        return reduce(lambda done, factor: factor.matrix.transposed.times(done), factors[::-1], x)

    size = factors[0].size
    if all(factor.is_doubly_stochastic for factor in factors):
        return float(max(0.0, lanczos.largest(lambda x: back(forth(_centered(x))), size)) ** 0.5)
    return lanczos.second_modulus(forth, size)


def period_product(schedule: PeriodicSchedule) -> Topology:
    """Return the product of the matrices of one period: ``W[period - 1] ... W[1] W[0]``."""
    product = reduce(lambda done, step: schedule(step).mixing @ done, range(schedule.period), np.eye(schedule.size))
    return Topology(schedule.name, product)


def fourier_eigenvalues(topology: Topology) -> np.ndarray | None:
    """Return all eigenvalues, (size,) complex, 1 first, of a graph that looks the same from every rank; else None.

    It looks the same if its matrix is circulant over its grid, ``W[i, i + d] = w[d]`` with sums modulo the extents, or
    over the ring of all ranks. The eigenvalues then are the Fourier transform of w.
    """
    size = topology.size
    if isinstance(topology, Complete):
        own = topology.own_weights.mean() - topology.other_weight
        return np.concatenate([[1], np.full(size - 1, own)]).astype(complex)
    matrix = topology.matrix
    degree = int(matrix.indptr[1])
    if not (matrix.counts == degree).all():
        return None
    columns, values = matrix.indices.reshape(size, degree), matrix.values.reshape(size, degree)
    for dims in {topology.dims or (size,), (size,)}:
        here = np.unravel_index(np.arange(size), dims)
        ahead = np.unravel_index(columns[0], dims)
        moved = [(i[:, None] + d) % extent for i, d, extent in zip(here, ahead, dims, strict=True)]
        expected = np.ravel_multi_index(tuple(moved), dims)
        order = expected.argsort(axis=1)
        if np.array_equal(np.take_along_axis(expected, order, 1), columns) and np.allclose(
            values[0][order], values, rtol=0, atol=TOLERANCE
        ):
            first = np.zeros(size)
            first[columns[0]] = values[0]
            spectrum: np.ndarray = np.fft.fftn(first.reshape(dims)).ravel()
            return spectrum
    return None


def extreme_eigenvalues(topology: Topology) -> tuple[float, float]:
    """Return ``l2`` and ``ln`` of a symmetric graph of at least two ranks."""
    if topology.size <= DENSE_RANKS:
        eigenvalues = np.linalg.eigvalsh(topology.mixing)
        return float(eigenvalues[-2]), float(eigenvalues[0])
    spectrum = fourier_eigenvalues(topology)
    if spectrum is not None:
        return float(spectrum.real[1:].max()), float(spectrum.real[1:].min())
    return lanczos.extremes(topology.matrix)


def best_diffusion_step(topology: Topology) -> float:
    """Return the constant step that brings exact, uncompressed gossip to consensus fastest; 1 for a single rank.

    Raises:
        TopologyError: a graph that is not symmetric, or not connected.

    """
    require_connected(topology)
    if not topology.is_symmetric:
        raise TopologyError(
            f"topology {topology.name!r} is not symmetric: use an undirected graph with topology.weights = 'metropolis'"
        )
    if topology.size == 1:
        return 1.0
    second, last = extreme_eigenvalues(topology)
    return float(2 / ((1 - last) + (1 - second)))


def require_connected(schedule: Schedule) -> None:
    """Raise TopologyError, which names unreached ranks, unless the union of the graphs is (strongly) connected."""
    if not schedule.union.is_connected:
        raise TopologyError(
            f"topology {schedule.name!r} is not connected: {_unreached(schedule.union)}; add edges until every rank is"
        )


def _centered(x: np.ndarray) -> np.ndarray:
    """Return `x` without its mean."""
    centered: np.ndarray = x - x.mean()
    return centered


def _unreached(topology: Topology) -> str:
    """Return a text that names the ranks not connected with rank 0."""
    reached = topology.matrix.reached() & topology.matrix.transposed.reached()
    lost = np.flatnonzero(~reached).tolist()
    shown = ", ".join(str(rank) for rank in lost[:8]) + (", ..." if len(lost) > 8 else "")
    return f"{len(lost)} of {topology.size} ranks ({shown}) have no path from rank 0 or none to it"
