"""Slow work of one rank, for which the others wait."""

import threading
import time

import pytest

from mpicomp.errors import CheckpointError
from mpicomp.exchange import loopback, patience
from mpicomp.exchange.patience import patiently


@pytest.fixture(autouse=True)
def short_rounds(monkeypatch):
    monkeypatch.setattr(patience, "PATIENCE_S", 0.02)


def test_all_ranks_move_while_one_works():
    def serve(world):
        moves = []

        def work():
            time.sleep(0.5 if world.rank == 0 else 0)
            return world.rank

        return patiently(world, work, lambda: moves.append(1)), len(moves)

    results = loopback.run(3, serve)
    assert [result for result, _ in results] == [0, 1, 2]
    assert all(moves >= 4 for _, moves in results)


def test_what_goes_wrong_on_one_rank_is_raised_on_all():
    def serve(world):
        def work():
            if world.rank == 1:
                raise CheckpointError("no such file")

        with pytest.raises(CheckpointError, match=r"no such file \(on rank 1\)"):
            patiently(world, work)
        return True

    assert all(loopback.run(3, serve))


def test_the_work_has_ended_when_the_wait_is_given_up():
    may_end, has_ended = threading.Event(), []

    def work():
        may_end.wait(10)
        has_ended.append(True)

    def give_up():
        may_end.set()
        raise KeyboardInterrupt

    def serve(world):
        with pytest.raises(KeyboardInterrupt):
            patiently(world, work, give_up)
        assert has_ended

    loopback.run(1, serve)
