"""``mpicomp tune``: which consensus step or learning rate to take, found in short runs."""

from __future__ import annotations

import math
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click

from mpicomp.cli import debug_option, set_option
from mpicomp.cli.run_world import threads
from mpicomp.config.config import RunConfig
from mpicomp.errors import ConfigError, DivergenceError
from mpicomp.exchange.launcher import require_one_process
from mpicomp.files import replacing
from mpicomp.run.result import readable_time
from mpicomp.run.tuning import FEW_STEPS, Found, Row, Tuning, axes_of, held_out

BEST_BAR, LONGEST_BAR = 10, 40
"""Characters of the bar of the best loss, and of one that is so many times as large or larger."""


@click.command()
@click.argument("config_path", type=click.Path(path_type=Path), metavar="CONFIG.toml")
@set_option
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
    size = threads(loopback, simulate)
    require_one_process()
    if size is None:
        raise ConfigError("give the number of ranks that will train, as threads of one process: --loopback N")
    if not (math.isfinite(factor) and factor > 1):
        raise ConfigError(f"--factor {factor:g}: must be a number > 1, e.g. 2")
    if target is not None:
        _check_target(target)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the trial that runs ends, too
    if given := [each for each in overrides if each.partition("=")[0].strip() in ("training.epochs", "training.steps")]:
        raise ConfigError(f"--set {given[0]}: give the length of the short runs by --epochs")
    axes = axes_of(config_path, overrides, searched, factor)
    starts = {axis.key: axis.start for axis in axes}
    tuning = Tuning(config_path, overrides, size, simulate is not None, epochs)
    config = tuning.config(starts)
    tuning.check(config)
    tuning = replace(tuning, validation=held_out(config))
    try:
        tuning.trial_config(starts)
    except ConfigError as error:
        remedy = "--epochs more, or another schedule, e.g. --set schedule.kind=constant"
        raise ConfigError(f"{error}\nThe runs have --epochs {epochs}: give {remedy}") from error
    automatic = " and auto" if tuning.has_automatic(starts) else ""
    click.echo(
        f"{config.algorithm.kind}, ranks: {size}, runs: at most {points}{automatic}, epochs of a run: {epochs}, "
        f"judged by {tuning.validation:,} training samples held out"
    )
    names = [axis.key for axis in axes]
    click.echo("  ".join([*names, "      loss", "accuracy", "consensus", " time"]))
    found = tuning.search(axes, points, lambda row: click.echo(line(names, row)))
    if math.isinf(found.best.loss):
        lowest = {axis.key: min(float(row.values[i]) for row in found.rows) for i, axis in enumerate(axes)}
        lower = " ".join(f"--search {key}={value / 10:.3g}" for key, value in lowest.items())
        raise DivergenceError(f"none of {len(found.rows)} runs has come to a loss: begin lower, {lower}")
    click.echo("\n" + "\n".join(curve(names, found)))
    click.echo("\n" + "\n".join(verdict(names, found)))
    if target is not None:
        _write(target, tuning.config(found.values))


def line(names: Sequence[str], row: Row) -> str:
    """Return the line of a run."""
    words = _words(names, row)
    if math.isinf(row.loss):
        return "  ".join([*words, row.remark])
    accuracy = "-" if row.accuracy is None else f"{row.accuracy:.2%}"
    figures = [f"{row.loss:10.4g}", f"{accuracy:>8}", f"{row.distance:9.3g}", f"{readable_time(row.seconds):>5}"]
    return "  ".join([*words, *figures, *([row.remark] if row.remark else [])])


def curve(names: Sequence[str], found: Found) -> list[str]:
    """Return a line with a bar as long as the loss for each run, and for ``"auto"`` the last one."""
    lines = ["  ".join([*names, "      loss", "consensus"])]
    for row in [*found.rows, *([found.automatic] if found.automatic else [])]:
        words = _words(names, row)
        if math.isinf(row.loss):
            lines.append("  ".join([*words, row.remark]))
            continue
        length = BEST_BAR * row.loss / found.best.loss if found.best.loss > 0 else BEST_BAR
        bar = "#" * round(length) if length <= LONGEST_BAR else "#" * LONGEST_BAR + "..."
        bar += " best" if row is found.best else ""
        lines.append("  ".join([*words, f"{row.loss:10.4g}", f"{row.distance:9.3g}", bar]))
    return lines


def verdict(names: Sequence[str], found: Found) -> list[str]:
    """Return what to take, in sentences."""
    best = found.best
    chosen = ", ".join(f"{name} = {value}" for name, value in zip(names, best.values, strict=True))
    accuracy = "" if best.accuracy is None else f", accuracy {best.accuracy:.2%}"
    lines = [f"Best: {chosen} (loss {best.loss:.4g}{accuracy})."]
    if not found.is_inside:
        lines.append("It lies at the edge of what was run: give more --points.")
    if best.steps < FEW_STEPS:
        lines.append(f"The runs had {best.steps} steps each, which tell little: give more --epochs.")
    if best is found.automatic:
        return lines
    is_automatic = found.automatic is not None and math.isfinite(found.automatic.loss)
    automatic = ', or take gamma = "auto", which needs no search' if is_automatic else ""
    lines.append(
        f"A short run tends to choose too large a step: train the best at full length, and a smaller one{automatic}."
    )
    return lines


def _words(names: Sequence[str], row: Row) -> list[str]:
    """Return the values of a run below their names."""
    return [word.rjust(len(name)) for name, word in zip(names, row.values, strict=True)]


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
