"""A node over MPI: its ranks share a communicator, and the ranks of one place on all nodes share another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpicomp.exchange.base import Groups, check_schedule, mean_in_order
from mpicomp.exchange.mpi.communicator import Communicator
from mpicomp.exchange.mpi.library import MPI
from mpicomp.exchange.mpi.neighbor import NeighborExchange
from mpicomp.exchange.mpi.node_group import NodeGroup
from mpicomp.timing import timed
from mpicomp.topology.base import Schedule

_BLOCK = 2**20
"""Entries of a shard that travel at a time, which bounds the memory beside the vector, and the counts of MPI."""


class MpiNode:
    """The `Node` of an MPI rank. Making one is collective on all ranks.

    Between ranks of one machine, MPI passes messages through shared memory. Vectors of a GPU go through the host,
    unless there is a `group`.

    Args:
        world: all ranks.
        groups: the ranks of each node.
        device: of the vectors.

    Attributes:
        inside: the ranks of the node.
        is_on_one_machine: whether these are on the machine of this rank.
        group: adds up inside the node, in an order of its own; None for MPI.

    """

    def __init__(self, world: Communicator, groups: Groups, device: torch.device) -> None:
        self.groups = groups
        self.number = next(number for number, group in enumerate(groups) if world.rank in group)
        self.place = groups[self.number].index(world.rank)
        self.size = len(groups[self.number])
        self._device = device
        self.inside = _Part(world, self.number, groups[self.number])
        self.is_on_one_machine = set(self.inside.all_gather(world.host)) == {world.host}
        self.group: NodeGroup | None = None
        self._between = _Part(world, self.place, [group[self.place] for group in groups])

    def exchange(self, schedule: Schedule) -> NeighborExchange:
        """Return the exchange between nodes over the edges of `schedule`."""
        check_schedule(schedule, len(self.groups))
        return NeighborExchange(self._between, schedule, self._device, lambda: None, self._between.members)

    @timed("exchange", "mean_shard")
    def mean_shard_(self, x: Tensor, shards: Sequence[slice]) -> None:
        """Average the shard of this rank over the ranks of the node; by MPI in float64 and in their order."""
        if self.group:
            self.group.reduce_([x.detach()[shard] for shard in shards])
            x.detach()[shards[self.place]] /= self.size
            return
        for parts in _blocks(shards):
            host = torch.cat([x.detach()[part] for part in parts]).cpu()
            counts, own = _nbytes(x, parts), parts[self.place]
            gathered = torch.empty((self.size, own.stop - own.start), dtype=x.dtype)
            received = np.full(self.size, counts[self.place])
            request = self.inside.comm.Ialltoallv(
                [_bytes(host), counts, MPI.BYTE], [_bytes(gathered.view(-1)), received, MPI.BYTE]
            )
            self.inside.wait(request, "reduce-scatter inside the node")
            x.detach()[own] = mean_in_order(list(gathered)).to(x.device)

    @timed("exchange", "gather_shards")
    def gather_shards_(self, x: Tensor, shards: Sequence[slice]) -> None:
        """Overwrite each shard with that of the rank that owns it."""
        if self.group:
            self.group.broadcast_([x.detach()[shard] for shard in shards])
            return
        for parts in _blocks(shards):
            own = x.detach()[parts[self.place]].cpu()
            whole = torch.empty(sum(part.stop - part.start for part in parts), dtype=x.dtype)
            request = self.inside.comm.Iallgatherv(_bytes(own), [_bytes(whole), _nbytes(x, parts), MPI.BYTE])
            self.inside.wait(request, "all-gather inside the node")
            for part, piece in zip(parts, torch.split(whole, [part.stop - part.start for part in parts]), strict=True):
                x.detach()[part] = piece.to(x.device)


class _Part(Communicator):
    """Some of the ranks of a world, with numbers of their own; they wait as in that world."""

    def __init__(self, world: Communicator, color: int, members: Sequence[int]) -> None:
        self.members = list(members)
        self.comm = MPI.Intracomm(world.comm.Split(color, key=world.rank))
        self.comm.Set_errhandler(MPI.ERRORS_RETURN)
        self.rank = self.comm.Get_rank()
        self.size = self.comm.Get_size()
        self.host = world.host
        self.local_ranks = [i for i, member in enumerate(self.members) if member in world.local_ranks]
        self.is_polite = world.is_polite
        self._world = world

    def wait(self, request: MPI.Request, operation: str = "collective operation") -> None:
        """Wait for the `request` of a collective operation."""
        self._world.wait(request, operation)


def _blocks(shards: Sequence[slice]) -> Iterator[list[slice]]:
    """Yield a part of each shard, until all parts have come."""
    longest = max(shard.stop - shard.start for shard in shards)
    for begin in range(0, longest, _BLOCK):
        bounds = [(shard.start + begin, shard.start + begin + _BLOCK, shard.stop) for shard in shards]
        yield [slice(min(start, end), min(stop, end)) for start, stop, end in bounds]


def _nbytes(x: Tensor, shards: Sequence[slice]) -> Any:
    return np.array([(shard.stop - shard.start) * x.element_size() for shard in shards])


def _bytes(host: Tensor) -> Any:
    return host.view(torch.uint8).numpy()
