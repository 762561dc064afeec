"""The table of a study, the configurations that it has chosen, and the plot of its searches."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import tomli_w
from definition import Study, Variant
from outcomes import Outcome
from scipy import stats
from tune import Cell, Choice, first_at

CONFIDENCE = 0.95
STEPS, SECONDS = 1, 5
"""The places of steps and seconds in a row of a curve."""


class Finished(NamedTuple):
    """A row of a table.

    Attributes:
        cell: method and setting.
        choice: what was chosen.
        outcomes: of all seeds, on the test samples.
        step_seconds: of a step over each of the study's `other_links`, simulated.

    """

    cell: Cell
    choice: Choice
    outcomes: list[Outcome]
    step_seconds: Sequence[float] = ()


def table(study: Study, setting: Variant, finished: Sequence[Finished]) -> list[str]:
    """Return the lines of the table of a setting, in Markdown."""
    quality = "test loss" if study.decide_by == "loss" else "test accuracy (%)"
    columns = ["method", "chosen", quality, "ranks' own (%)", "MB sent a rank", *seconds_heads(study, "seconds")]
    columns += ["twice the length"]
    if study.target:
        target = f"to {study.target:g}" + ("" if study.decide_by == "loss" else " %")
        columns += [f"epochs {target}", f"MB a rank {target}", *seconds_heads(study, f"seconds {target}")]
        columns += [f"seconds {target}, {name}" for name in study.other_links]
    reference = next((row.outcomes for row in finished if row.cell.method.name == study.reference), None)
    columns += ["difference"] if reference else []
    lines = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    for cell, choice, outcomes, step_seconds in finished:
        name = cell.method.title + ("" if choice.is_inside else " (optimum at an edge)")
        chosen = ", ".join(f"{key.split('.')[1]} {value:g}" for key, value in choice.values.items())
        cells = [name, chosen, *summary(study, outcomes), doubled(study, choice)]
        if study.target:
            cells += reached(study, outcomes)
            cells += [
                spread([step_s * row[STEPS] for row in rows_at_target(study, outcomes)], 0) for step_s in step_seconds
            ]
        if reference:
            cells.append("" if outcomes is reference else difference(study, outcomes, reference))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def summary(study: Study, outcomes: Sequence[Outcome]) -> list[str]:
    """Return the cells of quality, the ranks' own accuracy and bytes."""
    ended = [outcome for outcome in outcomes if not outcome["diverged"]]
    lost = f" ({len(outcomes) - len(ended)} of {len(outcomes)} diverged)" if len(ended) < len(outcomes) else ""
    if not ended:
        return [f"-{lost}", *["-"] * (3 if study.simulate else 2)]
    own = [100 * outcome["own_accuracy"] for outcome in ended if outcome["own_accuracy"] is not None]
    sent = fmean(outcome["bytes_per_rank"] for outcome in ended) / 1e6
    seconds = [f"{fmean(outcome['curve'][-1][SECONDS] for outcome in ended):.0f}"] if study.simulate else []
    return [spread(qualities(study, ended)) + lost, spread(own), f"{sent:.1f}", *seconds]


def qualities(study: Study, outcomes: Sequence[Outcome]) -> list[float]:
    """Return what the table compares by: the loss, or the accuracy in percent."""
    return [outcome["loss"] if study.decide_by == "loss" else 100 * outcome["accuracy"] for outcome in outcomes]


def doubled(study: Study, choice: Choice) -> str:
    """Return how the validation figure changes at twice the length."""
    full, double = qualities(study, [choice.full, choice.double])
    return f"{double - full:+.2f}"


def reached(study: Study, outcomes: Sequence[Outcome]) -> list[str]:
    """Return the epochs, megabytes and simulated seconds to the target."""
    rows = rows_at_target(study, outcomes)
    never = f" ({len(outcomes) - len(rows)} of {len(outcomes)} never)" if len(rows) < len(outcomes) else ""
    seconds = [spread([row[SECONDS] for row in rows], 0)] if study.simulate else []
    return [spread([row[0] for row in rows]) + never, spread([row[2] / 1e6 for row in rows]), *seconds]


def rows_at_target(study: Study, outcomes: Sequence[Outcome]) -> list[Sequence[Any]]:
    """Return the row of each curve at which the target is reached, where it is."""
    ended = [outcome for outcome in outcomes if not outcome["diverged"]]
    return [row for outcome in ended if (row := first_at(outcome["curve"], study))]


def seconds_heads(study: Study, head: str) -> list[str]:
    """Return the head of a column of simulated seconds, if there is one."""
    return [head] if study.simulate else []


def difference(study: Study, outcomes: Sequence[Outcome], reference: Sequence[Outcome]) -> str:
    """Return the mean difference of equal seeds with its confidence interval, by Student's t."""
    pairs = [(a, b) for a, b in zip(outcomes, reference, strict=True) if not a["diverged"] and not b["diverged"]]
    gaps = [qualities(study, [a])[0] - qualities(study, [b])[0] for a, b in pairs]
    if len(gaps) < 2:
        return "-"
    half = stats.t.ppf((1 + CONFIDENCE) / 2, len(gaps) - 1) * stdev(gaps) / len(gaps) ** 0.5
    return f"{fmean(gaps):+.2f} ± {half:.2f}"


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Return mean ± sample standard deviation."""
    if not values:
        return "-"
    return f"{fmean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def write_tuned(finished: Sequence[Finished]) -> None:
    """Write a complete configuration of each finished cell: SETTING/METHOD.toml in the study's folder."""
    for cell, choice, *_ in finished:
        study = cell.study
        path = study.folder / cell.setting.name / f"{cell.method.name}.toml"
        path.parent.mkdir(exist_ok=True)
        config = cell.config(choice.values, 0, epochs=cell.epochs)
        how = "simulate" if study.simulate else "loopback"
        path.write_text(
            f"# {cell.method.title}; {cell.setting.title}. Written by scripts/study {study.folder.as_posix()}:\n"
            f"#     mpicomp train {path.as_posix()} --{how} {study.size(cell.setting, cell.method)}\n\n"
            + tomli_w.dumps(config)
        )


def write_choices(study: Study, finished: Sequence[Finished]) -> Path:
    """Write tuned.json: of each cell the whole search and the choice."""
    found: dict[str, Any] = {}
    for cell, choice, outcomes, _ in finished:
        quality = "loss" if cell.study.decide_by == "loss" else "accuracy"
        found.setdefault(cell.setting.name, {})[cell.method.name] = {
            "chosen": dict(choice.values),
            "is_inside": choice.is_inside,
            "search": [[o["values"], None if o["diverged"] else o[quality]] for o in choice.searched],
            "refused": [dict(values) for values in choice.refused],
            "validation": [choice.full[quality], choice.double[quality]],
            "test": [None if o["diverged"] else o[quality] for o in outcomes],
        }
    path = study.folder / "tuned.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    return path
