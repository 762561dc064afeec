"""DGC, deep gradient compression: each rank corrects, accumulates and masks its own momentum before the compression.

    g_k = clip(grad F_k(x))
    u_k = mu u_k + g_k;  v_k = v_k + u_k                   momentum correction
                                                           (Nesterov: u_k = mu (u_k + g_k); v_k = v_k + u_k + g_k)
    q_k = C(v_k)
    v_k = v_k - q_k;  u_k = 0 where q_k is not             momentum factor masking
    b = mu b + lambda x                                    weight decay, with a momentum of its own
    x = x - lr (sum_k w_k q_k + b)                         by the optimizer, on all ranks alike
                                                           (Nesterov: lambda x + mu b in the place of b)

x is the model (n,), the same on all ranks; F_k the loss of the batch of rank k; u_k (n,) its momentum and mu the
parameter ``momentum``; v_k (n,) what it has accumulated and not sent; C the compressor and q_k what is sent; w_k what
rank k counts in the sum; lr the learning rate and lambda the weight decay, both of the optimizer; b (n,) is the same on
all ranks.

``clip = "norm"`` scales the gradient to a norm of at most ``clip_norm / sqrt(size)`` (the paper's); ``"rms"`` clamps
its entries to the root mean square over ranks of |g_k| (GRACE's rule, one more number exchanged a step). The ranks of a
node that hold one model together count as one rank, whose gradient is their mean (`mpicomp.replica.node_shard`).

While the run warms up, more is sent: ``warmup`` lists the ratios of the first stages, or ``warmup_stages`` of them are
geometric, ``max(c^(stage + 1), r)`` with ``c = r^(1 / (stages + 1))`` and the ratio r of C, as in the official code.
Each has ``warmup_steps`` steps.

``overlap`` delays the last line by one step (see `mpicomp.algorithms.sums.base`); u and v, which are of the own
gradients alone, stay as they are. ``clip = "rms"`` does not go with it: its sum would have to overtake the messages.

The paper compresses tensor by tensor and sends tensors of one dimension whole (``compression.per_tensor`` and
``compression.dense_1d``); those keep their momentum unmasked. Weight decay is neither compressed nor masked, as in the
authors' optimizer. Where every entry is sent and masked, this is plain SGD, but for b; with ``masking = false``, SGD
with momentum, as torch's with weight decay.

Wire: see `mpicomp.exchange.sums.aggregate`. Memory: ``u``, ``v`` and one scratch vector, and ``b`` with
weight decay. Lin et al. 2018,
arXiv 1712.01887; checked against the authors' code.

In a script:

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gossip = mpicomp.distribute(model, optimizer, DGC(PerTensor(TopK(0.01), dense_1d=True)), topology=star)
    loss = gossip.step(lambda: loss_fn(model, batch))
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from mpicomp.algorithms.base import Local, Phases, require_fraction, require_positive
from mpicomp.algorithms.sums.base import (
    GradientSum,
    add_decay_momentum_,
    decay_momentum,
    require_no_momentum,
)
from mpicomp.compression.base import Compressor
from mpicomp.compression.message import Spec
from mpicomp.compression.ratio import check_ratio
from mpicomp.compression.wrap.by_rank import by_rank_of, strength_of, with_strength
from mpicomp.compression.wrap.feedback import apart_from
from mpicomp.errors import ConfigError
from mpicomp.exchange.base import Exchange
from mpicomp.exchange.sums.aggregate import Aggregator
from mpicomp.state import ERROR_OF_GRADIENTS, IN_FLIGHT, MOMENT, SCRATCH, State

Clip = Literal["none", "norm", "rms"]


@dataclass
class DGCState:
    """What a rank keeps.

    Attributes:
        u: (n,) the momentum of the own gradients.
        v: (n,) what has been accumulated and not been sent.
        scratch: (n,) room for the own message.
        decay: (n,) the momentum b of the weight decay; None if the optimizer had none at the start.
        compressor: state of the compressor.
        delayed: (nbytes,) uint8, the message of the last step; None without overlap.
        steps: messages formed.

    """

    u: Tensor = field(metadata=MOMENT)
    v: Tensor = field(metadata=ERROR_OF_GRADIENTS)
    scratch: Tensor = field(metadata=SCRATCH)
    decay: Tensor | None = field(metadata=MOMENT)
    compressor: State
    delayed: Tensor | None = field(metadata=IN_FLIGHT)
    steps: int = 0


@dataclass(frozen=True)
class DGC(GradientSum[DGCState]):
    """Deep gradient compression.

    Attributes:
        momentum: mu in [0, 1).
        nesterov: whether the gradient of the step counts once more.
        masking: whether what is sent loses its momentum.
        clip: how gradients are clipped: ``"none"``, ``"norm"`` or ``"rms"``.
        clip_norm: the norm that the mean gradient of all ranks may have, for ``"norm"``.
        warmup: the ratios of the first stages, descending.
        warmup_stages: how many stages there are, if their ratios are geometric.
        warmup_steps: of each stage.

    """

    momentum: float = 0.9
    nesterov: bool = False
    masking: bool = True
    clip: Clip = "none"
    clip_norm: float = 1.0
    warmup: tuple[float, ...] = ()
    warmup_stages: int = 0
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_fraction(momentum=self.momentum)
        if self.clip not in get_args(Clip):
            raise ConfigError(f"algorithm.clip = {self.clip!r} must be one of {', '.join(map(repr, get_args(Clip)))}")
        require_positive(clip_norm=self.clip_norm)
        if self.clip == "rms" and self.overlap:
            raise ConfigError(
                "algorithm.clip = 'rms' needs a sum over ranks while the messages of algorithm.overlap are under way: "
                "use algorithm.clip = 'norm', or no overlap"
            )
        if self.warmup_stages < 0 or self.warmup_steps < 0:
            raise ConfigError("algorithm.warmup_stages and algorithm.warmup_steps must be at least 0")
        if self.warmup and self.warmup_stages:
            raise ConfigError("algorithm.warmup lists the stages, so leave out algorithm.warmup_stages")
        if (self.warmup or self.warmup_stages) and not self.warmup_steps:
            raise ConfigError("algorithm.warmup_steps = 0: say how many steps a stage of the warm-up has")
        for ratio in self.warmup:
            if not 0 < ratio <= 1:
                raise ConfigError(f"algorithm.warmup: {ratio} must be in (0, 1]: a fraction of the entries")
        self.compressor_at(0)  # raises if the ratio of the compressor cannot be changed

    def init(self, local: Local, exchange: Exchange) -> DGCState:
        """Return a momentum and an accumulation of zero, and room for the message."""
        self.rank_weights(exchange.size)  # raises what is wrong with them
        require_no_momentum("DGC", local)
        x = local.x
        compressor = self.compressor.init(local.spec, x.device, exchange.rank)
        delayed = self.init_delayed(local, [self.warmup_steps * stage for stage in range(self._stages + 1)])
        decay = decay_momentum("DGC", local, self.momentum)
        return DGCState(torch.zeros_like(x), torch.zeros_like(x), torch.empty_like(x), decay, compressor, delayed)

    def phases(self, local: Local, state: DGCState, exchange: Exchange) -> Phases:
        """Do one step in the order of the module's docstring."""
        require_no_momentum("DGC", local)
        u, v, own, spec = state.u, state.v, state.scratch, local.spec
        compressor = self.compressor_at(state.steps)
        delayed = self.start_delayed_sum(local, state, exchange)
        yield delayed.test if delayed else None
        g = self._clipped(local, exchange)
        if self.nesterov:
            u.add_(g).mul_(self.momentum)
            v.add_(u).add_(g)
        else:
            u.mul_(self.momentum).add_(g)
            v.add_(u)
        self.update_with_delayed_sum(delayed, local, state)
        q = apart_from(v, compressor.compress(v, spec, state.compressor))
        own.zero_()
        compressor.accumulate(q, spec, own)
        v.sub_(own)
        if self.masking:
            for part in _masked(self.compressor, spec):
                u[part].masked_fill_(own[part] != 0, 0.0)
        self.sum_and_update(q, local, state, exchange)

    def update(self, local: Local, state: DGCState) -> None:
        """Take the optimizer's step with the sum in ``local.g`` and the momentum of the weight decay."""
        if state.decay is not None:
            add_decay_momentum_(local, state.decay, self.momentum, self.nesterov)
        local.update()

    def compressor_at(self, step: int) -> Compressor:
        """Return the compressor of a step: the one given, with the ratio of the stage."""
        stages = self._stages
        if not stages:
            return self.compressor
        stage = step // self.warmup_steps
        if stage >= stages:
            return self.compressor
        if self.warmup:
            return _with_ratio(self.compressor, self.warmup[stage])
        ratio = _ratio(self.compressor)
        return _with_ratio(self.compressor, max(ratio ** ((stage + 1) / (stages + 1)), ratio))

    def diagnostics(self, local: Local, state: DGCState) -> dict[str, float]:
        """Return ``error_norm``, |v|, and ``ratio``, the fraction that is sent, if there is a warm-up."""
        numbers = {"error_norm": float(state.v.norm())}
        if self.warmup_steps:
            numbers["ratio"] = _ratio(self.compressor_at(state.steps))
        return numbers

    @property
    def _stages(self) -> int:
        return self.warmup_stages or len(self.warmup)

    def _clipped(self, local: Local, exchange: Exchange) -> Tensor:
        g = local.g
        if self.clip == "norm":
            limit = self.clip_norm / math.sqrt(exchange.size)
            g.mul_((limit / local.norm(g).clamp_min(1e-30)).clamp_max(1.0))
        elif self.clip == "rms":
            square = local.norm(g).square().reshape(1)
            Aggregator(exchange).mean_(square)
            largest = square.sqrt()
            g.clamp_(-largest, largest)
        return g


def _masked(compressor: Compressor, spec: Spec) -> list[slice]:
    """Return the parts of the flat vector whose momentum is masked: those that are not sent whole in every step."""
    parts: list[slice] = []
    begin = 0
    for part in spec.parts:
        end = begin + part.numel
        if not compressor.exempts(part):
            joined = parts.pop().start if parts and parts[-1].stop == begin else begin
            parts.append(slice(joined, end))
        begin = end
    return parts


def _ratio(compressor: Compressor) -> float:
    if by_rank_of(compressor):
        raise ConfigError(
            "algorithm.warmup gives all ranks one ratio, and compression.allocation each its own: set "
            "compression.allocation = 'uniform', or leave out the warm-up"
        )
    strength = strength_of(compressor)
    if not (strength and strength[0] == "ratio"):
        raise ConfigError(
            f"algorithm.warmup: {compressor} keeps no fraction of the entries that could change; use "
            "compression.kind = 'topk', or no warm-up"
        )
    return strength[1]


def _with_ratio(compressor: Compressor, ratio: float) -> Compressor:
    """Return `compressor` with another ratio."""
    check_ratio(ratio)
    _ratio(compressor)
    return with_strength(compressor, ratio)
