"""Topologies, who talks to whom: graphs over ranks and their mixing weights. Needs neither torch nor MPI."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mpicomp.plugins import make
from mpicomp.topology.base import TOLERANCE, Schedule, Topology
from mpicomp.topology.custom import from_file, from_graph
from mpicomp.topology.dynamic import OnePeerExponential, RandomMatching
from mpicomp.topology.induced import induced
from mpicomp.topology.spectral import (
    PeriodicSchedule,
    best_diffusion_step,
    period_product,
    require_connected,
    spectral_gap,
)
from mpicomp.topology.static import (
    chain,
    complete,
    complete_bipartite,
    directed_ring,
    dyck,
    erdos_renyi,
    exponential,
    hypercube,
    random_digraph,
    random_regular,
    ring,
    star,
    torus,
)

__all__ = [
    "TOLERANCE",
    "TOPOLOGIES",
    "OnePeerExponential",
    "PeriodicSchedule",
    "RandomMatching",
    "Schedule",
    "Topology",
    "best_diffusion_step",
    "chain",
    "complete",
    "complete_bipartite",
    "directed_ring",
    "dyck",
    "erdos_renyi",
    "exponential",
    "from_file",
    "from_graph",
    "hypercube",
    "induced",
    "make_topology",
    "period_product",
    "random_digraph",
    "random_regular",
    "require_connected",
    "ring",
    "spectral_gap",
    "star",
    "torus",
]

TOPOLOGIES: dict[str, Callable[..., Schedule]] = {
    "chain": chain,
    "complete": complete,
    "complete_bipartite": complete_bipartite,
    "directed_ring": directed_ring,
    "dyck": dyck,
    "erdos_renyi": erdos_renyi,
    "exponential": exponential,
    "file": from_file,
    "hypercube": hypercube,
    "one_peer_exponential": OnePeerExponential,
    "random_digraph": random_digraph,
    "random_matching": RandomMatching,
    "random_regular": random_regular,
    "ring": ring,
    "star": star,
    "torus": torus,
}
"""Every topology by its name in the configuration: ``TOPOLOGIES[kind](size, **parameters)``."""


def make_topology(kind: str, size: int, **parameters: Any) -> Schedule:
    """Build the topology `kind` over `size` ranks with parameters from a configuration.

    Raises:
        ConfigError: a kind that does not exist, or a parameter that it does not have or lacks.
        TopologyError: a graph that does not exist at this size.

    """
    schedule: Schedule = make("topology.kind", kind, TOPOLOGIES, Schedule, size, **parameters)
    return schedule
