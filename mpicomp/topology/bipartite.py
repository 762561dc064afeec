"""The two sides of a bipartite graph, whose edges all lead from one side to the other."""

from __future__ import annotations

from mpicomp.topology.base import Topology


def sides(graph: Topology) -> tuple[frozenset[int], frozenset[int]] | None:
    """Return the sides of a connected undirected graph, the larger one first, of two equal ones that of rank 0.

    None if the graph is not bipartite: it has a cycle of odd length, such as a triangle.
    """
    side = {0: 0}
    frontier = [0]
    while frontier:
        rank = frontier.pop()
        for neighbor in graph.targets(rank):
            if neighbor not in side:
                side[neighbor] = 1 - side[rank]
                frontier.append(neighbor)
            elif side[neighbor] == side[rank]:
                return None
    first, second = (frozenset(rank for rank, own in side.items() if own == which) for which in (0, 1))
    return (first, second) if len(first) >= len(second) else (second, first)
