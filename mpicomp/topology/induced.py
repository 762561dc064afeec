"""The graph that remains when ranks have died."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mpicomp.topology.base import Topology
from mpicomp.topology.sparse import SparseMatrix
from mpicomp.topology.weights import metropolis


def induced(topology: Topology, ranks: Sequence[int]) -> Topology:
    """Return the subgraph of the edges between `ranks`, numbered anew in their order, with Metropolis weights.

    It may be disconnected.

    Raises:
        TopologyError: the graph is directed, and its degrees differ.

    """
    numbers = np.full(topology.size, -1)
    numbers[list(ranks)] = np.arange(len(ranks))
    matrix = topology.matrix.without_diagonal()
    heard, told = numbers[matrix.rows], numbers[matrix.indices]
    kept = (heard >= 0) & (told >= 0)
    edges = SparseMatrix.from_edges(len(ranks), heard[kept], told[kept])
    return Topology(f"{topology.name}, {len(ranks)} of {topology.size} ranks", metropolis(edges))
