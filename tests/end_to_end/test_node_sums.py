"""Runs whose sums go over gloo inside the node, to their end and with a rank that is killed, under both launchers."""

import json
import re
from pathlib import Path

import pytest
from support.runs import ranks_of, run_command

ROOT = Path(__file__).parents[2]
LAUNCHERS = sorted(ROOT.glob(".venv*/bin/mpiexec"))
SSGD = ROOT / "configs" / "methods" / "ssgd.toml"
SHORT = ["training.steps=12", "run.log_every=6", "schedule.warmup=0"]

pytestmark = pytest.mark.parametrize("mpiexec", LAUNCHERS, ids=lambda path: path.parents[1].name)

# A shell that outlives its rank keeps MPICH's launcher from ending the others; Open MPI's has an option for that.
OUTLIVE = ["sh", "-c", '"$@"; sleep 3', "sh"]
KEEP_THE_OTHERS = {"mpich": [], "openmpi": ["--with-ft", "ulfm"]}

CODE = """
import os, signal, sys
from pathlib import Path
import torch
from mpicomp.errors import ExchangeError
from mpicomp.exchange.mpi.world import MpiWorld
from mpicomp.topology import ring
world = MpiWorld.from_environment("cpu", node_sums="gloo")
exchange = world.exchange(ring(world.size))
try:
    for step in range(1000):
        if step == 5 and world.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        exchange.mean_(torch.ones(1000))
except ExchangeError as error:
    Path(sys.argv[1], str(world.rank)).write_text(f"step {step}: {error}")
os._exit(0)
"""


def train(mpiexec, folder, *settings):
    sets = [word for setting in [*SHORT, *settings] for word in ("--set", setting)]
    python = [mpiexec.parent / "python", "-m", "mpicomp"]
    return run_command(mpiexec, "-n", 2, *python, "train", SSGD, *sets, "--run-dir", folder, cwd=ROOT)


def test_a_run_ends_as_with_mpi_and_leaves_nothing(mpiexec, tmp_path):
    losses = []
    for sums in ("gloo", "mpi"):
        done = train(mpiexec, tmp_path / sums, f"run.node_sums={sums}")
        assert done.returncode == 0, done.stdout
        assert ("dense sums: gloo inside nodes, MPI between them" in done.stdout) == (sums == "gloo")
        assert "warning" not in done.stdout.lower()
        assert "error" not in done.stdout.lower()
        assert ranks_of(tmp_path / sums) == []
        records = (tmp_path / sums / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in records])
    assert len(losses[0]) == 2
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_nccl_without_gpus_is_refused(mpiexec, tmp_path):
    done = train(mpiexec, tmp_path / "run", "run.node_sums=nccl", "run.device=cpu")
    assert done.returncode == 2, done.stdout
    assert re.search("node_sums = 'nccl': .*node_sums=mpi", done.stdout), done.stdout


def test_mates_of_a_killed_rank_get_an_error(mpiexec, tmp_path):
    library = mpiexec.parents[1].name.removeprefix(".venv-")
    line = [*KEEP_THE_OTHERS[library], "-n", 3, *OUTLIVE, mpiexec.parent / "python", "-c", CODE, tmp_path]
    done = run_command(mpiexec, *line, cwd=ROOT, timeout=40)
    told = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert sorted(told) == ["0", "2"], done.stdout
    assert all(
        re.match(r"step 5: gloo inside nodes.*A rank of the node may have ended", text) for text in told.values()
    )
