"""All ranks of an MPI job, seen from one of them. Importing this module starts MPI (see `library`)."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import NoReturn

import torch

from mpicomp.errors import ExchangeError
from mpicomp.exchange.base import Groups, check_schedule
from mpicomp.exchange.mailbox.choice import Reach, make_mailbox, try_reach, visible_processes
from mpicomp.exchange.mailbox.slots import SlotMailbox
from mpicomp.exchange.mailbox.window import WindowCounter
from mpicomp.exchange.mpi.communicator import Communicator
from mpicomp.exchange.mpi.library import MPI
from mpicomp.exchange.mpi.neighbor import NeighborExchange
from mpicomp.exchange.mpi.node import MpiNode
from mpicomp.exchange.mpi.node_group import NodeGroup
from mpicomp.exchange.mpi.survivors import HAS_ULFM, FaultTolerantSurvivors, Survivors
from mpicomp.exchange.mpi.wait import poll
from mpicomp.exchange.node_sums import Backend, NodeSums, agree_on_node_sums, describe
from mpicomp.exchange.placement import NO_GPU, DeviceKind, Gpu, claim_gpu, device_of
from mpicomp.topology.base import Schedule, Topology

_OUTPUT_S = 0.2
"""Seconds in which the launcher can print the last lines of a rank before it kills all ranks."""

LEAVE_S = 5.0
"""Seconds that an exiting rank waits for the others, which a launcher may kill as soon as one has exited."""


class MpiWorld(Communicator):
    """The `World` of one MPI rank, over a communicator of its own: messages of other libraries are none of ours.

    Attributes:
        gpu: the GPU of this rank; None on the CPU.
        node_sums: what adds up dense vectors inside nodes, the same on all ranks; None for MPI alone.

    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        device: DeviceKind = "auto",
        allow_shared_gpu: bool = False,
        node_sums: NodeSums = "auto",
    ) -> None:
        self._survivors: Survivors | None = None
        super().__init__(comm.Dup())
        self.gpu: Gpu | None = claim_gpu(self, device, allow_shared_gpu)
        self.device: torch.device = device_of(self.gpu)
        self._reach: Reach | None = None
        self.is_simulated = False
        self.notices: tuple[str, ...] = (NO_GPU,) if device == "auto" and self.device.type == "cpu" else ()
        self.node_sums: Backend | None = agree_on_node_sums(self, node_sums, self.gpu.uuid if self.gpu else None)
        self._may_fall_back = node_sums == "auto"
        self._node_group: NodeGroup | None = None
        if self.node_sums:
            self.notices += (f"dense sums: {describe(self.node_sums)}",)

    @classmethod
    def from_environment(
        cls, device: DeviceKind = "auto", allow_shared_gpu: bool = False, node_sums: NodeSums = "auto"
    ) -> MpiWorld:
        """Return the world of all ranks that the launcher has started; one rank without a launcher.

        Collective on all ranks. Sets torch's threads to this rank's share of the cores, and its CUDA device.

        Raises:
            ConfigError: a GPU that is demanded but missing, full, too old, or shared without `allow_shared_gpu`;
                `node_sums` that these ranks cannot have.

        """
        return cls(MPI.COMM_WORLD, device, allow_shared_gpu, node_sums)

    def exchange(self, schedule: Schedule) -> NeighborExchange:
        """Return the exchange over the edges of `schedule`."""
        check_schedule(schedule, self.size)
        return NeighborExchange(self, schedule, self.device, self.node_group)

    def node(self, groups: Groups) -> MpiNode:
        """Return the node of this rank; collective on all ranks.

        What adds up dense vectors inside nodes does so here, too, if the ranks of each node are on one machine.
        """
        node = MpiNode(self, groups, self.device)
        if self.node_sums and all(self.all_gather(node.is_on_one_machine)):
            node.group = self._make_group(MPI.Intracomm(node.inside.comm.Dup()))
        return node

    def node_group(self) -> NodeGroup | None:
        """Return what adds up dense vectors inside nodes; None for MPI alone. Collective on all ranks.

        It is made by the first call, because it takes memory of a GPU that most methods do not need. If that fails and
        nobody has asked for it, MPI adds up alone, after a warning.

        Raises:
            ExchangeError: on every rank: what was asked for does not work.

        """
        if self.node_sums and not self._node_group:
            self._node_group = self._make_group(
                MPI.Intracomm(self.comm.Split_type(MPI.COMM_TYPE_SHARED, key=self.rank))
            )
        return self._node_group

    def _make_group(self, node: MPI.Intracomm) -> NodeGroup | None:
        assert self.node_sums
        try:
            return NodeGroup(self, node, self.node_sums, self.device)
        except ExchangeError as error:
            if not self._may_fall_back:
                raise
            self.node_sums = None
            if self.rank == 0:
                print(f"mpicomp: warning: dense sums by MPI alone: {error}", file=sys.stderr, flush=True)
            return None

    def mailbox(self, topology: Topology, nbytes: int, depth: int = 2) -> SlotMailbox:
        """Return the mailbox over the edges of `topology`, for messages of up to `nbytes` bytes."""
        return make_mailbox(self, topology, nbytes, depth, self.device, self.reach())

    def reach(self) -> Reach:
        """Return whether puts arrive while their target makes no MPI call. The first call, a trial, is collective."""
        if self._reach is None:
            self._reach = try_reach(self)
        return self._reach

    def counter(self, start: int = 0) -> WindowCounter:
        """Return a counter in the memory of rank 0."""
        return WindowCounter(self.comm.Dup(), start)

    def failure_detector(self, names: Sequence[str], in_step: bool) -> Survivors | None:
        """Return a detector; None unless all ranks are visible on this machine, or are in step and MPI bears faults."""
        processes = visible_processes(self)
        if in_step and all(self.all_gather(HAS_ULFM)):
            self._survivors = FaultTolerantSurvivors(self, names, processes)
        elif all(self.all_gather(len(processes) == self.size)):
            self._survivors = Survivors(self, names, processes)
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

    @property
    def _look(self) -> Callable[[], None] | None:
        return self._survivors.look if self._survivors else None

    def _watching(self, requests: Sequence[MPI.Request]) -> AbstractContextManager[None]:
        return self._survivors.watching(requests) if self._survivors else super()._watching(requests)
