"""The doctor's trials, on every rank."""

import functools

import pytest
from click.testing import CliRunner
from support.driver_table import Table, node

from mpicomp.cli.doctor import doctor
from mpicomp.errors import ConfigError
from mpicomp.exchange.bandwidths import measure_bandwidths
from mpicomp.exchange.mpi import world as world_module
from mpicomp.exchange.mpi.library import MPI
from mpicomp.exchange.mpi.probe import (
    Trial,
    attempt,
    examine_library,
    examine_place,
    try_mailbox,
    try_neighbors,
    try_window,
)
from mpicomp.exchange.placement import claim_gpu
from mpicomp.topology import ring


def test_neighbors_are_tried_for_real(world):
    trial = attempt(world, try_neighbors)
    assert trial.problem == ""
    assert trial.latency_us > 0
    assert (trial.mb_per_s > 0) == (world.size > 1)
    assert trial.how == ("" if world.size == 1 else "shared memory")
    assert world.all_gather(trial) == [trial] * world.size


def test_bandwidths_are_measured_for_real(world):
    if world.size == 1:
        with pytest.raises(ConfigError, match="the bandwidth of rank 0 cannot be measured: it has no neighbors"):
            measure_bandwidths(world, ring(1))
        return
    bandwidths = measure_bandwidths(world, ring(world.size))
    assert len(bandwidths) == world.size and all(1e3 < each < 1e12 for each in bandwidths)
    assert world.all_gather(bandwidths) == [bandwidths] * world.size


def test_a_window_is_tried_for_real(world):
    trial = attempt(world, try_window)
    assert trial.problem == ""
    assert trial.latency_us > 0


def test_the_mailbox_is_tried_for_real(world):
    trial = attempt(world, try_mailbox)
    assert trial.problem == ""
    assert trial.latency_us > 0
    assert trial.how == "window"


def test_a_trial_that_fails_is_a_problem_and_no_exception(world):
    def broken(world):
        raise MPI.Exception(MPI.ERR_RMA_RANGE)

    trial = attempt(world, broken)
    assert isinstance(trial, Trial)
    assert trial.problem


def test_the_library_is_the_one_that_is_loaded(world):
    library = examine_library()
    assert library.version.startswith(("MPICH", "Open MPI"))
    assert "libmpi" in library.path
    assert library.thread_level in ("serialized", "multiple")
    assert (library.launcher != "none") == (world.size > 1) or world.size == 1


def test_every_rank_has_its_place(world):
    places = world.all_gather(examine_place(world))
    assert [place.rank for place in places] == list(range(world.size))
    assert all(place.cores >= 1 and place.threads >= 1 for place in places)
    assert places[world.rank].core_share == pytest.approx(world.core_share)


def test_the_doctor_goes_on_without_a_gpu_that_cannot_be_used(world, monkeypatch):
    if world.size > 1:  # takes seconds
        return
    driver = Table(node(1), broken={"GPU-a0": RuntimeError("CUDA error: out of memory")})
    monkeypatch.setattr(world_module, "claim_gpu", functools.partial(claim_gpu, driver=driver))
    result = CliRunner().invoke(doctor)
    assert result.exit_code == 4, result.output
    assert "problem: the GPU GPU-a0 (H100) cannot be used: CUDA error: out of memory." in result.output
    assert "one-sided window" in result.output
