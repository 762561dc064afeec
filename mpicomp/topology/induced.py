"""The graph that remains when ranks have died."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mpicomp.topology.base import Topology
from mpicomp.topology.weights import metropolis


def induced(topology: Topology, ranks: Sequence[int]) -> Topology:
    """Return the subgraph of the edges between `ranks`, numbered anew in their order, with Metropolis weights.

    It may be disconnected.

    Raises:
        TopologyError: the graph is directed, and its degrees differ.

    """
    edges = topology.mixing[np.ix_(ranks, ranks)] != 0
    np.fill_diagonal(edges, False)
    return Topology(f"{topology.name}, {len(ranks)} of {topology.size} ranks", metropolis(edges))
