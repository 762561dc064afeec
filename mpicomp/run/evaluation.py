"""How good the models of the ranks are."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from mpicomp.data.datasets import Dataset
from mpicomp.models import correct, loss
from mpicomp.replica.replica import Replica
from mpicomp.timing import traced

EVALUATION_BATCH = 500


class Score(NamedTuple):
    """How well a model did on some predictions: summed cross entropy, right ones, all of them."""

    loss_sum: float
    right: int
    total: int


@torch.no_grad()
def evaluate(model: nn.Module, dataset: Dataset, device: torch.device, rank: int = 0, size: int = 1) -> Score:
    """Return the score on every `size`-th test sample, from sample `rank` on."""
    chosen = np.arange(rank, len(dataset.test), size)
    total = Score(0.0, 0, 0)
    model.eval()
    for start in range(0, len(chosen), EVALUATION_BATCH):
        inputs, targets = dataset.batch("test", chosen[start : start + EVALUATION_BATCH], device)
        logits, n = model(inputs), targets.numel()
        total = Score(
            total.loss_sum + n * float(loss(logits, targets)), total.right + correct(logits, targets), total.total + n
        )
    model.train()
    return total


@traced("evaluation", "")
def averaged_accuracy(replica: Replica, dataset: Dataset) -> float:
    """Return the test accuracy of the trained model, each rank testing its part; collective on all ranks."""
    world = replica.world
    with replica.averaged() as model:
        parts = world.all_gather(evaluate(model, dataset, world.device, world.rank, world.size))
    return sum(part.right for part in parts) / sum(part.total for part in parts)
