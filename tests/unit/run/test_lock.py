"""The lock of a run folder: who holds it, who waits, and when nobody must."""

import errno
import fcntl
import os
import subprocess
import sys

import pytest

from mpicomp.errors import ConfigError
from mpicomp.run.lock import RunLock

HOLD = """
import sys, time
from pathlib import Path
from mpicomp.run.lock import RunLock
lock = RunLock(Path(sys.argv[1]))
lock.take()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "lock"


def test_one_holds_it_at_a_time(path):
    one, other = RunLock(path), RunLock(path)
    one.take()
    one.take()
    with pytest.raises(ConfigError, match=rf"PID {os.getpid()} on \S+, since 2.*touch {path.parent}/stop"):
        other.take(wait_s=0)
    other.close()
    assert path.exists()
    one.close()
    assert not path.exists()
    other.take(wait_s=0)
    other.close()


def test_nobody_waits_for_the_dead(path):
    with subprocess.Popen([sys.executable, "-c", HOLD, path], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(ConfigError, match=f"PID {process.pid} "):
            RunLock(path).take(wait_s=0)
        process.kill()
    assert path.exists()
    mine = RunLock(path)
    mine.take(wait_s=1)
    mine.close()


@pytest.mark.parametrize(("restarts", "is_free"), [("1", True), ("0", False)])
def test_a_requeued_job_does_not_wait_for_its_own_lost_node(path, monkeypatch, restarts, is_free):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    lost, mine = RunLock(path), RunLock(path)
    lost.take()
    monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    if not is_free:
        with pytest.raises(ConfigError, match="Slurm job 17"):
            mine.take(wait_s=0)
        lost.close()
        return
    mine.take(wait_s=1)
    lost.close()  # must not remove the file of the new holder
    assert path.exists()
    mine.close()


def test_a_file_system_without_locks_does_no_harm(path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    for _ in range(2):
        RunLock(path).take(wait_s=0)


def test_a_folder_that_cannot_be_written_is_not_locked(tmp_path):
    RunLock(tmp_path / "none" / "lock").take(wait_s=0)
