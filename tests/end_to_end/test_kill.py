"""A run on 4 ranks that is killed again and again goes on each time as if nothing had happened.

The killed run goes on from what the last kill has left, so any damage would be carried to its end; and whatever a kill
leaves published is compared, bit for bit, with the same step of a run that nobody disturbed.
"""

import os
import random
import signal
import time

import pytest
from support.runs import MPIEXEC, assert_same_checkpoint, mpicomp, mpicomp_here, ranks_of, records, start, wait_until

from mpicomp.checkpoint.folder import Checkpoints, open_checkpoint

RUN = [
    "configs/methods/choco.toml",
    *("--set", "data.kind=synthetic"),
    *("--set", "training.steps=400"),
    *("--set", "run.evaluate_every_epochs=5"),
    *("--set", "checkpoint.every_steps=2"),
    *("--set", "checkpoint.keep_last=0"),
]
KILLS = int(os.environ.get("MPICOMP_KILLS", "15"))
"""More take longer: MPICOMP_KILLS=30 runs for four minutes."""


pytestmark = pytest.mark.skipif(not MPIEXEC.exists(), reason=f"no MPI in this environment: {MPIEXEC} is missing")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    finished = mpicomp_here("train", *RUN, "--run-dir", folder, "--loopback", 4)
    assert finished.returncode == 0, finished.stdout
    return folder


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The folder of the run that every test kills, or ends."""
    return tmp_path_factory.mktemp("killed") / "run"


interrupted = []
"""For each kill: whether a checkpoint was being written."""


@pytest.mark.parametrize("kill", range(KILLS))
def test_what_a_kill_leaves_is_what_an_undisturbed_run_had(kill, killed, undisturbed):
    draw, checkpoints = random.Random(kill), Checkpoints(killed / "checkpoints")
    on_mpi = kill % 5 == 0
    before = checkpoints.latest()
    run = start(
        "train",
        *RUN,
        "--run-dir",
        killed,
        "--resume",
        "auto",
        *([] if on_mpi else ["--loopback", 4]),
        ranks=4 if on_mpi else None,
    )
    wait_until(lambda: _has_moved(checkpoints, before), "training goes on")
    time.sleep(draw.uniform(0, 0.3))
    ranks = ranks_of(killed)
    assert len(ranks) == (4 if on_mpi else 1)
    for rank in ranks if kill % 10 else [draw.choice(ranks)]:  # all of them, or one
        os.kill(rank, signal.SIGKILL)
    output, _ = run.communicate(timeout=120)
    assert run.returncode != 0, output
    interrupted.append(bool(list(checkpoints.path.glob(".step_*"))))
    left = checkpoints.latest()
    assert left.verify() == []
    assert_same_checkpoint(left, open_checkpoint(undisturbed / "checkpoints" / left.path.name))


def test_the_killed_run_ends_as_the_undisturbed_one(killed, undisturbed):
    if len(interrupted) >= 8:  # of fewer, all may have missed
        assert sum(interrupted) >= len(interrupted) / 4, "hardly a kill has met a checkpoint that was being written"
    finished = mpicomp("train", "--resume", killed, "--set", "checkpoint.every_steps=100", ranks=4)
    assert finished.returncode == 0, finished.stdout
    assert_same_checkpoint(*(Checkpoints(run / "checkpoints").latest() for run in (killed, undisturbed)))
    assert records(killed) == records(undisturbed)


def _has_moved(checkpoints, before):
    """Whether a checkpoint was published since `before`."""
    now = checkpoints.latest()
    return now is not None and (before is None or now.manifest.step > before.manifest.step)
