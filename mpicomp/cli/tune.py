"""``mpicomp tune``: which consensus step or learning rate to take, found in short runs."""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from mpicomp.algorithms.gossip.automatic_step import SHORTEST
from mpicomp.cli import debug_option
from mpicomp.config.config import RunConfig
from mpicomp.errors import ConfigError, DivergenceError, MpicompError
from mpicomp.exchange.launcher import launched_by
from mpicomp.exchange.node import groups_of_size
from mpicomp.files import replacing
from mpicomp.run.result import readable_time
from mpicomp.run.search import Axis, Values, search
from mpicomp.run.trial import run_trial

GAMMA, LR = "algorithm.gamma", "optimizer.lr"

GAMMA_START = 0.1
"""Where the search begins if the configuration has no number."""

HELD_OUT = 0.1
"""The part of the training samples that judges, unless ``data.validation`` says how many do."""

CLOSENESS = 0.05
"""The exponent of the consensus distance in the score. The averaged model hardly feels gamma until training diverges;
the distance does. Half of it counts as a loss that is 3.4 % less."""

FEW_STEPS = 4 * SHORTEST
"""In fewer, runs tell little, and ``gamma = "auto"`` has hardly begun to measure."""

BEST_BAR, LONGEST_BAR = 10, 40
"""Characters of the bar of the best loss, and of one that is so many times as large or larger."""


@dataclass(frozen=True)
class Row:
    """A run of the search.

    Attributes:
        values: the keys that are searched for, as they are printed.
        loss: of the averaged model on the held-out samples; infinity if the run diverged or could not be.
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
        """How good the run is, ``-log(loss distance^CLOSENESS)``; minus infinity if it diverged or could not be."""
        closeness = -CLOSENESS * math.log(max(self.distance, 1e-8)) if math.isfinite(self.distance) else 0.0
        return closeness - math.log(max(self.loss, 1e-30)) if math.isfinite(self.loss) else -math.inf


@dataclass(frozen=True)
class _Request:
    """What is tuned, and how long.

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
        return RunConfig.load(self.path, [*self.overrides, *settings(values)])

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
            remark += f", after {result['steps']} steps, too few to find it"
        accuracy, distance = result["test_accuracy"], result["consensus_distance"]
        return Row(words, loss, accuracy, math.nan if distance is None else distance, seconds, result["steps"], remark)


