"""Real launchers: failures of single ranks, the mpiexec of another MPI, and the verdicts of tests/mpi."""

import json
import os
import re
import sys
import time
from pathlib import Path

import pytest
from support.runs import MPIEXEC, OPEN_MPI_HERE, is_code, run_command

ROOT = Path(__file__).parents[2]
OTHERS = [path for path in sorted(ROOT.glob(".venv*/bin/mpiexec")) if path.parent != MPIEXEC.parent]

pytestmark = pytest.mark.skipif(not MPIEXEC.exists(), reason=f"no MPI in this environment: {MPIEXEC} is missing")

START = """
import sys
from mpicomp.errors import DataError, DivergenceError
from mpicomp.exchange.guard import guard, install_excepthook, together
from mpicomp.exchange.mpi.world import MpiWorld
world = MpiWorld.from_environment(device="cpu")
"""


def run(*command, environ=None, timeout=120):
    """Run `command` with a hard limit on all its processes; return the exit code and what it printed."""
    environ = (
        OPEN_MPI_HERE | {key: value for key, value in os.environ.items() if key != "PYTEST_ADDOPTS"} | (environ or {})
    )
    done = run_command(*command, environ=environ, timeout=timeout)
    return done.returncode, done.stdout


def run_ranks(code, ranks=3, timeout=120):
    return run(MPIEXEC, "-n", ranks, sys.executable, "-c", START + code, timeout=timeout)


@pytest.mark.parametrize(
    ("enter", "error", "code", "has_traceback"),
    [
        ("with guard(world):", "DivergenceError('loss is NaN at step 7')", 5, False),
        ("install_excepthook(world)\nif True:", "ZeroDivisionError('of theirs')", 1, True),
    ],
    ids=["guard", "hook"],
)
def test_an_exception_on_one_rank_ends_all_of_them(enter, error, code, has_traceback):
    begin = time.monotonic()
    body = f"{enter}\n    if world.rank == 1: raise {error}\n    world.barrier()\n    print('went on')"
    got, output = run_ranks(body)
    assert is_code(got, code), output
    assert time.monotonic() - begin < 100
    assert re.search(r"mpicomp: error: rank 1 on \S+: ", output), output
    assert output.count(error.split("'")[1]) == 1, output
    assert ("Traceback" in output) == has_traceback, output
    assert "went on" not in output


def test_an_error_that_all_agree_on_is_printed_once():
    body = "with guard(world), together(world):\n    if world.rank != 0: raise DataError('no such file: x.h5')"
    code, output = run_ranks(body)
    assert code == 3, output
    assert output.count("mpicomp: error: ") == 1
    assert "mpicomp: error: no such file: x.h5 (on ranks 1, 2)" in output
    assert "Traceback" not in output


@pytest.mark.parametrize("command", [["train"], ["plan"], ["bench", "step"]], ids=" ".join)
def test_ranks_that_read_different_configurations_are_refused(command, tmp_path):
    words = [sys.executable, "-m", "mpicomp", *command, "configs/methods/choco.toml"]
    folder = ["--run-dir", tmp_path / "run"] if command == ["train"] else []
    other = ["--set", "training.batch_size=5"]
    code, output = run(MPIEXEC, "-n", "1", *words, *folder, ":", "-n", "1", *words, *folder, *other)
    assert code == 2, output
    assert output.count("mpicomp: error: ") == 1
    differs = r"error: configs/methods/choco.toml: what \S+ reads there differs from what rank 0 reads \(on rank 1\)"
    assert re.search(differs, output)
    assert not (tmp_path / "run").exists()


def test_a_rank_that_is_killed_ends_all_of_them():
    body = (
        "import os, signal\nif world.rank == 1: os.kill(os.getpid(), signal.SIGKILL)\nworld.barrier()\nprint('went on')"
    )
    code, output = run_ranks(body)
    assert code != 0
    assert "went on" not in output


@pytest.mark.skipif(not OTHERS, reason="no second environment with the other MPI beside this one")
@pytest.mark.parametrize("other", OTHERS, ids=lambda path: path.parents[1].name)
def test_the_mpiexec_of_another_mpi_is_refused(other):
    code, output = run(other, "-n", "2", sys.executable, "-c", START + "print('went on', world.size)")
    assert code != 0, output
    assert "went on" not in output
    assert "wrong launcher: " in output
    assert "started 2 processes" in output
    assert str(MPIEXEC) in output


