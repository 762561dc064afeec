"""Star and ring, the graphs for sums over all ranks: their edges by direction, and recognition of such graphs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from mpicomp.topology.base import Topology
from mpicomp.topology.sparse import SparseMatrix
from mpicomp.topology.weights import uniform


@dataclass(frozen=True, eq=False)
class Star:
    """A star: one hub, connected with all other ranks.

    Attributes:
        hub: the rank in the middle.
        up: the edges to the hub.
        down: the edges from the hub.

    """

    hub: int
    up: Topology
    down: Topology


@dataclass(frozen=True, eq=False)
class Ring:
    """A ring: one cycle through all ranks.

    Attributes:
        order: the ranks along it, from rank 0 on.
        onward: the edges from each rank to the next.

    """

    order: tuple[int, ...]
    onward: Topology


@lru_cache
def star_or_ring(graph: Topology) -> Star | Ring | None:
    """Return `graph` as a star or a ring, judged by its edges only; None if it is neither."""
    size = graph.size
    neighbors = [graph.targets(rank) for rank in range(size)]
    if any(graph.sources(rank) != neighbors[rank] for rank in range(size)):
        return None
    order = _cycle(neighbors)
    if len(order) == size > 1:
        return Ring(tuple(order), _directed("onward", size, {(order[i - 1], order[i]) for i in range(size)}))
    hubs = [rank for rank in range(size) if len(neighbors[rank]) == size - 1]
    if len(hubs) != 1 or sum(map(len, neighbors)) != 2 * (size - 1):
        return None
    (hub,) = hubs
    others = set(range(size)) - {hub}
    return Star(
        hub,
        _directed("up", size, {(rank, hub) for rank in others}),
        _directed("down", size, {(hub, rank) for rank in others}),
    )


def _cycle(neighbors: list[list[int]]) -> list[int]:
    """Return the ranks along the cycle from 0 towards its smaller neighbor; not all ranks if the graph is no ring."""
    degree = min(len(neighbors) - 1, 2)
    if any(len(of) != degree for of in neighbors):
        return []
    order, seen = [0], {0}
    while onward := [rank for rank in neighbors[order[-1]] if rank not in seen]:
        order.append(onward[0])
        seen.add(onward[0])
    return order


def _directed(name: str, size: int, edges: set[tuple[int, int]]) -> Topology:
    """Return the graph of `edges` (from, to); its weights have no meaning."""
    sources, targets = zip(*edges, strict=True) if edges else ((), ())
    return Topology(name, uniform(SparseMatrix.from_edges(size, [*targets], [*sources])))
