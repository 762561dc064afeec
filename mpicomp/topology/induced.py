"""What is left of a graph when ranks have gone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mpicomp.topology.base import Topology
from mpicomp.topology.weights import metropolis


def induced(topology: Topology, ranks: Sequence[int]) -> Topology:
    """Return the graph of the edges between `ranks`, numbered anew in that order, with Metropolis weights.

    It need not be connected.

    Raises:
        TopologyError: a directed graph whose degrees differ.

    """
    edges = topology.mixing[np.ix_(ranks, ranks)] != 0
    np.fill_diagonal(edges, False)
    return Topology(f"{topology.name}, {len(ranks)} of {topology.size} ranks", metropolis(edges))
