"""The neighbor exchange over MPI: one packed message to each target, one from each source.

The communicator is Cartesian for grids and a distributed graph for other topologies. It documents and checks the
neighborhood. When ranks have died, it is that of the world. The messages themselves use Irecv and Isend, one for each
distinct neighbor: Open MPI 5.0.11's non-blocking neighbor all-to-all delivers wrong data on periodic dimensions of 1
and 2, and no neighbor collective was faster. Long messages between ranks of one machine lie in memory that both see,
and only a notice is sent (`neighbor_memory`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mpicomp.compression.message import Layout, Payload
from mpicomp.errors import ExchangeError
from mpicomp.exchange.base import all_reduce_nbytes, check_message
from mpicomp.exchange.mpi.communicator import Communicator
from mpicomp.exchange.mpi.library import MPI
from mpicomp.exchange.mpi.neighbor_memory import SHORTEST, TAG, NeighborMemory, Notice, new_notice
from mpicomp.exchange.mpi.node_group import NodeGroup
from mpicomp.exchange.staging import make_staging
from mpicomp.timing import Underway, timed
from mpicomp.topology.base import Schedule, Topology


class NeighborExchange:
    """The `Exchange` between MPI ranks. Making one and `free` are collective on all ranks.

    Args:
        world: the ranks.
        schedule: the graph of each step.
        device: of the payloads.
        node_group: returns what adds up inside nodes, None for MPI alone; called on all ranks.
        names: the rank that each rank is called by in reports; by default its own.

    Attributes:
        comm: the communicator of the neighborhood.
        near: the neighbors with which this rank shares memory.

    Raises:
        ExchangeError: the ranks were given different graphs.

    """

    def __init__(
        self,
        world: Communicator,
        schedule: Schedule,
        device: torch.device,
        node_group: Callable[[], NodeGroup | None],
        names: Sequence[int] | None = None,
    ) -> None:
        self.rank = world.rank
        self.size = world.size
        self.schedule = schedule
        self.bytes_sent = 0
        union = schedule.union
        _check_same(world, schedule)
        self.comm: MPI.Intracomm = (
            world.comm  # to make another blocks, and yet another rank may die
            if world.has_lost_ranks
            else _cartesian(world, union)
            or world.comm.Create_dist_graph_adjacent(union.sources(self.rank), union.targets(self.rank), reorder=False)
        )
        self._world = world
        self._node_group = node_group
        self._names = range(world.size) if names is None else names
        self._staging = make_staging(device)
        self._sources = frozenset(union.sources(self.rank))
        self._targets = frozenset(union.targets(self.rank))
        self._memory = NeighborMemory(world, self.comm, self._sources | self._targets, device.type == "cpu")
        self.near = self._memory.near
        self._route: _Route | None = None
        self._pending: _NeighborPending | None = None

    @timed("exchange", "send")
    def start(self, payload: Payload, layout: Layout, topology: Topology) -> _NeighborPending:
        """Send `payload` to this rank's targets, and begin to receive from its sources."""
        return self._start([payload], layout, topology)

    @timed("exchange", "send")
    def start_each(self, payloads: Mapping[int, Payload], layout: Layout, topology: Topology) -> _NeighborPending:
        """Send each target its own payload, and begin to receive from the sources."""
        return self._start([payloads[target] for target in topology.targets(self.rank)], layout, topology)

    def _start(self, payloads: Sequence[Payload], layout: Layout, topology: Topology) -> _NeighborPending:
        """Begin to receive, and send: one payload to all targets, or to each its own."""
        if self._pending is not None:
            raise ExchangeError("an exchange is still pending: wait for it before the next one")
        route = self._route
        if route is None or route.topology is not topology or route.layout != layout:
            route = self._route = self._find_route(layout, topology)
        self._memory.release()
        buffers = iter(self._staging.receive(len(route.sources) - len(route.notices), layout))
        requests = [
            self.comm.Irecv(notice if (notice := route.notices.get(source)) is not None else next(buffers), source, TAG)
            for source in route.sources
        ]
        if route.targets:
            requests += self._send(payloads, route)
        self._pending = _NeighborPending(self, requests, route)
        return self._pending

    def _find_route(self, layout: Layout, topology: Topology) -> _Route:
        sources, targets = topology.sources(self.rank), topology.targets(self.rank)
        if not (self._sources.issuperset(sources) and self._targets.issuperset(targets)):
            raise ExchangeError(f"topology {topology.name!r} has edges that {self.schedule.name!r} did not announce")
        near = self.near if layout.nbytes >= SHORTEST else frozenset()
        return _Route(
            layout,
            topology,
            sources,
            targets,
            readers=near.intersection(targets),
            notices={source: new_notice() for source in sources if source in near},
            statuses=[MPI.Status() for _ in (*sources, *targets)],
            peers=[self._names[peer] for peer in (*sources, *targets)],
        )

    def _send(self, payloads: Sequence[Payload], route: _Route) -> list[MPI.Request]:
        if route.readers:
            wires = [
                wire.pack(payload)
                for wire, payload in zip(self._memory.reserve(len(payloads), route.layout), payloads, strict=True)
            ]
        else:
            wires = self._staging.pack_each(payloads, route.layout)
        which = {target: i if len(wires) > 1 else 0 for i, target in enumerate(route.targets)}
        requests = []
        for target, i in which.items():
            self.bytes_sent += wires[i].nbytes
            if target in route.readers:
                requests.append(self._memory.notify(target, i, wires[i].nbytes))
            else:
                requests.append(self.comm.Isend(wires[i], target, TAG))
        return requests

    @timed("exchange", "all_reduce")
    def mean_(self, x: Tensor) -> None:
        """Average `x` over all ranks, in place, by an all-reduce, in x's precision and the library's order."""
        mean = _summable(x)
        if group := self._node_group():
            group.mean_(mean)
        else:
            mean = mean.cpu()
            request = self.comm.Iallreduce(MPI.IN_PLACE, mean.numpy(), op=MPI.SUM)
            self._world.wait(request, "mean_")
            mean /= self.size
        if mean.data_ptr() != x.data_ptr():
            x.detach().copy_(mean.view_as(x))
        self.bytes_sent += all_reduce_nbytes(x, self.size)

    def free(self) -> None:
        """Free the communicator, because MPI has only about two thousand (collective on all ranks)."""
        if self.comm != self._world.comm:
            self.comm.Free()

    def _finish(self, route: _Route) -> dict[int, Payload]:
        self._pending = None
        layout, notices = route.layout, route.notices
        sizes = [
            status.Get_count(MPI.BYTE)
            for source, status in zip(route.sources, route.statuses, strict=False)
            if source not in notices
        ]
        packed = zip(sizes, self._staging.unpack(layout, sizes), strict=True)
        received = {}
        for source in route.sources:
            if source in notices:
                nbytes, payload = self._memory.read(source, notices[source], layout)
            else:
                nbytes, payload = next(packed)
            check_message(payload, layout, nbytes, self._names[source])
            received[source] = payload
        return received


