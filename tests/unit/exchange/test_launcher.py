"""Which launcher, and is it the right one? From the environment alone."""

import pytest

from mpicomp.errors import ExchangeError
from mpicomp.exchange.launcher import check_after_start, check_before_start, family, launched_by

HYDRA = {"PMI_RANK": "0", "PMI_SIZE": "4", "PMI_FD": "9", "MPI_LOCALNRANKS": "4"}
PRRTE = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0", "PMIX_RANK": "0"}
SRUN = {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0"}
SALLOC = {"SLURM_NTASKS": "4", "SLURM_JOB_ID": "17"}
SBATCH = {"SLURM_NTASKS": "4", "SLURM_JOB_ID": "17", "SLURM_PROCID": "0"}


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("Open MPI v5.0.11, package: Open MPI user@localhost", "Open MPI"),
        ("MPICH Version:      5.0.2", "MPICH"),
        ("Intel(R) MPI Library 2021.14 for Linux* OS", "MPICH"),
        ("MVAPICH2 Version : 2.3.7", "MPICH"),
        ("CRAY MPICH version 8.1.29", "MPICH"),
        ("MPI.openmpi.cpython-311-x86_64-linux-gnu.so", "Open MPI"),
        ("MPI.mpich.cpython-311-x86_64-linux-gnu.so", "MPICH"),
        ("MPI.cpython-311-x86_64-linux-gnu.so", "unknown"),
        ("", "unknown"),
    ],
)
def test_family(version, expected):
    assert family(version) == expected


def test_the_launcher_is_named():
    assert launched_by({}) is None
    assert launched_by(HYDRA) == ("MPICH's mpiexec (or srun --mpi=pmi2)", 4)
    assert launched_by(PRRTE) == ("Open MPI's mpiexec", 4)
    assert launched_by(SRUN) == ("srun", 4)


@pytest.mark.parametrize(("library", "environ"), [("Open MPI", HYDRA), ("Open MPI", SRUN), ("MPICH", SRUN)])
def test_a_rank_alone_among_several_is_an_error(library, environ):
    with pytest.raises(
        ExchangeError, match=f"wrong launcher: .* started 4 processes.* is {library} .*Remedy: "
    ) as caught:
        check_after_start(library, 1, environ)
    assert caught.value.exit_code == 4
    assert ("srun --mpi=list" in str(caught.value)) == ("SLURM_STEP_NUM_TASKS" in environ or "PMI_SIZE" in environ)


@pytest.mark.parametrize(
    ("library", "size", "environ"),
    [
        ("MPICH", 4, HYDRA),
        ("Open MPI", 4, PRRTE),
        ("Open MPI", 4, SRUN),
        ("MPICH", 1, {}),
        ("MPICH", 1, {"PMI_SIZE": "1"}),
        ("Open MPI", 1, SALLOC),
        ("Open MPI", 1, SBATCH),
        # mpiexec -n 1 inside a job: its daemons are a step of as many tasks as nodes
        ("Open MPI", 1, {"OMPI_COMM_WORLD_SIZE": "1", "SLURM_STEP_NUM_TASKS": "2"}),
    ],
)
def test_a_rank_in_its_place_is_none(library, size, environ):
    check_before_start(library, environ)
    check_after_start(library, size, environ)


def test_mpich_is_not_even_started_under_open_mpi():
    with pytest.raises(ExchangeError, match="wrong launcher: Open MPI's mpiexec started 4"):
        check_before_start("MPICH", PRRTE)
    check_before_start("Open MPI", HYDRA)  # this one is found out after the start
