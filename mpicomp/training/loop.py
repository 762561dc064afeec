"""One run, straight down: set up, train, evaluate. The only line about distribution is ``gossip.step``."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mpicomp.algorithms.base import Algorithm
from mpicomp.errors import DivergenceError
from mpicomp.exchange.base import World
from mpicomp.exchange.guard import together
from mpicomp.timing import take_seconds
from mpicomp.topology import spectral_gap
from mpicomp.topology.base import Schedule
from mpicomp.training.config import RunConfig
from mpicomp.training.data import Dataset
from mpicomp.training.distributed import Distributed, root_mean_square
from mpicomp.training.metrics import Progress, Record, Result, summary
from mpicomp.training.models import correct, loss
from mpicomp.training.partition import Indices, epoch_indices, steps_per_epoch
from mpicomp.training.run_folder import RunFolder

SAMPLED_ENTRIES = 4096
"""Parameters from which the records' consensus distance is estimated; result.json has the exact one."""

EVALUATION_BATCH = 500

RUNAWAY_RECORDS = 3
"""Records in a row with public copies farther from the models than zero would be, after which a run is given up."""

PARTS = ("gradient", "compress", "exchange", "mix")
"""Where a step's seconds go; `mix` is what the others leave."""

_loading = threading.Lock()
_loaded: dict[str, Dataset] = {}


@dataclass
class _Setup:
    """What a rank has built before training starts."""

    dataset: Dataset
    partition: list[Indices]
    schedule: Schedule
    algorithm: Algorithm[Any]
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
    meter, runaway = _Meter(), 0
    if progress:
        progress.start(_header(config, setup, world))
    for step, (inputs, targets) in enumerate(_batches(config, setup, world)):
        epoch, done = step / setup.per_epoch, step + 1
        for group in setup.optimizer.param_groups:
            group["lr"] = config.optimizer.lr * learning_rate(epoch)
        with meter:
            meter.loss += gossip.step(partial(_loss, setup.model, inputs, targets))
        evaluate_now = done == setup.steps or done % (setup.per_epoch * config.run.evaluate_every_epochs) == 0
        if evaluate_now or done % config.run.log_every == 0:
            gossip.check_finite()
            record = _record(gossip, setup, meter, evaluate_now)
            runaway = runaway + 1 if record.diagnostics.get("compression_error", 0.0) > 1 else 0
            if runaway == RUNAWAY_RECORDS:
                raise DivergenceError(
                    f"the public copies have left the models behind (compression_error "
                    f"{record.diagnostics['compression_error']:.3g} at step {done}): algorithm.gamma is too large for "
                    "this compressor, or optimizer.lr is"
                )
            if folder:
                folder.append(record)
            if progress:
                progress.update(record)
    result = _result(config, gossip, setup, meter, record)
    with gossip.averaged() as model:
        if folder:
            folder.save_model(model, config)
            folder.save_result(result)
    if folder and progress:
        progress.finish(summary(result, folder.path))
    return result


class _Meter:
    """Adds up loss and seconds over the steps; enter it for each step, `take` what came since the last record."""

    def __init__(self) -> None:
        self.total_seconds = 0.0
        self.loss: Tensor | float = 0.0
        self._steps = 0
        self._seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        self._start = 0.0

    def __enter__(self) -> None:
        take_seconds()
        self._start = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        seconds = time.perf_counter() - self._start
        parts = take_seconds()
        parts["mix"] = seconds - sum(parts.values())
        for part in PARTS:
            self._seconds[part] += parts.get(part, 0.0)
        self.total_seconds += seconds
        self._steps += 1

    def take(self) -> tuple[float, dict[str, float]]:
        """Return the mean loss and the seconds by part since the last call."""
        taken = float(self.loss) / self._steps, self._seconds
        self.loss, self._steps, self._seconds = 0.0, 0, dict.fromkeys(PARTS, 0.0)
        return taken


def _loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    return loss(model(inputs), targets)


def _set_up(config: RunConfig, world: World) -> _Setup:
    """Check everything, cheapest first, and build what this rank needs; no communication."""
    schedule, algorithm = config.check(world.size)
    dataset = _load(config)
    partition = config.data.split(dataset.train_labels, world.size, config.run.seed)
    per_epoch = steps_per_epoch(len(dataset.train), world.size, config.training.batch_size)
    steps = config.training.steps or round(per_epoch * (config.training.epochs or 0))
    model = config.model.build(dataset, config.run.seed).to(world.device)
    optimizer = config.optimizer.build(model)
    return _Setup(dataset, partition, schedule, algorithm, model, optimizer, per_epoch, max(1, steps))


