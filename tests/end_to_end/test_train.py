"""``mpicomp train`` as a user starts it: what a run leaves behind, the same bits from threads and from MPI ranks."""

import json
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from support.runs import mpicomp_here

from mpicomp.compression import Spec, TopK

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.toml"
SHORT = ["--set", "training.steps=30", "--set", "run.log_every=7", "--set", "run.evaluate_every_epochs=0.5"]
MPIEXEC = str(Path(sys.executable).parent / "mpiexec")


def mpicomp(*arguments, launcher=()):
    command = [*launcher, sys.executable, "-m", "mpicomp", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folders of the same run on 3 MPI ranks and on 3 threads."""
    folder = tmp_path_factory.mktemp("runs")
    mpi = mpicomp("train", QUICKSTART, *SHORT, "--run-dir", folder / "mpi", launcher=[MPIEXEC, "-n", "3"])
    loop = mpicomp_here("train", QUICKSTART, *SHORT, "--run-dir", folder / "loop", "--loopback", 3)
    assert mpi.returncode == 0, mpi.stderr
    assert loop.returncode == 0, loop.stdout
    assert "uncompressed all-reduce would have sent" in mpi.stdout
    return folder / "mpi", folder / "loop"


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_model_and_records_agree_bit_for_bit(runs):
    models = []
    for folder in runs:
        with h5py.File(folder / "model.h5") as file:
            models.append({name: value[()] for name, value in file["parameters"].items()})
    assert models[0].keys() == models[1].keys()
    assert all(np.array_equal(models[0][name], models[1][name]) for name in models[0])
    ours, theirs = (records(folder) for folder in runs)
    for record in [*ours, *theirs]:
        del record["seconds"]
    assert ours == theirs


def test_records_come_every_k_steps_with_evaluations_and_at_the_end(runs):
    found = records(runs[0])
    assert [record["step"] for record in found] == [7, 14, 15, 21, 28, 29, 30]  # an epoch has 29 steps
    assert [record["step"] for record in found if record["test_accuracy"]] == [15, 29, 30]
    for record in found:
        assert set(record["seconds"]) == {"gradient", "compress", "exchange", "mix", "exchange_hidden"}
        assert all(seconds >= 0 for seconds in record["seconds"].values())
        assert record["consensus_distance"] > 0
    assert found[-1]["test_accuracy"] > 0.5


def test_the_result_is_complete(runs):
    result = json.loads((runs[0] / "result.json").read_text())
    assert {k: result[k] for k in ("algorithm", "topology", "compressor", "ranks", "steps")} == {
        "algorithm": "adagossip",
        "topology": "ring",
        "compressor": "topk",
        "ranks": 3,
        "steps": 30,
    }
    n = result["parameters"]
    layout = TopK(0.1).layout(Spec.flat(n))  # float32 values, and coded indices of varying length
    assert 30 * 2 * 4 * int(0.1 * n) < min(result["bytes_sent"])
    assert max(result["bytes_sent"]) <= 30 * 2 * layout.nbytes
    assert len(result["test_accuracy_local"]) == 3
    for key in ("seconds", "train_loss", "test_accuracy", "consensus_distance"):
        assert result[key] > 0


def test_public_copies_that_run_away_end_the_run(tmp_path):
    wild = ["--set", "algorithm.kind=choco", "--set", "algorithm.gamma=1.5", "--set", "compression.ratio=0.001"]
    done = mpicomp_here("train", QUICKSTART, *wild, "--run-dir", tmp_path / "run", "--loopback", 5)
    assert done.returncode == 5
    assert "algorithm.gamma is too large" in done.stdout or "ower optimizer.lr or algorithm.gamma" in done.stdout
    assert "Traceback" not in done.stdout