@click.command()
@click.argument("config_path", type=click.Path(path_type=Path), metavar="CONFIG.toml")
@click.option("--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE", help="Change a key; may be repeated.")
@click.option("--loopback", type=click.IntRange(min=1), metavar="N", help="Run N ranks as threads, without MPI.")
@click.option(
    "--simulate", type=click.IntRange(min=1), metavar="N", help="As --loopback, in simulated time (see mpicomp train)."
)
@click.option(
    "--search",
    "searched",
    multiple=True,
    metavar="SECTION.KEY[=START]",
    help="A key to search for, from START or the value of CONFIG.toml; may be repeated.  [default: algorithm.gamma if "
    "the method has it, else optimizer.lr]",
)
@click.option(
    "--factor", default=2.0, show_default=True, metavar="F", help="From a value to the next, until that is too coarse."
)
@click.option("--points", type=click.IntRange(min=1), default=8, show_default=True, metavar="N", help="Runs at most.")
@click.option("--epochs", type=click.IntRange(min=1), default=2, show_default=True, metavar="N", help="Of a run.")
@click.option(
    "--write", "target", type=click.Path(path_type=Path), metavar="FILE", help="Write CONFIG.toml with the best values."
)
@debug_option
def tune(
    config_path: Path,
    overrides: tuple[str, ...],
    loopback: int | None,
    simulate: int | None,
    searched: tuple[str, ...],
    factor: float,
    points: int,
    epochs: int,
    target: Path | None,
) -> None:
    """Search for the best consensus step, learning rate or other numbers of CONFIG.toml in short runs.

    Values lie on a geometric grid that grows where the best one lies, and becomes finer around it. A run is judged by
    the loss of the averaged model on training samples that are held out (data.validation, by default a tenth); of
    nearly the same losses, the run whose ranks are closer together is the better one. Where the method has
    gamma = "auto", that is run, too.
    """
    size = _size(loopback, simulate)
    if not (math.isfinite(factor) and factor > 1):
        raise ConfigError(f"--factor {factor:g}: must be a number > 1, e.g. 2")
    if target is not None:
        _check_target(target)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the trial that runs ends, too
    axes = _axes(config_path, overrides, searched, factor)
    starts = values_at_start(axes)
    request = _Request(config_path, overrides, size, simulate is not None, epochs)
    config = request.config(starts)
    request.check(config)
    request = _Request(config_path, overrides, size, simulate is not None, epochs, held_out(config))
    try:
        request.trial_config(starts)
    except ConfigError as error:
        remedy = "--epochs more, or another schedule, e.g. --set schedule.kind=constant"
        raise ConfigError(f"{error}\nThe runs have --epochs {epochs}: give {remedy}") from error
    click.echo(
        f"{config.algorithm.kind}, ranks: {size}, runs: at most {points}, epochs of a run: {epochs}, judged by "
        f"{request.validation:,} training samples held out"
    )
    names = [axis.key for axis in axes]
    click.echo(heading(names))
    rows: dict[str, Row] = {}

    def score(values: Values) -> float:
        try:
            row = request.run(values)
        except MpicompError as error:
            if not rows:
                raise
            row = Row(tuple(map(str, values.values())), math.inf, remark=f"failed: {_one_line(error)}")
        rows[str(values)] = row
        click.echo(line(names, row))
        return row.score

    ranked, is_inside = search(axes, points, score)
    best = ranked[0]
    automatic = _automatic(request, best)
    if automatic is not None:
        click.echo(line(names, automatic))
    if math.isinf(rows[str(best)].loss):
        lower = " ".join(f"--search {axis.key}={min(v[axis.key] for v in ranked) / 10:.3g}" for axis in axes)
        also = ", or take algorithm.gamma = 'auto', which did not" if automatic and automatic.loss < math.inf else ""
        raise DivergenceError(f"none of {len(ranked)} runs has come to a loss: begin lower, {lower}{also}")
    click.echo("\n" + "\n".join(curve(names, [rows[str(v)] for v in ordered(ranked)], rows[str(best)], automatic)))
    click.echo("\n" + "\n".join(verdict(names, rows[str(best)], is_inside, automatic is not None)))
    if target is not None:
        _write(target, request.config(best))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def values_at_start(axes: Sequence[Axis]) -> dict[str, float]:
    """Return the values that the search begins with."""
    return {axis.key: axis.start for axis in axes}


def settings(values: Mapping[str, object]) -> list[str]:
    """Return `values` as overrides ``section.key=value``."""
    return [f"{key}={value}" for key, value in values.items()]


def ordered(points: Sequence[Values]) -> list[Values]:
    """Return points by ascending values."""
    return sorted(points, key=lambda values: tuple(values.values()))


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


def heading(names: Sequence[str]) -> str:
    """Return the line above the runs."""
    return "  ".join([*names, "      loss", "accuracy", "consensus", " time"])


def line(names: Sequence[str], row: Row) -> str:
    """Return the line of a run."""
    words = [word.rjust(len(name)) for name, word in zip(names, row.values, strict=True)]
    if math.isinf(row.loss):
        return "  ".join([*words, row.remark])
    accuracy = "-" if row.accuracy is None else f"{row.accuracy:.2%}"
    figures = [f"{row.loss:10.4g}", f"{accuracy:>8}", f"{row.distance:9.3g}", f"{readable_time(row.seconds):>5}"]
    return "  ".join([*words, *figures, *([row.remark] if row.remark else [])])


def curve(names: Sequence[str], rows: Sequence[Row], best: Row, automatic: Row | None) -> list[str]:
    """Return a line with a bar as long as the loss for each of `rows`, and for ``"auto"`` the last one."""
    lines = ["  ".join([*names, "      loss", "consensus"])]
    for row in [*rows, *([automatic] if automatic else [])]:
        words = [word.rjust(len(name)) for name, word in zip(names, row.values, strict=True)]
        if math.isinf(row.loss):
            lines.append("  ".join([*words, row.remark]))
            continue
        length = BEST_BAR * row.loss / best.loss if best.loss > 0 else BEST_BAR
        bar = "#" * round(length) if length <= LONGEST_BAR else "#" * LONGEST_BAR + "..."
        bar += " best" if row is best else ""
        lines.append("  ".join([*words, f"{row.loss:10.4g}", f"{row.distance:9.3g}", bar]))
    return lines


