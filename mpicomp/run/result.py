"""The result of a run, and the formatting of numbers for display."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from mpicomp.replica.record import Record

BYTES_PER_PARAMETER = 4

LISTED_RANKS = 64
"""Files list a number of each rank up to so many ranks; of more, they have the `distribution`."""

QUANTILES = {"min": 0.0, "5%": 0.05, "25%": 0.25, "median": 0.5, "75%": 0.75, "95%": 0.95, "max": 1.0}


@dataclass(frozen=True)
class Result:
    """The result of a whole run.

    Attributes:
        algorithm: ``algorithm.kind``.
        topology: ``topology.kind``.
        compressor: ``compression.kind``.
        ranks: the number of ranks.
        steps: steps done.
        seconds: of training, without evaluation; the most of all ranks.
        train_loss: of the last steps.
        test_accuracy: of the averaged model, in [0, 1]; None where the data set has no accuracy.
        test_accuracy_local: of each rank's own model; None where it was not evaluated (`evaluates_own`). In
            result.json of more than 64 ranks the `distribution`, as of the other numbers by rank.
        bytes_sent: for each rank.
        consensus_distance: ``sqrt(mean_i |x_i - xbar|^2)`` at the end.
        parameters: trainable entries of the model.
        spectral_gap: of the topology.
        gradients: how many gradients each rank has computed; for asynchronous algorithms only.
        delays: as in `Record`.
        lost: the ranks that have died; all other fields are of the remaining ranks, which have new numbers.
        test_loss: of the averaged model, the mean over the test samples; None where there are none.
        evaluated_on: ``"test"``, or ``"validation"``: accuracies and loss are of held-out training samples.
        test_perplexity: ``exp(test_loss)`` of a language model; None for others.
        is_simulated: whether `seconds` are simulated.
        nodes: how many nodes the graph joins (``topology.level = "node"``); None where it joins ranks. ``bytes_sent``
            are those between nodes.

    """

    algorithm: str
    topology: str
    compressor: str
    ranks: int
    steps: int
    seconds: float
    train_loss: float
    test_accuracy: float | None
    test_accuracy_local: list[float | None] | dict[str, float]
    bytes_sent: list[int] | dict[str, float]
    consensus_distance: float
    parameters: int
    spectral_gap: float
    gradients: list[int] | dict[str, float] = field(default_factory=list)
    delays: dict[str, list[int]] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    test_loss: float | None = None
    evaluated_on: str = "test"
    test_perplexity: float | None = None
    is_simulated: bool = False
    nodes: int | None = None

    @property
    def all_reduce_nbytes(self) -> int:
        """The bytes that a rank would have sent with an uncompressed ring all-reduce of the gradient in every step.

        Where the graph joins nodes, those between nodes, with a ring of nodes for the shard of each rank.
        """
        members = self.nodes or self.ranks
        shard = BYTES_PER_PARAMETER * self.parameters * members / self.ranks
        return round(2 * (members - 1) / members * shard * self.steps)


def to_json(report: Record | Result, indent: int | None = None) -> str:
    """Return the fields as a JSON object; NaN and infinity, which JSON does not have, become null.

    Lists of a number for each of more than `LISTED_RANKS` ranks become their `distribution`, and the histograms
    ``delays`` of their edges one histogram, ``"all"``.
    """
    fields = dataclasses.asdict(report)
    for name, value in fields.items():
        if isinstance(value, list) and len(value) > LISTED_RANKS and not isinstance(value[0], str):
            fields[name] = distribution(value)
    if len({edge.partition("<")[0] for edge in fields["delays"]}) > LISTED_RANKS:
        fields["delays"] = {"all": [sum(late) for late in zip_longest(*fields["delays"].values(), fillvalue=0)]}
    return json.dumps(_finite(fields), indent=indent, allow_nan=False)


def distribution(values: Sequence[float | None] | Mapping[str, float]) -> dict[str, float]:
    """Return how many numbers are known (``count``), their mean and `QUANTILES`; of a distribution, itself."""
    if isinstance(values, Mapping):
        return dict(values)
    known = [value for value in values if value is not None]
    if not known:
        return {"count": 0}
    quantiles = np.quantile(known, list(QUANTILES.values())).tolist()
    return {"count": len(known), "mean": fmean(known), **dict(zip(QUANTILES, quantiles, strict=True))}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def summary(result: Result, folder: Path) -> list[str]:
    """Return the last lines of a run: accuracy or loss, traffic compared with an all-reduce, the run folder."""
    ranks = f"{result.ranks} ranks" if result.ranks > 1 else "1 rank"
    own = _gradients(result.gradients)
    return [
        f"Trained {result.steps} steps on {ranks} in {result.seconds:.1f} s.",
        *([f"Lost on the way: {', '.join(result.lost)}."] if result.lost else []),
        *([own] if own else []),
        *_quality(result),
        _traffic(result),
        f"Results: {folder}",
    ]


def _gradients(counts: Sequence[int] | Mapping[str, float]) -> str:
    if len(counts) <= LISTED_RANKS and not isinstance(counts, Mapping):
        return f"Gradients by rank: {', '.join(f'{count}' if count else 'none' for count in counts)}." if counts else ""
    spread = distribution(counts)
    return f"Gradients of a rank: {spread['min']:.0f} to {spread['max']:.0f}, {spread['mean']:.1f} on average."


def _quality(result: Result) -> list[str]:
    model, split = "", result.evaluated_on.capitalize()
    if result.ranks > 1:
        has_hub = distribution(result.gradients).get("min") == 0
        model = " of the hub's model" if has_hub else " of the averaged model"
    if result.test_accuracy is not None:
        local = distribution(result.test_accuracy_local)
        own = f" ({local['min']:.2%} to {local['max']:.2%} of the ranks' own)" if local["count"] and model else ""
        return [f"{split} accuracy: {result.test_accuracy:.2%}{model}{own}."]
    if result.test_loss is None:
        return []
    own = f" (perplexity {result.test_perplexity:.4g})" if result.test_perplexity is not None else ""
    return [f"{split} loss: {result.test_loss:.4g}{own}{model}."]


def _traffic(result: Result) -> str:
    spread, dense = distribution(result.bytes_sent), result.all_reduce_nbytes
    sent = spread["mean"]
    if not sent:
        return "Nothing was sent."
    between = " between nodes" if result.nodes else ""
    each = f"Each rank sent {readable_bytes(sent)}{between}"
    if not math.isclose(spread["min"], spread["max"]):
        each += f" on average (at most {readable_bytes(spread['max'])})"
    times = f"{dense / sent:.3g} times as much"
    return f"{each}; an uncompressed all-reduce{between} would have sent {readable_bytes(dense)}, {times}."


def readable_bytes(count: float) -> str:
    """Return a number of bytes with a decimal unit, e.g. ``"12.3 MB"``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"


def readable_time(seconds: float) -> str:
    """Return a duration as ``m:ss`` or ``h:mm:ss``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
