"""AdaGossip's step on directed graphs: the script does what the methods do, and why it does not help."""

import sys
from pathlib import Path

import numpy as np
import pytest
from support.quadratic import DIM, centers, curvature
from support.quadratic import train as train_method

from mpicomp.algorithms import SGP, AdaGossip
from mpicomp.compression import TopK
from mpicomp.topology import OnePeerExponential, directed_ring, random_digraph, ring

sys.path.insert(0, str(Path(__file__).parents[3] / "scripts" / "studies"))

from adaptive_push import RULES, train

KEPT = 6
TOP = TopK(ratio=KEPT / DIM)
RATES = [0.1] * 20 + [0.05] * 20


@pytest.mark.parametrize(
    ("rule", "gamma", "graph", "method"),
    [
        (RULES[0], 0.2, random_digraph(6), SGP(0.2, TOP)),
        (RULES[0], 0.7, OnePeerExponential(6), SGP(0.7)),
        (RULES[1], 0.05, ring(6), AdaGossip(0.05, TOP)),
    ],
    ids=str,
)
def test_it_is_the_method_where_there_is_one(rule, gamma, graph, method):
    found = train(rule, gamma, graph, centers(6), curvature(), RATES, kept=KEPT)
    np.testing.assert_allclose(found, train_method(method, graph, 40, lr=RATES).x, rtol=0, atol=1e-11)


@pytest.mark.parametrize("graph", [ring(6), directed_ring(6)], ids=lambda graph: graph.name)
def test_unequal_steps_move_the_mean_away_from_the_optimum(graph):
    def mean_error(rule, gamma):
        x = train(rule, gamma, graph, centers(6), curvature(), np.linspace(0.1, 0, 600), kept=KEPT)
        return np.linalg.norm(x.mean(axis=0) - centers(6).mean(axis=0))

    assert mean_error(RULES[0], 0.2) < 1e-6
    assert mean_error(RULES[2], 0.03) < 1e-6
    assert mean_error(RULES[1], 0.03) > 0.3
