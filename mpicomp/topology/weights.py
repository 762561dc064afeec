"""Rules for the weights of a graph.

With ``deg_i`` the number of ranks that rank i hears (without itself):

- metropolis: ``W[i, j] = 1 / (1 + max(deg_i, deg_j))`` on edges, the rest of each row on the diagonal. Symmetric and
  doubly stochastic on every undirected graph (Xiao, Boyd and Lall 2005, doi 10.1109/IPSN.2005.1440896).
- uniform: ``W[i, j] = 1 / (1 + deg_i)``, itself included. Rows always sum to one; columns do where all degrees agree,
  otherwise the ranks agree on a mean weighted by ``1 + deg_i``.
- push: ``W[i, j] = 1 / (1 + out_j)``, itself included, with ``out_j`` the number of ranks to which rank j sends.
  Columns always sum to one, also on directed graphs, as push-sum needs (Kempe, Dobra and Gehrke 2003,
  doi 10.1109/SFCS.2003.1238221).

All are the same on a regular graph. The lazy variant ``(I + W) / 2`` has no negative eigenvalue where W is symmetric,
as some proofs ask, and mixes about half as fast.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mpicomp.errors import TopologyError, unknown_name
from mpicomp.topology.arguments import require_bool
from mpicomp.topology.sparse import SparseMatrix


def mixing_matrix(adjacency: SparseMatrix, weights: str, lazy: bool) -> SparseMatrix:
    """Return the mixing matrix of a simple graph.

    Args:
        adjacency: one where rank i hears rank j, (i, j); nothing on the diagonal.
        weights: a name of `WEIGHTS`.
        lazy: whether to return ``(I + W) / 2``.

    Raises:
        ConfigError: a rule that does not exist.
        TopologyError: metropolis on a directed graph whose degrees differ, where it is not doubly stochastic.

    """
    mixing = rule(weights)(adjacency)
    return lazy_matrix(mixing) if require_bool("topology.lazy", lazy) else mixing


def complete_weights(size: int, weights: str, lazy: bool) -> tuple[float, np.ndarray]:
    """Return the weights of the complete graph by `mixing_matrix`: for another rank, and of each rank for itself."""
    own = np.full(size, 1 / size)
    if rule(weights) is metropolis:
        # As for any other graph, to the last bit, but without its square of entries.
        for rank in range(size):
            row = np.full(size, 1 / size)
            row[rank] = 0
            own[rank] = 1 - row.sum()
    return (1 / size / 2, (1 + own) / 2) if require_bool("topology.lazy", lazy) else (1 / size, own)


def rule(weights: str) -> Callable[[SparseMatrix], SparseMatrix]:
    """Return the rule of this name.

    Raises:
        ConfigError: there is none.

    """
    if weights not in WEIGHTS:
        raise unknown_name("topology.weights", weights, WEIGHTS)
    return WEIGHTS[weights]


def lazy_matrix(mixing: SparseMatrix) -> SparseMatrix:
    """Return ``(I + W) / 2``."""
    halves = SparseMatrix(mixing.indptr, mixing.indices, mixing.values / 2).without_diagonal()
    return halves.with_diagonal((1 + mixing.diagonal()) / 2)


def metropolis(adjacency: SparseMatrix) -> SparseMatrix:
    """Return ``W[i, j] = 1 / (1 + max(deg_i, deg_j))`` on edges, the rest on the diagonal."""
    degrees = adjacency.counts
    is_regular = len({*degrees.tolist(), *adjacency.column_counts.tolist()}) == 1
    if not is_regular and not adjacency.same_places(adjacency.transposed):
        raise TopologyError(
            "topology.weights = 'metropolis' is for undirected graphs, and for directed ones in which every rank has "
            "the same number of sources and targets; use 'push' for this graph, with algorithm.kind = 'sgp'"
        )
    values = 1 / (1 + np.maximum(degrees[adjacency.rows], degrees[adjacency.indices]))
    edges = SparseMatrix(adjacency.indptr, adjacency.indices, values)
    return edges.with_diagonal(1 - edges.dense_row_sums)


def uniform(adjacency: SparseMatrix) -> SparseMatrix:
    """Return ``W[i, j] = 1 / (1 + deg_i)`` on edges and on the diagonal."""
    shares = 1 / (1 + adjacency.counts)
    return SparseMatrix(adjacency.indptr, adjacency.indices, shares[adjacency.rows]).with_diagonal(shares)


def push(adjacency: SparseMatrix) -> SparseMatrix:
    """Return ``W[i, j] = 1 / (1 + out_j)`` on edges and on the diagonal."""
    shares = 1 / (1 + adjacency.column_counts)
    return SparseMatrix(adjacency.indptr, adjacency.indices, shares[adjacency.indices]).with_diagonal(shares)


WEIGHTS: dict[str, Callable[[SparseMatrix], SparseMatrix]] = {
    "metropolis": metropolis,
    "uniform": uniform,
    "push": push,
}
"""Every rule by its name in the configuration."""
