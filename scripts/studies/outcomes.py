"""The runs of a study: each started once, its outcome stored in `runs.jsonl` of the study's folder."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import tomli_w
from definition import Sections, Study, StudyError, digest

from mpicomp.errors import MpicompError
from mpicomp.replica.record import training_seconds
from mpicomp.run.result import distribution
from mpicomp.run.trial import run_trial

Outcome = dict[str, Any]


class OutOfTime(Exception):
    """No time is left to begin another run."""


@dataclass
class Runs:
    """The outcomes of a study, and the time that is left for more.

    Attributes:
        study: whose they are.
        deadline: of `time.monotonic`; no run begins after it.

    """

    study: Study
    deadline: float

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._path = self.study.folder / "runs.jsonl"
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        self._known: dict[str, Outcome] = {}
        for number, line in enumerate(lines, 1):
            try:
                outcome = json.loads(line)
                self._known[outcome["config"]] = outcome
            except (ValueError, KeyError) as error:
                raise StudyError(f"{self._path}, line {number}: no outcome of a run: {error}") from error

    def outcome(self, config: Sections, size: int, **labels: Any) -> Outcome:
        """Return the outcome of a run, which is started unless it is known; raise OutOfTime if there is no time.

        Args:
            config: complete, with its seed.
            size: how many ranks are started.
            labels: stored beside the outcome, for people.

        """
        key = digest({**config, "ranks": size})
        if (known := self._known.get(key)) is not None:
            return known
        if time.monotonic() > self.deadline:
            raise OutOfTime
        outcome = {"config": key, **labels, "ranks": size, **train(config, size, self.study.simulate)}
        print(described(outcome), file=sys.stderr)
        with self._lock:
            self._known[key] = outcome
            with self._path.open("a") as file:
                file.write(json.dumps(outcome) + "\n")
        return outcome


def described(outcome: Outcome) -> str:
    """Return a line about a run that has ended, e.g. ``iid_99/choco, choice, 20 epochs, optimizer.lr 0.1: ...``."""
    labels = [f"{outcome['setting']}/{outcome['method']}", outcome["purpose"]]
    labels += [f"{outcome['epochs']} epochs, seed {outcome['seed']}"] if "epochs" in outcome else []
    labels += [f"{key} {value:g}" for key, value in outcome["values"].items()]
    if outcome["diverged"]:
        return f"{', '.join(labels)}: diverged"
    figures = [f"loss {outcome['loss']:.4g}", f"{outcome['wall_s']:.0f} s"]
    if outcome["accuracy"] is not None:
        figures.insert(0, f"accuracy {100 * outcome['accuracy']:.2f} %")
    return f"{', '.join(labels)}: {', '.join(figures)}"


def train(config: Sections, size: int, simulate: bool) -> Outcome:
    """Train, and return what came out; raise StudyError if the run failed otherwise than by diverging."""
    started, text = time.monotonic(), tomli_w.dumps(config)
    environ = os.environ | {"OMP_NUM_THREADS": "1"}  # several runs at a time, each with threads for its ranks
    try:
        trial = run_trial(text, size, simulate and size > 1, environ)
    except MpicompError as error:
        raise StudyError(f"{text}\n{error}") from error
    if trial is None:
        return {"diverged": True}
    return {"diverged": False, "wall_s": round(time.monotonic() - started, 1)} | summary(trial.result, trial.records)


def summary(result: dict[str, Any], records: list[dict[str, Any]]) -> Outcome:
    """Return what a study stores of a run: the last figures, and the curve over its evaluations.

    A row of the curve is: epochs, steps, bytes that a rank has sent, accuracy, loss, seconds of training.
    """
    own = distribution(result["test_accuracy_local"])
    elapsed = accumulate(training_seconds(record["seconds"]) for record in records)
    curve = [
        [
            round(r["epoch"], 3),
            r["step"],
            r["bytes_sent"] // result["ranks"],
            r["test_accuracy"],
            _rounded(r["test_loss"]),
            _rounded(seconds),
        ]
        for r, seconds in zip(records, elapsed, strict=True)
        if r["test_loss"] is not None
    ]
    return {
        "accuracy": result["test_accuracy"],
        "own_accuracy": round(own["mean"], 5) if own["count"] else None,
        "loss": _rounded(result["test_loss"]),
        "steps": result["steps"],
        "bytes_per_rank": round(distribution(result["bytes_sent"])["mean"]),
        "consensus_distance": _rounded(result["consensus_distance"]),
        "curve": curve,
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")
