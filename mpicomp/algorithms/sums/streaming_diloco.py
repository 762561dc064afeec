"""Streaming DiLoCo: DiLoCo a fragment of the model at a time, whose mean travels behind the steps that follow.

    every step:                                      g_i = grad F_i(theta_i);  theta_i = theta_i - lr u_i
    after step floor((k + 1) H / P), k = 0, 1, ..:   p = k mod P, and on this fragment of the vectors
        d_i = phi - theta_i                          the pseudo-gradient
    tau steps later:
        d = (1/N) sum_i d_i
        v = beta v + d
        phi = phi - eta (d + beta v)                 Nesterov's; with ``nesterov = false``, phi = phi - eta v
        theta_i = alpha theta_i + (1 - alpha) phi

theta_i is the model (n,) of rank i and F_i the loss of its batch; phi (n,) the slow model, the same on all N ranks; lr
the learning rate; u_i the direction that the inner optimizer makes of g_i, whose state is kept and never exchanged; H
the parameter ``period``, P ``fragments`` and tau ``delay``; d_i what rank i has moved on the fragment since phi was
last set there, d its mean over the ranks, and v (n,) the momentum of d; eta ``outer_lr``, beta ``outer_momentum``;
alpha ``local_weight``, what the model keeps of its own when the slow one arrives. All ranks start from the same phi.

The fragments are groups of consecutive tensors, cut so that the largest one is as small as it can be. Each is
synchronized every H steps, the first time after fewer. With one fragment, tau = 0 and alpha = 0 this is DiLoCo: to
rounding, as the sum is formed in another order, and bit for bit on one and two ranks.

No message is in flight between two steps: d_i is cut into tau pieces, and each of the tau steps sums one of them behind
its gradient. So what a step sends is spread as evenly as the fragments are, and d_i is part of the state. With tau = 0
the whole fragment is summed at the end of the step, and all ranks wait for it.

Wire: a dense sum (see `mpicomp.exchange.sums.aggregate`) of one vector every H steps. Of it a step sends the tau-th
part of each fragment under way, all together no more than the largest fragment (to one entry for each under way).
Memory: ``phi``, ``v`` with momentum, and the fragments under way at a time, ``ceil(tau P / H)`` or one. Douillard et
al. 2025, arXiv 2501.18512: alpha = 0.5, robust up to tau = 5, AdamW inside; there a fragment is every P-th group of
layers, and messages have 4 bits a value.

In a script:

    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4, betas=(0.9, 0.95), weight_decay=0.1)
    gossip = mpicomp.distribute(model, optimizer, StreamingDiLoCo(period=50, fragments=4), topology=ring)
    loss = gossip.step(lambda: loss_fn(model, batch))
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mpicomp.algorithms.base import Local, Phases, require_fraction, require_period, require_positive
from mpicomp.algorithms.outer_step import outer_step_
from mpicomp.algorithms.sums.base import SummingAlgorithm
from mpicomp.compression.identity import Identity
from mpicomp.compression.message import Spec
from mpicomp.errors import ConfigError
from mpicomp.exchange.base import Exchange
from mpicomp.exchange.sums.aggregate import Aggregator
from mpicomp.state import SCRATCH


@dataclass
class StreamingDiLoCoState:
    """What a rank keeps.

    Attributes:
        phi: (n,) the slow model.
        v: (n,) the momentum of the pseudo-gradients; None without.
        d: (fragments under way at a time, length of the largest), their pseudo-gradients; what has been summed is the
            mean over the ranks already.
        parts: where each fragment lies in the model.
        step: the number of steps done, which tells what is under way.

    """

    phi: Tensor
    v: Tensor | None
    d: Tensor
    parts: list[slice] = field(metadata=SCRATCH)
    step: int = 0


@dataclass(frozen=True)
class StreamingDiLoCo(SummingAlgorithm[StreamingDiLoCoState]):
    """Local steps of any optimizer, and outer steps of one fragment after the other behind them.

    Attributes:
        period: H, the steps from one outer step of a fragment to its next.
        fragments: P, into how many groups of tensors the model is cut; at most `period`.
        delay: tau, the steps behind which a pseudo-gradient travels, in [0, period); 0 waits for it.
        local_weight: alpha in [0, 1), the weight of the own model when the slow one arrives, which has 1 - alpha.
        outer_lr: eta, > 0.
        outer_momentum: beta, in [0, 1).
        nesterov: whether the outer step looks ahead along its momentum; else it is heavy-ball momentum.

    """

    period: int = 50
    fragments: int = 4
    delay: int = 1
    local_weight: float = 0.5
    outer_lr: float = 0.7
    outer_momentum: float = 0.9
    nesterov: bool = True

    def __post_init__(self) -> None:
        require_period(self.period)
        if not 1 <= self.fragments <= self.period:
            raise ConfigError(
                f"algorithm.fragments = {self.fragments} must be at least 1 and at most algorithm.period = "
                f"{self.period}: each fragment is synchronized after a step of its own"
            )
        if not 0 <= self.delay < self.period:
            raise ConfigError(
                f"algorithm.delay = {self.delay} must be at least 0 and less than algorithm.period = {self.period}: a "
                "fragment arrives before it is sent again"
            )
        require_positive(outer_lr=self.outer_lr)
        require_fraction(local_weight=self.local_weight, outer_momentum=self.outer_momentum)

    @property
    def begins_before_gradient(self) -> bool:
        """Whether pseudo-gradients travel behind the gradient."""
        return self.delay > 0

    @property
    def keeps_anchor(self) -> bool:
        """Yes, the slow model."""
        return True

    def init(self, local: Local, exchange: Exchange) -> StreamingDiLoCoState:
        """Return the slow model, which is that of the start, and a momentum of zero.

        Raises:
            ConfigError: there are more fragments than tensors.

        """
        parts = fragments_of(local.spec, self.fragments)
        under_way = max(1, -(-self.delay * self.fragments // self.period))
        d = local.x.new_zeros(under_way, max(part.stop - part.start for part in parts))
        v = torch.zeros_like(local.x) if self.outer_momentum else None
        return StreamingDiLoCoState(local.x.clone(), v, d, parts)

    def phases(self, local: Local, state: StreamingDiLoCoState, exchange: Exchange) -> Phases:
        """Take a local step with a sum under way, and what is due then, in the order of the module's docstring."""
        step, aggregator = state.step, Aggregator(exchange)
        pieces, pending = self._pieces(state), None
        if pieces:
            own = torch.cat(pieces)
            spec = Spec.flat(own.numel(), own.dtype)
            pending = aggregator.start(Identity().compress(own, spec, None), Identity(), spec)
        yield pending.test if pending else None
        local.update()
        state.step += 1
        if pending:
            mean = torch.empty_like(own)
            pending.wait(mean)
            for piece, its_mean in zip(pieces, torch.split(mean, [len(piece) for piece in pieces]), strict=True):
                piece.copy_(its_mean)
            # The last piece of a fragment is never empty. What arrives makes room for what begins below.
            for k in range(self._begun(step - self.delay), self._begun(step - self.delay + 1)):
                self._outer_step(k, local, state)
        for k in range(self._begun(step), self._begun(step + 1)):
            part, d = self._fragment(k, state)
            torch.sub(state.phi[part], local.x[part], out=d)
            if not self.delay:
                aggregator.mean_(d)
                self._outer_step(k, local, state)

    def _begun(self, step: int) -> int:
        """Return how many pseudo-gradients have been formed after so many steps: k ends at floor((k + 1) H / P)."""
        return ((max(step, 0) + 1) * self.fragments - 1) // self.period

    def _fragment(self, k: int, state: StreamingDiLoCoState) -> tuple[slice, Tensor]:
        """Return where pseudo-gradient `k` belongs in the model, and itself."""
        part = state.parts[k % self.fragments]
        return part, state.d[k % len(state.d), : part.stop - part.start]

    def _pieces(self, state: StreamingDiLoCoState) -> list[Tensor]:
        """Return what is to be summed in this step, views of ``state.d``: a piece of each fragment under way."""
        pieces = []
        for k in range(self._begun(state.step - self.delay), self._begun(state.step)):
            _, d = self._fragment(k, state)
            age = state.step - (k + 1) * self.period // self.fragments
            begin, end = (len(d) * i // self.delay for i in (age, age + 1))
            if begin < end:
                pieces.append(d[begin:end])
        return pieces

    def _outer_step(self, k: int, local: Local, state: StreamingDiLoCoState) -> None:
        part, d = self._fragment(k, state)
        phi, v = state.phi[part], None if state.v is None else state.v[part]
        outer_step_(phi, v, d, self.outer_lr, self.outer_momentum, self.nesterov)
        local.x[part].lerp_(phi, 1 - self.local_weight)  # alpha theta_i + (1 - alpha) phi


def fragments_of(spec: Spec, count: int) -> list[slice]:
    """Cut a vector between its tensors into `count` parts whose largest is as small as it can be.

    Raises:
        ConfigError: there are fewer tensors than parts.

    """
    sizes = [part.numel for part in spec.parts]
    if count > len(sizes):
        raise ConfigError(
            f"algorithm.fragments = {count} must be at most {len(sizes)}, the tensors of the model, or with "
            "topology.level = 'node' those of a rank's shard: a fragment has at least one"
        )
    # The smallest length into which the tensors fit; bisection, because what fits into less also fits into more.
    lengths = range(max(sizes), spec.numel + 1)
    length = lengths[bisect_left(lengths, True, key=lambda length: len(_ends(sizes, length, 1)) <= count)]
    ends = _ends(sizes, length, count)
    return [slice(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]


def _ends(sizes: Sequence[int], length: int, least: int) -> list[int]:
    """Return where consecutive parts of up to `length` entries end, each as long as it can be, but `least` at least."""
    ends: list[int] = []
    begin = end = 0
    for i, size in enumerate(sizes):
        is_due = len(ends) + 1 + len(sizes) - i <= least  # one part for each tensor that is left
        if i > 0 and (end + size - begin > length or is_due):
            ends.append(end)
            begin = end
        end += size
    return [*ends, end]
