"""The drop-in for a training script of one's own: three lines, under its own loader, scheduler and loop.

gossip = mpicomp.distribute(model, optimizer, algorithm=AdaGossip(gamma=1e-2), topology=ring,
                            compressor=TopK(ratio=0.01))
for batch in loader:
    loss = gossip.step(lambda: loss_fn(model, batch))
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from mpicomp.algorithms.base import Algorithm
from mpicomp.checkpoint.tree import Leaf
from mpicomp.compression.base import Compressor
from mpicomp.errors import CheckpointError, ConfigError, DivergenceError, TopologyError
from mpicomp.exchange.base import World
from mpicomp.exchange.guard import together
from mpicomp.topology.base import Schedule, Topology
from mpicomp.training.flat import FlatModel
from mpicomp.training.saving import Identity, Saver, check_fits, find_checkpoint, topology_name
from mpicomp.training.state import (
    algorithm_leaves,
    load_algorithm_,
    load_model_,
    load_optimizer_,
    load_random,
    model_leaves,
    optimizer_leaves,
    random_leaves,
)


class Distributed:
    """A model that is trained together with those of the other ranks; made by `distribute`."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        algorithm: Algorithm[Any],
        schedule: Schedule,
        world: World,
    ) -> None:
        algorithm.check(schedule)
        self.world = world
        self.algorithm = algorithm
        self.local = FlatModel(model, optimizer)
        world.broadcast_(self.local.x)
        for buffer in self.local.buffers():
            world.broadcast_(buffer)
        self.exchange = world.exchange(schedule)
        self.state = algorithm.init(self.local, self.exchange)
        self.steps = 0

    @property
    def bytes_sent(self) -> int:
        """The bytes that this rank has sent in training messages."""
        return self.exchange.bytes_sent

    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        """Do one step of training and return the loss, detached; collective on all ranks.

        `closure` computes the loss of the next batch, a scalar; the backward pass and the optimizer's step are made
        here.

        Raises:
            DivergenceError: the loss, or what is to be sent, is not a number; names step and rank.

        """
        self.local.closure = closure
        try:
            self.algorithm.step(self.local, self.state, self.exchange)
        except DivergenceError as error:
            raise self._diverged(str(error)) from error
        if self.local.x.device.type == "cpu":  # on a GPU this would wait for the device in every step
            self.check_finite()
        self.steps += 1
        return self.local.loss

    def check_finite(self) -> None:
        """Raise DivergenceError if the last loss is NaN or infinite."""
        if not bool(torch.isfinite(self.local.loss)):
            raise self._diverged(f"the loss is {self.local.loss.item()}")

    def _diverged(self, what: str) -> DivergenceError:
        return DivergenceError(
            f"{what} at step {self.steps} on rank {self.world.rank}: lower optimizer.lr or algorithm.gamma, "
            "or lengthen schedule.warmup"
        )

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """Give the model the mean parameters and batch-norm statistics of all ranks, within the block.

        Collective on all ranks; not counted as training traffic. This is the model to evaluate and to keep.
        """
        snapshot = self.local.snapshot()
        self.world.mean_(self.local.x)
        for buffer in self.local.buffers():
            self.world.mean_(buffer)
        try:
            yield self.local.model
        finally:
            self.local.restore_(snapshot)

    def consensus_distance(self) -> float:
        """Return ``sqrt(mean_i |x_i - xbar|^2)``, the distance of the ranks' models from their mean; collective."""
        mean = self.local.x.clone()
        self.world.mean_(mean)
        return root_mean_square(self.world, float((self.local.x - mean).norm()))

    def identity(self, config: str = "") -> Identity:
        """Return what checkpoints of this rank belong to; `config` is the text of a configuration, if there is one."""
        return Identity(
            algorithm=repr(self.algorithm),
            topology=topology_name(self.exchange.schedule),
            model=f"{type(self.local.model).__name__} with {self.local.spec.numel:,} parameters",
            config=config,
        )

    def state_dict(self) -> dict[str, Leaf]:
        """Return all that this rank needs to go on later, by path (see `mpicomp.training.state`); nothing is copied.

        Model, optimizer, public copies, moments, residuals, random generators. Not the caller's own: loader, scheduler.
        """
        return {
            **model_leaves(self.local),
            **optimizer_leaves(self.local),
            **algorithm_leaves(self.state),
            "exchange/steps": self.steps,
            "exchange/bytes_sent": self.exchange.bytes_sent,
            **random_leaves(self.world.device),
        }

    def load_state_dict(self, stored: Mapping[str, Leaf]) -> None:
        """Take over what `state_dict` gave on this rank.

        Raises:
            CheckpointError: the state of another algorithm, compressor, optimizer or model.

        """
        load_model_(self.local, stored)
        load_optimizer_(self.local, stored)
        load_algorithm_(self.state, stored)
        self.steps = int(stored["exchange/steps"])
        self.exchange.bytes_sent = int(stored["exchange/bytes_sent"])
        load_random(self.world.device, stored)

    def save(self, folder: Path | str, extra: Mapping[str, Leaf] | None = None, keep_last: int = 2) -> None:
        """Store a checkpoint of all ranks in `folder`, which they share, and wait for it; collective on all ranks.

        `extra` is given back by `resume`: say, the state of the caller's scheduler.

        Raises:
            CheckpointError: it could not be written; earlier checkpoints are intact.

        """
        problems: list[str] = []
        saver = Saver(self.world, Path(folder), self.identity(), keep_last, None, problems.append)
        saver.start(
            self.steps, {**self.state_dict(), **{f"extra/{name}": leaf for name, leaf in (extra or {}).items()}}
        )
        is_sound = saver.finish()
        saver.close()
        if not is_sound:
            raise CheckpointError("; ".join(self.world.broadcast(problems)))

    def resume(self, folder: Path | str) -> dict[str, Leaf] | None:
        """Go on from the newest checkpoint in `folder` and return its `extra`, or None if there is none; collective.

        Raises:
            CheckpointError: a checkpoint that is damaged, or of another model, algorithm or number of ranks.

        """
        checkpoint = find_checkpoint(self.world, Path(folder))
        if checkpoint is None:
            return None
        with together(self.world):
            check_fits(checkpoint, self.identity(), self.world.size)
            stored = checkpoint.read(self.world.rank)
            self.load_state_dict(stored)
        return {path.removeprefix("extra/"): leaf for path, leaf in stored.items() if path.startswith("extra/")}


