"""What the doctor says of what it has found."""

from types import SimpleNamespace

import pytest
from rich.console import Console

from mpicomp.cli.doctor import Report, _facts, _ranks, find_advice, find_problems


def place(rank, core_share=1.0, uuid=None, near_cores=None):
    gpu = {"gpu": "H100", "uuid": uuid, "capability": "9.0", "free_gb": 84.4, "total_gb": 85.0} if uuid else {}
    return SimpleNamespace(
        rank=rank,
        host="node1",
        local_rank=rank,
        local_size=4,
        cores=2,
        core_share=core_share,
        threads=1,
        near_cores=near_cores,
        **{"gpu": None, "uuid": None, "capability": None, "free_gb": None, "total_gb": None, **gpu},
    )


def library(thread_level="serialized", **cuda_support):
    facts = dict.fromkeys(("version", "standard", "path", "mpi4py", "launcher"), "x")
    return SimpleNamespace(thread_level=thread_level, cuda_support=cuda_support, **facts)


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


def test_ranks_that_may_run_far_from_their_gpu_get_advice():
    near = [place(0, uuid="a", near_cores=2), place(1, uuid="b")]  # of the second it is not known
    assert find_advice(near, {}) == []
    far = [place(2, uuid="c", near_cores=1), place(3, uuid="d", near_cores=0)]
    (advice,) = find_advice(near + far, {})
    assert advice.startswith("2 rank(s) may run far from their GPU (rank 3 on node1: 0 of 2 cores are near)")


def printed(table):
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table)
    return [" ".join(line.replace("│", " ").split()) for line in capture.get().splitlines()]


def test_the_gpus_of_ranks_are_shown():
    assert "1 node1 1 of 4 2 1.00 1 H100 GPU-7 9.0 84.4 of 85.0 GB 1 of 2" in printed(
        _ranks([place(0), place(1, uuid="GPU-7", near_cores=1)])
    )
    assert "0 node1 0 of 4 2 1.00 1 - -" in printed(_ranks([place(0)]))


@pytest.mark.parametrize(
    ("answers", "tried", "shown"),
    [
        ({"MPIX": False, "OPAL": True}, {}, ("MPIX no, OPAL yes", "not tried: the library says no")),
        ({"MPIX": True}, {}, ("MPIX yes", "not tried: no GPU")),
        ({}, {"sums": "crashed (SIGSEGV)"}, ("cannot be asked", "sums crashed (SIGSEGV)")),
    ],
)
def test_what_mpi_says_of_gpu_buffers_and_what_came_of_them_is_shown(answers, tried, shown):
    facts = printed(_facts(Report([], places=[place(0)], device_buffers=tried), library(**answers)))
    assert f"CUDA-aware {shown[0]}" in facts
    assert f"GPU buffers {shown[1]}; messages pass through host memory in any case" in facts
