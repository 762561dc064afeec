"""All ranks of an MPI job, seen from one of them. Importing this module starts MPI (see `library`)."""

from __future__ import annotations

import os
import pickle
import socket
import sys
import time
from collections.abc import Sequence
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
from torch import Tensor

from mpicomp.errors import ConfigError, MpicompError
from mpicomp.exchange.base import check_schedule, mean_in_order
from mpicomp.exchange.guard import agree
from mpicomp.exchange.mailbox.choice import Progress, Reach, Transport, make_mailbox, try_reach, visible_processes
from mpicomp.exchange.mailbox.slots import SlotMailbox
from mpicomp.exchange.mailbox.window import WindowCounter
from mpicomp.exchange.mpi.library import MPI
from mpicomp.exchange.mpi.neighbor import NeighborExchange
from mpicomp.exchange.mpi.survivors import Survivors
from mpicomp.exchange.mpi.wait import poll, wait_all
from mpicomp.exchange.placement import NO_GPU, DeviceKind, choose_device, core_share, shared_gpus, thread_count
from mpicomp.topology.base import Schedule, Topology

T = TypeVar("T")

_BLOCK = 2**20
"""Entries averaged or broadcast at a time, which bounds the additional memory."""


_OUTPUT_S = 0.2
"""Seconds in which the launcher can print the last lines of a rank before it kills all ranks."""

LEAVE_S = 5.0
"""Seconds that an exiting rank waits for the others, which a launcher may kill as soon as one has exited."""


