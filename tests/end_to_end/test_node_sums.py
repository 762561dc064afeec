"""Runs whose sums go over gloo inside the node, to their end and with a rank that is killed, under both launchers."""

import json
import re
from pathlib import Path

import pytest
from support.runs import others_long, ranks_of, run_command

ROOT = Path(__file__).parents[2]
LAUNCHERS = sorted(ROOT.glob(".venv*/bin/mpiexec"))
SSGD = ROOT / "configs" / "methods" / "ssgd.toml"
SHORT = ["training.steps=12", "run.log_every=6", "schedule.warmup=0"]


def names(path):
    return path.parents[1].name


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


@pytest.mark.parametrize("mpiexec", others_long(LAUNCHERS), ids=names)
def test_a_run_ends_well_and_leaves_nothing(mpiexec, tmp_path):
    sets = [word for setting in ["run.node_sums=gloo", *SHORT] for word in ("--set", setting)]
    python = [mpiexec.parent / "python", "-m", "mpicomp"]
    run = ["train", SSGD, *sets, "--run-dir", tmp_path / "run"]
    done = run_command(mpiexec, "-n", 2, *python, *run, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stdout
    assert "dense sums: gloo inside nodes, MPI between them" in done.stdout
    assert "warning" not in done.stdout.lower()
    assert ranks_of(tmp_path / "run") == []
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [6, 12]
    assert records[1]["loss"] < records[0]["loss"]
    assert records[1]["consensus_distance"] == 0


@pytest.mark.parametrize("mpiexec", LAUNCHERS, ids=names)
def test_mates_of_a_killed_rank_get_an_error(mpiexec, tmp_path):
    library = mpiexec.parents[1].name.removeprefix(".venv-")
    line = [*KEEP_THE_OTHERS[library], "-n", 3, *OUTLIVE, mpiexec.parent / "python", "-c", CODE, tmp_path]
    done = run_command(mpiexec, *line, cwd=ROOT, timeout=120)
    told = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert sorted(told) == ["0", "2"], done.stdout
    assert all(
        re.match(r"step 5: gloo inside nodes.*A rank of the node may have ended", text) for text in told.values()
    )
