"""What the ranks of an MPI communicator do together: gather, broadcast, average, wait."""

from __future__ import annotations

import os
import pickle
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mpicomp.exchange.base import mean_in_order
from mpicomp.exchange.mpi.library import MPI
from mpicomp.exchange.mpi.wait import test_all, wait_all
from mpicomp.exchange.placement import core_share, thread_count

T = TypeVar("T")

_BLOCK = 2**20
"""Entries averaged or broadcast at a time, which bounds the memory beside the vector."""


class Communicator:
    """One rank among those of an MPI communicator; methods are collective on all of them, but `test`.

    Args:
        comm: taken over.

    Attributes:
        comm: the communicator.
        rank: this rank.
        size: how many ranks there are.
        host: the name of this machine.
        local_ranks: the ranks of this machine, ascending.
        local_rank: this rank's number among them.
        local_size: how many ranks this machine has.
        core_share: the cores that fall to this rank; below 1 where ranks outnumber cores.
        is_polite: whether this rank sleeps while it waits, because others need its core.

    """

    def __init__(self, comm: MPI.Intracomm) -> None:
        self.host = socket.gethostname()
        self.join_(comm)

    def join_(self, comm: MPI.Intracomm) -> None:
        """Become one of the ranks of `comm`, which is taken over; collective on these."""
        self._take(comm)
        node = self.comm.Split_type(MPI.COMM_TYPE_SHARED, key=self.rank)
        cores = os.sched_getaffinity(0)
        self._share(cores, dict(node.allgather((self.rank, cores))))
        node.Free()

    def join_survivors_(self, comm: MPI.Intracomm) -> None:
        """Do as `join_`, with no call that blocks: another rank may die meanwhile."""
        self._take(comm)
        self.is_polite = True
        cores = os.sched_getaffinity(0)
        rows = self.all_gather((self.host, cores))
        self._share(cores, {rank: theirs for rank, (host, theirs) in enumerate(rows) if host == self.host})

    def _take(self, comm: MPI.Intracomm) -> None:
        self.comm = comm
        self.comm.Set_errhandler(MPI.ERRORS_RETURN)
        self.rank = self.comm.Get_rank()
        self.size = self.comm.Get_size()

    def _share(self, cores: set[int], of_host: Mapping[int, set[int]]) -> None:
        """Share the `cores` of this rank with those of the ranks of its host."""
        self.local_ranks = sorted(of_host)
        self.local_rank, self.local_size = self.local_ranks.index(self.rank), len(of_host)
        self.core_share = core_share(cores, list(of_host.values()))
        self.is_polite = self.core_share < 1 - 1e-9
        torch.set_num_threads(thread_count(self.core_share))

    @property
    def has_lost_ranks(self) -> bool:
        """Whether ranks have died."""
        return False

    def all_gather(self, value: T) -> list[T]:
        """Return the (small, picklable) values of all ranks, by rank."""
        mine = np.frombuffer(pickle.dumps(value), dtype=np.uint8)
        sizes = np.empty(self.size, dtype=np.int64)
        self.wait(self.comm.Iallgather(np.array([mine.size], dtype=np.int64), sizes), "all_gather")
        everything = np.empty(int(sizes.sum()), dtype=np.uint8)
        self.wait(self.comm.Iallgatherv(mine, (everything, sizes)), "all_gather")
        pieces = np.split(everything, np.cumsum(sizes)[:-1])
        return [pickle.loads(piece.tobytes()) for piece in pieces]

    def broadcast(self, value: T) -> T:
        """Return rank 0's (small, picklable) value."""
        nbytes = np.zeros(1, dtype=np.int64)
        data = np.frombuffer(pickle.dumps(value), dtype=np.uint8).copy() if self.rank == 0 else np.empty(0, np.uint8)
        nbytes[0] = data.size
        self.wait(self.comm.Ibcast(nbytes, root=0), "broadcast")
        if self.rank != 0:
            data = np.empty(int(nbytes[0]), dtype=np.uint8)
        self.wait(self.comm.Ibcast(data, root=0), "broadcast")
        result: T = value if self.rank == 0 else pickle.loads(data.tobytes())
        return result

    def broadcast_(self, x: Tensor, root: int = 0) -> None:
        """Overwrite `x` by that of rank `root`."""
        for block in torch.split(x.detach().view(-1), _BLOCK):
            host = block.cpu()
            self.wait(self.comm.Ibcast(_bytes(host), root=root), "broadcast_")
            if self.rank != root:
                block.copy_(host)

    def start_gather(self, values: Sequence[float]) -> MpiGather:
        """Begin to collect the `values` of all ranks."""
        return MpiGather(self, values)

    def mean_(self, x: Tensor) -> None:
        """Average `x` over all ranks, in place, in float64 and by ascending rank.

        Each rank averages its piece of a block, and all collect all pieces: 2 (size - 1) / size vectors sent a rank.
        """
        for block in torch.split(x.detach().view(-1), _BLOCK):
            host = block.cpu()
            pieces = host.tensor_split(self.size)
            counts = np.array([piece.numel() * piece.element_size() for piece in pieces])
            mine = pieces[self.rank]
            gathered = torch.empty((self.size, mine.numel()), dtype=x.dtype)
            self.wait(
                self.comm.Ialltoallv(
                    [_bytes(host), counts, MPI.BYTE],
                    [_bytes(gathered.view(-1)), np.full(self.size, counts[self.rank]), MPI.BYTE],
                ),
                "mean_",
            )
            mean = mean_in_order(list(gathered))
            result = torch.empty_like(host)
            self.wait(self.comm.Iallgatherv(_bytes(mean), [_bytes(result), counts, MPI.BYTE]), "mean_")
            block.copy_(result)

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.wait(self.comm.Ibarrier(), "barrier")

    def wait(self, request: MPI.Request, operation: str = "collective operation") -> None:
        """Wait for the `request` of a collective operation; sleep meanwhile if ranks outnumber cores."""
        self.wait_all([request], operation=operation)

    def wait_all(
        self,
        requests: Sequence[MPI.Request],
        statuses: list[MPI.Status] | None = None,
        operation: str = "message",
        peers: Sequence[int] | None = None,
    ) -> None:
        """Wait for all `requests` of this rank; see `mpicomp.exchange.mpi.wait.wait_all`.

        Raises:
            RankLost: a rank has died, and this communicator looks out for that.

        """
        with self._watching(requests):
            wait_all(
                requests,
                statuses,
                is_polite=self.is_polite,
                operation=operation,
                peers=peers,
                look=self._look,
            )

    def test(self, request: MPI.Request) -> bool:
        """Return whether the `request` of a collective operation is complete; raises as `wait_all`."""
        with self._watching([request]):
            return bool(request.Test())

    def test_all(self, requests: list[MPI.Request], statuses: list[MPI.Status]) -> bool:
        """Return whether all `requests` of this rank are complete; then overwrite `statuses`. Raises as `wait_all`."""
        with self._watching(requests):
            return test_all(requests, statuses)

    @property
    def _look(self) -> Callable[[], None] | None:
        """What looks now and then, during a wait, whether the others are alive."""
        return None

    def _watching(self, requests: Sequence[MPI.Request]) -> AbstractContextManager[None]:
        """Explain a failure of MPI in the block, which completes `requests`, by a death."""
        return nullcontext()


class MpiGather:
    """Numbers of all ranks under way to all ranks."""

    def __init__(self, world: Communicator, values: Sequence[float]) -> None:
        self._world = world
        self._mine = np.array(values, dtype=np.float64)
        self._all = np.empty((world.size, len(self._mine)))
        self._request = world.comm.Iallgather(self._mine, self._all)

    def test(self) -> bool:
        """Return whether all ranks have given theirs."""
        return self._world.test(self._request)

    def wait(self) -> npt.NDArray[np.float64]:
        """Return the numbers by rank."""
        self._world.wait(self._request, "gather")
        return self._all


def _bytes(host: Tensor) -> Any:
    return host.view(torch.uint8).numpy()
