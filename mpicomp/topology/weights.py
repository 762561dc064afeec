"""Rules for the weights of a graph.

With ``deg_i`` the number of ranks that rank i hears (without itself):

- metropolis: ``W[i, j] = 1 / (1 + max(deg_i, deg_j))`` on edges, the rest of each row on the diagonal. Symmetric and
  doubly stochastic on every undirected graph (Xiao, Boyd and Lall 2005, doi 10.1109/IPSN.2005.1440896).
- uniform: ``W[i, j] = 1 / (1 + deg_i)``, itself included. Rows always sum to one; columns do where all degrees agree,
  otherwise the ranks agree on a mean weighted by ``1 + deg_i``.

Both are the same on a regular graph. The lazy variant ``(I + W) / 2`` has no negative eigenvalue where W is symmetric,
as some proofs ask, and mixes about half as fast.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mpicomp.errors import TopologyError, unknown_name
from mpicomp.topology.arguments import require_bool


def mixing_matrix(adjacency: np.ndarray, weights: str, lazy: bool) -> np.ndarray:
    """Return the (size, size) float64 mixing matrix of a simple graph.

    Args:
        adjacency: (size, size) bool, false on the diagonal; entry (i, j): rank i hears rank j.
        weights: a name of `WEIGHTS`.
        lazy: whether to return ``(I + W) / 2``.

    Raises:
        ConfigError: a rule that does not exist.
        TopologyError: metropolis on a directed graph whose degrees differ, where it is not doubly stochastic.

    """
    if weights not in WEIGHTS:
        raise unknown_name("topology.weights", weights, WEIGHTS)
    mixing = WEIGHTS[weights](adjacency)
    return lazy_matrix(mixing) if require_bool("topology.lazy", lazy) else mixing


def lazy_matrix(mixing: np.ndarray) -> np.ndarray:
    """Return ``(I + W) / 2``."""
    lazy: np.ndarray = (np.eye(len(mixing)) + mixing) / 2
    return lazy


def metropolis(adjacency: np.ndarray) -> np.ndarray:
    """Return ``W[i, j] = 1 / (1 + max(deg_i, deg_j))`` on edges, the rest on the diagonal."""
    degrees = adjacency.sum(axis=1)
    regular = len({*degrees, *adjacency.sum(axis=0)}) == 1
    if not regular and not np.array_equal(adjacency, adjacency.T):
        raise TopologyError(
            "topology.weights = 'metropolis' is for undirected graphs, and for directed ones in which every rank has "
            "the same number of sources and targets; use 'uniform' for this graph"
        )
    mixing: np.ndarray = adjacency / (1 + np.maximum.outer(degrees, degrees))
    np.fill_diagonal(mixing, 1 - mixing.sum(axis=1))
    return mixing


def uniform(adjacency: np.ndarray) -> np.ndarray:
    """Return ``W[i, j] = 1 / (1 + deg_i)`` on edges and on the diagonal."""
    heard = adjacency | np.eye(len(adjacency), dtype=bool)
    mixing: np.ndarray = heard / heard.sum(axis=1, keepdims=True)
    return mixing


WEIGHTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"metropolis": metropolis, "uniform": uniform}
"""Every rule by its name in the configuration."""
