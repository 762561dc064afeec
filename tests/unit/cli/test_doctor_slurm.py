"""What the doctor says of Slurm."""

import time

import pytest

from mpicomp.cli.doctor import find_slurm_advice
from mpicomp.slurm import job as slurm

MPICH, OPEN_MPI = "MPICH Version: 5.0.2", "Open MPI v5.0.11"


def job(tasks=4, end_time=2e9, is_requeued=True):
    return slurm.Job("7", "run", 2, tasks, 0, end_time, is_requeued)


def test_no_slurm_no_advice():
    assert find_slurm_advice(MPICH, 4, None, [], {}) == []


@pytest.mark.parametrize(("library", "wanted"), [(MPICH, "pmi2"), (OPEN_MPI, "pmix")])
def test_outside_of_a_job_the_fitting_plugin_is_named(library, wanted):
    (advice,) = find_slurm_advice(library, 1, None, ["pmi2", "pmix"], {})
    assert f"--mpi={wanted}" in advice


def test_an_mpi_that_srun_does_not_speak_needs_its_own_mpirun():
    (advice,) = find_slurm_advice(OPEN_MPI, 4, job(), ["pmi2"], {})
    assert "start its own mpirun" in advice


def test_a_job_in_order_gets_no_advice():
    assert find_slurm_advice(OPEN_MPI, 4, job(), ["pmix_v4"], {}) == []


@pytest.mark.parametrize(
    ("given", "environ", "message"),
    [
        (job(tasks=8), {}, "made for 8 tasks, but 4 rank"),
        (job(is_requeued=False), {}, "send it with --requeue"),
        (job(end_time=None), {}, "--time-limit"),
        (job(), {"SLURM_CPUS_PER_TASK": "4"}, "SRUN_CPUS_PER_TASK"),
    ],
)
def test_what_is_odd_is_named(given, environ, message):
    (advice,) = find_slurm_advice(MPICH, 4, given, ["pmi2"], environ)
    assert message in advice


def test_the_end_comes_from_the_environment_or_from_squeue(tmp_path, monkeypatch):
    (tmp_path / "squeue").write_text("#!/bin/sh\necho 2030-01-02T03:04:05\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert slurm.job_end_time({}) is None
    assert slurm.job_end_time({"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": "1900000000"}) == 1.9e9
    end = slurm.job_end_time({"SLURM_JOB_ID": "7"})
    assert time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(end)) == "2030-01-02T03:04:05"


@pytest.mark.parametrize("answer", ["echo N/A", "exit 1", "true"])
def test_no_end_if_nobody_can_tell(tmp_path, monkeypatch, answer):
    (tmp_path / "squeue").write_text(f"#!/bin/sh\n{answer}\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert slurm.job_end_time({"SLURM_JOB_ID": "7"}) is None


def test_the_plugins_of_srun(tmp_path, monkeypatch):
    text = "MPI plugin types are...\n\tpmix\n\tnone\n\tpmi2\nspecific pmix plugin versions available: pmix_v4\n"
    (tmp_path / "srun").write_text(
        f"#!/bin/sh\nprintf '{text}'\n".replace("\n\t", "\\n\\t").replace("\nspec", "\\nspec")
    )
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert slurm.srun_speaks() == ["pmi2", "pmix"]
