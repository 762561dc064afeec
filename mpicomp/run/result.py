"""The result of a run, and the formatting of numbers for display."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from mpicomp.replica.record import Record

BYTES_PER_PARAMETER = 4


@dataclass(frozen=True)
class Result:
    """The result of a whole run.

    Attributes:
        algorithm: ``algorithm.kind``.
        topology: ``topology.kind``.
        compressor: ``compression.kind``.
        ranks: the number of ranks.
        steps: steps done.
        seconds: of training, without evaluation.
        train_loss: of the last steps.
        test_accuracy: of the averaged model, in [0, 1]; None where the data set has no accuracy.
        test_accuracy_local: of each rank's own model.
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

    """

    algorithm: str
    topology: str
    compressor: str
    ranks: int
    steps: int
    seconds: float
    train_loss: float
    test_accuracy: float | None
    test_accuracy_local: list[float | None]
    bytes_sent: list[int]
    consensus_distance: float
    parameters: int
    spectral_gap: float
    gradients: list[int] = field(default_factory=list)
    delays: dict[str, list[int]] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    test_loss: float | None = None
    evaluated_on: str = "test"
    test_perplexity: float | None = None

    @property
    def all_reduce_nbytes(self) -> int:
        """The bytes that a rank would have sent with an uncompressed ring all-reduce of the gradient in every step."""
        return round(2 * (self.ranks - 1) / self.ranks * BYTES_PER_PARAMETER * self.parameters * self.steps)


def to_json(report: Record | Result, indent: int | None = None) -> str:
    """Return the fields as a JSON object; NaN and infinity, which JSON does not have, become null."""
    return json.dumps(_finite(dataclasses.asdict(report)), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def summary(result: Result, folder: Path) -> list[str]:
    """Return the last lines of a run: accuracy or loss, traffic compared with an all-reduce, the run folder."""
    ranks = f"{result.ranks} ranks" if result.ranks > 1 else "1 rank"
    own = [f"{count}" if count else "none" for count in result.gradients]
    return [
        f"Trained {result.steps} steps on {ranks} in {result.seconds:.1f} s.",
        *([f"Lost on the way: {', '.join(result.lost)}."] if result.lost else []),
        *([f"Gradients by rank: {', '.join(own)}."] if own else []),
        *_quality(result),
        _traffic(result),
        f"Results: {folder}",
    ]


def _quality(result: Result) -> list[str]:
    model, split = "", result.evaluated_on.capitalize()
    if result.ranks > 1:
        model = " of the hub's model" if 0 in result.gradients else " of the averaged model"
    if result.test_accuracy is not None:
        local = [accuracy for accuracy in result.test_accuracy_local if accuracy is not None]
        own = f" ({min(local):.2%} to {max(local):.2%} of the ranks' own)" if local and model else ""
        return [f"{split} accuracy: {result.test_accuracy:.2%}{model}{own}."]
    if result.test_loss is None:
        return []
    own = f" (perplexity {result.test_perplexity:.4g})" if result.test_perplexity is not None else ""
    return [f"{split} loss: {result.test_loss:.4g}{own}{model}."]


def _traffic(result: Result) -> str:
    sent, dense = fmean(result.bytes_sent), result.all_reduce_nbytes
    if not sent:
        return "Nothing was sent."
    each = f"Each rank sent {readable_bytes(sent)}"
    if not math.isclose(min(result.bytes_sent), max(result.bytes_sent)):
        each += f" on average (at most {readable_bytes(max(result.bytes_sent))})"
    return (
        f"{each}; an uncompressed all-reduce would have sent {readable_bytes(dense)}, {dense / sent:.3g} times as much."
    )


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