class MpiWorld:
    """The `World` of one MPI rank, over a communicator of its own.

    Attributes:
        comm: a duplicated communicator, so that messages of other libraries cannot be mistaken for ours.
        core_share: the number of cores for this rank; below 1 where ranks outnumber cores.
        is_polite: whether this rank sleeps while it waits, because others need its core.

    """

    def __init__(self, comm: MPI.Intracomm, device: DeviceKind = "auto", allow_shared_gpu: bool = False) -> None:
        self.host = socket.gethostname()
        self._survivors: Survivors | None = None
        self.join_(comm.Dup())
        self.device = self._choose_device(device, allow_shared_gpu)
        self._reach: Reach | None = None
        self.is_simulated = False
        self.notices: tuple[str, ...] = (NO_GPU,) if device == "auto" and self.device.type == "cpu" else ()

    def join_(self, comm: MPI.Intracomm) -> None:
        """Make this the world of the ranks of `comm`, and own it; collective on these ranks."""
        self.comm = comm
        self.comm.Set_errhandler(MPI.ERRORS_RETURN)
        self.rank = self.comm.Get_rank()
        self.size = self.comm.Get_size()
        node = self.comm.Split_type(MPI.COMM_TYPE_SHARED, key=self.rank)
        self.local_rank = node.Get_rank()
        self.local_size = node.Get_size()
        cores = os.sched_getaffinity(0)
        self.core_share = core_share(cores, node.allgather(cores))
        self.is_polite = self.core_share < 1 - 1e-9
        node.Free()
        torch.set_num_threads(thread_count(self.core_share))

    @classmethod
    def from_environment(cls, device: DeviceKind = "auto", allow_shared_gpu: bool = False) -> MpiWorld:
        """Return the world of all ranks that the launcher has started; one rank without a launcher.

        Collective on all ranks. Sets torch's threads to this rank's share of the cores, and its CUDA device.

        Raises:
            ConfigError: a GPU is required but missing, or several ranks share one without `allow_shared_gpu`.

        """
        return cls(MPI.COMM_WORLD, device, allow_shared_gpu)

    def exchange(self, schedule: Schedule) -> NeighborExchange:
        """Return the exchange over the edges of `schedule`."""
        check_schedule(schedule, self.size)
        return NeighborExchange(self, schedule)

    def mailbox(
        self,
        topology: Topology,
        nbytes: int,
        depth: int = 2,
        transport: Transport = "auto",
        progress: Progress = "auto",
    ) -> SlotMailbox:
        """Return the mailbox over the edges of `topology`, for messages of up to `nbytes` bytes.

        `transport` chooses how the bytes travel, `progress` whether a thread makes progress; "auto" tries out what
        these ranks need.
        """
        check_schedule(topology, self.size)
        return make_mailbox(self, topology, nbytes, depth, transport, progress)

    def reach(self) -> Reach:
        """Return whether puts arrive while their target makes no MPI call. The first call, a trial, is collective."""
        if self._reach is None:
            self._reach = try_reach(self)
        return self._reach

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
        """Overwrite `x` with the `x` of rank `root`."""
        for block in torch.split(x.detach().view(-1), _BLOCK):
            host = block.cpu()
            self.wait(self.comm.Ibcast(_bytes(host), root=root), "broadcast_")
            if self.rank != root:
                block.copy_(host)

    def start_gather(self, values: Sequence[float]) -> MpiGather:
        """Begin to gather the `values` of all ranks."""
        return MpiGather(self, values)

    def counter(self, start: int = 0) -> WindowCounter:
        """Return a counter in the memory of rank 0."""
        return WindowCounter(self.comm.Dup(), start)

    def failure_detector(self, names: Sequence[str]) -> Survivors | None:
        """Return a detector that watches the processes of all ranks; None unless all are visible on this machine."""
        processes = visible_processes(self)
        is_seen = all(self.all_gather(len(processes) == self.size))
        self._survivors = Survivors(self, names, [processes[rank] for rank in range(self.size)]) if is_seen else None
        return self._survivors

    @property
    def has_lost_ranks(self) -> bool:
        """Whether ranks have died. The survivors then `leave`, because MPI_Finalize would wait for the dead."""
        return self._survivors is not None and self._survivors.has_lost_ranks

    def now(self) -> float:
        """Return the time in seconds."""
        return time.perf_counter()

    def sleep(self, seconds: float) -> None:
        """Do nothing for `seconds`."""
        time.sleep(seconds)

    def mean_(self, x: Tensor) -> None:
        """Average `x` over all ranks, in place, in float64 and by ascending rank.

        Each rank averages its piece of a block, then all gather all pieces. A rank sends 2 (size - 1) / size vectors.
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

    def leave(self, exit_code: int) -> NoReturn:
        """End this process without MPI_Finalize; collective on all ranks, with a time limit on the wait."""
        sys.stdout.flush()
        sys.stderr.flush()
        self._survivors = None  # ranks that have left have not died
        poll(self.comm.Ibarrier().Test, LEAVE_S)
        os._exit(exit_code)

    def abort(self, exit_code: int) -> NoReturn:
        """End all ranks at once; the launcher ends with `exit_code`.

        MPICH 5.0.2's mpiexec sometimes exits with 9 instead, the code of a rank that it has killed.
        """
        sys.stdout.flush()
        sys.stderr.flush()
        time.sleep(_OUTPUT_S)
        self.comm.Abort(exit_code)
        os._exit(exit_code)

    def wait(self, request: MPI.Request, operation: str = "collective operation") -> None:
        """Wait for the `request` of a collective operation; sleep meanwhile if ranks outnumber cores.

        Raises:
            RankLost: a rank has died, and there is a `failure_detector`.

        """
        if self._survivors is not None:
            self._survivors.wait(request, operation)
        else:
            wait_all([request], is_polite=self.is_polite, operation=operation)

    def test(self, request: MPI.Request) -> bool:
        """Return whether the `request` of a collective operation is complete."""
        return bool(request.Test()) if self._survivors is None else self._survivors.test(request)

    def _choose_device(self, kind: DeviceKind, allow_shared_gpu: bool) -> torch.device:
        device, error = torch.device("cpu"), None
        try:
            visible = torch.cuda.device_count() if kind != "cpu" else 0
            device = choose_device(kind, self.local_rank, visible)
        except MpicompError as failure:
            error = failure
        agree(self, error)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        uuid = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None
        shared = shared_gpus(self.all_gather(uuid))
        if shared and not allow_shared_gpu:
            gpu, ranks = next(iter(shared.items()))
            raise ConfigError(
                f"ranks {', '.join(map(str, ranks))} would share the GPU {gpu}: start one rank per GPU, or allow it "
                "(allow_shared_gpu), or run with device = 'cpu'"
            )
        return device


class MpiGather:
    """A non-blocking all-gather over MPI."""

    def __init__(self, world: MpiWorld, values: Sequence[float]) -> None:
        self._world = world
        self._mine = np.array(values, dtype=np.float64)
        self._all = np.empty((world.size, len(self._mine)))
        self._request = world.comm.Iallgather(self._mine, self._all)

    def test(self) -> bool:
        """Return whether the numbers of all ranks are here."""
        return self._world.test(self._request)

    def wait(self) -> list[list[float]]:
        """Return the numbers by rank."""
        self._world.wait(self._request, "gather")
        return [[float(value) for value in row] for row in self._all]


def _bytes(host: Tensor) -> Any:
    return host.view(torch.uint8).numpy()