def _load(config: RunConfig) -> Dataset:
    """Return the data set; ranks that are threads of one process share it."""
    key = config.data.model_dump_json()
    with _loading:
        if key not in _loaded:
            dataset = config.data.load()
            _loaded.clear()
            _loaded[key] = dataset
        return _loaded[key]


def _header(config: RunConfig, setup: _Setup, world: World) -> list[str]:
    """Return what a user should know before the first step."""
    n, steps = sum(p.numel() for p in setup.model.parameters() if p.requires_grad), setup.steps
    return [
        f"{config.algorithm.kind} on {world.size} ranks ({config.topology.kind}, spectral gap "
        f"{spectral_gap(setup.schedule):.4f}), messages: {config.compression.kind}, device: {world.device}",
        f"{config.model.kind} with {n:,} parameters on {config.data.kind}: {steps} steps "
        f"({steps / setup.per_epoch:.3g} epochs) of {config.training.batch_size} samples a rank",
    ]


def _batches(config: RunConfig, setup: _Setup, world: World) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches of this rank; they depend on (seed, epoch, rank, step) alone."""
    size, seed = config.training.batch_size, config.run.seed
    for step in range(setup.steps):
        epoch, position = divmod(step, setup.per_epoch)
        if position == 0:
            order = epoch_indices(setup.partition, seed, epoch, world.rank, setup.per_epoch, size)
        chosen = order[position * size : (position + 1) * size]
        yield setup.dataset.batch("train", chosen, world.device, (seed, epoch, world.rank, position))


def _record(gossip: Distributed, setup: _Setup, meter: _Meter, with_accuracy: bool) -> Record:
    """Return the means over ranks since the last record; collective on all ranks."""
    mean_loss, seconds = meter.take()
    distance = _sampled_consensus_distance(gossip)
    rows = gossip.world.all_gather(
        (mean_loss, gossip.bytes_sent, seconds, gossip.algorithm.diagnostics(gossip.local, gossip.state))
    )
    losses, sent, parts, diagnostics = zip(*rows, strict=True)
    accuracy = _averaged_accuracy(gossip, setup.dataset) if with_accuracy else None
    return Record(
        step=gossip.steps,
        epoch=gossip.steps / setup.per_epoch,
        loss=fmean(losses),
        lr=gossip.local.lr,
        bytes_sent=sum(sent),
        seconds={part: fmean(p[part] for p in parts) for part in PARTS},
        consensus_distance=distance,
        test_accuracy=accuracy,
        diagnostics={key: fmean(d[key] for d in diagnostics) for key in diagnostics[0]},
    )


def _sampled_consensus_distance(gossip: Distributed) -> float:
    """Estimate ``sqrt(mean_i |x_i - xbar|^2)`` from some parameters, so that a record costs no dense exchange."""
    x = gossip.local.x
    if len(x) > SAMPLED_ENTRIES:
        generator = torch.Generator().manual_seed(gossip.steps)
        x = x[torch.randint(len(x), (SAMPLED_ENTRIES,), generator=generator).to(x.device)]
    mean = x.clone()
    gossip.world.mean_(mean)
    scale = (len(gossip.local.x) / len(x)) ** 0.5
    return root_mean_square(gossip.world, scale * float((x - mean).norm()))


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


def _averaged_accuracy(gossip: Distributed, dataset: Dataset) -> float:
    """Return the test accuracy of the mean model, each rank testing its part; collective on all ranks."""
    world = gossip.world
    with gossip.averaged() as model:
        parts = world.all_gather(evaluate(model, dataset, world.device, world.rank, world.size))
    return sum(part.right for part in parts) / sum(part.total for part in parts)


def _result(config: RunConfig, gossip: Distributed, setup: _Setup, meter: _Meter, last: Record) -> Result:
    """Return what the whole run came to; collective on all ranks."""
    world = gossip.world
    own = evaluate(gossip.local.model, setup.dataset, world.device)
    assert last.test_accuracy is not None
    return Result(
        algorithm=config.algorithm.kind,
        topology=config.topology.kind,
        compressor=config.compression.kind,
        ranks=world.size,
        steps=gossip.steps,
        seconds=max(world.all_gather(meter.total_seconds)),
        train_loss=last.loss,
        test_accuracy=last.test_accuracy,
        test_accuracy_local=world.all_gather(own.right / own.total),
        bytes_sent=world.all_gather(gossip.bytes_sent),
        consensus_distance=gossip.consensus_distance(),
        parameters=gossip.local.spec.numel,
        spectral_gap=spectral_gap(setup.schedule),
    )
