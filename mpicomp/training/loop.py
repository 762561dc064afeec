"""One run, straight down: set up, train, evaluate. The only line about distribution is ``gossip.step``."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from mpicomp.errors import DivergenceError
from mpicomp.exchange.base import World
from mpicomp.exchange.guard import together
from mpicomp.timing import take_seconds
from mpicomp.topology.base import Schedule
from mpicomp.training.config import RunConfig
from mpicomp.training.data import Dataset
from mpicomp.training.distributed import Distributed, root_mean_square
from mpicomp.training.metrics import Progress, Record, Result, sent_line
from mpicomp.training.models import loss_and_correct
from mpicomp.training.partition import epoch_indices, steps_per_epoch
from mpicomp.training.run_folder import RunFolder

SAMPLED_ENTRIES = 4096
"""Parameters from which the records' consensus distance is estimated; result.json has the exact one."""

EVALUATION_BATCH = 500

_load_lock = threading.Lock()


@dataclass
class _Setup:
    """What a rank has built before training starts."""

    dataset: Dataset
    own: list[np.ndarray]
    schedule: Schedule
    model: nn.Module
    optimizer: torch.optim.Optimizer
    per_epoch: int
    steps: int


def train(config: RunConfig, world: World, folder: RunFolder | None, progress: Progress | None) -> Result:
    """Train as `config` says and return the result, the same on every rank; collective on all ranks.

    Args:
        config: the run.
        world: the ranks.
        folder: where rank 0 writes records, result and model; None on other ranks.
        progress: what rank 0 shows; None on other ranks.

    Raises:
        MpicompError: bad input, named on all ranks before training starts, or a loss that is not finite.

    """
    with together(world):
        setup = _set_up(config, world)
    gossip = Distributed(setup.model, setup.optimizer, setup.algorithm, setup.schedule, world)
    learning_rate = config.schedule.build(setup.steps / setup.per_epoch)
    meter = _Meter()
    if progress:
        progress.start(_header(config, setup, world))
    for step, (inputs, targets) in enumerate(_batches(config, setup, world)):
        epoch, done = step / setup.per_epoch, step + 1
        for group in setup.optimizer.param_groups:
            group["lr"] = config.optimizer.lr * learning_rate(epoch)
        with meter:
            meter.loss += gossip.step(lambda i=inputs, t=targets: loss(setup.model(i), t))
        evaluate_now = done == setup.steps or done % (setup.per_epoch * config.run.evaluate_every_epochs) == 0
        if evaluate_now or done % config.run.log_every == 0:
            gossip.check_finite()
            record = _record(gossip, setup, meter, evaluate_now)
            if folder:
                folder.append(record)
            if progress:
                progress.update(record)
    result = _result(config, gossip, setup, meter, record)
    with gossip.averaged() as model:
        if folder:
            folder.save_model(model, config)
            folder.save_result(result)
    return result


class _Meter:
    """Adds up loss and seconds over the steps from one record to the next; enter it for each step."""

    def __init__(self) -> None:
        self.total_seconds = 0.0
        self._start = 0.0
        self._reset()

    def _reset(self) -> None:
        self.loss = torch.zeros(())
        self._steps = 0
        self._seconds = 0.0

    def __enter__(self) -> None:
        take_seconds()
        self._start = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self._seconds += time.perf_counter() - self._start
        self._steps += 1
