"""A rank that is killed is named by its neighbors on the same machine, where the launcher lets them live on."""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
from support.runs import OPEN_MPI_HERE

ROOT = Path(__file__).parents[2]
LAUNCHERS = sorted(ROOT.glob(".venv*/bin/mpiexec"))
# MPICH's launcher watches the processes that it has started, so a shell that outlives its rank keeps the others alive.
OUTLIVE = ["sh", "-c", '"$@"; sleep 6', "sh"]
KEEP_THE_OTHERS = {"mpich": [], "openmpi": ["--with-ft", "ulfm"]}

CODE = """
import json, os, signal, sys, time
from pathlib import Path
from mpicomp.exchange.mpi.world import MpiWorld
from mpicomp.topology import complete
world = MpiWorld.from_environment(device="cpu")
mailbox = world.mailbox(complete(3), 100)
assert sorted(mailbox.processes) == [0, 1, 2]
world.barrier()
deadline = time.monotonic() + 0.3  # The others may still be in the barrier.
while time.monotonic() < deadline:
    mailbox.pause()
if world.rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
begin = time.monotonic()
while not mailbox.peers()[1].has_ended and time.monotonic() < begin + 20:
    mailbox.pause()
peers = mailbox.peers()
other = 2 - world.rank
verdict = [peers[1].has_ended, peers[other].has_ended, time.monotonic() - begin]
Path(sys.argv[1], str(world.rank)).write_text(json.dumps(verdict))
# The other survivor may still be looking.
while time.monotonic() < begin + 4:
    mailbox.pause()
os._exit(0)
"""


@pytest.mark.parametrize("mpiexec", LAUNCHERS, ids=lambda path: path.parents[1].name)
def test_survivors_name_the_dead(mpiexec, tmp_path):
    library = mpiexec.parents[1].name.removeprefix(".venv-")
    line = [mpiexec, *KEEP_THE_OTHERS[library], "-n", "3", *OUTLIVE, mpiexec.parent / "python", "-c", CODE, tmp_path]
    process = subprocess.Popen(
        line,
        env=os.environ | OPEN_MPI_HERE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=120)
    except subprocess.TimeoutExpired as error:
        output = str(error.stdout)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    # MPICH's launcher may lose what ranks print after one has died.
    verdicts = {path.name: json.loads(path.read_text()) for path in tmp_path.iterdir()}
    assert {rank: verdict[:2] for rank, verdict in verdicts.items()} == {"0": [True, False], "2": [True, False]}, output
    assert all(seconds < 3 for *_, seconds in verdicts.values()), verdicts