def verdict(names: Sequence[str], best: Row, is_inside: bool, has_automatic: bool) -> list[str]:
    """Return what to take, in sentences."""
    chosen = ", ".join(f"{name} = {value}" for name, value in zip(names, best.values, strict=True))
    accuracy = "" if best.accuracy is None else f", accuracy {best.accuracy:.2%}"
    lines = [f"Best: {chosen} (loss {best.loss:.4g}{accuracy})."]
    if not is_inside:
        lines.append("It lies at the edge of what was run: give more --points.")
    if best.steps < FEW_STEPS:
        lines.append(f"The runs had {best.steps} steps each, which tell little: give more --epochs.")
    automatic = ', or take gamma = "auto", which needs no search' if has_automatic else ""
    lines.append(
        f"A short run tends to choose too large a step: train the best at full length, and a smaller one{automatic}."
    )
    return lines


def _size(loopback: int | None, simulate: int | None) -> int:
    if loopback is not None and simulate is not None:
        raise ConfigError("--loopback and --simulate both say how many ranks to run: give one of them")
    claim = launched_by(os.environ)
    if claim is not None and claim[1] > 1:
        raise ConfigError(
            f"{claim[0]} has started this {claim[1]} times: start it once, without one; --loopback N runs N ranks"
        )
    size = loopback or simulate
    if size is None:
        raise ConfigError("give the number of ranks that will train, as threads of one process: --loopback N")
    return size


def _axes(path: Path, overrides: Sequence[str], searched: Sequence[str], factor: float) -> tuple[Axis, ...]:
    """Return what is searched for; raise ConfigError for a key twice, or a start that is no number above 0."""
    if not searched:
        algorithm = RunConfig.load(path, overrides).algorithm
        searched = [GAMMA if hasattr(algorithm, "gamma") else LR]
    axes: dict[str, Axis] = {}
    for text in searched:
        key, equals, value = text.partition("=")
        section, dot, name = key.strip().partition(".")
        key = f"{section}.{name}"
        if not (section and dot and name):
            raise ConfigError(f"--search {text}: must have the form section.key=start, e.g. --search {GAMMA}=0.2")
        if key in axes:
            raise ConfigError(f"--search {text}: {key} is given twice")
        if isinstance(_value(RunConfig.load(path, overrides), key), int):
            raise ConfigError(f"--search {text}: {key} takes whole numbers, and the search tries fractions")
        axes[key] = Axis(key, _start(text, value) if equals else _start_of_file(path, overrides, key), factor)
    return tuple(axes.values())


def _start(text: str, value: object) -> float:
    try:
        start = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else math.nan
    except ValueError:
        start = math.nan
    if not (math.isfinite(start) and start > 0):
        raise ConfigError(f"--search {text}: the search begins at a number > 0, e.g. --search {text.split('=')[0]}=0.1")
    return start


def _start_of_file(path: Path, overrides: Sequence[str], key: str) -> float:
    value = _value(RunConfig.load(path, overrides), key)
    if value is None:
        RunConfig.load(path, [*overrides, f"{key}=0.1"])  # raises, if the key is unknown or takes no fractions
    return GAMMA_START if value == "auto" else _start(key, value)


def _value(config: RunConfig, key: str) -> object:
    section, name = key.split(".", 1)
    return getattr(getattr(config, section, None), name, None)


def _automatic(request: _Request, best: Values) -> Row | None:
    """Return the run with ``gamma = "auto"`` and the other values of `best`; None where the method has none."""
    values = {**best, GAMMA: "auto"}
    if GAMMA not in best:
        return None
    try:
        request.trial_config(values)
    except ConfigError:
        return None
    return request.run(values)


def _check_target(target: Path) -> None:
    """Raise ConfigError, before anything is run, if the best values cannot be written."""
    if target.exists():
        raise ConfigError(f"--write {target}: the file exists already: give another name, or remove it")
    if not target.parent.is_dir():
        raise ConfigError(f"--write {target}: there is no folder {target.parent}: make it first")


def _write(target: Path, config: RunConfig) -> None:
    with replacing(target) as path:
        path.write_text(config.to_toml())
    click.echo(f"Written: {target}")
