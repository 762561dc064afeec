"""What the doctor says of what it has found."""

from types import SimpleNamespace

from mpicomp.cli.doctor import find_advice, find_problems


def place(rank, core_share=1.0, uuid=None):
    return SimpleNamespace(rank=rank, host="node1", local_size=4, cores=2, core_share=core_share, gpu=uuid, uuid=uuid)


def library(thread_level="serialized"):
    return SimpleNamespace(thread_level=thread_level)


def test_nothing_is_wrong():
    trials = {"neighbor exchange": SimpleNamespace(problem=""), "one-sided window": SimpleNamespace(problem="")}
    assert find_problems(library(), [place(0, uuid="a"), place(1, uuid="b")], trials) == []


def test_a_trial_that_failed_has_a_remedy():
    problems = find_problems(
        library(), [place(0)], {"neighbor exchange": SimpleNamespace(problem="rank 1: wrong bytes")}
    )
    assert len(problems) == 1
    assert problems[0].startswith("the neighbor exchange fails: rank 1: wrong bytes. Try ")


def test_a_shared_gpu_is_a_problem():
    (problem,) = find_problems(library(), [place(0, uuid="GPU-7"), place(1, uuid="GPU-7")], {})
    assert "ranks 0, 1 share the GPU GPU-7" in problem


def test_too_low_a_thread_level_is_a_problem():
    (problem,) = find_problems(library("funneled"), [place(0)], {})
    assert "MPI4PY_RC_THREAD_LEVEL" in problem


def test_crowded_ranks_and_a_lonely_one_get_advice():
    crowded = find_advice([place(rank, core_share=0.5) for rank in range(4)], {})
    assert any("4 ranks on node1 share cores" in line for line in crowded)
    assert not any("one rank only" in line for line in crowded)
    assert any("one rank only" in line for line in find_advice([place(0)], {}))


def test_a_mailbox_that_needs_pokes_gets_advice():
    places = [place(0), place(1)]
    way = "window on a machine, messages between machines"
    advice = [
        line
        for how in (way, f"{way}, progress thread", "window", "")
        for line in find_advice(places, {"mailbox": SimpleNamespace(how=how)})
        if "MPI4PY_RC_THREAD_LEVEL=multiple" in line
    ]
    assert len(advice) == 1
