"""Evaluation of models on the test samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from mpicomp.data.dataset import Dataset
from mpicomp.replica.replica import Replica
from mpicomp.timing import traced

EVALUATION_BATCH = 500
EVALUATION_NUMBERS = 2**24
"""The outputs of a model that may be in memory at a time, unless a single sample has more; 64 MiB in float32."""


OWN_MODELS = 64
"""How many ranks evaluate their own models at the end of a run; all, if there are no more."""


class Score(NamedTuple):
    """The score of a model: the sum of the losses, the number of right predictions, and the number of all.

    `right` is None where predictions cannot be right or wrong.
    """

    loss_sum: float
    right: int | None
    total: int

    @property
    def accuracy(self) -> float | None:
        """The fraction of right predictions; None if predictions cannot be right, or if there are none."""
        return None if self.right is None or not self.total else self.right / self.total

    @property
    def loss(self) -> float | None:
        """The mean loss; None if there are no predictions."""
        return self.loss_sum / self.total if self.total else None


def evaluates_own(rank: int, size: int) -> bool:
    """Return whether `rank` evaluates its own model on all samples: of many ranks, `OWN_MODELS` at equal distances."""
    return size <= OWN_MODELS or rank * OWN_MODELS % size < OWN_MODELS


@torch.no_grad()
def evaluate(model: nn.Module, dataset: Dataset, device: torch.device, rank: int = 0, size: int = 1) -> Score:
    """Return the score on every `size`-th test sample, from sample `rank` on."""
    chosen = np.arange(rank, len(dataset.test), size)
    numbers = dataset.classes * (dataset.input_shape[0] if dataset.task == "language" else 1)
    batch = max(1, min(EVALUATION_BATCH, EVALUATION_NUMBERS // numbers))
    total = Score(0.0, 0, 0)
    model.eval()
    for start in range(0, len(chosen), batch):
        inputs, targets = dataset.batch("test", chosen[start : start + batch], device)
        outputs = model(inputs)
        right, n = dataset.score(outputs, targets) or (None, targets.numel())
        total = _sum([total, Score(n * float(dataset.loss(outputs, targets)), right, n)])
    model.train()
    return total


def _sum(parts: Sequence[Score]) -> Score:
    rights = [part.right for part in parts if part.right is not None]
    right = sum(rights) if len(rights) == len(parts) else None
    return Score(sum(part.loss_sum for part in parts), right, sum(part.total for part in parts))


@traced("evaluation", "")
def averaged_score(replica: Replica, dataset: Dataset) -> Score:
    """Return the test score of the trained model, each rank testing its part; collective on all ranks."""
    world = replica.world
    with replica.averaged() as model:
        parts = world.all_gather(evaluate(model, dataset, world.device, world.rank, world.size))
    return _sum(parts)


def perplexity(loss: float) -> float:
    """Return ``exp(loss)`` of a loss in nats: among how many tokens, equally likely, the model in effect guesses."""
    return math.inf if loss > 700 else math.exp(loss)


def tested(score: Score | None, dataset: Dataset) -> dict[str, Any]:
    """Return the fields of a `Record` that come from an evaluation; none if there was none."""
    if score is None:
        return {}
    loss = score.loss
    return {
        "test_accuracy": score.accuracy,
        "test_loss": loss,
        "test_perplexity": perplexity(loss) if dataset.task == "language" and loss is not None else None,
    }
