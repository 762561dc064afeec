"""A node over MPI: its ranks share a communicator, and the ranks of one place on all nodes share another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpicomp.exchange.base import Groups, check_schedule, mean_in_order
from mpicomp.exchange.mpi.communicator import Communicator
from mpicomp.exchange.mpi.library import MPI
from mpicomp.exchange.mpi.neighbor import NeighborExchange
from mpicomp.timing import timed
from mpicomp.topology.base import Schedule


class MpiNode:
    """The `Node` of an MPI rank. Making one is collective on all ranks.

    Between ranks of one machine, MPI passes messages through shared memory. Vectors of a GPU go through the host.

    Args:
        world: all ranks.
        groups: the ranks of each node.
        device: of the vectors.

    """

    def __init__(self, world: Communicator, groups: Groups, device: torch.device) -> None:
        self.groups = groups
        self.number = next(number for number, group in enumerate(groups) if world.rank in group)
        self.place = groups[self.number].index(world.rank)
        self.size = len(groups[self.number])
        self._device = device
        self._inside = _Part(world, self.number, groups[self.number])
        self._between = _Part(world, self.place, [group[self.place] for group in groups])

    def exchange(self, schedule: Schedule) -> NeighborExchange:
        """Return the exchange between nodes over the edges of `schedule`."""
        check_schedule(schedule, len(self.groups))
        return NeighborExchange(self._between, schedule, self._device, lambda: None, self._between.members)

    @timed("exchange", "mean_shard")
    def mean_shard_(self, x: Tensor, shards: Sequence[slice]) -> None:
        """Average the shard of this rank over the ranks of the node, in float64 and in their order."""
        host = x.detach().cpu()
        counts = _nbytes(host, shards)
        own = shards[self.place]
        gathered = torch.empty((self.size, own.stop - own.start), dtype=x.dtype)
        received = np.full(self.size, counts[self.place])
        request = self._inside.comm.Ialltoallv(
            [_bytes(host), counts, MPI.BYTE], [_bytes(gathered.view(-1)), received, MPI.BYTE]
        )
        self._inside.wait(request, "reduce-scatter inside the node")
        x[own] = mean_in_order(list(gathered)).to(x.device)

    @timed("exchange", "gather_shards")
    def gather_shards_(self, x: Tensor, shards: Sequence[slice]) -> None:
        """Overwrite each shard with that of the rank that owns it."""
        own = x.detach()[shards[self.place]].cpu()
        whole = torch.empty(x.shape, dtype=x.dtype)
        request = self._inside.comm.Iallgatherv(_bytes(own), [_bytes(whole), _nbytes(whole, shards), MPI.BYTE])
        self._inside.wait(request, "all-gather inside the node")
        x.detach().copy_(whole)


class _Part(Communicator):
    """Some of the ranks of a world, with numbers of their own; they wait as in that world."""

    def __init__(self, world: Communicator, color: int, members: Sequence[int]) -> None:
        self.members = list(members)
        self.comm = MPI.Intracomm(world.comm.Split(color, key=world.rank))
        self.comm.Set_errhandler(MPI.ERRORS_RETURN)
        self.rank = self.comm.Get_rank()
        self.size = self.comm.Get_size()
        self.host = world.host
        self.is_polite = world.is_polite
        self.wait = world.wait  # type: ignore[method-assign]


def _nbytes(x: Tensor, shards: Sequence[slice]) -> Any:
    return np.array([(shard.stop - shard.start) * x.element_size() for shard in shards])


def _bytes(host: Tensor) -> Any:
    return host.view(torch.uint8).numpy()
