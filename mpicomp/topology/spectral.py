"""How fast a graph mixes, and whether an algorithm may use it.

With eigenvalues ``1 = l1 >= l2 >= ... >= ln`` of a symmetric W:

- spectral gap ``1 - max(|l2|, |ln|)``; ``1 - ||W - 11'/n||_2`` where W is doubly stochastic but not symmetric;
  ``1 - |second eigenvalue|`` (by modulus) where only the rows sum to one;
- ``beta = ||I - W||_2``, which is ``1 - ln``;
- the best constant step of ``x <- x + step (W - I) x``: ``2 / ((1 - ln) + (1 - l2))`` (Xiao and Boyd 2004,
  doi 10.1016/j.sysconle.2004.02.022).

The gap of a connected graph is positive as long as every rank keeps some weight for itself.
"""

from __future__ import annotations

from functools import reduce
from typing import Protocol, cast

import numpy as np

from mpicomp.errors import TopologyError
from mpicomp.topology.base import Schedule, Topology


class PeriodicSchedule(Schedule, Protocol):
    """A schedule whose graphs repeat after a period."""

    @property
    def period(self) -> int:
        """The number of steps after which the graphs repeat."""


def spectral_gap(schedule: Schedule) -> float:
    """Return the spectral gap of a graph, of the product of all matrices of a period, or of the mean matrix of a step.

    The gap of a single rank is 1.
    """
    topology = representative(schedule)
    if topology.size == 1:
        return 1.0
    if topology.is_symmetric:
        eigenvalues = _eigenvalues(topology)
        slowest = max(abs(eigenvalues[-2]), abs(eigenvalues[0]))
    elif topology.is_doubly_stochastic:
        slowest = np.linalg.norm(topology.mixing - 1 / topology.size, ord=2)
    else:
        slowest = np.sort(np.abs(np.linalg.eigvals(topology.mixing)))[-2]
    return float(1 - slowest)


def representative(schedule: Schedule) -> Topology:
    """Return the matrix that represents a schedule: its own, the product of a period, or the mean of a step."""
    if isinstance(schedule, Topology):
        return schedule
    mean = getattr(schedule, "mean", None)
    if isinstance(mean, Topology):
        return mean
    return period_product(cast(PeriodicSchedule, schedule))


def period_product(schedule: PeriodicSchedule) -> Topology:
    """Return the product of the matrices of one period: ``W[period - 1] ... W[1] W[0]``."""
    product = reduce(lambda done, step: schedule(step).mixing @ done, range(schedule.period), np.eye(schedule.size))
    return Topology(schedule.name, product)


def beta(topology: Topology) -> float:
    """Return ``||I - W||_2``, the constant of CHOCO-SGD's step size."""
    return float(np.linalg.norm(np.eye(topology.size) - topology.mixing, ord=2))


def best_diffusion_step(topology: Topology) -> float:
    """Return the constant step that brings exact, uncompressed gossip to consensus fastest; 1 for a single rank.

    Raises:
        TopologyError: a graph that is not symmetric, or not connected.

    """
    check(topology, symmetric=True)
    if topology.size == 1:
        return 1.0
    eigenvalues = _eigenvalues(topology)
    return float(2 / ((1 - eigenvalues[0]) + (1 - eigenvalues[-2])))


def is_connected(topology: Topology) -> bool:
    """Return whether the graph is connected; for a directed graph, strongly connected."""
    edges = topology.mixing != 0
    return len(_reached(edges)) == topology.size == len(_reached(edges.T))


def check(
    schedule: Schedule, *, doubly_stochastic: bool = False, symmetric: bool = False, connected: bool = True
) -> None:
    """Raise TopologyError if a graph lacks a property that the caller needs; every `Topology` has rows that sum to one.

    The weights of a schedule are checked at step 0, and its union must be connected.

    Raises:
        TopologyError: names the missing property, a rank where it fails, and the remedy.

    """
    topology = schedule(0)
    kind = f"topology {schedule.name!r}"
    if connected and not is_connected(schedule.union):
        raise TopologyError(f"{kind} is not connected: {_unreached(schedule.union)}; add edges until every rank is")
    if symmetric and not topology.is_symmetric:
        i, j = _worst(np.abs(topology.mixing - topology.mixing.T))
        raise TopologyError(
            f"{kind} is not symmetric: rank {i} weighs rank {j} with {topology.weight(i, j):.6g}, the other way round "
            f"it is {topology.weight(j, i):.6g}; use an undirected graph with topology.weights = 'metropolis'"
        )
    if doubly_stochastic and not topology.is_doubly_stochastic:
        sums = topology.mixing.sum(axis=0)
        (column,) = _worst(np.abs(sums - 1))
        raise TopologyError(
            f"{kind} is not doubly stochastic: column {column} sums to {sums[column]:.6g} instead of 1; "
            "use topology.weights = 'metropolis'"
        )


def _eigenvalues(topology: Topology) -> np.ndarray:
    """Return the (size,) eigenvalues of a symmetric graph, ascending."""
    return np.linalg.eigvalsh(topology.mixing)


def _reached(edges: np.ndarray) -> set[int]:
    """Return all ranks that a walk along rows of `edges` from rank 0 visits."""
    reached = frontier = np.arange(len(edges)) == 0
    while frontier.any():
        frontier = edges[frontier].any(axis=0) & ~reached
        reached = reached | frontier
    return {int(rank) for rank in np.flatnonzero(reached)}


def _unreached(topology: Topology) -> str:
    """Return a text that names the ranks not connected with rank 0."""
    edges = topology.mixing != 0
    lost = sorted(set(range(topology.size)) - (_reached(edges) & _reached(edges.T)))
    shown = ", ".join(str(rank) for rank in lost[:8]) + (", ..." if len(lost) > 8 else "")
    return f"{len(lost)} of {topology.size} ranks ({shown}) have no path from rank 0 or none to it"


def _worst(excess: np.ndarray) -> tuple[int, ...]:
    """Return the row and column of the largest entry."""
    return tuple(int(index) for index in np.unravel_index(int(excess.argmax()), excess.shape))
