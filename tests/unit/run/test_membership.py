"""Which ranks of a run are left."""

from mpicomp.run.membership import ElasticMembership
from mpicomp.topology import ring


def test_losses_are_counted_by_the_numbers_of_the_day():
    assert ElasticMembership.of({}, 2) == ElasticMembership(2, [0, 1])
    membership = ElasticMembership(5, list(range(5)))
    membership.lose([1], ["rank 1 on a"])
    membership.lose([0, 3], ["rank 0 on a", "rank 4 on a"])
    assert membership.left == [2, 3]
    assert membership.lost == ["rank 1 on a", "rank 0 on a", "rank 4 on a"]
    graph = membership.graph(ring(5))
    assert graph.sources(0) == [1] and graph.sources(1) == [0]


def test_a_checkpoint_has_all_of_it():
    membership = ElasticMembership(4, [0, 1, 3], ["rank 2 on a"], 17)
    assert ElasticMembership.of(membership.leaves(), 3) == membership
    # after --resize, only the names are of use
    assert ElasticMembership.of(membership.leaves(), 2) == ElasticMembership(2, [0, 1], ["rank 2 on a"])
