"""The drop-in for a training script of your own: its loop, loader, scheduler and Trainer stay as they are.

    gossip = mpicomp.distribute(model, optimizer, algorithm=AdaGossip(gamma=1e-2), topology=ring,
                                compressor=TopK(ratio=0.01))

    for batch in loader:                                 # with a function that computes the loss
        loss = gossip.step(lambda: loss_fn(model, batch))

    for batch in loader:                                 # or with the usual loop
        loss = loss_fn(model, batch)
        loss.backward()
        gossip.optimizer.step()
        gossip.optimizer.zero_grad()

Both run the same `Algorithm.phases` and give the same bits. The first forward pass of a step runs what an algorithm
does before the gradient, such as sending messages that travel meanwhile. The rest runs when the gradient is complete.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
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
from mpicomp.exchange.guard import install_excepthook, together
from mpicomp.exchange.node_groups import checked_groups, groups_by_host
from mpicomp.exchange.node_sums import NodeSums
from mpicomp.exchange.placement import DeviceKind
from mpicomp.exchange.watchdog import Watchdog
from mpicomp.replica.asynchronous_distributed import AsynchronousDistributed
from mpicomp.replica.clipping import Clip
from mpicomp.replica.consistency import require_same_settings
from mpicomp.replica.device import device_of, place
from mpicomp.replica.distributed import Distributed
from mpicomp.replica.optimizer import DistributedOptimizer, given
from mpicomp.replica.several_optimizers import SeveralOptimizers, singles
from mpicomp.topology.base import Schedule, Topology

Buffers = Literal["averaged", "own"] | int
"""How batch-norm statistics are handled; see `distribute`."""


@overload
def distribute(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    algorithm: Algorithm[Any],
    topology: Schedule | Callable[[int], Schedule],
    compressor: Compressor | None = None,
    world: World | None = None,
    *,
    clip: Clip | None = None,
    buffers: Buffers = "averaged",
    device: DeviceKind | None = None,
    allow_shared_gpu: bool = False,
    groups: Sequence[Sequence[int]] | Literal["host"] | None = None,
    node_sums: NodeSums = "auto",
    hang_timeout_s: float = 600.0,
) -> Distributed: ...
@overload
def distribute(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    algorithm: AsynchronousAlgorithm[Any],
    topology: Schedule | Callable[[int], Schedule],
    compressor: Compressor | None = None,
    world: World | None = None,
    *,
    clip: Clip | None = None,
    buffers: Literal["averaged", "own"] = "averaged",
    device: DeviceKind | None = None,
    allow_shared_gpu: bool = False,
    node_sums: NodeSums = "auto",
    hang_timeout_s: float = 600.0,
) -> AsynchronousDistributed: ...
def distribute(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    algorithm: AnyAlgorithm,
    topology: Schedule | Callable[[int], Schedule],
    compressor: Compressor | None = None,
    world: World | None = None,
    *,
    clip: Clip | None = None,
    buffers: Buffers = "averaged",
    device: DeviceKind | None = None,
    allow_shared_gpu: bool = False,
    groups: Sequence[Sequence[int]] | Literal["host"] | None = None,
    node_sums: NodeSums = "auto",
    hang_timeout_s: float = 600.0,
) -> Distributed:
    """Train `model` together with the other ranks of this MPI job; collective on all ranks.

    With an asynchronous algorithm it returns an `AsynchronousDistributed`: each rank runs its own loop, and calls
    ``gossip.finish()`` after it.

    Args:
        model: a module; the parameters that the optimizer holds become views of one flat buffer. All ranks take rank
            0's values.
        optimizer: a first-order optimizer of `torch.optim` (not LBFGS or SparseAdam) over all trainable parameters of
            `model`, or several that hold them together, such as ``[muon, adamw]``; they make the local step one after
            another. Afterwards call ``gossip.optimizer`` instead.
        algorithm: an object of `mpicomp.algorithms`, e.g. ``Choco(gamma=0.2)``.
        topology: a graph or schedule, or a function of the number of ranks such as `mpicomp.topology.ring`.
        compressor: replaces ``algorithm.compressor``; `mpicomp.compression.allocate` makes one with a ratio for each
            rank.
        world: the ranks; by default those of ``mpiexec``. With the default, an uncaught exception ends all ranks.
        clip: limits for gradients; None for no clipping.
        buffers: how batch-norm statistics are handled. ``"averaged"``: averaged in `Distributed.averaged`, each rank's
            own in training. ``"own"``: each rank's own there, too. A number: like ``"averaged"``, and an all-reduce
            averages them in training after so many steps.
        device: where to train: ``"cpu"``, ``"cuda"`` for the GPU of this rank, ``"auto"`` for a GPU if there is one;
            the model is moved there. By default it stays where it is.
        allow_shared_gpu: whether several ranks may use one GPU.
        groups: the ranks of each node, if `topology` joins nodes that hold one model each: lists of ranks, or
            ``"host"`` for the ranks of each machine. The ranks of a node average their gradients, and each exchanges
            its shard of the model with the same shard of neighbor nodes. For synchronous algorithms.
        node_sums: what adds up dense vectors inside a node, before MPI does between nodes: ``"nccl"``, ``"gloo"`` on
            the CPU, ``"mpi"``, or ``"auto"`` for NCCL if every rank has a GPU of its own and a node has several ranks.
            For `SSGD`, and for `buffers` every so many steps. If you pass `world`, that of `world` holds.
        hang_timeout_s: how many seconds a rank may wait for others before the job ends with their names; 0 for no
            limit. It must be longer than the longest evaluation on a single rank. If you pass `world`, there is no
            limit.

    Raises:
        ConfigError: model and optimizer do not fit together (names the tensor and the ranks); the model is on another
            device than its rank; a compressor is given, but the algorithm sends no compressed messages, or the
            compressor is for another number of ranks; ranks have different settings or models.
        TopologyError: the algorithm cannot use the graph, or the graph has another number of ranks.

    """
    if not isinstance(algorithm, Algorithm | AsynchronousAlgorithm):
        raise ConfigError(
            f"algorithm = {algorithm!r} must be an object of mpicomp.algorithms, e.g. Choco(gamma=0.2), not a class or "
            "a name"
        )
    if not isinstance(optimizer, torch.optim.Optimizer):
        optimizer = SeveralOptimizers(optimizer)
    if any(each in given or isinstance(each, DistributedOptimizer) for each in singles(optimizer)):
        raise ConfigError("this optimizer is distributed already: make a new model and optimizer for another training")
    is_own_world, watchdog = world is None, None
    if world is None:
        from mpicomp.exchange.mpi.world import MpiWorld  # here, because it starts MPI

        world = MpiWorld.from_environment(device or device_of(model), allow_shared_gpu, node_sums)
        install_excepthook(world)
        watchdog = Watchdog(world, hang_timeout_s, "hang_timeout_s", only_waiting=True)
        watchdog.__enter__()  # for the rest of the program
    place(model, optimizer, world, is_moved=device is not None)
    if compressor is not None:
        algorithm = with_compressor(algorithm, compressor)
    nodes = None
    if groups is not None:
        with together(world):
            nodes = groups_by_host(world) if groups == "host" else checked_groups(groups, world.size)
    size = len(nodes) if nodes else world.size
    is_schedule = isinstance(getattr(topology, "union", None), Topology)  # a class has a property there, not a graph
    schedule = cast(Schedule, topology if is_schedule else topology(size))
    require_size(getattr(algorithm, "compressor", Identity()), size)
    if schedule.size != size:
        what = "nodes" if nodes else "ranks"
        raise TopologyError(f"topology {schedule.name!r} has {schedule.size} ranks, but there are {size} {what}")
    if isinstance(buffers, int) and buffers < 1:
        raise ConfigError(f"buffers = {buffers} must be 'averaged', 'own', or a number of steps that is at least 1")
    if clip is not None and clip.after_sum and not algorithm.updates_with_sum:
        raise ConfigError(
            f"Clip(after_sum=True): {algorithm.name} has no sum of gradients to clip: leave after_sum out"
        )
    same = {"algorithm": algorithm, "topology": schedule, "buffers": buffers, "groups": nodes}
    require_same_settings(world, same | {"clip": clip if clip and clip.after_sum else None})
    if isinstance(algorithm, AsynchronousAlgorithm):
        if nodes:
            raise ConfigError(f"groups: {algorithm.name} has no common steps, which the ranks of a node take together")
        if isinstance(buffers, int):
            raise ConfigError(f"buffers = {buffers}: {algorithm.name} has no common steps. Use 'averaged' or 'own'.")
        gossip: Distributed = AsynchronousDistributed(model, optimizer, algorithm, schedule, world, is_own_world)
    else:
        gossip = Distributed(model, optimizer, algorithm, schedule, world, world.node(nodes) if nodes else None)
    gossip.watchdog = watchdog
    gossip.local.clip, gossip.local.clip_sum = (None, clip) if clip and clip.after_sum else (clip, None)
    gossip.averages_buffers = buffers != "own"
    gossip.buffers_every = buffers if isinstance(buffers, int) else 0
    gossip.is_compared = algorithm.ranks_stay_equal or nodes is not None
    given.update(singles(optimizer))
    return gossip


def with_compressor(algorithm: AnyAlgorithm, compressor: Compressor) -> AnyAlgorithm:
    """Return `algorithm` with `compressor` in the place of its own, or of that of the algorithm inside."""
    if isinstance(inner := getattr(algorithm, "inner", None), Algorithm):
        return cast(AnyAlgorithm, dataclasses.replace(cast(Any, algorithm), inner=with_compressor(inner, compressor)))
    if "compressor" not in {field.name for field in dataclasses.fields(cast(Any, algorithm))}:
        raise ConfigError(f"{algorithm.name} sends uncompressed messages: leave out compressor (compression.kind)")
    return cast(AnyAlgorithm, dataclasses.replace(cast(Any, algorithm), compressor=compressor))
