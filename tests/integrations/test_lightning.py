"""The example with Lightning, as a user starts it; what `GossipStrategy` does on ranks is tested in tests/mpi."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from support.runs import MPIEXEC, OPEN_MPI_HERE

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "lightning_fashion_mnist.py"

pytestmark = [
    pytest.mark.skipif(find_spec("lightning") is None, reason="lightning is not installed"),
    pytest.mark.skipif("MPICOMP_DATA" not in os.environ, reason="MPICOMP_DATA names no data folder"),
]


def run(*arguments):
    done = subprocess.run(
        [MPIEXEC, "-n", "2", sys.executable, EXAMPLE, "--batches", "40", *map(str, arguments)],
        env=os.environ | OPEN_MPI_HERE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_the_example_trains_and_goes_on(tmp_path):
    first = run("--epochs", 1, "--out", tmp_path)
    assert len(re.findall(r"val_accuracy\s+│\s+0\.\d+", first)) == 1  # rank 0 alone speaks
    assert torch.load(tmp_path / "last.ckpt", weights_only=False)["global_step"] == 40
    second = run("--epochs", 2, "--out", tmp_path, "--resume")
    assert "Restored all states" in second
    (accuracy,) = re.findall(r"val_accuracy\s+│\s+(0\.\d+)", second)
    assert float(accuracy) > 0.6
    assert torch.load(tmp_path / "last.ckpt", weights_only=False)["global_step"] == 80
    folders = sorted(path.name for path in tmp_path.glob("*.ckpt.ranks"))
    assert folders == sorted(f"{path.name}.ranks" for path in tmp_path.glob("*.ckpt"))
