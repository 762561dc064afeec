"""The sides of bipartite graphs, against networkx."""

import networkx as nx
import pytest

from mpicomp.topology import chain, complete, complete_bipartite, dyck, hypercube, random_regular, ring, star, torus
from mpicomp.topology.bipartite import sides

GRAPHS = [ring(n) for n in range(1, 9)] + [chain(5), star(1), star(5), complete(2), complete(4), hypercube(8)]
GRAPHS += [torus(12), torus(16), torus(9), dyck(32), complete_bipartite(7, 3), random_regular(8, degree=3, seed=1)]


@pytest.mark.parametrize("graph", GRAPHS, ids=lambda g: f"{g.name}{g.size}")
def test_every_edge_leads_to_the_other_side(graph):
    edges = nx.Graph((rank, target) for rank in range(graph.size) for target in graph.targets(rank))
    edges.add_nodes_from(range(graph.size))
    found = sides(graph)
    assert (found is not None) == nx.is_bipartite(edges)
    if found is not None:
        assert found[0] | found[1] == set(range(graph.size)) and not found[0] & found[1]
        assert all((a in found[0]) != (b in found[0]) for a, b in edges.edges)
        assert len(found[0]) > len(found[1]) or (len(found[0]) == len(found[1]) and 0 in found[0])
