"""The objects that a rank builds before training starts, and the batches that it takes."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from mpicomp.algorithms import Algorithm, AnyAlgorithm, AsynchronousAlgorithm
from mpicomp.checkpoint.folder import Checkpoint
from mpicomp.compression.identity import Identity
from mpicomp.compression.wrap.allocation import BY_BANDWIDTH, allocate, summary
from mpicomp.config.config import RunConfig
from mpicomp.config.sections import CompressionSection, TrainingSection
from mpicomp.data.dataset import Dataset
from mpicomp.data.partition import Indices
from mpicomp.errors import ConfigError, DataError
from mpicomp.exchange.bandwidths import measure_bandwidths
from mpicomp.exchange.base import Groups, World
from mpicomp.exchange.guard import agree, together
from mpicomp.exchange.loopback.world import LoopbackWorld
from mpicomp.run.assignment import BatchAssignment
from mpicomp.topology import spectral_gap
from mpicomp.topology.absence import Absences
from mpicomp.topology.base import Schedule

_loading = threading.Lock()
_loaded: dict[str, tuple[Dataset, str, Callable[..., list[Indices]]]] = {}


@dataclass
class Setup:
    """The objects that a rank builds before training starts.

    Attributes:
        dataset: all samples.
        digest: of them, see `Dataset.digest`.
        assignment: the samples of each training rank at each step; all take from one queue if its size is 1.
        trainers: how many ranks train.
        schedule: the graph of each step.
        groups: the ranks of each node, if the graph joins nodes.
        algorithm: the training method.
        model: on the device of the rank.
        optimizer: over the parameters of `model`.
        rates: the learning rate of each group of the optimizer, before the schedule.
        training: the section of the configuration.
        absences: which ranks are away when, in a simulation.

    """

    dataset: Dataset
    digest: str
    assignment: BatchAssignment
    trainers: int
    schedule: Schedule
    groups: Groups | None
    algorithm: AnyAlgorithm
    model: nn.Module
    optimizer: torch.optim.Optimizer
    rates: Sequence[float]
    training: TrainingSection
    absences: Absences
    _ordered: tuple[BatchAssignment, int, int] | None = None
    _order: Indices = field(default_factory=lambda: np.empty(0, dtype=np.int64))

    def set_learning_rate(self, factor: float) -> None:
        """Give each group of the optimizer `factor` times its learning rate."""
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor

    @property
    def steps(self) -> int:
        """The number of steps of the whole run; of batches, if all ranks take them from one queue."""
        if self.training.steps:
            return self.training.steps * self.trainers // self.assignment.size
        return self.assignment.history.offset + self.assignment.per_epoch * (self.training.epochs or 0)

    def epoch(self, step: float) -> float:
        """Return the epochs done after `step` steps, fractional."""
        return (step - self.assignment.history.offset) / self.assignment.per_epoch

    def batch(self, step: int, place: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return inputs and targets of batch `step` for the training rank number `place`.

        They depend only on (seed, epoch, place, step).
        """
        epoch, index = self.assignment.position(step)
        if self._ordered != (self.assignment, epoch, place):
            self._ordered, self._order = (self.assignment, epoch, place), self.assignment.order(epoch, place)
        size = self.assignment.batch_size
        chosen = self._order[index * size : (index + 1) * size]
        return self.dataset.batch("train", chosen, device, (self.assignment.seed, epoch, place, index))

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of a batch with its autograd graph; raise ConfigError if it is no scalar."""
        loss = self.dataset.loss(self.model(inputs), targets)
        if not isinstance(loss, Tensor) or loss.ndim:
            found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise ConfigError(f"the loss of data.kind = {self.dataset.kind!r} must be a scalar tensor, and is {found}")
        return loss

    def batch_loss(self, step: int, place: int, device: torch.device) -> Tensor:
        """Return the loss of batch `step` for the training rank number `place`: the closure of a step.

        Making the batch counts as a part of the gradient.
        """
        return self.loss(*self.batch(step, place, device))


def with_bandwidths(
    config: RunConfig, world: World, groups: Groups | None = None, checkpoint: Checkpoint | None = None
) -> RunConfig:
    """Return `config` with the bandwidth of each rank, if its ratios need them; collective on all ranks.

    They are those of `config` if it has them, else those with which the run of `checkpoint` began, else measured.

    Raises:
        ConfigError: on every rank: they cannot be measured.

    """
    section = config.compression
    if section.allocation not in BY_BANDWIDTH or section.bandwidths is not None:
        return config
    with together(world):
        schedule, _ = config.check(world.size, groups)
        stored = RunConfig.from_toml(checkpoint.manifest.config, str(checkpoint.path)) if checkpoint else None
        bandwidths = stored.compression.bandwidths if stored else None
        if bandwidths is None and isinstance(world, LoopbackWorld) and not world.is_simulated:
            raise ConfigError(
                f"compression.allocation = {section.allocation!r}: ranks that are threads of one process have no links "
                "to measure: give compression.bandwidths, or train with --simulate or MPI"
            )
    if bandwidths is None:
        bandwidths = measure_bandwidths(world, schedule)
    return dataclasses.replace(config, compression=section.model_copy(update={"bandwidths": bandwidths}))


def set_up(config: RunConfig, world: World, groups: Groups | None = None) -> Setup:
    """Check everything, cheap checks first, and build what this rank needs; no communication.

    `config` has gone through `with_bandwidths`.
    """
    schedule, algorithm = config.check(world.size, groups)
    if (fault := config.simulation.fault) and not world.is_simulated:
        raise ConfigError(
            f"{fault}: messages are lost, and ranks leave, in simulated time only. Train with --simulate, or leave the "
            "key out"
        )
    dataset, digest, split = _load(config)
    trainers = sharers = world.size
    if isinstance(algorithm, AsynchronousAlgorithm):
        trainers = len(algorithm.trainers(world.size))
        sharers = 1 if algorithm.share == "by_speed" else trainers
    assignment = BatchAssignment(
        partial(split, seed=config.run.seed),
        len(dataset.train),
        sharers,
        config.training.batch_size,
        config.run.seed,
    )
    volumes = [len(samples) for samples in assignment.split(sharers)]  # raises what is wrong with it
    algorithm = with_volumes(algorithm, volumes, config.compression)
    model = config.model.build(dataset, config.run.seed).to(world.device)
    optimizer = config.optimizer.build(model)
    setup = Setup(
        dataset,
        digest,
        assignment,
        trainers,
        schedule,
        groups,
        algorithm,
        model,
        optimizer,
        [group["lr"] for group in optimizer.param_groups],
        config.training,
        config.simulation.absences(world.size),
    )
    config.schedule.build(setup.epoch(setup.steps))  # raises what is wrong with it, on all ranks before they start
    return setup


def check_same_data(setup: Setup, world: World) -> None:
    """Raise DataError on every rank if ranks have different data sets; collective on all ranks."""
    digests = world.all_gather(setup.digest)
    others = [str(rank) for rank, digest in enumerate(digests) if digest != digests[0]]
    if others:
        agree(
            world,
            DataError(
                f"data.kind = {setup.dataset.kind!r}: the data set of rank{'s' if len(others) > 1 else ''} "
                f"{', '.join(others)} is another one than that of rank 0. Give all nodes the same files; a data set "
                "that code makes must not depend on the rank"
            ),
        )


def with_volumes(algorithm: AnyAlgorithm, volumes: Sequence[int], section: CompressionSection) -> AnyAlgorithm:
    """Return `algorithm` with the ratios that `section` allocates, and with its field ``volumes``, if any."""
    if isinstance(inner := getattr(algorithm, "inner", None), Algorithm):
        return cast(
            AnyAlgorithm, dataclasses.replace(cast(Any, algorithm), inner=with_volumes(inner, volumes, section))
        )
    found: dict[str, Any] = {}
    if section.allocation != "uniform":
        own = cast(Any, algorithm).compressor
        found["compressor"] = allocate(own, volumes, section.allocation, section.bandwidths or ())
    if getattr(algorithm, "volumes", None) == ():
        found["volumes"] = tuple(volumes)
    return cast(AnyAlgorithm, dataclasses.replace(cast(Any, algorithm), **found)) if found else algorithm


def _load(config: RunConfig) -> tuple[Dataset, str, Callable[..., list[Indices]]]:
    """Return the data set, its digest, and what splits it over ranks; ranks of one process share them."""
    key = config.data.model_dump_json()
    with _loading:
        if key not in _loaded:
            dataset = config.data.load()
            _loaded.clear()
            split = lru_cache(partial(config.data.split, dataset.train_labels))
            _loaded[key] = dataset, dataset.digest(), split
        return _loaded[key]


def header(config: RunConfig, setup: Setup, world: World, start: int) -> list[str]:
    """Return the lines to show before the first step: method, graph, model, data, length."""
    n, steps = sum(p.numel() for p in setup.model.parameters() if p.requires_grad), setup.steps
    resumed = [f"Going on after step {start}, from a checkpoint."] if start else []
    simulated = ", simulated time" if world.is_simulated else ""
    nodes = f" in {len(setup.groups)} nodes" if setup.groups else ""
    allocated = summary(getattr(setup.algorithm, "compressor", Identity()))
    kind = config.compression.kind
    has_own = kind == "identity" and not hasattr(setup.algorithm, "compressor")  # messages, such as PowerSGD's
    messages = "" if has_own else f", messages: {kind}"
    is_pile = setup.assignment.size == 1 < setup.trainers
    length = f"{steps} batches" if is_pile else f"{steps} steps"
    each = f"samples, from one queue for {setup.trainers} ranks" if is_pile else "samples a rank"
    return [
        f"{config.algorithm.kind} on {world.size} rank{'s' * (world.size > 1)}{nodes} ({config.topology.kind}, "
        f"spectral gap {spectral_gap(setup.schedule):.4f}){messages}, device: {world.device}{simulated}",
        f"{config.model.kind} with {n:,} parameters on {config.data.kind}: {length} "
        f"({setup.epoch(steps):.3g} epochs) of {config.training.batch_size} {each}",
        *([f"Evaluated on {len(setup.dataset.test):,} training samples held out."] if config.data.validation else []),
        *([f"{config.compression.allocation}: {allocated}"] if allocated else []),
        *resumed,
    ]
