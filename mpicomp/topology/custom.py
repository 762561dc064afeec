"""Graphs of the user: from a networkx graph, or from a file.

Nodes are the ranks 0 ... size-1. An edge u -> v of a directed graph means that u sends to v. Files by suffix:

- ``.txt``, ``.edges``, ``.edgelist``, ``.csv``: a line per undirected edge, ``u v`` or ``u v weight``, separated by
  blanks or a comma; ``#`` starts a comment
- ``.graphml``, ``.gml``: as networkx writes them
- ``.json``: node-link, ``{"directed": false, "nodes": [{"id": 0}, ...], "edges": [{"source": 0, "target": 1}, ...]}``
  (``"links"`` is read as well as ``"edges"``)
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias
from xml.etree.ElementTree import ParseError

import numpy as np

from mpicomp.errors import TopologyError, unknown_name
from mpicomp.topology.arguments import require_bool, require_size
from mpicomp.topology.base import TOLERANCE, Topology
from mpicomp.topology.shared import shared
from mpicomp.topology.sparse import SparseMatrix
from mpicomp.topology.spectral import require_connected
from mpicomp.topology.weights import WEIGHTS, lazy_matrix, mixing_matrix

if TYPE_CHECKING:  # imported where a graph is read: its import takes a tenth of that of all others
    import networkx as nx

Graph: TypeAlias = "nx.Graph[Any]"

GIVEN = "given"
"""The value of `weights` that takes the weights of the edges instead of a rule."""


def from_graph(graph: Graph, *, weights: str = "metropolis", lazy: bool = False, name: str = "graph") -> Topology:
    """Build the topology of a networkx graph with nodes 0 ... size-1.

    Args:
        graph: directed or not; parallel edges count once, loops not at all.
        weights: ``"metropolis"``, ``"uniform"``, ``"push"``, or ``"given"``: the edges' attribute ``weight``, with what
            is left of each row on the diagonal (or the weight of the loop, where there is one).
        lazy: whether to use ``(I + W) / 2``.
        name: for messages and results.

    Raises:
        TopologyError: the nodes are others, the graph is not connected, or given weights are not stochastic.
        ConfigError: the rule for weights does not exist.

    """
    if weights not in (*WEIGHTS, GIVEN):
        raise unknown_name("topology.weights", weights, (*WEIGHTS, GIVEN))
    nodes = _nodes_by_rank(graph, name)
    if weights == GIVEN:
        mixing = _given_weights(graph, nodes, name)
        if require_bool("topology.lazy", lazy):
            mixing = lazy_matrix(mixing)
    else:
        mixing = mixing_matrix(_adjacency(graph, nodes), weights, lazy)
    topology = Topology(name, mixing)
    require_connected(topology)
    return topology


def from_file(size: int, *, path: str | os.PathLike[str], weights: str = "metropolis", lazy: bool = False) -> Topology:
    """Read a graph of `size` nodes from a file, by its suffix; for the formats see the module.

    Args:
        size: the number of ranks.
        path: the file.
        weights: as in `from_graph`.
        lazy: as in `from_graph`.

    Raises:
        TopologyError: the file is missing or cannot be read, has another number of nodes, or `from_graph` refuses it.

    """
    size = require_size("file", size)
    if not isinstance(path, (str, os.PathLike)):
        raise TopologyError(f"topology.path = {path!r} must be the path of a file")
    path = Path(path)
    try:
        status = path.stat()
    except OSError as error:
        raise _unreadable(path, error) from error
    return _from_file(size, path, (status.st_mtime_ns, status.st_size), weights, lazy)


# A file that has changed is another one.
@shared
def _from_file(size: int, path: Path, version: tuple[int, int], weights: str, lazy: bool) -> Topology:
    graph = _read(path)
    if len(graph) != size:
        raise TopologyError(f"topology.path = {str(path)!r} has {len(graph)} nodes, but there are {size} ranks")
    return from_graph(graph, weights=weights, lazy=lazy, name=path.stem)


def _read(path: Path) -> Graph:
    import networkx as nx

    if path.suffix not in READERS:
        raise TopologyError(
            f"topology.path = {str(path)!r}: the suffix {path.suffix!r} is unknown. Known: {', '.join(READERS)}"
        )
    try:
        return READERS[path.suffix](path)
    except OSError as error:
        raise _unreadable(path, error) from error
    except (nx.NetworkXException, ParseError, ValueError, KeyError, TypeError) as error:
        raise TopologyError(f"topology.path = {str(path)!r} is not a valid {path.suffix} graph: {error}") from error


def _unreadable(path: Path, error: OSError) -> TopologyError:
    return TopologyError(f"topology.path = {str(path)!r} cannot be read: {error.strerror or error}")


def _read_edge_list(path: Path) -> Graph:
    import networkx as nx

    graph: Graph = nx.Graph()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        match line.partition("#")[0].replace(",", " ").split():
            case []:
                pass
            case [u, v]:
                graph.add_edge(u, v)
            case [u, v, weight]:
                graph.add_edge(u, v, weight=float(weight))
            case _:
                raise ValueError(f"line {number} is not 'u v' or 'u v weight': {line!r}")
    return graph


def _read_graphml(path: Path) -> Graph:
    import networkx as nx

    return nx.read_graphml(path)


def _read_gml(path: Path) -> Graph:
    import networkx as nx

    return nx.read_gml(path)


def _read_node_link(path: Path) -> Graph:
    import networkx as nx

    # networkx itself reads either "links" or "edges", depending on its version.
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError("the file holds no JSON object")
    graph: Graph = nx.DiGraph() if content.get("directed") else nx.Graph()
    graph.add_nodes_from(node["id"] for node in content["nodes"])
    edges = content["edges"] if "edges" in content else content["links"]
    graph.add_edges_from((edge["source"], edge["target"], edge) for edge in edges)
    return graph


READERS: dict[str, Callable[[Path], Graph]] = {
    ".txt": _read_edge_list,
    ".edges": _read_edge_list,
    ".edgelist": _read_edge_list,
    ".csv": _read_edge_list,
    ".graphml": _read_graphml,
    ".gml": _read_gml,
    ".json": _read_node_link,
}
"""Every format by its suffix."""


def _nodes_by_rank(graph: Graph, name: str) -> list[Any]:
    """Return the nodes in the order of their ranks; text such as ``"3"`` is read as a number."""
    try:
        nodes = {int(str(node)): node for node in graph}
    except ValueError:
        nodes = {}
    if not nodes or sorted(nodes) != list(range(len(graph))):
        shown = ", ".join(str(node) for node in list(graph)[:8]) or "no node at all"
        raise TopologyError(
            f"topology {name!r}: the nodes must be the ranks 0 ... {max(len(graph) - 1, 0)}, not {shown}; "
            "networkx.convert_node_labels_to_integers renames them"
        )
    return [nodes[rank] for rank in range(len(nodes))]


def _adjacency(graph: Graph, nodes: list[Any]) -> SparseMatrix:
    """Return who hears whom, without loops."""
    ranks = {node: rank for rank, node in enumerate(nodes)}
    ends = np.array([(ranks[receiver], ranks[sender]) for sender, receiver in graph.edges()]).reshape(-1, 2).astype(int)
    if not graph.is_directed():
        ends = np.concatenate([ends, ends[:, ::-1]])
    return SparseMatrix.from_edges(len(nodes), ends[:, 0], ends[:, 1]).without_diagonal()


def _given_weights(graph: Graph, nodes: list[Any], name: str) -> SparseMatrix:
    """Return the mixing matrix of the edges' weights, what is left of each row on the diagonal."""

    if graph.is_multigraph():
        raise TopologyError(
            f"topology.weights = 'given': graph {name!r} has parallel edges, whose weights are ambiguous"
        )
    for u, v, data in graph.edges(data=True):
        if not isinstance(data.get("weight"), Real):
            raise TopologyError(f"topology.weights = 'given': edge {u} - {v} of graph {name!r} has no weight")
    ranks = {node: rank for rank, node in enumerate(nodes)}
    weights = {(ranks[v], ranks[u]): float(data["weight"]) for u, v, data in graph.edges(data=True)}
    if not graph.is_directed():
        weights |= {(u, v): weight for (v, u), weight in weights.items()}
    ends = np.array([*weights], dtype=int).reshape(-1, 2)
    edges = SparseMatrix.from_edges(len(nodes), ends[:, 0], ends[:, 1])
    values = [weights[place] for place in zip(edges.rows.tolist(), edges.indices.tolist(), strict=True)]
    given = SparseMatrix(edges.indptr, edges.indices, np.array(values, dtype=float))
    rest = 1 - given.row_sums
    without_loop = np.ones(len(nodes), dtype=bool)
    without_loop[edges.indices[edges.rows == edges.indices]] = False
    for rank in np.flatnonzero(without_loop & (rest < -TOLERANCE)):
        raise TopologyError(
            f"topology.weights = 'given': the weights of rank {rank} of graph {name!r} sum to {1 - rest[rank]:.6g}, "
            "more than 1"
        )
    diagonal = given.diagonal() + np.where(without_loop, np.maximum(rest, 0), 0)
    return given.without_diagonal().with_diagonal(diagonal).without_zeros()
