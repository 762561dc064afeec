"""The drop-in for a training script of one's own: three lines, under its own loader, scheduler and loop.

gossip = mpicomp.distribute(model, optimizer, algorithm=AdaGossip(gamma=1e-2), topology=ring,
                            compressor=TopK(ratio=0.01))
for batch in loader:
    loss = gossip.step(lambda: loss_fn(model, batch))
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from mpicomp.algorithms.asynchronous import AnyAlgorithm, AsynchronousAlgorithm
from mpicomp.algorithms.base import Algorithm
from mpicomp.compression.base import Compressor
from mpicomp.compression.by_rank import require_size
from mpicomp.compression.identity import Identity
from mpicomp.errors import ConfigError, TopologyError
from mpicomp.exchange.base import World
from mpicomp.topology.base import Schedule, Topology
from mpicomp.training.meter import Meter
from mpicomp.training.metrics import Record
from mpicomp.training.replica import Replica


class Distributed(Replica):
    """A model that is trained together with those of the other ranks; made by `distribute`.

    Attributes:
        meter: what the steps have cost since the last record.

    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        algorithm: Algorithm[Any],
        schedule: Schedule,
        world: World,
    ) -> None:
        super().__init__(model, optimizer, algorithm, schedule, world)
        self.link = self._exchange = world.exchange(schedule)
        self._algorithm = algorithm
        self.state = algorithm.init(self.local, self._exchange)
        self.meter = Meter(torch.zeros((), dtype=torch.float64, device=self.local.x.device))

    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        """Do one step of training and return the loss, detached; collective on all ranks.

        `closure` computes the loss of the next batch, a scalar; the backward pass and the optimizer's step are made
        here.

        Raises:
            DivergenceError: the loss, or what is to be sent, is not a number; names step and rank.

        """
        self.local.closure = closure
        with self.meter:
            with self.naming_divergence():
                self._algorithm.step(self.local, self.state, self._exchange)
            if self.local.x.device.type == "cpu":  # on a GPU this would wait for the device in every step
                self.check_finite()
            self.meter.add(self.local.loss)
        self.steps += 1
        return self.local.loss

    def metrics(self, loss: Tensor | float | None = None) -> Record:
        """Return the means over ranks since the last call, the same on all of them; collective on all ranks.

        Loss, bytes, seconds by part with those that are hidden, consensus distance (estimated from 4,096 of the
        parameters), and in `diagnostics` what the algorithm reports, e.g. ``compression_error``. The seconds ``other``
        are the caller's own between two steps: loading and evaluation, and forward and backward pass where they are
        made outside of `step`. Steps before a restart are not in it.

        Args:
            loss: of this rank, where `step` does not see it, or in place of the mean over the steps.

        Raises:
            DivergenceError: a loss that is not finite, or public copies that have been running away for three records.

        """
        return self.meter.record(self, loss)


def distribute(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    algorithm: AnyAlgorithm,
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
        compressor: takes the place of ``algorithm.compressor``; `mpicomp.compression.allocate` makes one with a ratio
            for each rank.
        world: the ranks; by default those of ``mpiexec``. An uncaught exception then ends all of them.

    Raises:
        ConfigError: a compressor for an algorithm that sends no compressed message, or one for another number of ranks;
            an asynchronous algorithm.
        TopologyError: a graph that the algorithm cannot use, or of another size than the number of ranks.

    """
    if world is None:
        from mpicomp.exchange.guard import install_excepthook
        from mpicomp.exchange.world import MpiWorld  # here, because it starts MPI

        world = MpiWorld.from_environment()
        install_excepthook(world)
    if isinstance(algorithm, AsynchronousAlgorithm):
        raise ConfigError(
            f"{algorithm.name} has no common steps, which a training loop of one's own needs: train with it by "
            "`mpicomp train`, or take a synchronous algorithm"
        )
    if compressor is not None:
        algorithm = with_compressor(algorithm, compressor)
    is_schedule = isinstance(getattr(topology, "union", None), Topology)  # a class has a property there, not a graph
    schedule = cast(Schedule, topology if is_schedule else topology(world.size))
    require_size(getattr(algorithm, "compressor", Identity()), world.size)
    if schedule.size != world.size:
        raise TopologyError(f"topology {schedule.name!r} has {schedule.size} ranks, but there are {world.size}")
    return Distributed(model, optimizer, algorithm, schedule, world)


def with_compressor(algorithm: Algorithm[Any], compressor: Compressor) -> Algorithm[Any]:
    """Return `algorithm` with `compressor` for what it sends."""
    if not hasattr(algorithm, "compressor"):
        raise ConfigError(f"{algorithm.name} sends uncompressed messages: leave out compressor (compression.kind)")
    return cast(Algorithm[Any], dataclasses.replace(cast(Any, algorithm), compressor=compressor))
