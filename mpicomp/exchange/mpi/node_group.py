"""Dense sums in two levels: `torch.distributed` inside a node, MPI between nodes.

With L the least number of ranks of a node, a vector (n,) is cut into L shards; rank i of each node owns shard i:

    reduce       inside each node: shard i, of all ranks of the node, to its owner          NCCL or gloo
    all-reduce   the owners of shard i, one a node, all L shards at a time                  MPI
    broadcast    inside each node: shard i, from its owner to all ranks of the node         NCCL or gloo

So each byte crosses the links between nodes once for each node and not for each rank, and the ranks of a node share
that work. Reduce and broadcast of shards are a reduce-scatter and an all-gather that allow nodes of unequal size, where
some ranks own nothing. On a single node all of it is one all-reduce of the node's group.

The group is an object of its own with a store of its own. It is not registered with `torch.distributed`, whose default
group is the user's, to make and to destroy.
"""

from __future__ import annotations

import atexit
import socket
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from mpicomp.errors import ExchangeError
from mpicomp.exchange.guard import agree
from mpicomp.exchange.mpi.communicator import Communicator
from mpicomp.exchange.mpi.library import MPI
from mpicomp.exchange.mpi.wait import poll, spin, wait_all
from mpicomp.exchange.node_sums import Backend, describe
from mpicomp.exchange.watchdog import Waiting

LIMIT_S = 120.0
"""Seconds in which the ranks of a node must have found each other and added up a first number."""

CLOSE_S = 5.0
"""Seconds that a rank waits for its mates before it closes their connections."""

_HERE = "127.0.0.1"

_NEVER = timedelta(days=365)
"""The time limit of a sum: a rank may be away for long, to evaluate, and a hang is the watchdog's to report."""


