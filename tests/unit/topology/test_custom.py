"""Graphs from networkx and from files."""

import json

import networkx as nx
import numpy as np
import pytest

from mpicomp import topology as topologies
from mpicomp.errors import ConfigError, TopologyError
from mpicomp.topology import from_file, from_graph

HOUSE = [(3, 1), (0, 1), (1, 2), (2, 3), (3, 0), (2, 4), (3, 4)]


@pytest.fixture
def house():
    return nx.Graph(HOUSE)


def test_a_cycle_is_the_ring():
    np.testing.assert_allclose(from_graph(nx.cycle_graph(6)).mixing, topologies.ring(6).mixing)


def test_ranks_are_the_labels_not_the_order():
    graph = from_graph(nx.Graph([("2", "1"), ("1", "0")]))
    assert [graph.sources(rank) for rank in range(3)] == [[1], [0, 2], [1]]


def test_loops_and_parallel_edges_count_once():
    graph = from_graph(nx.MultiGraph([(0, 1), (0, 1), (1, 0), (1, 1)]))
    assert graph.mixing.tolist() == [[0.5, 0.5], [0.5, 0.5]]


def test_an_edge_points_from_sender_to_receiver():
    graph = from_graph(nx.DiGraph([(0, 1), (1, 2), (2, 0)]))
    assert graph.targets(0) == [1]
    assert graph.sources(0) == [2]


def test_given_weights_leave_the_rest_on_the_diagonal():
    net = nx.DiGraph()
    net.add_weighted_edges_from([(0, 1, 0.25), (1, 0, 0.5)])
    assert from_graph(net, weights="given").mixing.tolist() == [[0.5, 0.5], [0.25, 0.75]]
    assert from_graph(net, weights="given", lazy=True).mixing.tolist() == [[0.75, 0.25], [0.125, 0.875]]


def test_given_weights_of_a_loop_are_the_diagonal():
    net = nx.Graph()
    net.add_weighted_edges_from([(0, 1, 0.5), (0, 0, 0.5)])
    assert from_graph(net, weights="given").mixing.tolist() == [[0.5, 0.5], [0.5, 0.5]]
    net.add_edge(1, 1, weight=0.25)
    with pytest.raises(TopologyError, match=r"row 1 sums to 0.75 instead of 1"):
        from_graph(net, weights="given")


@pytest.mark.parametrize(
    ("edges", "message"),
    [
        ([(0, 1, {})], "edge 0 - 1 of graph 'graph' has no weight"),
        ([(0, 1, {"weight": "half"})], "edge 0 - 1 of graph 'graph' has no weight"),
        ([(0, 1, {"weight": 1.5})], "the weights of rank 0 of graph 'graph' sum to 1.5, more than 1"),
        ([(0, 1, {"weight": -0.5})], "finite and non-negative"),
        ([(0, 1, {"weight": 0.0})], "is not connected"),
    ],
)
def test_bad_given_weights_are_refused(edges, message):
    with pytest.raises(TopologyError, match=message):
        from_graph(nx.Graph(edges), weights="given")


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (nx.Graph([("a", "b")]), r"must be the ranks 0 ... 1, not a, b; networkx.convert_node_labels_to_integers"),
        (nx.Graph([(1, 2)]), r"must be the ranks 0 ... 1, not 1, 2"),
        (nx.Graph([(0, "0"), (0, 1)]), r"must be the ranks 0 ... 2, not 0, 0, 1"),
        (nx.Graph(), "not no node at all"),
        (nx.Graph([(0, 1), (2, 3)]), r"is not connected: 2 of 4 ranks \(2, 3\)"),
        (nx.DiGraph([(0, 1)]), "metropolis"),
    ],
)
def test_bad_graphs_are_refused(net, message):
    with pytest.raises(TopologyError, match=message):
        from_graph(net)


def test_a_one_way_street_is_not_connected():
    with pytest.raises(TopologyError, match="is not connected"):
        from_graph(nx.DiGraph([(0, 1)]), weights="uniform")


def test_parallel_edges_have_no_given_weight():
    with pytest.raises(TopologyError, match="has parallel edges"):
        from_graph(nx.MultiGraph([(0, 1), (0, 1)]), weights="given")


def test_an_unknown_rule_is_refused():
    with pytest.raises(ConfigError, match=r"topology.weights = 'give' is unknown. Did you mean 'given'\?"):
        from_graph(nx.path_graph(2), weights="give")


def write_edge_list(net, path):
    path.write_text("# the house\n" + "".join(f"{u} {v} # edge\n" for u, v in net.edges) + "\n")


def write_csv(net, path):
    path.write_text("".join(f"{u}, {v}, 0.2\n" for u, v in net.edges))


def write_json(net, path):
    edges = [{"source": u, "target": v} for u, v in net.edges]
    path.write_text(json.dumps({"nodes": [{"id": node} for node in net], "links": edges}))


@pytest.mark.parametrize(
    ("suffix", "write"),
    [
        (".txt", write_edge_list),
        (".edges", write_edge_list),
        (".edgelist", lambda net, path: nx.write_edgelist(net, path, data=False)),
        (".csv", write_csv),
        (".graphml", nx.write_graphml_xml),
        (".gml", nx.write_gml),
        (".json", write_json),
        (".json", lambda net, path: path.write_text(json.dumps(nx.node_link_data(net)))),
    ],
)
def test_every_format_gives_the_same_graph(tmp_path, house, suffix, write):
    path = tmp_path / f"house{suffix}"
    write(house, path)
    graph = from_file(5, path=path)
    np.testing.assert_allclose(graph.mixing, from_graph(house).mixing)
    assert graph.name == "house"


def test_given_weights_are_read_from_an_edge_list(tmp_path):
    path = tmp_path / "pair.txt"
    path.write_text("0 1 0.25\n")
    assert from_file(2, path=str(path), weights="given").mixing.tolist() == [[0.75, 0.25], [0.25, 0.75]]


def test_directed_json(tmp_path):
    path = tmp_path / "loop.json"
    path.write_text(json.dumps(nx.node_link_data(nx.cycle_graph(3, create_using=nx.DiGraph))))
    assert from_file(3, path=path).targets(0) == [1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "0 1 2 3\n", r"a.txt' is not a valid .txt graph: line 1 is not 'u v' or 'u v weight': '0 1 2 3'"),
        ("a.txt", "0 1 heavy\n", "is not a valid .txt graph: could not convert"),
        ("a.txt", "0 1\n2 3\n", "is not connected"),
        ("a.txt", "0 1\n", "has 2 nodes, but there are 4 ranks"),
        ("a.json", "{", "is not a valid .json graph"),
        ("a.json", "[]", "is not a valid .json graph"),
        ("a.json", '{"nodes": []}', "is not a valid .json graph: 'links'"),
        ("a.gml", "graph [ node [ id 0 ] ]", "is not a valid .gml graph"),
        ("a.graphml", "<graphml", "is not a valid .graphml graph"),
        ("a.png", "", "the suffix '.png' is unknown. Known: .txt, .edges"),
    ],
)
def test_bad_files_are_refused(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(TopologyError, match=message):
        from_file(4, path=path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(TopologyError, match=r"topology.path = .*none.txt' cannot be read: No such file"):
        from_file(4, path=tmp_path / "none.txt")
    with pytest.raises(TopologyError, match=r"topology.path = 5 must be the path of a file"):
        from_file(4, path=5)
