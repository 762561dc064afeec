"""The benchmarks that need several ranks, on as little as there can be."""

import json

import pytest
import torch
from support.runs import is_code, mpicomp, mpicomp_here


def test_exchange_is_timed_beside_that_of_mpi(tmp_path):
    path = tmp_path / "exchange.json"
    done = mpicomp("bench", "exchange", "--largest", "0.02", "--rounds", "2", "--json", path, ranks=3)
    assert done.returncode == 0, done.stdout
    report = json.loads(path.read_text())
    assert (report["ranks"], report["neighbors"]) == (3, 2)
    assert [row["nbytes"] for row in report["results"]] == [1000, 4000, 16000]
    for row in report["results"]:
        assert row["us"] > 0 and row["raw_us"] > 0 and row["copy_us"] > 0 and row["ratio"] > 0
        assert row["bytes_per_s"] == pytest.approx(1e6 * row["nbytes"] * report["neighbors"] / row["us"])
    assert report["fixed_us"] == report["results"][0]["us"]
    assert "of mpi4py's rate" in done.stdout and "fixed cost" in done.stdout


def test_exchange_needs_neighbors():
    done = mpicomp("bench", "exchange", ranks=1)
    assert is_code(done.returncode, 2) and "mpiexec -n 2" in done.stdout


def test_steps_are_timed_between_processes(tmp_path):
    path = tmp_path / "step.json"
    config = ["configs/methods/choco.toml", "--set", "data.kind=synthetic", "--set", "model.hidden=[8]"]
    done = mpicomp("bench", "step", *config, "--blocks", "2", "--block", "2", "--json", path, ranks=2)
    assert done.returncode == 0, done.stdout
    (row,) = json.loads(path.read_text())["results"]
    assert row["ranks"] == 2 and row["nbytes"] > 0 and row["ratio"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_steps_are_timed_on_the_device_of_the_run():
    command = ["bench", "step", "configs/methods/choco.toml", "--set", "run.device=cuda"]
    for done in (mpicomp(*command, ranks=2), mpicomp_here(*command, "--loopback", 2)):
        assert is_code(done.returncode, 2) and "this rank sees no GPU" in done.stdout
