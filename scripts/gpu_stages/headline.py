"""The headline of arXiv 2404.05919 and then the table of arXiv 1609.08326, going on from checkpoints in every campaign.

First, threads and processes train a few steps; what trains more samples a second takes the rest of the time.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from functools import partial
from typing import Any

from stage import NotYet, Stage

from mpicomp.replica.record import training_seconds

RANKS = 16
SEEDS = (0, 1, 2)
GOSSIP = ("choco_90", "adagossip_90")
DELAYED = ("ssgd", "asgd", "dc_asgd_c", "dc_asgd_a")
WORKERS = (4, 8)
HOWS = ("threads", "processes")

RESERVE_S = 15
"""Seconds for the start of a run and its last checkpoint."""

UNFINISHED = 75
"""The exit code of `mpicomp train` where the time limit has stopped it."""


def main() -> None:
    """Run the stage."""
    stage = Stage("headline")
    ranks = 2 if stage.tiny else RANKS
    seeds = SEEDS[:1] if stage.tiny else SEEDS
    workers = (2,) if stage.tiny else WORKERS
    methods = DELAYED[-1:] if stage.tiny else DELAYED
    items = {f"speed of {how}": partial(speed, stage, how, ranks) for how in HOWS}
    for seed in seeds:
        for config in GOSSIP[:1] if stage.tiny else GOSSIP:
            items[f"{config}, seed {seed}"] = partial(gossip, stage, config, ranks, seed)
    for size in workers:
        for config in methods:
            items[f"{config}, {size} workers, seed 0"] = partial(delayed, stage, config, size)
    stage.run(items)


def sets_of(stage: Stage, *more: str) -> list[str]:
    """Return the options that set keys."""
    sets = [f"run.device={stage.device}", *more]
    if stage.tiny:
        sets += ["data.kind=digits", "data.augment=", "model.kind=mlp", "model.norm="]
    return [word for value in sets for word in ("--set", value)]


def speed(stage: Stage, how: str, ranks: int) -> Mapping[str, Any]:
    """Train a few steps, and return the samples a second of all ranks together."""
    folder, steps = stage.folder / f"speed-{how}", 8 if stage.tiny else 60
    shutil.rmtree(folder, ignore_errors=True)
    words = train_words(stage, GOSSIP[0], folder, 0, f"training.steps={steps}", "run.evaluate_every_epochs=1000")
    options, processes = started_as(how, ranks)
    launch(stage, [*words, *options], processes, limit=150)
    result = json.loads((folder / "result.json").read_text())
    # The first record holds what starts up: compilers, the choice of convolutions.
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    seconds = [training_seconds(record["seconds"]) for record in records]
    taken, done = (sum(seconds[1:]), steps - records[0]["step"]) if len(records) > 1 else (seconds[0], steps)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return {"ranks": ranks, "samples_per_s": done * ranks * 32 / taken, "seconds": result["seconds"]}


def train_words(stage: Stage, config: str, folder: Any, seed: int, *more: str) -> list[object]:
    """Return the command of a run that starts or goes on."""
    words = [
        "-m",
        "mpicomp",
        "train",
        f"configs/studies/cifar10/{config}.toml",
        "--run-dir",
        folder,
        "--resume",
        "auto",
    ]
    return [*words, *sets_of(stage, f"run.seed={seed}", "run.allow_shared_gpu=true", *more)]


def launch(stage: Stage, words: list[object], ranks: int | None = None, limit: float = 1e9) -> None:
    """Train until the run or the time ends, on MPI ranks if their number is given."""
    left = min(limit, stage.seconds_left)
    if left < RESERVE_S + 5:
        raise NotYet({})
    words = [*words, "--time-limit", f"{int(left - RESERVE_S)}s"]
    stage.program(words, limit=left, ranks=ranks, codes=(0, UNFINISHED))


def started_as(how: str, ranks: int) -> tuple[list[object], int | None]:
    """Return the options and the number of MPI ranks that start threads or processes."""
    return (["--loopback", ranks], None) if how == "threads" else ([], ranks)


def gossip(stage: Stage, config: str, ranks: int, seed: int) -> Mapping[str, Any]:
    """Train the configuration with a seed, as far as the time goes."""
    speeds = {how: stage.result(f"speed of {how}").get("samples_per_s", 0.0) for how in HOWS}
    how = max(HOWS, key=lambda how: speeds[how])
    more = ["training.epochs=1"] if stage.tiny else []
    folder = stage.folder / f"{config}-seed{seed}"
    options, processes = started_as(how, ranks)
    launch(stage, [*train_words(stage, config, folder, seed, *more), *options], processes)
    return outcome(folder, ranks_are=how)


def delayed(stage: Stage, config: str, workers: int) -> Mapping[str, Any]:
    """Train a configuration of the study of delays on CIFAR-10, in simulated time."""
    folder = stage.folder / f"{config}-{workers}workers-seed0"
    more = ["training.epochs=1"] if stage.tiny else []
    size = ["--loopback", workers] if config == "ssgd" else ["--simulate", workers + 1]  # the hub comes on top
    launch(stage, [*train_words(stage, config, folder, 0, *more), *size])
    return outcome(folder)


def outcome(folder: Any, **more: Any) -> Mapping[str, Any]:
    """Return how far a run has come, and its result; NotYet if it has not ended."""
    metrics = folder / "metrics.jsonl"
    records = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    evaluated = [record for record in records if record["test_accuracy"] is not None]
    found = {**more, "epoch": records[-1]["epoch"] if records else 0.0}
    if evaluated:
        found["test_accuracy"] = evaluated[-1]["test_accuracy"]
    if not (folder / "result.json").exists():
        raise NotYet(found)
    result = json.loads((folder / "result.json").read_text())
    return found | {key: result[key] for key in ("ranks", "steps", "seconds", "test_accuracy", "consensus_distance")}


if __name__ == "__main__":
    main()
