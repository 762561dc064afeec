"""A figure of runs: loss, test accuracy and consensus distance against steps, bytes and seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mpicomp.config.config import read_values
from mpicomp.errors import CheckpointError, ConfigError
from mpicomp.replica.record import training_seconds
from mpicomp.run.folder import RunFolder

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve = npt.NDArray[np.float64]

ABSCISSAS = {"steps": "step", "bytes": "bytes sent by all ranks", "seconds": "seconds of training"}
ORDINATES = {"loss": "training loss", "accuracy": "{} accuracy", "consensus": "consensus distance"}
"""The ordinates; ``{}`` is what the runs were evaluated on."""

LOSSES = {"loss": "training loss", "test_loss": "{} loss", "consensus": "consensus distance"}
"""The ordinates if no run has an accuracy."""

NATS = {
    "loss": "training loss (nats)",
    "test_loss": "{} loss (nats)",
    "perplexity": "{} perplexity",
    "consensus": "consensus distance",
}
"""The ordinates of language models."""


@dataclass(frozen=True)
class Run:
    """The curves of one run, with one entry for each record; NaN where there is no value.

    Attributes:
        name: for the legend.
        curves: by the keys of `ABSCISSAS`, `ORDINATES` and `NATS`.
        evaluated_on: ``"test"``, or ``"validation"``: accuracies are of held-out training samples.
        time: ``"simulated"`` if the seconds are, else ``"real"``, also of a run that has not finished yet.

    """

    name: str
    curves: dict[str, Curve]
    evaluated_on: str
    time: str

    @classmethod
    def read(cls, folder: RunFolder, name: str) -> Run:
        """Read the records of a run, and what they are of.

        Raises:
            CheckpointError: there are no records, or damaged ones, or a damaged result.
            ConfigError: the configuration is damaged.

        """
        records = folder.records()
        if not records:
            raise CheckpointError(f"{folder.metrics_path}: holds no record yet")
        # Not `RunConfig.load`: a picture needs neither the plug-ins of a run nor the version that made it.
        config = read_values(folder.config_path)
        result = folder.load_result()
        try:
            return cls(
                name,
                {
                    "steps": _curve(records, "step"),
                    "bytes": _curve(records, "bytes_sent"),
                    "seconds": np.cumsum([training_seconds(record["seconds"]) for record in records]),
                    "loss": _curve(records, "loss"),
                    "accuracy": _curve(records, "test_accuracy"),
                    "test_loss": _curve(records, "test_loss"),
                    "perplexity": _curve(records, "test_perplexity"),
                    "consensus": _curve(records, "consensus_distance"),
                },
                evaluated_on="validation" if config.get("data", {}).get("validation") else "test",
                time="simulated" if result and result.is_simulated else "real",
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{folder.metrics_path}: is not a file of records: {error!r}") from error


def _curve(records: Sequence[dict[str, Any]], key: str) -> Curve:
    return np.array([np.nan if record[key] is None else record[key] for record in records], dtype=np.float64)


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read the runs in some folders; each gets the shortest part of its path that distinguishes it as its name.

    Raises:
        ConfigError: a path is no run folder, or its configuration is damaged.
        CheckpointError: a run has no records, or its files are damaged.

    """
    folders = [RunFolder.open(path) for path in paths]
    names = [path.resolve().name for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    return [Run.read(folder, name) for folder, name in zip(folders, names, strict=True)]


def figure(runs: Sequence[Run]) -> Figure:
    """Return panels, a row for each of `ORDINATES` (or `LOSSES`, or `NATS`) and a column for each of `ABSCISSAS`.

    Where runs differ in what they were evaluated on, or in whether their time is simulated, the legend says so.

    Raises:
        ConfigError: matplotlib is not installed.

    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("plots need matplotlib: pip install matplotlib") from error
    tested = [
        y for y in ("accuracy", "perplexity", "test_loss") if any(np.isfinite(run.curves[y]).any() for run in runs)
    ]
    ordinates = {"perplexity": NATS, "test_loss": LOSSES}.get(tested[0], ORDINATES) if tested else ORDINATES
    evaluated_on, times = sorted({run.evaluated_on for run in runs}), sorted({run.time for run in runs})
    marks = [
        [*([run.evaluated_on] if len(evaluated_on) > 1 else []), *([f"{run.time} time"] if len(times) > 1 else [])]
        for run in runs
    ]
    labels = [run.name + (f" ({', '.join(mark)})" if mark else "") for run, mark in zip(runs, marks, strict=True)]
    made = Figure(figsize=(13, 1 + 3 * len(ordinates)), layout="constrained")
    panels = made.subplots(len(ordinates), len(ABSCISSAS), sharex="col", sharey="row")
    for row, y in zip(panels, ordinates, strict=True):
        for axes, x in zip(row, ABSCISSAS, strict=True):
            _draw(axes, runs, x, y)
        row[0].set_ylabel(ordinates[y].format(" and ".join(evaluated_on)))
    for axes, label in zip(panels[-1], ABSCISSAS.values(), strict=True):
        axes.set_xlabel(label)
    if times != ["real"]:
        panels[-1][-1].set_xlabel(f"{' and '.join(times)} seconds of training")
    made.legend(panels[0][0].lines, labels, loc="outside upper center", ncols=min(len(runs), 4))
    return made


def _draw(axes: Axes, runs: Sequence[Run], x: str, y: str) -> None:
    for run in runs:
        abscissa, ordinate = run.curves[x], run.curves[y]
        if y == "consensus":
            ordinate = np.where(ordinate > 0, ordinate, np.nan)
        shown = np.isfinite(ordinate)
        # A curve of few points, such as the accuracy, would be hard to see without markers.
        marker = "o" if shown.sum() <= 30 else None
        axes.plot(abscissa[shown], ordinate[shown], marker=marker, markersize=3, linewidth=1.2)
    axes.grid(alpha=0.3)
    if x == "bytes" and all((run.curves["bytes"] > 0).all() for run in runs):
        axes.set_xscale("log")
    if y != "accuracy" and any(np.nanmax(run.curves[y], initial=0.0) > 0 for run in runs):
        axes.set_yscale("log")
