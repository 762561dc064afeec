"""Asynchronous runs as a user starts, stops, kills and continues them, under MPI."""

import json
import os
import signal

import pytest
from support.runs import mpicomp, others_long, ranks_of, start, wait_until

BATCHES = 2 * (1437 // 16)
RUN = ["--set", "training.epochs=2", "--set", "schedule.warmup=0", "--set", "run.log_every=5"]
SLOW = {  # all that train, so that there is time to stop them; a hub cannot be slow
    "dc_asgd": ["--set", "slow.ranks=[1,2]", "--set", "slow.seconds=[0.03,0.06]"],
    "dc_gossip": ["--set", "slow.ranks=[0,1,2]", "--set", "slow.seconds=[0.03,0.03,0.06]"],
}
SLOW["ad_psgd"] = ["--set", "slow.ranks=[0,1]", "--set", "slow.seconds=[0.03,0.06]"]
RANKS = {"dc_asgd": 3, "dc_gossip": 3, "ad_psgd": 2}  # a hub has two workers, and two ranks meet


def gradients(folder):
    """The gradients of all ranks, as the last record has them."""
    lines = (folder / "metrics.jsonl").read_text().splitlines() if (folder / "metrics.jsonl").exists() else []
    return sum(json.loads(lines[-1])["gradients"]) if lines else 0


@pytest.mark.parametrize("method", others_long(["dc_asgd", "dc_gossip", "ad_psgd"]))
def test_a_run_that_is_stopped_takes_every_batch_once(tmp_path, method):
    folder, ranks = tmp_path / "run", RANKS[method]
    run = start("train", f"configs/methods/{method}.toml", *RUN, *SLOW[method], "--run-dir", folder, ranks=ranks)
    wait_until(lambda: gradients(folder) > 20, "training")
    (folder / "stop").touch()
    output, _ = run.communicate(timeout=120)
    assert run.returncode == 75, output
    assert "stop file." in output
    finished = mpicomp("train", "--resume", folder, ranks=ranks)
    assert finished.returncode == 0, finished.stdout
    result = json.loads((folder / "result.json").read_text())
    assert sum(result["gradients"]) == BATCHES
    assert result["test_accuracy"] > 0.6


def test_a_killed_run_goes_on_from_its_last_checkpoint(tmp_path):
    folder = tmp_path / "run"
    options = [*RUN, *SLOW["dc_gossip"], "--set", "checkpoint.every_steps=5"]
    run = start("train", "configs/methods/dc_gossip.toml", *options, "--run-dir", folder, ranks=3)
    wait_until(lambda: (folder / "checkpoints" / "latest").exists() and gradients(folder) > 30, "a checkpoint")
    os.kill(ranks_of(folder)[1], signal.SIGKILL)
    output, _ = run.communicate(timeout=120)
    assert run.returncode != 0, output
    finished = mpicomp("train", "--resume", folder, ranks=3)
    assert finished.returncode == 0, finished.stdout
    assert "Going on after step" in finished.stdout
    assert sum(json.loads((folder / "result.json").read_text())["gradients"]) == BATCHES
