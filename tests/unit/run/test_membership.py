"""Which ranks of a run are left."""

import json

from mpicomp.exchange.loopback import run
from mpicomp.run.asynchronous.membership import Crew
from mpicomp.topology import ring


def test_losses_are_counted_by_the_numbers_of_the_day():
    crew = run(1, Crew.of, None)[0]
    assert (crew.size, crew.left, crew.lost) == (1, [0], [])
    crew = Crew(5, list(range(5)))
    crew.lose([1], ["rank 1 on a"])
    crew.lose([0, 3], ["rank 0 on a", "rank 4 on a"])
    assert crew.left == [2, 3]
    assert crew.lost == ["rank 1 on a", "rank 0 on a", "rank 4 on a"]
    graph = crew.graph(ring(5))
    assert graph.sources(0) == [1] and graph.sources(1) == [0]


def test_a_checkpoint_has_all_of_it():
    crew = Crew(4, [0, 1, 3], ["rank 2 on a"], 17)
    (leaf,) = crew.leaves().values()
    assert Crew(**json.loads(leaf)) == crew
