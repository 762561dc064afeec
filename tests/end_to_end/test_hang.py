"""Ranks that are stopped, stuck or killed, under the launchers of both MPIs where both environments exist."""

import re
import time
from pathlib import Path

import pytest
from support.runs import MPIEXEC, is_code, others_long, run_command, wait_until

ROOT = Path(__file__).parents[2]
MPIEXECS = [MPIEXEC, *(path for path in sorted(ROOT.glob(".venv*/bin/mpiexec")) if path != MPIEXEC)]

pytestmark = [
    pytest.mark.skipif(not MPIEXEC.exists(), reason=f"no MPI in this environment: {MPIEXEC} is missing"),
    pytest.mark.parametrize("mpiexec", others_long(MPIEXECS), ids=lambda path: path.parents[1].name),
]

TIMEOUT_S = 2.0
END_S = 15.0
"""How long a job may take to end, after the time that the watchdog leaves it: launchers are slow on a busy machine."""

PROGRAM = """
import os, signal, sys, time
import torch
from mpicomp.compression.message import Field, Layout
from mpicomp.exchange.guard import guard
from mpicomp.exchange.watchdog import Watchdog
from mpicomp.exchange.mpi.world import MpiWorld
from mpicomp.topology import ring

def act():
    os.write(1, f"acts at {time.time()}\\n".encode())
    ACT

world = MpiWorld.from_environment(device="cpu")
world.is_polite = IS_POLITE
topology, layout = ring(world.size), Layout((Field("x", torch.float32, 10),))
with guard(world), Watchdog(world, TIMEOUT_S) as watchdog:
    os.write(1, f"{watchdog.members[world.rank]}\\n".encode())
    exchange = world.exchange(topology)
    for step in range(STEPS):
        watchdog.moved(step)
        if step == 7 and world.rank == 1:
            act()
        OPERATION
print("went on to the end")
"""

EXCHANGE = "exchange.start({'x': torch.zeros(10)}, layout, topology).wait()"


def run(mpiexec, act="pass", operation=EXCHANGE, steps=20, is_polite=True):
    """Return the exit code, what was printed, and the seconds from `act` on rank 1 to the end of the job."""
    texts = {"ACT": act, "IS_POLITE": is_polite, "TIMEOUT_S": TIMEOUT_S, "STEPS": steps, "OPERATION": operation}
    program = re.sub("|".join(texts), lambda match: str(texts[match[0]]), PROGRAM)
    # From the root, because the other environment may not know the package.
    done = run_command(mpiexec, "-n", 3, mpiexec.parent / "python", "-c", program, cwd=ROOT)
    end, output = time.time(), done.stdout
    acted = re.search(r"acts at (\S+)", output)
    assert acted, output
    assert len(pids(output)) == 3, output
    return done.returncode, output, end - float(acted[1])


def pids(output):
    return {int(rank): int(pid) for rank, pid in re.findall(r"^rank (\d) on \S+ \(PID (\d+)\)$", output, re.MULTILINE)}


def lines(output):
    """Return what the watchdogs have said, by rank."""
    return {int(re.search(r"rank (\d)", line)[1]): line for line in output.splitlines() if "no progress for" in line}


def has_ended(pid):
    """Return whether a process is gone, or dead and not yet fetched by its parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.parametrize("is_polite", [True, False], ids=["polls", "blocks"])
def test_neighbors_name_a_stopped_rank_and_the_job_ends(mpiexec, is_polite):
    code, output, seconds = run(mpiexec, "os.kill(os.getpid(), signal.SIGSTOP)", is_polite=is_polite)
    assert is_code(code, 4), output
    assert seconds < TIMEOUT_S + END_S
    told = lines(output)
    assert sorted(told) == [0, 2], output
    for line in told.values():
        assert line.startswith("mpicomp: error: rank ")
        assert re.search(rf"waits for rank 1 on \S+ \(PID {pids(output)[1]}\) \(message in step 7\)", line), output
    # Open MPI's launcher kills the stopped rank last, and does not wait for its end.
    wait_until(lambda: all(has_ended(pid) for pid in pids(output).values()), "nothing is left behind", timeout=10)


def test_a_collective_operation_is_named(mpiexec):
    code, output, _ = run(mpiexec, "os.kill(os.getpid(), signal.SIGSTOP)", "world.all_gather(step)")
    assert is_code(code, 4), output
    assert sorted(lines(output)) == [0, 2], output
    assert output.count("waits for all ranks (all_gather in step 7)") == 2, output


def test_a_stuck_rank_shows_its_stack(mpiexec):
    code, output, _ = run(mpiexec, "time.sleep(60)")
    assert is_code(code, 4), output
    told = lines(output)
    assert sorted(told) == [0, 1, 2], output
    assert "computes in step 7" in told[1]
    assert "waits for rank 1 on" in told[0] and "waits for rank 1 on" in told[2]
    frame = r'  File "<string>", line \d+, in '
    assert re.search(rf"its stack:\n{frame}<module>\n{frame}act\n", output), output


def test_a_slow_run_is_left_alone(mpiexec):
    code, output, seconds = run(mpiexec, operation=f"time.sleep({TIMEOUT_S / 4}); {EXCHANGE}", steps=14)
    assert code == 0, output
    assert seconds > TIMEOUT_S
    assert output.count("went on to the end") == 3
    assert not lines(output)


def test_the_launcher_ends_the_job_of_a_killed_rank_and_names_processes_of_the_roster(mpiexec):
    code, output, seconds = run(mpiexec, "os.kill(os.getpid(), signal.SIGKILL)")
    assert code != 0
    assert seconds < END_S
    assert "went on to the end" not in output
    named = re.search(r"rank 1 with PID (\d+) on node|PID (\d+) RUNNING AT", output)
    assert named, output
    if named[1]:  # Open MPI; MPICH 5.0.2 sometimes names one that it has killed itself
        assert int(named[1]) == pids(output)[1]
    else:
        assert int(named[2]) in pids(output).values()
    assert "(signal 9)" in output or "signal 9 (Killed)" in output