@dataclass(frozen=True)
class _Route:
    """What an exchange of one layout in one topology needs; found once, for all that follow one another.

    Attributes:
        layout: of the messages.
        topology: the graph.
        sources: who sends to this rank, ascending.
        targets: to whom it sends, ascending.
        readers: the targets that read its memory.
        notices: the buffers for notices of the sources whose memory it reads.
        statuses: one for each source, then for each target.
        peers: by which name reports call these.

    """

    layout: Layout
    topology: Topology
    sources: Sequence[int]
    targets: Sequence[int]
    readers: frozenset[int]
    notices: Mapping[int, Notice]
    statuses: list[MPI.Status]
    peers: Sequence[int]


class _NeighborPending:
    """A pending exchange over MPI."""

    def __init__(self, exchange: NeighborExchange, requests: list[MPI.Request], route: _Route) -> None:
        self._exchange = exchange
        self._requests = requests
        self._route = route
        self._is_complete = not requests
        self._underway = Underway() if requests else None

    @timed("exchange", is_event=False)
    def test(self) -> bool:
        """Return whether all messages have arrived, without waiting; makes progress."""
        if not self._is_complete and self._exchange._world.test_all(self._requests, self._route.statuses):
            self._complete()
        return self._is_complete

    @timed("exchange")
    def wait(self) -> dict[int, Payload]:
        """Return the messages by source rank, ascending."""
        assert self._exchange._pending is self, "waited for twice"
        if not self._is_complete:
            self._complete()
            self._exchange._world.wait_all(self._requests, self._route.statuses, peers=self._route.peers)
        return self._exchange._finish(self._route)

    def _complete(self) -> None:
        """Note that the messages have arrived, which ends the hidden time of this exchange."""
        self._is_complete = True
        if self._underway:
            self._underway.arrived()


def _summable(x: Tensor) -> Tensor:
    """Return `x` as a flat vector of a type that MPI can add; a copy only if necessary."""
    flat = x.detach().view(-1)
    return flat if flat.dtype in (torch.float32, torch.float64) else flat.to(torch.float32)


def _check_same(world: Communicator, schedule: Schedule) -> None:
    graphs = [schedule.union, *(schedule(step) for step in range(4))]
    digests = world.all_gather([graph.edges_digest for graph in graphs])
    different = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if different:
        raise ExchangeError(
            f"topology {schedule.name!r}: ranks {', '.join(map(str, different))} have another graph than rank 0; "
            "give all ranks the same seed and file"
        )


def _cartesian(world: Communicator, union: Topology) -> MPI.Cartcomm | None:
    """Return the Cartesian communicator of a grid; None for any other graph (collective on all ranks)."""
    if union.dims is None or union.periods is None or math.prod(union.dims) != world.size:
        return None
    comm = world.comm.Create_cart(list(union.dims), list(union.periods), reorder=False)
    found = {rank for axis in range(len(union.dims)) for rank in comm.Shift(axis, 1)} - {MPI.PROC_NULL, world.rank}
    if all(world.all_gather(found == set(union.sources(world.rank)))):
        return comm
    comm.Free()
    return None
