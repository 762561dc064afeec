"""A thousand ranks as threads of one process: the run whose figures are in BENCHMARKS.md."""

import json
import resource
import subprocess
import sys
from pathlib import Path

CHOCO = Path(__file__).parents[2] / "configs" / "methods" / "choco.toml"
RANKS, STEPS = 1024, 5

OPTIONS = {
    "model.hidden": [256, 256],  # 85,002 parameters
    "schedule.warmup": 0,
    "training.batch_size": 1,
    "training.steps": STEPS,
    "run.evaluate_every_epochs": 1000,
}


def test_a_thousand_ranks_train_in_less_than_four_gigabytes(tmp_path):
    options = [word for key, value in OPTIONS.items() for word in ("--set", f"{key}={value}")]
    command = ["-m", "mpicomp", "train", CHOCO, *options, "--loopback", RANKS, "--run-dir", tmp_path]
    polite = ["nice", "-n", "5", sys.executable]  # its threads would take the cores from the tests beside it
    done = subprocess.run([*map(str, [*polite, *command])], capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    # the largest child of this process so far, which is this one unless it took less than another test's
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 < 4e9
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["steps"] == STEPS
    assert (result["bytes_sent"]["count"], result["test_accuracy_local"]["count"]) == (RANKS, 64)
    assert (tmp_path / "result.json").stat().st_size < 20_000