class NodeGroup:
    """The ranks of each node, joined by `torch.distributed`. Making one is collective on all ranks.

    Args:
        world: all ranks.
        node: the ranks of this node, ordered as in `world`; taken over.
        backend: ``"nccl"`` if each rank has a GPU of its own, ``"gloo"`` for vectors on the CPU.
        device: of the vectors.

    Raises:
        ExchangeError: on every rank: the ranks of a node do not find each other in `LIMIT_S`, or add up wrongly.

    """

    def __init__(self, world: Communicator, node: MPI.Intracomm, backend: Backend, device: torch.device) -> None:
        self._world = world
        self._node = node
        self._backend = backend
        self._place = node.Get_rank()
        sizes = [size for place, size in world.all_gather((self._place, node.Get_size())) if place == 0]
        self._shards = min(sizes)
        color = self._place if self._place < self._shards and len(sizes) > 1 else MPI.UNDEFINED
        self._owners = world.comm.Split(color, key=world.rank)  # null where this rank owns nothing
        self._is_one_node = len(sizes) == 1
        self._is_alone = node.Get_size() == 1
        self._store: Any = None
        self._group: Any = None
        error = None if self._is_alone else self._open(device)
        atexit.register(self.close)
        try:
            agree(world, error)
        except ExchangeError:
            self.close()
            raise

    def mean_(self, x: Tensor) -> None:
        """Average `x` (n,), contiguous and of float32 or float64, over all ranks, in place; collective on all ranks.

        It is summed in its precision, in an order that the backend chooses. All ranks get the same bits.

        Raises:
            ExchangeError: a rank of this node has ended, or the transport failed.

        """
        if self._is_one_node:
            self._inside(lambda group: [group.allreduce([x], torch.distributed.AllreduceOptions())])
            x /= self._world.size
            return
        shards = x.tensor_split(self._shards)
        self.reduce_(shards)
        if self._owners and shards[self._place].numel():
            host = shards[self._place].cpu()
            request = self._owners.Iallreduce(MPI.IN_PLACE, host.numpy(), op=MPI.SUM)
            wait_all([request], is_polite=self._world.is_polite, operation="sum between nodes")
            host /= self._world.size
            shards[self._place].copy_(host)
        self.broadcast_(shards)

    def reduce_(self, shards: Sequence[Tensor]) -> None:
        """Add up shard i over the ranks of the node, on rank i; the others' shards are used up. Collective on them."""
        owned = [(owner, shard) for owner, shard in enumerate(shards) if shard.numel()]
        self._inside(lambda group: [group.reduce([shard], _to(owner)) for owner, shard in owned])

    def broadcast_(self, shards: Sequence[Tensor]) -> None:
        """Overwrite shard i by that of rank i of the node; collective on the ranks of the node."""
        owned = [(owner, shard) for owner, shard in enumerate(shards) if shard.numel()]
        self._inside(lambda group: [group.broadcast([shard], _from(owner)) for owner, shard in owned])

    def close(self) -> None:
        """Close the connections, once no rank of the node needs them; at the latest when the program ends."""
        atexit.unregister(self.close)
        if self._node and not MPI.Is_finalized() and poll(self._node.Ibarrier().Test, CLOSE_S):
            self._node.Free()
            if self._owners:
                self._owners.Free()
        self._drop()

    def _drop(self) -> None:
        # Without it NCCL's group warns at the end of the program. Nothing is under way that it could interrupt.
        if self._group is not None and hasattr(self._group, "abort"):
            self._group.abort()
        self._group = self._store = None

    def _open(self, device: torch.device) -> ExchangeError | None:
        """Make the group of this node and try it out; return what went wrong."""
        listener = None
        try:
            # Only this machine can reach the store, and only this program knows its port.
            listener = socket.create_server((_HERE, 0)) if self._place == 0 else None
            port = listener.getsockname()[1] if listener else None
        except OSError:
            port = None
        port = self._node.bcast(port)
        if port is None:
            return self._failure(f"rank 0 of the node cannot listen on {_HERE}")
        problems: list[str] = []

        def meet() -> None:
            try:
                if device.type == "cuda":
                    torch.cuda.set_device(device)  # each thread has one of its own
                self._meet(port, listener)
                self._try_out(device)
            except Exception as error:
                problems.append(_first_line(error))
            finally:
                if listener:
                    listener.close()  # the store has it, unless it was not made

        # NCCL may wait for a rank without a limit of its own, so a thread does; it makes no MPI call.
        thread = threading.Thread(target=meet, name="node group", daemon=True)
        thread.start()
        with Waiting(f"{self._backend} group of the node"):
            thread.join(LIMIT_S)
        if thread.is_alive():
            problems.append(f"its ranks have not found each other in {LIMIT_S:g} s")
        return self._failure(problems[0]) if problems else None

    def _meet(self, port: int, listener: socket.socket | None) -> None:
        rank, size = self._place, self._node.Get_size()
        c10d: Any = torch.distributed  # which classes it has depends on the build, and their types on the version
        self._store = c10d.TCPStore(
            _HERE,
            port,
            is_master=listener is not None,
            timeout=timedelta(seconds=LIMIT_S),
            wait_for_workers=False,
            master_listen_fd=None if listener is None else listener.detach(),
        )
        if self._backend == "nccl":
            options = c10d.ProcessGroupNCCL.Options()
            options._timeout = _NEVER
            self._group = c10d.ProcessGroupNCCL(self._store, rank, size, options)
        else:
            options = c10d.ProcessGroupGloo._Options()
            # A thread that still looked for its mates at the end of the program could abort it.
            options._timeout = timedelta(seconds=LIMIT_S)
            options._devices = [c10d.ProcessGroupGloo.create_device(hostname=_HERE)]
            self._group = c10d.ProcessGroupGloo(self._store, rank, size, options)
            self._group._set_default_timeout(_NEVER)

    def _try_out(self, device: torch.device) -> None:
        x = torch.full((1,), float(self._place + 1), device=device)
        self._group.allreduce([x], torch.distributed.AllreduceOptions()).wait()
        size = self._node.Get_size()
        if (found := x.item()) != (right := size * (size + 1) / 2):
            raise ExchangeError(f"its ranks add up to {found:g} where the sum is {right:g}")

    def _inside(self, start: Callable[[Any], Sequence[Any]]) -> None:
        """Wait for what `start` begins with the group of this node; nothing where the node has one rank."""
        if self._is_alone:
            return
        if self._group is None:
            raise self._failure("its connections are closed")
        wait = poll if self._world.is_polite else spin
        with Waiting(f"{self._backend} sum inside the node"):
            try:
                for work in start(self._group):
                    wait(work.is_completed)
                    work.wait()  # raises what went wrong, and orders the current stream of a GPU
            except RuntimeError as error:
                self._drop()  # so that mates that wait for this rank, and not for the one that has ended, fail too
                raise self._failure(f"{_first_line(error)}. A rank of the node may have ended") from error

    def _failure(self, what: str) -> ExchangeError:
        return ExchangeError(
            f"{describe(self._backend)}: the sum inside {self._world.host} fails: {what}. Sums by MPI alone may work: "
            "run.node_sums=mpi, in a script node_sums='mpi'"
        )


def _to(owner: int) -> Any:
    options = torch.distributed.ReduceOptions()
    options.rootRank = owner
    return options


def _from(owner: int) -> Any:
    options = torch.distributed.BroadcastOptions()
    options.rootRank = owner
    return options


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
