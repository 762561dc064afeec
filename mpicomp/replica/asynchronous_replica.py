"""The replica of one rank in asynchronous training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mpicomp.algorithms.asynchronous.base import AsynchronousAlgorithm, RegroupingAlgorithm
from mpicomp.errors import ExchangeError
from mpicomp.exchange.watchdog import Member
from mpicomp.replica.hooks import hook_layers
from mpicomp.replica.replica import Replica
from mpicomp.topology.base import Topology

PEERS_S = 0.5
"""Seconds between two checks of a rank whether its neighbors still run."""


class AsynchronousReplica(Replica):
    """A replica that is trained by an asynchronous algorithm, over a mailbox."""

    algorithm: AsynchronousAlgorithm[Any]
    schedule: Topology

    def _connect(self) -> None:
        algorithm, topology, world, spec = self.algorithm, self.schedule, self.world, self.local.spec
        # Loading kernels takes seconds, in which a rank that has done so already would take all batches.
        for compressor in algorithm.compressors:
            compressor.rehearse(self.local.x, spec)
        self.link = self.mailbox = world.mailbox(topology, algorithm.message_nbytes(spec, world.size), algorithm.depth)
        self.state = algorithm.init(self.local, self.mailbox)
        self._owners = algorithm.owners(world.size, spec)
        if self.mailbox.needs_poke:
            hook_layers(self.local.model, self._poke)
            for p in self.local.model.parameters():
                if p.requires_grad:
                    p.register_post_accumulate_grad_hook(self._poke)  # type: ignore[no-untyped-call]

    def regroup(self, topology: Topology) -> None:
        """Continue over the graph of the survivors; collective on these."""
        assert isinstance(self.algorithm, RegroupingAlgorithm)
        sent, spec = self.bytes_sent, self.local.spec
        nbytes = self.algorithm.message_nbytes(spec, self.world.size)
        self.schedule = topology
        self.link = self.mailbox = self.world.mailbox(topology, nbytes, self.algorithm.depth)
        exchange = self.world.exchange(topology)
        self.algorithm.regroup_(self.local, self.state, self.mailbox, exchange)
        self.mailbox.bytes_sent = sent + exchange.bytes_sent

    def take_in(self) -> None:
        """Receive and process all messages that have arrived."""
        self.algorithm.drain(self.local, self.state, self.mailbox)

    def drain(self) -> None:
        """Receive and process all messages still on their way, then the answers to them; collective on all ranks."""
        for _ in range(2):
            self.mailbox.settle()
            self.take_in()

    def require_neighbors(self, members: Sequence[Member], remedy: str) -> None:
        """Raise ExchangeError if a neighbor's process has ended; `members` are the names of the ranks."""
        for rank, peer in self.mailbox.peers().items():
            if peer.has_ended:
                raise ExchangeError(
                    f"{members[rank]} has ended, which rank {self.world.rank} shares an edge with: "
                    f"go on from the last checkpoint with {remedy}"
                )

    def _average_(self) -> None:
        """Overwrite the model with the hubs' or, without hubs, the mean; average statistics over training ranks."""
        if not self._owners:
            super()._average_()
            return
        for rank, part in self._owners:
            self.world.broadcast_(self.local.x[part], rank)
        self.local.show_parameters()
        hubs = len(self._owners)
        for buffer in self.averaged_buffers():
            if self.world.rank < hubs:
                buffer.zero_()
            self.world.mean_(buffer)
            buffer.mul_(self.world.size / (self.world.size - hubs))

    def _poke(self, *_: object) -> None:
        if not torch.compiler.is_compiling():
            self.mailbox.poke()
