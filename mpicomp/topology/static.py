"""Graphs that stay the same: from the number of ranks to a `Topology`.

Every function builds the simple graph first, so that a neighbor met in two directions (a ring of two, a 2 x b torus)
counts once, and then gives it weights by one rule (`mpicomp.topology.weights`). Closed forms of the spectral gap, with
n ranks: complete 1; ring ``(2/3)(1 - cos(2 pi / n))`` from n = 5; chain ``(2/3)(1 - cos(pi / n))``; hypercube
``2 / (1 + log2 n)``; exponential ``2 / (1 + ceil(log2 n))`` for even n; star ``1 / n``; Dyck ``(3 - sqrt(5)) / 4``.

Common arguments:
    size: the number of ranks.
    weights: ``"metropolis"``, ``"uniform"`` or ``"push"``; they differ on irregular graphs only.
    lazy: whether to use ``(I + W) / 2``.

All functions raise `TopologyError` where the graph does not exist at this size.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from mpicomp.errors import TopologyError
from mpicomp.topology.arguments import require_integer, require_size
from mpicomp.topology.base import Topology
from mpicomp.topology.implicit import Complete
from mpicomp.topology.shared import shared
from mpicomp.topology.sparse import SparseMatrix
from mpicomp.topology.weights import complete_weights, mixing_matrix

Edges: TypeAlias = tuple[np.ndarray, np.ndarray]
"""The ranks at the two ends of each edge."""

if TYPE_CHECKING:  # imported where a random graph is drawn: its import takes a tenth of that of all others
    import networkx as nx

DRAWS = 100
"""How often a random graph is drawn anew until it is connected."""

DYCK_CHORDS = (5, -5, 13, -13)
"""Vertex v of the Dyck graph is connected with ``v + DYCK_CHORDS[v mod 4]`` and with its neighbors on a cycle of 32."""


@shared
def ring(size: int, *, weights: str = "metropolis", lazy: bool = False) -> Topology:
    """Build the ring: rank i is connected with i - 1 and i + 1, modulo `size`."""
    size = require_size("ring", size)
    return _grid("ring", (size,), periodic=True, weights=weights, lazy=lazy)


@shared
def chain(size: int, *, weights: str = "metropolis", lazy: bool = False) -> Topology:
    """Build the chain: rank i is connected with i - 1 and i + 1; each end has one neighbor."""
    size = require_size("chain", size)
    return _grid("chain", (size,), periodic=False, weights=weights, lazy=lazy)


@shared
def torus(
    size: int,
    *,
    dims: Sequence[int] | None = None,
    ndim: int | None = None,
    weights: str = "metropolis",
    lazy: bool = False,
) -> Topology:
    """Build the torus: neighbors at +- 1 in each dimension, periodic; ranks in row-major order (``MPI_Cart_create``).

    Args:
        size: the number of ranks.
        dims: the extents, whose product is `size`; by default the ones closest to a cube, largest first.
        ndim: the number of dimensions where `dims` is not given; 2 by default.
        weights: see the module.
        lazy: see the module.

    Raises:
        TopologyError: extents whose product is not `size`, or whose number is not `ndim`.

    """
    size = require_size("torus", size)
    if ndim is not None:
        ndim = require_integer("topology.ndim", ndim, 1)
    shape = balanced_dims(size, ndim or 2) if dims is None else _torus_dims(size, dims, ndim)
    return _grid("torus", shape, periodic=True, weights=weights, lazy=lazy)


@shared
def hypercube(size: int, *, weights: str = "metropolis", lazy: bool = False) -> Topology:
    """Build the hypercube: rank i is connected with ``i xor 2^k``; `size` must be a power of two."""
    size = require_size("hypercube", size)
    below = 1 << (size.bit_length() - 1)
    if size != below:
        raise TopologyError(
            f"topology.kind = 'hypercube' needs a power of two as the number of ranks, not {size}; "
            f"the nearest are {below} and {2 * below}"
        )
    dims = (2,) * (size.bit_length() - 1) or (1,)
    return _grid("hypercube", dims, periodic=False, weights=weights, lazy=lazy)


@shared
def exponential(size: int, *, weights: str = "metropolis", lazy: bool = False) -> Topology:
    """Build the static exponential graph: rank i sends to ``i + 2^k mod size``, ``2^k < size``. Directed.

    Doubly stochastic but not symmetric (Ying et al. 2021, arXiv 2110.13363).
    """
    size = require_size("exponential", size)
    ranks = np.arange(size)
    told = [(ranks + hop) % size for hop in hops(size)]
    adjacency = _adjacency(size, np.concatenate([ranks[:0], *told]), np.tile(ranks, len(told)))
    return _topology("exponential", adjacency, weights, lazy)


@shared
def directed_ring(size: int, *, weights: str = "metropolis", lazy: bool = False) -> Topology:
    """Build the directed ring: rank i sends to i + 1 modulo `size`, and hears i - 1. Doubly stochastic."""
    size = require_size("directed_ring", size)
    ranks = np.arange(size)
    return _topology("directed_ring", _adjacency(size, (ranks + 1) % size, ranks), weights, lazy)


@shared
def complete(size: int, *, weights: str = "metropolis", lazy: bool = False) -> Topology:
    """Build the complete graph: all ranks are connected, ``W = 1/size``."""
    size = require_size("complete", size)
    return Complete("complete", *complete_weights(size, weights, lazy))


@shared
def star(size: int, *, weights: str = "metropolis", lazy: bool = False) -> Topology:
    """Build the star: rank 0 is the hub, and the only neighbor of all other ranks."""
    size = require_size("star", size)
    return _topology("star", _bipartite(size, 1), weights, lazy)


@shared
def complete_bipartite(size: int, hubs: int = 2, *, weights: str = "metropolis", lazy: bool = False) -> Topology:
    """Build the complete bipartite graph of the first `hubs` ranks and the others; with one hub it is a star."""
    size, hubs = require_size("complete_bipartite", size), require_integer("topology.hubs", hubs, 1)
    if hubs >= size > 1:
        raise TopologyError(f"topology.hubs = {hubs}: must be fewer than the {size} ranks")
    return _topology("complete_bipartite", _bipartite(size, hubs), weights, lazy)


@shared
def dyck(size: int, *, weights: str = "metropolis", lazy: bool = False) -> Topology:
    """Build the Dyck graph: 32 ranks, three neighbors each, bipartite, girth 6, diameter 5.

    A cycle of 32 with chords, ``[5, -5, 13, -13]^8`` in LCF notation (https://mathworld.wolfram.com/DyckGraph.html).
    """
    size = require_size("dyck", size)
    if size != 32:
        raise TopologyError(f"topology.kind = 'dyck' exists with 32 ranks only, not {size}")
    ranks = np.arange(size)
    others = np.concatenate([ranks + 1, ranks + np.resize(DYCK_CHORDS, size)]) % size
    return _topology("dyck", _undirected(size, np.tile(ranks, 2), others), weights, lazy)


@shared
def random_regular(
    size: int, *, degree: int = 4, seed: int = 0, weights: str = "metropolis", lazy: bool = False
) -> Topology:
    """Draw a connected graph in which every rank has `degree` neighbors; the same on all ranks for the same seed.

    Raises:
        TopologyError: no connected graph has this degree at this size, or none was drawn.

    """
    import networkx as nx

    size = require_size("random_regular", size)
    degree = require_integer("topology.degree", degree, 0)
    _check_degree(size, degree)
    return _random(
        "random_regular",
        lambda generator: _edges(nx.random_regular_graph(degree, size, seed=generator)),
        size=size,
        seed=seed,
        remedy=f"raise topology.degree = {degree}",
        weights=weights,
        lazy=lazy,
    )


@shared
def erdos_renyi(
    size: int, *, probability: float = 0.5, seed: int = 0, weights: str = "metropolis", lazy: bool = False
) -> Topology:
    """Draw a connected graph in which each pair is joined with `probability`; the same on all ranks for the same seed.

    Raises:
        TopologyError: a probability outside (0, 1], or no connected graph among the draws: likely where the
            probability is far below ``ln(size) / size``.

    """

    size = require_size("erdos_renyi", size)
    if isinstance(probability, bool) or not isinstance(probability, (int, float)) or not 0 < probability <= 1:
        raise TopologyError(f"topology.probability = {probability!r} must be a number above 0 and at most 1")
    return _random(
        "erdos_renyi",
        lambda generator: _random_pairs(size, probability, generator),
        size=size,
        seed=seed,
        remedy=f"raise topology.probability = {probability} above ln(size)/size = {math.log(size) / size:.3g}",
        weights=weights,
        lazy=lazy,
    )


@shared
def random_digraph(size: int, *, degree: int = 2, seed: int = 0, weights: str = "push", lazy: bool = False) -> Topology:
    """Draw a directed graph in which every rank sends to `degree` others; the same on all ranks for the same seed.

    One of the others is the next rank on a random cycle through all ranks, so that there is a path from every rank to
    every other. How many ranks a rank hears differs.

    Raises:
        TopologyError: a degree below 1, or not below the number of ranks.

    """
    size = require_size("random_digraph", size)
    degree = require_integer("topology.degree", degree, 1)
    if size > 1 and degree >= size:
        raise TopologyError(
            f"topology.degree = {degree} must be below the number of ranks, {size}; at most {size - 1} works here"
        )
    generator = random.Random(require_integer("topology.seed", seed, 0))
    cycle = generator.sample(range(size), size)
    edges = []
    for rank, following in zip(cycle, [*cycle[1:], cycle[0]], strict=True):
        # Two more than are needed, as far as there are so many: the rank itself and the following one may be drawn.
        drawn = generator.sample(range(size), min(size, degree + 1))
        others = [other for other in drawn if other not in (rank, following)]
        edges += [(target, rank) for target in (following, *others[: degree - 1])]
    heard, told = np.array(edges).T
    return _topology("random_digraph", _adjacency(size, heard, told), weights, lazy)


def hops(size: int) -> list[int]:
    """Return the hops of the exponential graphs: the powers of two below `size`, ascending."""
    return [1 << k for k in range((size - 1).bit_length())]


# Each extent asks for the best shape of the rest, and most of them ask for the same one.
@cache
def balanced_dims(size: int, ndim: int) -> tuple[int, ...]:
    """Return `ndim` extents whose product is `size` and whose sum is least, largest first: the closest to a cube."""
    if ndim == 1:
        return (size,)
    divisors = [d for d in range(1, size + 1) if size % d == 0]
    shapes = (tuple(sorted((d, *balanced_dims(size // d, ndim - 1)), reverse=True)) for d in divisors)
    return min(shapes, key=lambda shape: (sum(shape), shape))


def _torus_dims(size: int, dims: Sequence[int], ndim: int | None) -> tuple[int, ...]:
    if not isinstance(dims, (list, tuple)) or not dims:
        raise TopologyError(f"topology.dims = {dims!r} must be a list of extents, e.g. {list(balanced_dims(size, 2))}")
    shape = tuple(require_integer("topology.dims", extent, 1) for extent in dims)
    if ndim is not None and ndim != len(shape):
        raise TopologyError(f"topology.ndim = {ndim} contradicts topology.dims = {list(shape)}: give one of them")
    if math.prod(shape) != size:
        raise TopologyError(
            f"topology.dims = {list(shape)} must multiply to the number of ranks, {size}, not to {math.prod(shape)}; "
            f"e.g. {list(balanced_dims(size, len(shape)))}"
        )
    return shape


def _check_degree(size: int, degree: int) -> None:
    """Refuse a degree at which no connected regular graph exists."""
    if degree >= size:
        raise TopologyError(
            f"topology.degree = {degree} must be below the number of ranks, {size}; at most {size - 1} works here"
        )
    if degree * size % 2:
        raise TopologyError(
            f"topology.degree = {degree} with {size} ranks: an odd degree needs an even number of ranks; "
            f"use {degree - 1 if degree > 1 else degree + 1}"
        )
    if degree < min(2, size - 1):
        raise TopologyError(f"topology.degree = {degree} leaves {size} ranks disconnected; use at least 2")


def _random(
    name: str,
    draw: Callable[[random.Random], Edges],
    *,
    size: int,
    seed: int,
    remedy: str,
    weights: str,
    lazy: bool,
) -> Topology:
    """Draw graphs from one generator until one is connected."""

    generator = random.Random(require_integer("topology.seed", seed, 0))
    for _ in range(DRAWS):
        adjacency = _undirected(size, *draw(generator))
        if adjacency.reached().all():
            return _topology(name, adjacency, weights, lazy)
    raise TopologyError(
        f"topology.kind = {name!r}: none of {DRAWS} graphs of {size} ranks drawn from topology.seed = {seed} "
        f"is connected; {remedy}"
    )


def _edges(graph: nx.Graph[Any]) -> Edges:
    """Return the two ends of each edge of a graph over ranks."""
    ends = np.array([*graph.edges], dtype=np.int64).reshape(-1, 2)
    return ends[:, 0], ends[:, 1]


def _random_pairs(size: int, probability: float, generator: random.Random) -> Edges:
    """Return the two ends of each edge of a graph, drawn as networkx does, with the same numbers, but fast."""
    if probability >= 1:
        return np.triu_indices(size, 1)
    # Both make floats of the same Mersenne twister in the same way, and the generator goes on where the draws end.
    version, (*words, position), gauss = generator.getstate()
    twister: Any = np.random.RandomState()
    twister.set_state(("MT19937", np.array(words, dtype=np.uint32), position))
    # Pairs (i, j), i < j, in lexicographic order.
    found = [np.flatnonzero(twister.random_sample(size - 1 - i) < probability) + i + 1 for i in range(size)]
    words, position = twister.get_state()[1:3]
    generator.setstate((version, (*map(int, words), int(position)), gauss))
    return np.repeat(np.arange(size), [len(others) for others in found]), np.concatenate(found)


def _adjacency(size: int, heard: np.ndarray, told: np.ndarray) -> SparseMatrix:
    """Return the graph in which the ranks `heard` hear the ranks `told`, each once and none itself."""
    return SparseMatrix.from_edges(size, heard, told).without_diagonal()


def _undirected(size: int, one: np.ndarray, other: np.ndarray) -> SparseMatrix:
    """Return the graph with the edges between ranks `one` and `other`."""
    return _adjacency(size, np.concatenate([one, other]), np.concatenate([other, one]))


def _bipartite(size: int, hubs: int) -> SparseMatrix:
    one, other = np.meshgrid(np.arange(hubs), np.arange(hubs, size))
    return _undirected(size, one.ravel(), other.ravel())


def _grid(name: str, dims: tuple[int, ...], *, periodic: bool, weights: str, lazy: bool) -> Topology:
    """Build the Cartesian grid with these extents, ranks in row-major order."""
    size = math.prod(dims)
    ranks = np.arange(size).reshape(dims)
    here, there = [], []
    for axis, extent in enumerate(dims):
        following = np.roll(ranks, -1, axis=axis)
        inner = slice(None) if periodic else slice(extent - 1)
        here.append(np.moveaxis(ranks, axis, 0)[inner].ravel())
        there.append(np.moveaxis(following, axis, 0)[inner].ravel())
    adjacency = _undirected(size, np.concatenate(here), np.concatenate(there))
    return _topology(name, adjacency, weights, lazy, dims=dims, periods=(periodic,) * len(dims))


def _topology(
    name: str,
    adjacency: SparseMatrix,
    weights: str,
    lazy: bool,
    dims: tuple[int, ...] | None = None,
    periods: tuple[bool, ...] | None = None,
) -> Topology:
    return Topology(name, mixing_matrix(adjacency, weights, lazy), dims, periods)
