"""The drop-in for a training script of one's own: its loop, loader, scheduler and Trainer stay as they are.

    gossip = mpicomp.distribute(model, optimizer, algorithm=AdaGossip(gamma=1e-2), topology=ring,
                                compressor=TopK(ratio=0.01))

    for batch in loader:                                 # with a function that computes the loss
        loss = gossip.step(lambda: loss_fn(model, batch))

    for batch in loader:                                 # or with the loop that people have
        loss = loss_fn(model, batch)
        loss.backward()
        gossip.optimizer.step()
        gossip.optimizer.zero_grad()

Both run the same `Algorithm.phases`, to the same bits. What an algorithm does before the gradient, such as sending
messages that travel behind it, is done at the first forward pass of a step; the rest when the gradient is there.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from typing import Any, Literal, cast, overload

import torch
from torch import nn

from mpicomp.algorithms.asynchronous.base import AnyAlgorithm, AsynchronousAlgorithm
from mpicomp.algorithms.base import Algorithm
from mpicomp.compression.base import Compressor
from mpicomp.compression.identity import Identity
from mpicomp.compression.wrap.by_rank import require_size
from mpicomp.errors import ConfigError, TopologyError
from mpicomp.exchange.base import World
from mpicomp.exchange.guard import install_excepthook
from mpicomp.exchange.placement import DeviceKind
from mpicomp.exchange.watchdog import Watchdog
from mpicomp.replica.asynchronous_distributed import AsynchronousDistributed
from mpicomp.replica.clipping import Clip
from mpicomp.replica.device import device_of, place
from mpicomp.replica.distributed import Distributed
from mpicomp.replica.optimizer import DistributedOptimizer
from mpicomp.topology.base import Schedule, Topology

_distributed: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
"""The optimizers of models that are trained together."""


Buffers = Literal["averaged", "own"] | int
"""What becomes of batch-norm statistics: see `distribute`."""


@overload
def distribute(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    algorithm: Algorithm[Any],
    topology: Schedule | Callable[[int], Schedule],
    compressor: Compressor | None = None,
    world: World | None = None,
    *,
    clip: Clip | None = None,
    buffers: Buffers = "averaged",
    device: DeviceKind | None = None,
    allow_shared_gpu: bool = False,
    hang_timeout_s: float = 600.0,
) -> Distributed: ...
@overload
def distribute(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    algorithm: AsynchronousAlgorithm[Any],
    topology: Schedule | Callable[[int], Schedule],
    compressor: Compressor | None = None,
    world: World | None = None,
    *,
    clip: Clip | None = None,
    buffers: Literal["averaged", "own"] = "averaged",
    device: DeviceKind | None = None,
    allow_shared_gpu: bool = False,
    hang_timeout_s: float = 600.0,
) -> AsynchronousDistributed: ...
def distribute(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    algorithm: AnyAlgorithm,
    topology: Schedule | Callable[[int], Schedule],
    compressor: Compressor | None = None,
    world: World | None = None,
    *,
    clip: Clip | None = None,
    buffers: Buffers = "averaged",
    device: DeviceKind | None = None,
    allow_shared_gpu: bool = False,
    hang_timeout_s: float = 600.0,
) -> Distributed:
    """Train `model` together with the other ranks of this MPI job; collective on all ranks.

    With an asynchronous algorithm it is an `AsynchronousDistributed` that comes back: ranks do not wait for each other,
    and end by ``gossip.finish()``.

    Args:
        model: any module; the parameters that the optimizer holds become views of one flat buffer. All ranks take rank
            0's values.
        optimizer: any first-order optimizer of `torch.optim` over all trainable parameters of `model`; it makes the
            local step. From here on call ``gossip.optimizer`` in its place.
        algorithm: an object of `mpicomp.algorithms`, e.g. ``Choco(gamma=0.2)``.
        topology: a graph or schedule, or a function of the number of ranks such as `mpicomp.topology.ring`.
        compressor: takes the place of ``algorithm.compressor``; `mpicomp.compression.allocate` makes one with a ratio
            for each rank.
        world: the ranks; by default those of ``mpiexec``. An uncaught exception then ends all of them.
        clip: how gradients are shortened; None leaves them as they are.
        buffers: what becomes of batch-norm statistics: ``"averaged"`` in `Distributed.averaged` and each rank's own in
            training; ``"own"`` also there; or a number of steps after which they are averaged in training, too, by an
            all-reduce.
        device: where to train: ``"cpu"``, ``"cuda"`` for the GPU of this rank, ``"auto"`` for a GPU if there is one;
            the model is moved there. By default it stays where it is.
        allow_shared_gpu: whether several ranks may use one GPU.
        hang_timeout_s: how long a rank may wait for others, in seconds, before the job ends with their names; 0 for
            ever. Longer than the longest evaluation on one rank alone. With a `world` of one's own there is no limit.

    Raises:
        ConfigError: a model and an optimizer that do not fit together (names the tensor and the ranks); a model on
            another device than its rank; a compressor for an algorithm that sends no compressed message, or one for
            another number of ranks.
        TopologyError: a graph that the algorithm cannot use, or of another size than the number of ranks.

    """
    if optimizer in _distributed or isinstance(optimizer, DistributedOptimizer):
        raise ConfigError("this optimizer is distributed already: make a new model and optimizer for another training")
    is_own_world, watchdog = world is None, None
    if world is None:
        from mpicomp.exchange.mpi.world import MpiWorld  # here, because it starts MPI

        world = MpiWorld.from_environment(device or device_of(model), allow_shared_gpu)
        install_excepthook(world)
        watchdog = Watchdog(world, hang_timeout_s, "hang_timeout_s", only_waiting=True)
        watchdog.__enter__()  # for the rest of the program
    place(model, optimizer, world, is_moved=device is not None)
    if compressor is not None:
        algorithm = with_compressor(algorithm, compressor)
    is_schedule = isinstance(getattr(topology, "union", None), Topology)  # a class has a property there, not a graph
    schedule = cast(Schedule, topology if is_schedule else topology(world.size))
    require_size(getattr(algorithm, "compressor", Identity()), world.size)
    if schedule.size != world.size:
        raise TopologyError(f"topology {schedule.name!r} has {schedule.size} ranks, but there are {world.size}")
    if isinstance(buffers, int) and buffers < 1:
        raise ConfigError(f"buffers = {buffers} must be 'averaged', 'own', or a number of steps that is at least 1")
    if clip is not None and clip.after_sum and not algorithm.updates_with_sum:
        raise ConfigError(
            f"Clip(after_sum=True): {algorithm.name} has no sum of gradients to clip: leave after_sum out"
        )
    if isinstance(algorithm, AsynchronousAlgorithm):
        if isinstance(buffers, int):
            raise ConfigError(f"buffers = {buffers}: {algorithm.name} has no common steps. Use 'averaged' or 'own'.")
        gossip: Distributed = AsynchronousDistributed(model, optimizer, algorithm, schedule, world, is_own_world)
    else:
        gossip = Distributed(model, optimizer, algorithm, schedule, world)
    gossip.watchdog = watchdog
    gossip.local.clip, gossip.local.clip_sum = (None, clip) if clip and clip.after_sum else (clip, None)
    gossip.averages_buffers = buffers != "own"
    gossip.buffers_every = buffers if isinstance(buffers, int) else 0
    gossip.is_compared = algorithm.ranks_stay_equal
    gossip.optimizer.take_over()
    _distributed.add(optimizer)
    return gossip


def with_compressor(algorithm: AnyAlgorithm, compressor: Compressor) -> AnyAlgorithm:
    """Return `algorithm` with `compressor` for what it sends."""
    if not hasattr(algorithm, "compressor"):
        raise ConfigError(f"{algorithm.name} sends uncompressed messages: leave out compressor (compression.kind)")
    return cast(AnyAlgorithm, dataclasses.replace(cast(Any, algorithm), compressor=compressor))
