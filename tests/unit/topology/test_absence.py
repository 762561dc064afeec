"""Traces of who is away when, and the graphs of those that are there."""

import numpy as np
import pytest

from mpicomp.errors import ConfigError
from mpicomp.topology import RandomMatching, ring
from mpicomp.topology.absence import Absences, WithAbsences, without


@pytest.fixture
def read(tmp_path):
    path = tmp_path / "trace.csv"

    def read(*rows, size=4):
        path.write_text("\n".join(["rank,leaves,returns", *rows, ""]))
        return Absences.read(path, size)

    return read


def test_a_rank_is_away_from_leaving_to_returning(read):
    absences = read("3, 2, 4", "", "1,3,", "3,6,7")
    away = [sorted(absences.away(step)) for step in range(8)]
    assert away == [[], [], [3], [1, 3], [1], [1], [1, 3], [1]]
    assert absences.away(10**9) == {1}


def test_the_weights_of_an_absent_rank_go_to_the_diagonal():
    left = without(ring(4), frozenset({2}))
    assert np.allclose(left.mixing, np.array([[1, 1, 0, 1], [1, 2, 0, 0], [0, 0, 3, 0], [1, 0, 0, 2]]) / 3, atol=1e-15)
    assert left.weight(2, 2) == 1 and not left.sources(2) and not left.targets(2)
    assert left.is_symmetric and left.is_doubly_stochastic
    assert left.weight(0, 0) == ring(4).weight(0, 0)


def test_graphs_of_a_varying_schedule_lose_the_ranks_that_are_away_when_they_mix(read):
    # The graphs 0, 1, 2 are those of steps 1, 3, 5.
    matching = RandomMatching(4)
    schedule = WithAbsences(matching, read("0,2,4", "1,4,5"), period=2)
    assert schedule(0) is matching(0) and schedule(2) is matching(2)
    assert not schedule(1).sources(0)
    (partner,) = matching(1).sources(0)
    others = [rank for rank in range(1, 4) if rank != partner]
    assert not schedule(1).sources(partner) and schedule(1).sources(others[0]) == [others[1]]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["4,1,2"], r"trace.csv, line 2: there is no rank 4 among 4 ranks, which are 0 to 3"),
        (["1,1,2", "1,2"], r"trace.csv, line 3: has 2 entries, and must have 3: rank,leaves,returns"),
        (["1,-1,2"], r"trace.csv, line 2: leaves = '-1' must be a whole number of at least 0$"),
        (["1,1,soon"], r"line 2: returns = 'soon' must be a whole number of at least 0, or nothing if the rank does"),
        (["1,5,5"], r"trace.csv, line 2: returns = 5 must be after leaves = 5"),
        (["1,5,9", "2,5,9", "1,8,"], r"line 4: rank 1 leaves after 8 steps, but is away then: see line 2"),
        (["1,5,", "1,8,9"], r"line 3: rank 1 leaves after 8 steps, but is away then: see line 2"),
        (["0,1,9", "1,2,9", "2,3,9", "3,8,"], r"line 5: with rank 3, all 4 ranks are away after 8 steps"),
    ],
)
def test_a_wrong_trace_is_refused_with_its_line(read, rows, message):
    with pytest.raises(ConfigError, match=message):
        read(*rows)


def test_a_file_that_is_no_trace_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"simulation.churn = '.*none.csv': cannot be read: .*No such file"):
        Absences.read(tmp_path / "none.csv", 4)
    for content, message in ((b"", "and is ''"), (b"3,1,2\n", "and is '3,1,2'")):
        (tmp_path / "trace.csv").write_bytes(content)
        with pytest.raises(
            ConfigError, match=f"trace.csv, line 1: must be 'rank,leaves,returns', the columns, {message}"
        ):
            Absences.read(tmp_path / "trace.csv", 4)
    (tmp_path / "trace.csv").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"cannot be read: .*utf-8"):
        Absences.read(tmp_path / "trace.csv", 4)
