"""Which settings of a configuration are good, by short runs that are judged by held-out training samples.

A run is judged by ``loss * distance^0.05``, the smaller the better: the loss of the averaged model on the held-out
samples, and the consensus distance at the end. The averaged model hardly feels the consensus step before training
diverges, but the distance does. So of nearly the same losses the run whose ranks are closer together is the better one:
half the distance counts as a loss that is 3.4 % less.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mpicomp.algorithms.gossip.automatic_step import HALF_LIFE
from mpicomp.config.config import RunConfig
from mpicomp.errors import ConfigError, MpicompError
from mpicomp.exchange.node_groups import groups_of_size
from mpicomp.run.search import Axis, Values, search
from mpicomp.run.trial import run_trial

GAMMA, LR = "algorithm.gamma", "optimizer.lr"

GAMMA_START = 0.1
"""Where the search begins if the configuration has no number."""

HELD_OUT = 0.1
"""The part of the training samples that judges, unless ``data.validation`` says how many do."""

CLOSENESS = 0.05
"""The exponent of the consensus distance."""

FEW_STEPS = HALF_LIFE
"""Runs of fewer steps are too noisy to compare, and ``gamma = "auto"`` is a mean over about so many."""


@dataclass(frozen=True)
class Row:
    """A short run.

    Attributes:
        values: the keys that are searched for, as they are printed.
        loss: of the averaged model on the held-out samples; infinity if the run diverged, failed or could not be.
        accuracy: of the same; None where the task has none.
        distance: the consensus distance at the end.
        seconds: from start to end.
        steps: how many there were.
        remark: what there is to say, e.g. ``"diverged"``.

    """

    values: tuple[str, ...]
    loss: float
    accuracy: float | None = None
    distance: float = math.nan
    seconds: float = 0.0
    steps: int = 0
    remark: str = ""

    @property
    def score(self) -> float:
        """How good the run is, ``-log(loss * distance^CLOSENESS)``; minus infinity without a loss."""
        closeness = -CLOSENESS * math.log(max(self.distance, 1e-8)) if math.isfinite(self.distance) else 0.0
        return closeness - math.log(max(self.loss, 1e-30)) if math.isfinite(self.loss) else -math.inf


@dataclass(frozen=True)
class Found:
    """What a search has found.

    Attributes:
        values: the best ones.
        best: their run; its loss is infinite if no run has come to one. It is that of ``"auto"`` if this is better than
            all others, and long enough to have found its step.
        rows: all runs but that of ``"auto"``, by ascending values.
        is_inside: whether others enclose the best one on every axis, or it is ``"auto"``.
        automatic: the run with ``gamma = "auto"`` and the other best values; None where the method has none.

    """

    values: Mapping[str, object]
    best: Row
    rows: list[Row]
    is_inside: bool
    automatic: Row | None


@dataclass(frozen=True)
class Tuning:
    """The short runs of a configuration.

    Attributes:
        path: of the configuration.
        overrides: ``section.key=value`` of the user.
        size: the number of ranks.
        simulate: whether time is simulated.
        epochs: of a run.
        validation: how many training samples are held out.

    """

    path: Path
    overrides: Sequence[str]
    size: int
    simulate: bool
    epochs: int
    validation: int = 0

    def config(self, values: Mapping[str, object]) -> RunConfig:
        """Return the configuration of a whole run with `values`; raise ConfigError if there is none."""
        return RunConfig.load(self.path, [*self.overrides, *(f"{key}={value}" for key, value in values.items())])

    def trial_config(self, values: Mapping[str, object]) -> RunConfig:
        """Return the configuration of a short run; raise ConfigError if there is none."""
        short: dict[str, object] = {
            "training.epochs": self.epochs,
            "data.validation": self.validation,
            "run.evaluate_every_epochs": 1e6,  # at the end
            "checkpoint.every_minutes": 0,
            "checkpoint.every_steps": "",
        }
        return self.config({**short, **values})

    def check(self, config: RunConfig) -> None:
        """Raise ConfigError if `config` cannot be trained on these ranks."""
        groups = None
        if config.topology.level == "node":
            groups = groups_of_size(self.size, config.topology.node_size or self.size)
        config.check(self.size, groups)
        if config.simulation.fault and not self.simulate:
            raise ConfigError(f"{config.simulation.fault} needs simulated time: give --simulate N, not --loopback N")

    def run(self, values: Mapping[str, object]) -> Row:
        """Train shortly with `values`.

        Raises:
            MpicompError: the run failed otherwise than by diverging.

        """
        words = tuple(str(value) for value in values.values())
        try:
            config = self.trial_config(values)
            self.check(config)
        except ConfigError as error:
            return Row(words, math.inf, remark=f"not possible: {_one_line(error)}")
        started = time.monotonic()
        trial = run_trial(config.to_toml(), self.size, self.simulate)
        seconds = time.monotonic() - started
        loss = None if trial is None else trial.result["test_loss"]
        if trial is None or loss is None:
            return Row(words, math.inf, seconds=seconds, remark="diverged")
        result, gamma = trial.result, trial.records[-1]["diagnostics"].get("gamma")
        remark = "" if gamma is None else f"{gamma:.3g} at the end"
        if gamma is not None and result["steps"] < FEW_STEPS:
            remark += f", after {result['steps']} steps, too few to settle"
        accuracy, distance = result["test_accuracy"], result["consensus_distance"]
        return Row(words, loss, accuracy, math.nan if distance is None else distance, seconds, result["steps"], remark)

    def search(self, axes: tuple[Axis, ...], points: int, show: Callable[[Row], None]) -> Found:
        """Run at most `points` values, and ``"auto"`` where the method has it; `show` gets each run when it ends.

        Raises:
            MpicompError: the first run failed otherwise than by diverging. A later one that fails is a row without a
                loss.

        """
        rows: dict[str, Row] = {}

        def run(values: Mapping[str, object]) -> Row:
            try:
                row = self.run(values)
            except MpicompError as error:
                if not rows:
                    raise
                row = Row(tuple(map(str, values.values())), math.inf, remark=f"failed: {_one_line(error)}")
            show(row)
            return row

        def score(values: Values) -> float:
            row = rows[str(values)] = run(values)
            return row.score

        ranked, is_inside = search(axes, points, score)
        best = ranked[0]
        ascending = sorted(ranked, key=lambda values: tuple(values.values()))
        row, given = rows[str(best)], [rows[str(values)] for values in ascending]
        if not self.has_automatic(best):
            return Found(best, row, given, is_inside, None)
        automatic = run(with_auto := {**best, GAMMA: "auto"})
        if automatic.score > row.score and automatic.steps >= FEW_STEPS:
            return Found(with_auto, automatic, given, True, automatic)
        return Found(best, row, given, is_inside, automatic)

    def has_automatic(self, values: Values) -> bool:
        """Return whether the method takes ``gamma = "auto"``, and gamma is one of the `values`."""
        if GAMMA not in values:
            return False
        try:
            self.config({**values, GAMMA: "auto"})
        except ConfigError:
            return False
        return True


def axes_of(path: Path, overrides: Sequence[str], searched: Sequence[str], factor: float) -> tuple[Axis, ...]:
    """Return what is searched for.

    Args:
        path: of the configuration.
        overrides: ``section.key=value`` of the user.
        searched: ``section.key=start``, or ``section.key``, which starts at the value of the configuration; by default
            the consensus step, or the learning rate where the method has none.
        factor: from a value to the next.

    Raises:
        ConfigError: a key twice, one that does not exist or takes no fractions, or a start that is no number above 0.

    """
    given: dict[str, str] = {}
    for text in searched:
        key, _, value = (word.strip() for word in text.partition("="))
        if not all(key.partition(".")):
            raise ConfigError(f"--search {text}: must have the form section.key=start, e.g. --search {GAMMA}=0.2")
        if key in given:
            raise ConfigError(f"--search {text}: {key} is given twice")
        if "=" in text:
            _start(key, value)  # before the configuration is asked, which says less of the search
        given[key] = value
    starts = [f"{key}={value}" for key, value in given.items() if value]
    config = RunConfig.load(path, [*overrides, *starts])
    axes = []
    for key in given or [GAMMA if hasattr(config.algorithm, "gamma") else LR]:
        section, name = key.split(".", 1)
        start: object = getattr(getattr(config, section, None), name, None)
        if start is None:
            RunConfig.load(path, [*overrides, *starts, f"{key}=0.1"])  # raises, if there is no such key
        if isinstance(start, int):
            raise ConfigError(f"--search {key}: it takes no fractions, which the search tries")
        axes.append(Axis(key, GAMMA_START if start == "auto" else _start(key, start), factor))
    return tuple(axes)


def held_out(config: RunConfig) -> int:
    """Return how many training samples judge: ``data.validation``, or a tenth of all.

    Raises:
        ConfigError: there are none to hold out.
        DataError: the data set is missing or damaged.

    """
    count, dataset = config.data.validation, config.data.load()
    if not count:
        count = int(HELD_OUT * len(dataset.train))
        dataset = dataset.with_validation(count) if count else dataset
    if not count or not len(dataset.test):
        raise ConfigError(
            f"data.validation = {count}: holds out no sample of the {len(dataset.train)} of data.kind = "
            f"{config.data.kind!r}, and a run is judged by them: set more, --set data.validation=N"
        )
    return count


def _start(key: str, value: object) -> float:
    try:
        start = float(value) if isinstance(value, str | float) else math.nan
    except ValueError:
        start = math.nan
    if not (math.isfinite(start) and start > 0):
        raise ConfigError(f"--search {key}: the search begins at a number > 0, e.g. --search {key}=0.1")
    return start


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
