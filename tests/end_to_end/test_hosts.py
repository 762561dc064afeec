"""The mailbox between hosts that share no memory: the MPI tests of it again, on hosts of ``scripts/link_lab``."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from support.runs import others_long

ROOT = Path(__file__).parents[2]
LINK_LAB = ROOT / "scripts" / "link_lab"
LIBRARIES = [path.parents[1].name.removeprefix(".venv-") for path in sorted(ROOT.glob(".venv*/bin/mpiexec"))]
# Hosts share the cores of this machine: Open MPI must yield while it waits.
ENVIRON = os.environ | {"LINK_LAB": "99", "OMP_NUM_THREADS": "1", "OMPI_MCA_mpi_yield_when_idle": "1"}

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="only root may make hosts (scripts/link_lab)"),
    pytest.mark.skipif(not (shutil.which("ip") and shutil.which("tc")), reason="hosts are made with iproute2"),
]


@pytest.fixture(scope="module")
def hosts():
    made = subprocess.run([LINK_LAB, "up", "2", "--rate", "1gbit"], env=ENVIRON, capture_output=True, text=True)
    if made.returncode:
        subprocess.run([LINK_LAB, "down"], env=ENVIRON)
        pytest.skip(f"this kernel makes no hosts: {made.stderr.strip().splitlines()[-1]}")
    yield
    subprocess.run([LINK_LAB, "down"], env=ENVIRON, check=True)


@pytest.mark.parametrize("library", others_long(LIBRARIES))
def test_the_mailbox_between_hosts(hosts, library):
    python = ROOT / f".venv-{library}" / "bin" / "python"
    # Two ranks on one host, which share a window, and one on the other, which gets messages.
    line = [LINK_LAB, "mpi", library, "-n", "3", "--ppn", "2", "--", python]
    tests = [
        "-m",
        "pytest",
        "-q",
        "--color=no",
        "tests/mpi/test_window.py",
        "-k",
        "not messages and not on_each_machine",
    ]
    done = subprocess.run([*line, *tests], cwd=ROOT, env=ENVIRON, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr
