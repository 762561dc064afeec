"""AD-PSGD: a rank averages its whole model with one random neighbor at a time, and nobody waits for a third.

    active rank i:    put x_i into the mailbox of a random neighbor j
                      g = grad F_i(x_i)                        meanwhile the answer comes
                      x_i = the answer;  x_i = x_i - lr u(g)
    passive rank j:   y_j = x_j
                      g = grad F_j(x_j), and on each x_i that comes meanwhile:  y_j = (x_i + y_j) / 2;  send y_j to i
                      x_j = y_j;  x_j = x_j - lr u(g)
                      between two gradients the same, on x_j itself

x_i is the model (n,) of rank i and F_i the loss of its batch; y_j the model of a passive rank as it is averaged while a
gradient is computed at the one before; lr the learning rate; u(g) the direction that the optimizer makes of g.

The graph is bipartite: ranks of its larger side are active, the others are passive, and every edge joins an active rank
and a passive one. So no two ranks wait for each other. An active rank does not change x_i before the answer is there,
so each average is atomic: both ranks continue from the same mean. The mean over all n ranks moves by 1/n of each rank's
local step, and by nothing else, whatever the speeds.

A passive rank answers between the layers of its passes, as a thread of its own would; on a GPU not during the backward
pass. An active rank whose gradient is done before the answer is there waits for it. The neighbor depends on (seed,
step, rank) alone.

Wire: one dense model to one neighbor for each gradient of an active rank, and one back. Memory: a passive rank keeps
y_j, 1 vector. Lian et al. 2018, arXiv 1710.06952, Algorithm 1 and section 4 (the bipartite graph).

In a script (after the last step, ``gossip.finish()``):

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    gossip = mpicomp.distribute(model, optimizer, ADPSGD(), topology=ring)
    loss = gossip.step(lambda: loss_fn(model, batch))
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from mpicomp.algorithms.asynchronous.base import AsynchronousAlgorithm, Attempt, Share, require_connected
from mpicomp.algorithms.base import Local
from mpicomp.compression.base import Compressor
from mpicomp.compression.identity import Identity
from mpicomp.compression.random import mix64
from mpicomp.errors import ConfigError, TopologyError
from mpicomp.exchange.base import Mail, Mailbox
from mpicomp.state import SCRATCH
from mpicomp.topology.base import Schedule
from mpicomp.topology.bipartite import sides


@dataclass
class ADPSGDState:
    """What a rank keeps. A checkpoint has no average under way: taking in all messages completes them.

    Attributes:
        steps: steps done.
        is_active: whether this rank asks its neighbors for averages; otherwise it answers.
        asked: the neighbor whose answer this rank waits for; None if there is none.
        is_computed: whether the gradient of a step that waits for an answer has been computed.
        waiting: models that have come and are not averaged yet, in that order.
        averaged: (n,) the model of a passive rank that computes a gradient, as averaged meanwhile.
        is_computing: whether a passive rank computes a gradient.

    """

    steps: int
    is_active: bool = field(metadata=SCRATCH)
    averaged: Tensor | None = field(metadata=SCRATCH)
    asked: int | None = field(default=None, metadata=SCRATCH)
    is_computed: bool = field(default=False, metadata=SCRATCH)
    waiting: list[tuple[int, Mail]] = field(default_factory=list, metadata=SCRATCH)
    is_computing: bool = field(default=False, metadata=SCRATCH)


@dataclass(frozen=True)
class ADPSGD(AsynchronousAlgorithm[ADPSGDState]):
    """Asynchronous decentralized parallel SGD.

    Attributes:
        compressor: a lossless one: both ranks of an average must continue from the same mean.
        seed: of the choice of neighbors.
        share: who computes how many gradients.

    """

    compressor: Compressor = Identity()
    seed: int = 0
    share: Share = "by_speed"

    def __post_init__(self) -> None:
        if not self.compressor.is_lossless:
            raise ConfigError(
                f"AD-PSGD sends the model itself: with compression.kind = {type(self.compressor).__name__!r} two ranks "
                "would not continue from the same mean, and the mean over ranks would not be preserved. Leave the "
                "section [compression] out, or use algorithm.kind = 'dc_gossip'."
            )

    def check(self, schedule: Schedule) -> None:
        """Raise TopologyError unless `schedule` is one connected, undirected and bipartite graph."""
        graph = require_connected("AD-PSGD", schedule)
        if any(graph.sources(rank) != graph.targets(rank) for rank in range(graph.size)):
            raise TopologyError(
                f"topology.kind = {graph.name!r} has a directed edge, but in AD-PSGD both of its ranks average. Use an "
                "undirected graph, such as topology.kind = 'ring'."
            )
        if sides(graph) is None:
            raise TopologyError(
                f"topology.kind = {graph.name!r} with {graph.size} ranks has a cycle of odd length, on which ranks of "
                "AD-PSGD could wait for each other in a circle. Use a bipartite graph: topology.kind = 'ring' with an "
                "even number of ranks, or 'chain', 'star', 'hypercube' or 'complete_bipartite'."
            )

    def init(self, local: Local, mailbox: Mailbox) -> ADPSGDState:
        """Return the side of this rank, and room for averages on a passive one."""
        found = sides(mailbox.topology)
        assert found is not None, "check() has refused the graph"
        is_active = mailbox.rank in found[0]
        return ADPSGDState(0, is_active, None if is_active else torch.empty_like(local.x))

    def phases(self, local: Local, state: ADPSGDState, mailbox: Mailbox) -> Attempt:
        """Do one step in the order of the module's docstring; a step that waits for an answer is finished later."""
        if state.averaged is not None:
            return (yield from self._passive_step(local, state, mailbox, state.averaged))
        if state.asked is not None:
            return self.serve(local, state, mailbox)
        if neighbors := mailbox.topology.targets(mailbox.rank):
            neighbor = self._draw(neighbors, state, mailbox)
            if not mailbox.room(neighbor):
                return False
            self._put(local.x, local, state, mailbox, neighbor)
            state.asked = neighbor
        yield None
        state.is_computed = True
        self.serve(local, state, mailbox)
        return True

    def _passive_step(self, local: Local, state: ADPSGDState, mailbox: Mailbox, averaged: Tensor) -> Attempt:
        """Do one step of a passive rank, which averages `averaged` with its neighbors while it computes."""

        def meanwhile() -> bool:
            self.serve(local, state, mailbox)
            return False

        if state.is_computing:  # a gradient was begun and given up, but neighbors have averaged with this rank since
            local.x.copy_(averaged)
        averaged.copy_(local.x)
        state.is_computing = True
        yield meanwhile
        state.is_computing = False
        local.x.copy_(averaged)
        local.update()
        state.steps += 1
        self.serve(local, state, mailbox)
        return True

    def serve(self, local: Local, state: ADPSGDState, mailbox: Mailbox) -> bool:
        """Average with all that have asked, on a passive rank; on an active one, take the answer and end the step."""
        arrived = mailbox.receive(self.compressor.layout(local.spec))
        if state.averaged is not None:
            for source, mails in arrived.items():
                state.waiting.extend((source, mail) for mail in mails)
            return self._average(local, state, mailbox, state.averaged if state.is_computing else local.x)
        for mails in arrived.values():
            (mail,) = mails
            local.x.zero_()
            self.compressor.accumulate(mail.payload, local.spec, local.x)
            state.asked = None
        if state.is_computed and state.asked is None:
            state.is_computed = False
            local.update()
            state.steps += 1
        return bool(arrived)

    def _average(self, local: Local, state: ADPSGDState, mailbox: Mailbox, model: Tensor) -> bool:
        """``y_j = (x_i + y_j) / 2`` in `model`, in the order of arrival, and answer; return whether there was any."""
        has_moved, waiting, state.waiting = False, state.waiting, []
        for source, mail in waiting:
            # A neighbor asks again only after it has read the answer, but its note that says so may come later.
            if not mailbox.room(source):
                state.waiting.append((source, mail))
                continue
            self.compressor.accumulate(mail.payload, local.spec, model)
            model.mul_(0.5)
            self._put(model, local, state, mailbox, source)
            has_moved = True
        return has_moved

    def _put(self, model: Tensor, local: Local, state: ADPSGDState, mailbox: Mailbox, target: int) -> None:
        """Send `model` to `target`, which has room."""
        payload = self.compressor.compress(model, local.spec, None)
        mailbox.put(payload, self.compressor.layout(local.spec), [target], state.steps)

    def _draw(self, neighbors: list[int], state: ADPSGDState, mailbox: Mailbox) -> int:
        """Return the neighbor to average with in this step."""
        return neighbors[mix64(self.seed, state.steps, mailbox.rank) % len(neighbors)]

    def is_unfinished(self, state: ADPSGDState) -> bool:
        """Return whether a step has its gradient and waits for the answer of its neighbor."""
        return state.is_computed

    def awaited(self, state: ADPSGDState, mailbox: Mailbox) -> list[int]:
        """Return the neighbor that has not answered, or has no room."""
        if state.asked is not None:
            return [state.asked]
        return [self._draw(mailbox.topology.targets(mailbox.rank), state, mailbox)]

    def updates(self, state: ADPSGDState) -> int:
        """Return the steps done: each applies one gradient."""
        return state.steps
