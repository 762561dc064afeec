"""The trial of device buffers on ranks and in a program of its own, here with buffers of the host."""

import os
import sys

import pytest

from mpicomp.exchange.mpi import device_buffers
from mpicomp.exchange.mpi.device_buffers import RIGHT, USES
from mpicomp.exchange.mpi.probe import examine_library, try_device_buffers


def test_every_use_works_between_ranks(world, capsys):
    device_buffers.main("cpu", list(USES))
    assert capsys.readouterr().out == ("".join(f"{use}: right\n" for use in USES) if world.rank == 0 else "")


@pytest.mark.parametrize("use", USES)
def test_bytes_that_do_not_arrive_are_noticed(world, capsys, monkeypatch, use):
    def lossy(world, sent, received):
        USES_BEFORE[use](world, sent, received)
        if world.rank == world.size - 1 and len(received) == 65_537:
            received[-1] += 1

    monkeypatch.setitem(device_buffers.USES, use, lossy)
    device_buffers.main("cpu", [use])
    if world.rank == 0:
        assert capsys.readouterr().out == f"{use}: wrong bytes, of 65537, on rank {world.size - 1}\n"


USES_BEFORE = dict(USES)


def test_a_program_of_a_rank_of_a_job_is_one_rank_alone(world):
    if world.rank or world.size != 2:  # takes seconds
        return
    command = [sys.executable, "-m", device_buffers.__name__, "cpu"]
    outcomes = device_buffers.try_uses(command, device_buffers.without_launcher(os.environ), 60)
    assert outcomes == dict.fromkeys(USES, RIGHT)


def test_the_mpi_of_pypi_says_no_and_is_not_tried(world):
    support = examine_library().cuda_support
    assert support.pop("MPIX_Query_cuda_support") is False
    assert support in ({"MPIX_GPU_query_support": False}, {"opal_built_with_cuda_support": False})
    assert try_device_buffers(world, 1.0) == {}
