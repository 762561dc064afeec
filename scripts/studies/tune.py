"""The stages of a cell of a study, which is a method in a setting: search, full length, twice the length, seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from definition import TUNING_SEED, Sections, Study, Variant, merge_
from outcomes import Outcome, Runs

from mpicomp.run.search import Values, search

STABLE_WITHIN = 0.01
"""A setting is stable if at twice the length its accuracy falls by less (its loss rises by a smaller part)."""

SMOOTHING = 3

TIMED_STEPS = 400
"""Of a run that says how long a step takes: a multiple of the periods 8, 10, 16, 20, 25 and 50."""


@dataclass(frozen=True)
class Choice:
    """The settings that were chosen for a cell.

    Attributes:
        values: the settings.
        is_inside: whether the search has run all neighbors of its best point.
        searched: the outcomes of the search, the best first.
        full: the outcome at full length on the validation samples.
        double: the outcome at twice the length.
        refused: settings that came before these, but diverged at full length, or diverged or fell at twice the length.

    """

    values: Values
    is_inside: bool
    searched: list[Outcome]
    full: Outcome
    double: Outcome
    refused: list[Values]


@dataclass(frozen=True)
class Cell:
    """A method in a setting."""

    runs: Runs
    setting: Variant
    method: Variant

    @property
    def study(self) -> Study:
        """The study, as it is for the setting."""
        return self.runs.study.of(self.setting)

    @property
    def name(self) -> str:
        """The name of the cell, ``"SETTING/METHOD"``."""
        return f"{self.setting.name}/{self.method.name}"

    @property
    def epochs(self) -> int:
        """The epochs of a run of the table."""
        return self.method.epochs or self.study.epochs

    @property
    def short_epochs(self) -> int:
        """The epochs of a run of the search: the same part of the table's runs for all methods."""
        return max(1, self.study.short_epochs * self.epochs // self.study.epochs)

    def choose(self) -> Choice | None:
        """Choose the settings by the validation samples; None if no setting is stable. Raises OutOfTime."""
        study = self.study
        short: dict[str, Outcome] = {}

        def shortly(values: Values) -> float:
            short[str(values)] = self.validated(values, self.short_epochs)
            return self.score(short[str(values)])

        points, is_inside = search(self.method.axes, study.points, shortly)
        searched = [short[str(values)] for values in points]
        # The best of a short search may be too bold for a long run: then the next ones are tried in their order.
        following = [values for values, outcome in zip(points, searched, strict=True) if not outcome["diverged"]]
        finalists = following[: study.finalists]
        finalists.sort(key=lambda values: self.score(self.validated(values, self.epochs)), reverse=True)
        refused: list[Values] = []
        for values in finalists + following[study.finalists :]:
            full = self.validated(values, self.epochs)
            if not full["diverged"]:
                double = self.validated(values, 2 * self.epochs)
                if self.is_stable(full, double):
                    return Choice(values, is_inside, searched, full, double, refused)
            refused.append(values)
        return None

    def final(self, choice: Choice) -> list[Outcome]:
        """Return the outcomes of all seeds on the test samples. Raises OutOfTime."""
        return [self._run(choice.values, self.epochs, seed, validation=0, purpose="table") for seed in self.study.seeds]

    def step_seconds(self, choice: Choice) -> list[float]:
        """Return the simulated seconds of a step over each of the study's other links. Raises OutOfTime."""
        found = []
        for links in self.study.other_links.values():
            config = self.config(choice.values, TUNING_SEED, steps=TIMED_STEPS)
            config.get("schedule", {}).pop("warmup", None)  # longer than so few steps
            merge_(config, {"simulation": links})
            outcome = self._outcome(config, purpose="time", values=dict(choice.values))
            if outcome["diverged"]:
                found.append(math.nan)
                continue
            _, steps, _, _, _, seconds = outcome["curve"][-1]
            found.append(float(seconds / steps))
        return found

    def validated(self, values: Values, epochs: int) -> Outcome:
        """Return the outcome of a run that is judged by the validation samples."""
        return self._run(values, epochs, TUNING_SEED, self.study.validation, purpose="choice")

    def _run(self, values: Values, epochs: int, seed: int, validation: int, purpose: str) -> Outcome:
        config = self.config(values, seed, epochs=epochs)
        if validation:
            config["data"]["validation"] = validation
        return self._outcome(config, purpose=purpose, values=dict(values), epochs=epochs, seed=seed)

    def _outcome(self, config: Sections, **labels: Any) -> Outcome:
        labels = {"setting": self.setting.name, "method": self.method.name, **labels}
        return self.runs.outcome(config, self.study.size(self.setting, self.method), **labels)

    def config(self, values: Values, seed: int, **training: Any) -> Sections:
        """Return a complete configuration."""
        config = self.study.config(self.setting, self.method, values, **training)
        config.setdefault("run", {})["seed"] = seed
        config["run"].setdefault("log_every", 1000)
        config["checkpoint"] = {"every_minutes": 0}
        return config

    def score(self, outcome: Outcome) -> float:
        """Return how good a run is by what the study decides by; the larger the better."""
        if outcome["diverged"]:
            return -math.inf
        if self.study.decide_by == "loss":
            return -float(outcome["loss"])
        if self.study.decide_by == "time":
            reached = first_at(outcome["curve"], self.study)
            return -reached[0] if reached else -1000 + float(outcome["accuracy"])
        return float(outcome["accuracy"])

    def is_stable(self, full: Outcome, double: Outcome) -> bool:
        """Return whether a setting holds at twice the length."""
        if double["diverged"]:
            return False
        if self.study.decide_by == "loss":
            return bool(double["loss"] < full["loss"] * (1 + STABLE_WITHIN))
        return bool(double["accuracy"] > full["accuracy"] - STABLE_WITHIN)


def first_at(curve: Sequence[Sequence[Any]], study: Study) -> Sequence[Any] | None:
    """Return the first row of a curve at which the mean of the last evaluations has come to the study's target."""
    assert study.target is not None
    for i in range(SMOOTHING - 1, len(curve)):
        recent = curve[i - SMOOTHING + 1 : i + 1]
        if study.decide_by == "loss":
            has_come = fmean(row[4] for row in recent) <= study.target
        else:
            has_come = 100 * fmean(row[3] for row in recent) >= study.target
        if has_come:
            return curve[i]
    return None
