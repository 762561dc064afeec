"""Evaluation of models on the test samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from mpicomp.data.datasets import Dataset
from mpicomp.replica.replica import Replica
from mpicomp.timing import traced

EVALUATION_BATCH = 500


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


@torch.no_grad()
def evaluate(model: nn.Module, dataset: Dataset, device: torch.device, rank: int = 0, size: int = 1) -> Score:
    """Return the score on every `size`-th test sample, from sample `rank` on."""
    chosen = np.arange(rank, len(dataset.test), size)
    total = Score(0.0, 0, 0)
    model.eval()
    for start in range(0, len(chosen), EVALUATION_BATCH):
        inputs, targets = dataset.batch("test", chosen[start : start + EVALUATION_BATCH], device)
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
