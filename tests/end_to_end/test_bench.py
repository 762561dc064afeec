"""The benchmarks that need several ranks, on as little as there can be."""

import json

import pytest
import torch
from support.runs import is_code, mpicomp


@pytest.mark.parametrize("ranks", [2, 3])
def test_exchange_is_timed_beside_that_of_mpi(tmp_path, ranks):
    path = tmp_path / "exchange.json"
    done = mpicomp("bench", "exchange", "--largest", "0.02", "--rounds", "2", "--json", path, ranks=ranks)
    assert done.returncode == 0, done.stdout
    report = json.loads(path.read_text())
    assert (report["ranks"], report["neighbors"]) == (ranks, min(2, ranks - 1))
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
@pytest.mark.parametrize("how", [{"ranks": 2}, {}], ids=["processes", "threads"])
def test_steps_are_timed_on_the_device_of_the_run(how):
    command = ["bench", "step", "configs/methods/choco.toml", "--set", "run.device=cuda"]
    done = mpicomp(*command, *([] if how else ["--loopback", "2"]), **how)
    assert is_code(done.returncode, 2) and "this rank sees no GPU" in done.stdout
