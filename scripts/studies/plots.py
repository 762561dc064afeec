"""The plots of a study: how wide the range of good settings is, and what is reached with how much."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import numpy as np
from definition import Study
from matplotlib.figure import Figure
from outcomes import Outcome
from tables import Finished
from tune import Choice

EPOCHS, BYTES, ACCURACY, LOSS, SECONDS = 0, 2, 3, 4, 5
"""The places in a row of a curve (see `outcomes`)."""

AMOUNTS = ((EPOCHS, 1.0, "epochs"), (BYTES, 1e6, "MB sent a rank"), (SECONDS, 1.0, "simulated seconds"))
"""What curves are drawn over: place, unit and name."""

SHOWN = 10
"""Points of accuracy below the best run that are shown; what is worse, or diverged, lies on the lower edge."""


def draw_searches(study: Study, finished: Sequence[Finished]) -> Path | None:
    """Draw the validation accuracy of the short runs over each setting, the others as chosen; None without settings."""
    keys = list(dict.fromkeys(axis.key for cell, *_ in finished for axis in cell.method.axes))
    settings = list(dict.fromkeys(cell.setting.name for cell, *_ in finished if cell.study.decide_by != "loss"))
    if not keys or not settings:
        return None
    plt.style.use(Path(__file__).parents[1] / "figures.mplstyle")
    figure, rows = plt.subplots(
        len(settings), len(keys), figsize=(4 * len(keys), 2.6 * len(settings)), squeeze=False, sharey="row"
    )
    for setting, row in zip(settings, rows, strict=True):
        for key, axes in zip(keys, row, strict=True):
            best = max(100 * outcome["accuracy"] for outcome in _ended(finished, setting))
            for cell, choice, *_ in finished:
                line = _line(key, choice) if cell.setting.name == setting else []
                if line:
                    factors = [value / choice.values[key] for value, _ in line]
                    shown = [max(quality, best - SHOWN) for _, quality in line]
                    color = f"C{study.methods.index(cell.method)}"
                    axes.plot(factors, shown, "o-", label=cell.method.title, color=color, clip_on=False)
            axes.set_visible(axes.has_data())
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:g}")
            axes.set(xlabel=f"{key} over its chosen value", ylim=(best - SHOWN, best + 1))
        row[0].set(ylabel="validation accuracy (%)", title=_title(study, setting))
    entries = {}
    for axes in rows.flat:
        entries |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "ncols": len(keys)}  # where it hides no line
    figure.legend(entries.values(), entries, frameon=False, **below)
    figure.tight_layout()
    return _save(figure, study.folder / "search.svg")


def draw_curves(study: Study, finished: Sequence[Finished]) -> Path | None:
    """Draw what the runs of the table have reached, mean over seeds, over epochs, bytes and simulated seconds.

    None for a study whose time is not simulated, or that has no target to be reached.
    """
    settings = list(dict.fromkeys(row.cell.setting.name for row in finished))
    if not (study.simulate and study.target and settings):
        return None
    by_loss = study.decide_by == "loss"
    of, unit, label = (LOSS, 1.0, "test loss (nats)") if by_loss else (ACCURACY, 100.0, "test accuracy (%)")
    plt.style.use(Path(__file__).parents[1] / "figures.mplstyle")
    figure, rows = plt.subplots(
        len(settings), len(AMOUNTS), figsize=(10, 3 * len(settings)), squeeze=False, sharey="row"
    )
    for setting, row in zip(settings, rows, strict=True):
        best = []
        for cell, _, outcomes, *_ in (found for found in finished if found.cell.setting.name == setting):
            curves = [outcome["curve"] for outcome in outcomes if not outcome["diverged"]]
            if curves:
                mean = np.mean(np.array(curves, dtype=float), axis=0)
                best.append(unit * mean[-1, of])
                for (place, scale, _), axes in zip(AMOUNTS, row, strict=True):
                    color = f"C{study.methods.index(cell.method)}"
                    axes.plot(mean[:, place] / scale, unit * mean[:, of], label=cell.method.title, color=color)
        for (place, _, name), axes in zip(AMOUNTS, row, strict=True):
            axes.axhline(study.target, color="0.8", zorder=0)
            axes.set(xlabel=name, xscale="linear" if place == EPOCHS else "log")
        if best:
            row[0].set(
                ylim=(min(best) - 0.05, study.target + 0.65) if by_loss else (study.target - SHOWN, max(best) + 0.5)
            )
        row[0].set(ylabel=label, title=_title(study, setting))
    entries = dict(zip(*reversed(rows[0][0].get_legend_handles_labels()), strict=True))
    figure.legend(entries.values(), entries, frameon=False, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=3)
    figure.tight_layout()
    return _save(figure, study.folder / "curves.svg")


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
    plt.close(figure)
    return path


def _title(study: Study, name: str) -> str:
    return next(setting.title for setting in study.settings if setting.name == name)


def _ended(finished: Sequence[Finished], setting: str) -> list[Outcome]:
    """Return the short runs of a setting that have not diverged."""
    choices = [row.choice for row in finished if row.cell.setting.name == setting]
    return [outcome for choice in choices for outcome in choice.searched if not outcome["diverged"]]


def _line(key: str, choice: Choice) -> list[tuple[float, float]]:
    """Return value and accuracy, ascending, of the short runs that differ from the choice in `key` alone."""
    chosen = choice.values
    if key not in chosen:
        return []
    line = [
        (outcome["values"][key], 0.0 if outcome["diverged"] else 100 * outcome["accuracy"])
        for outcome in choice.searched
        if all(outcome["values"][other] == chosen[other] for other in chosen if other != key)
    ]
    return sorted(line)
