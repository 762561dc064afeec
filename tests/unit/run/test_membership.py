"""Which ranks of a run are left."""

import json

from mpicomp.exchange.loopback import run
from mpicomp.run.asynchronous.membership import ElasticMembership
from mpicomp.topology import ring


def test_losses_are_counted_by_the_numbers_of_the_day():
    membership = run(1, ElasticMembership.of, None)[0]
    assert (membership.size, membership.left, membership.lost) == (1, [0], [])
    membership = ElasticMembership(5, list(range(5)))
    membership.lose([1], ["rank 1 on a"])
    membership.lose([0, 3], ["rank 0 on a", "rank 4 on a"])
    assert membership.left == [2, 3]
    assert membership.lost == ["rank 1 on a", "rank 0 on a", "rank 4 on a"]
    graph = membership.graph(ring(5))
    assert graph.sources(0) == [1] and graph.sources(1) == [0]


def test_a_checkpoint_has_all_of_it():
    membership = ElasticMembership(4, [0, 1, 3], ["rank 2 on a"], 17)
    (leaf,) = membership.leaves().values()
    assert ElasticMembership(**json.loads(leaf)) == membership
