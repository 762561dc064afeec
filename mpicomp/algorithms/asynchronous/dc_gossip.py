"""DC-gossip: asynchronous gossip on any connected graph, with the own gradient corrected for the mixing it has missed.

    rank i, at its own pace:
      if all neighbors have room in their mailboxes:
          q_i = C(x_i - xhat_i);  put q_i into them;  xhat_i = xhat_i + q_i;  s_i = s_i + W_ii q_i
      g = grad F_i(x_i)                                      meanwhile the neighbors write
      s_i = s_i + W_ij q_j for all that has arrived          (s_i = sum_j W_ij xhat_j, as far as it is known)
      d = gamma (s_i - xhat_i), 0 if nothing was put         the mixing
      g~ = g + lambda_t g g d                                elementwise; lambda_t as in DC-ASGD, but no longer than g
      x_i = x_i - lr u(g~) + d

x_i is the model (n,) of rank i and F_i the loss of its batch; C the compressor and q_i what is sent; xhat_i the public
copy of the model; W_ij the weight of rank j in the average of rank i, 0 unless they are neighbors; s_i the weighted sum
of the public copies; gamma the consensus step; lambda_t the strength of the correction, from the parameters lambda0,
adaptive, decay and epsilon; lr the learning rate; u(g~) the direction that the optimizer makes of g~.

The model that g is applied to has moved by d since g was begun, which the correction makes up for to first order, with
no traffic and no memory of other models: DC-ASGD's idea at the place where it costs nothing on a graph. The correction
is shortened to the length of g where it is longer, as in DC-S3GD (Rigazzi 2019, arXiv 1911.02516): mixing moves a model
farther than stale gradients do, and without a limit a quadratic diverged at the published lambda0 = 2. lambda0 = 0 is
asynchronous gossip in the manner of AD-PSGD (Lian et al. 2018, arXiv 1710.06952), without its pairwise lock, on the
public copies of CHOCO-SGD. Increments are never lost, because the mailbox refuses them instead: what a slow neighbor
has no room for stays in ``x_i - xhat_i``; a step without a message does not mix, because it would move ``x_i`` by an
old difference once more.

The mean over ranks is not preserved, because a rank mixes the newer copies of its neighbors with its own older one. The
mean moves at another rate than the learning rate times the mean gradient. On a ring of 4, with a constant gradient and
lambda0 = 0: with gamma = 1 at 1.50 times this rate if all ranks are equally fast, 0.98 with one four times slower, 0.50
with one ten times slower; with gamma = 0.5 at 1.20, 0.84 and 0.47. With ``max_staleness = 0`` it is preserved. AD-PSGD
preserves it at any speeds.

``max_staleness`` bounds how many steps a rank may be ahead of what it knows of each neighbor; with 0 it waits for all
of them in every step, and (lambda0 = 0) does what CHOCO-SGD does in its overlapped order, but for the order of sums.

When ranks have died (``run.on_peer_loss``), the others go on along the edges that are left, with new weights W: each
tells its neighbors its model as it is, and ``xhat_i = x_i``, ``s_i = sum_j W_ij x_j``. Models, optimizers and mean
squares stay; increments under way are lost, and the mean over ranks is now that of the survivors.

Wire: one compressed message to each neighbor and step, at most. Memory: ``xhat``, ``s``, one scratch vector, and the
mean square of the adaptive variant, whatever the degree. Not from a paper: a design of this package.

In a script (after the last step, ``gossip.finish()``):

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    gossip = mpicomp.distribute(model, optimizer, DCGossip(gamma=0.2, compressor=TopK(ratio=0.1)), topology=ring)
    loss = gossip.step(lambda: loss_fn(model, batch))
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mpicomp.algorithms.asynchronous.base import (
    DELAYS,
    Attempt,
    DelayCompensation,
    RegroupingAlgorithm,
    Share,
    count_delay_,
    require_connected,
)
from mpicomp.algorithms.base import Local, require_bounded_errors, require_fixed_symmetric, require_positive
from mpicomp.algorithms.gossip.choco import compression_error
from mpicomp.compression.base import Compressor
from mpicomp.compression.identity import Identity
from mpicomp.compression.message import Field, Layout
from mpicomp.errors import ConfigError
from mpicomp.exchange.base import Exchange, Mailbox
from mpicomp.state import SCRATCH, State
from mpicomp.topology.base import Schedule

UNREAD = 8
"""How many messages a rank may be ahead of a neighbor that does not read: enough for one that is that much slower."""


@dataclass
class DCGossipState:
    """What a rank keeps.

    Attributes:
        x_hat: (n,) the public copy of the own model.
        s: (n,) sum of the public copies of the neighborhood, weighted by the own row of W.
        gradient: (n,) the gradient of the model, which a checkpoint keeps for a step that waits for neighbors.
        mean_square: (n,) of the gradients, for the adaptive correction.
        compressor: state of the compressor.
        steps: steps done.
        has_sent: whether the step under way has sent a message.
        is_computed: whether the gradient of the step under way has been computed.
        heard: for each source, ascending, the last of its steps that is known.
        delays: (sources, DELAYS) int64, how often what was mixed in was how many steps old.
        scratch: (n,) room for a difference.

    """

    x_hat: Tensor
    s: Tensor
    gradient: Tensor
    mean_square: Tensor | None
    compressor: State
    steps: int
    has_sent: bool
    is_computed: bool
    heard: list[int]
    delays: Tensor
    scratch: Tensor = field(metadata=SCRATCH)


@dataclass(frozen=True)
class DCGossip(RegroupingAlgorithm[DCGossipState]):
    """Asynchronous gossip with compressed increments and delay compensation.

    Attributes:
        gamma: consensus step, > 0; as for CHOCO-SGD it must shrink with what the compressor keeps.
        compressor: any contractive compressor.
        lambda0: strength of the correction, >= 0.
        adaptive: whether it adapts to the size of the gradients, as in DC-ASGD-a.
        decay: of the mean square, in [0, 1).
        epsilon: added below the root, > 0.
        max_staleness: steps that a rank may be ahead of what it knows of a neighbor; None for any number.
        share: who computes how many gradients.

    """

    gamma: float
    compressor: Compressor = Identity()
    lambda0: float = 2.0
    adaptive: bool = True
    decay: float = 0.95
    epsilon: float = 1e-7
    max_staleness: int | None = None
    share: Share = "by_speed"

    def __post_init__(self) -> None:
        require_positive(gamma=self.gamma)
        require_bounded_errors("DC-gossip", self.compressor)
        if self.max_staleness is not None and self.max_staleness < 0:
            raise ConfigError(f"algorithm.max_staleness = {self.max_staleness} must be at least 0")
        _ = self._compensation  # checks the values

    def check(self, schedule: Schedule) -> None:
        """Raise TopologyError unless `schedule` is one connected undirected graph with symmetric weights."""
        require_fixed_symmetric("DC-gossip", schedule)
        require_connected("DC-gossip", schedule)

    @property
    def depth(self) -> int:
        """How many messages a neighbor must have room for: of as many steps as it may be behind, and two."""
        return UNREAD if self.max_staleness is None else self.max_staleness + 2

    def init(self, local: Local, mailbox: Mailbox) -> DCGossipState:
        """Return public copies of the model that all ranks begin with."""
        sources = mailbox.topology.sources(mailbox.rank)
        return DCGossipState(
            x_hat=local.x.clone(),
            s=local.x.clone(),  # the rows of W sum to one
            gradient=local.g,
            mean_square=self._compensation.init(local.x),
            compressor=self.compressor.init(local.spec, local.x.device, mailbox.rank),
            steps=0,
            has_sent=False,
            is_computed=False,
            heard=[-1] * len(sources),
            delays=torch.zeros((len(sources), DELAYS), dtype=torch.int64),
            scratch=torch.empty_like(local.x),
        )

    def phases(self, local: Local, state: DCGossipState, mailbox: Mailbox) -> Attempt:
        """Do one step in the order of the module's docstring; a step that waits for a neighbor is finished later."""
        is_begun = state.is_computed
        if not is_begun:
            state.has_sent = self._send(local, state, mailbox)
            if not state.has_sent and self.max_staleness is not None:
                return False
            yield None
            state.is_computed = True
        self.serve(local, state, mailbox)
        if self._late(state, mailbox):
            return not is_begun
        torch.sub(state.s, state.x_hat, out=state.scratch)  # d / gamma
        if not state.has_sent:
            state.scratch.zero_()
        if self.lambda0:
            self._compensation.correct_(state.gradient, self.gamma * state.scratch, state.mean_square)
        local.update()
        local.x.add_(state.scratch, alpha=self.gamma)
        for i, heard in enumerate(state.heard):
            count_delay_(state.delays[i], state.steps - heard)
        state.steps += 1
        state.is_computed = False
        return True

    def _send(self, local: Local, state: DCGossipState, mailbox: Mailbox) -> bool:
        """``q_i = C(x_i - xhat_i);  xhat_i += q_i;  s_i += W_ii q_i``, if all neighbors have room; return whether."""
        topology, rank = mailbox.topology, mailbox.rank
        targets = topology.targets(rank)
        if not all(mailbox.room(target) for target in targets):
            return False
        own = self.compressor.compress_difference_(local.x, state.x_hat, local.spec, state.compressor, state.scratch)
        mailbox.put(own, self.compressor.layout(local.spec), targets, state.steps)
        self.compressor.accumulate(own, local.spec, state.s, topology.weight(rank, rank))
        return True

    def _receive(self, local: Local, state: DCGossipState, mailbox: Mailbox, up_to: float) -> bool:
        """``s_i += W_ij q_j`` for all that has arrived of steps to `up_to`, by ascending rank; return whether any."""
        topology, rank = mailbox.topology, mailbox.rank
        arrived = mailbox.receive(self.compressor.layout(local.spec), up_to)
        sources = topology.sources(rank)
        for source, mails in arrived.items():
            for mail in mails:
                self.compressor.accumulate(mail.payload, local.spec, state.s, topology.weight(rank, source))
            state.heard[sources.index(source)] = mails[-1].step
        return bool(arrived)

    def _late(self, state: DCGossipState, mailbox: Mailbox) -> list[int]:
        """Return the neighbors that this rank is too far ahead of."""
        if self.max_staleness is None:
            return []
        sources = mailbox.topology.sources(mailbox.rank)
        late = [s for s, heard in zip(sources, state.heard, strict=True) if heard < state.steps - self.max_staleness]
        peers = mailbox.peers() if late else {}
        return [source for source in late if not peers[source].is_done]

    def is_unfinished(self, state: DCGossipState) -> bool:
        """Return whether a step has its gradient and waits for neighbors that are too far behind."""
        return state.is_computed

    def awaited(self, state: DCGossipState, mailbox: Mailbox) -> list[int]:
        """Return the neighbors that are too far behind, or have no room."""
        if state.is_computed:
            return self._late(state, mailbox)
        return [target for target in mailbox.topology.targets(mailbox.rank) if not mailbox.room(target)]

    def serve(self, local: Local, state: DCGossipState, mailbox: Mailbox) -> bool:
        """Take in what has arrived, so that no neighbor runs out of room; of a bound, what it lets be mixed in now."""
        horizon = math.inf if self.max_staleness is None else state.steps + self.max_staleness
        return self._receive(local, state, mailbox, horizon)

    def drain(self, local: Local, state: DCGossipState, mailbox: Mailbox) -> bool:
        """Take in all that has arrived, from however far ahead."""
        return self._receive(local, state, mailbox, math.inf)

    def updates(self, state: DCGossipState) -> int:
        """Return the steps done: each applies one gradient."""
        return state.steps

    def delays(self, state: DCGossipState, mailbox: Mailbox) -> dict[int, list[int]]:
        """Return, by neighbor, how often what was mixed in was how many steps old."""
        return dict(zip(mailbox.topology.sources(mailbox.rank), state.delays.tolist(), strict=True))

    def diagnostics(self, local: Local, state: DCGossipState) -> dict[str, float]:
        """Return ``compression_error``, |x - xhat| / |x|."""
        return {"compression_error": compression_error(local.x, state.x_hat, state.scratch)}

    def regroup_(self, local: Local, state: DCGossipState, mailbox: Mailbox, exchange: Exchange) -> None:
        """Start the public copies anew at the models of all ranks, which neighbors get in one dense exchange."""
        topology, rank = mailbox.topology, mailbox.rank
        layout = Layout((Field("model", local.x.dtype, local.x.numel()), Field("steps", torch.int64, 1)))
        pending = exchange.start({"model": local.x, "steps": torch.tensor([state.steps])}, layout, topology)
        state.x_hat.copy_(local.x)
        torch.mul(local.x, topology.weight(rank, rank), out=state.s)
        arrived = pending.wait()
        for source, payload in arrived.items():
            state.s.add_(payload["model"].to(local.x.device), alpha=topology.weight(rank, source))
        # As if the message of its step had come: a neighbor in the middle of it has sent that to the old mailbox.
        state.heard = [int(payload["steps"]) for payload in arrived.values()]
        state.delays = torch.zeros((len(arrived), DELAYS), dtype=torch.int64)

    @property
    def _compensation(self) -> DelayCompensation:
        return DelayCompensation(
            self.lambda0, self.adaptive and self.lambda0 > 0, self.decay, self.epsilon, is_limited=True
        )