def root_mean_square(world: World, value: float) -> float:
    """Return the root of the mean over ranks of `value` squared; collective on all ranks."""
    values = world.all_gather(value)
    return float((sum(v * v for v in values) / len(values)) ** 0.5)


def distribute(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    algorithm: Algorithm[Any],
    topology: Schedule | Callable[[int], Schedule],
    compressor: Compressor | None = None,
    world: World | None = None,
) -> Distributed:
    """Train `model` together with the other ranks of this MPI job; collective on all ranks.

    Args:
        model: any module; its trainable parameters become views of one flat buffer. All ranks take rank 0's values.
        optimizer: any `torch.optim` optimizer over the parameters of `model`; it makes the local step.
        algorithm: an object of `mpicomp.algorithms`, e.g. ``Choco(gamma=0.2)``.
        topology: a graph or schedule, or a function of the number of ranks such as `mpicomp.topology.ring`.
        compressor: takes the place of ``algorithm.compressor``.
        world: the ranks; by default those of ``mpiexec``. An uncaught exception then ends all of them.

    Raises:
        ConfigError: a compressor for an algorithm that sends no compressed message.
        TopologyError: a graph that the algorithm cannot use, or of another size than the number of ranks.

    """
    if world is None:
        from mpicomp.exchange.guard import install_excepthook
        from mpicomp.exchange.world import MpiWorld  # here, because it starts MPI

        world = MpiWorld.from_environment()
        install_excepthook(world)
    if compressor is not None:
        algorithm = with_compressor(algorithm, compressor)
    is_schedule = isinstance(getattr(topology, "union", None), Topology)  # a class has a property there, not a graph
    schedule = cast(Schedule, topology if is_schedule else topology(world.size))
    if schedule.size != world.size:
        raise TopologyError(f"topology {schedule.name!r} has {schedule.size} ranks, but there are {world.size}")
    return Distributed(model, optimizer, algorithm, schedule, world)


def with_compressor(algorithm: Algorithm[Any], compressor: Compressor) -> Algorithm[Any]:
    """Return `algorithm` with `compressor` for what it sends."""
    if not hasattr(algorithm, "compressor"):
        raise ConfigError(f"{algorithm.name} sends uncompressed messages: leave out compressor (compression.kind)")
    return cast(Algorithm[Any], dataclasses.replace(cast(Any, algorithm), compressor=compressor))