def test_srun_without_pmi_is_refused():
    code, output = run(sys.executable, "-c", START + "print('went on')", environ={"SLURM_STEP_NUM_TASKS": "2"})
    assert code == 1, output
    assert "ExchangeError: wrong launcher: srun started 2 processes" in output
    assert "went on" not in output


def test_doctor_examines_all_ranks():
    code, output = run(MPIEXEC, "-n", "3", sys.executable, "-m", "mpicomp", "doctor", "--json")
    assert code == 0, output
    report = json.loads(output[output.index("{") : output.rindex("}") + 1])
    assert report["problems"] == []
    assert [place["rank"] for place in report["places"]] == [0, 1, 2]
    assert report["library"]["launcher"] != "none"
    assert report["library"]["version"].startswith(("MPICH", "Open MPI"))
    assert {name: trial["problem"] for name, trial in report["trials"].items()} == {
        "neighbor exchange": "",
        "one-sided window": "",
        "mailbox": "",
    }
    assert report["trials"]["mailbox"]["how"] == "window"


def test_doctor_alone():
    code, output = run(sys.executable, "-m", "mpicomp", "doctor")
    assert code == 0, output
    assert "nothing is broken" in output
    assert "try the same under your launcher" in output


def test_doctor_names_the_wrong_launcher():
    environ = {"SLURM_STEP_NUM_TASKS": "2"}
    code, output = run(sys.executable, "-m", "mpicomp", "doctor", environ=environ)
    assert code == 4, output
    assert "problem: wrong launcher: srun" in output
    assert "Traceback" not in output


def test_doctor_does_not_hang():
    code, output = run(sys.executable, "-m", "mpicomp", "doctor", "--timeout", "0.001")
    assert code == 4, output
    assert "stuck for 0.001 s while" in output


MIXED_TESTS = """
import pytest
def test_fails_on_one(world):
    world.barrier()
    assert world.rank != 1, "only on rank one"
@pytest.fixture
def broken(world):
    if world.rank == 2: raise KeyError("in the fixture")
def test_with_broken_fixture(broken):
    raise AssertionError("must not run")
def test_skips_on_one(world):
    if world.rank == 0: pytest.skip("lonely")
def test_last(world):
    assert sum(world.all_gather(1)) == world.size
"""

HANGING_TEST = """
def test_hangs(world):
    assert world.rank != 1, "the cause"
    world.barrier()
"""


DEADLOCK = """
def test_deadlock(world):
    if world.rank == 0:
        world.barrier()
"""


def run_suite(folder, tests, *more, grace="15.0"):
    source = (ROOT / "tests" / "mpi" / "conftest.py").read_text()
    assert "GRACE_S = 15.0" in source
    (folder / "conftest.py").write_text(source.replace("GRACE_S = 15.0", f"GRACE_S = {grace}"))
    (folder / "test_sample.py").write_text(tests)
    options = ["-p", "no:cacheprovider", "--rootdir", folder, "-c", os.devnull, "--color=no", *more]
    return run(MPIEXEC, "-n", "3", sys.executable, "-m", "pytest", *options, folder)


def test_verdicts_of_mpi_tests_are_collective(tmp_path):
    code, output = run_suite(tmp_path, MIXED_TESTS)
    assert code == 1, output
    assert re.search(r"^MPI: .*(MPICH|Open MPI).* rank 0 of 3", output, re.MULTILINE), output
    assert "2 failed, 1 passed, 1 error" in output, output
    assert "---- rank 1 of 3: failed" in output
    assert "only on rank one" in output
    assert "KeyError: 'in the fixture'" in output
    assert "must not run" not in output
    assert output.count("short test summary info") == 1, "other ranks than 0 are muted"


def test_a_failure_that_leaves_others_waiting_ends_the_job_with_its_traceback(tmp_path):
    code, output = run_suite(tmp_path, HANGING_TEST, grace="1.0")
    assert code != 0
    assert "rank 1 failed and others hang" in output, output
    assert "the cause" in output


def test_a_deadlock_ends_the_job_with_all_stacks(tmp_path):
    limits = ["-o", "faulthandler_timeout=4", "-o", "faulthandler_exit_on_timeout=true"]
    code, output = run_suite(tmp_path, DEADLOCK, *limits)
    assert code != 0
    assert "Timeout (0:00:04)!" in output, output
    assert "in test_deadlock" in output, output
