"""What the methods of Adam's kind share that compress in both directions, with an error memory at both ends.

    p_k = z_k + e_k;  q_k = C(p_k);  e_k = p_k - q_k       each rank k
    p = sum_k w_k q_k + e;  q = C_down(p);  e = p - q      the server
    all ranks read q

z_k (n,) is what rank k has to say, e_k (n,) its error memory, q_k its message and w_k what it counts in the sum; e (n,)
is the error memory of the server and q its answer; C and C_down are the compressors of both directions.

The hub of a star is the server, and sends q; on a ring every rank repeats the server's arithmetic, so no q travels.
No part of any z_k is lost: the sum of all ``q`` so far, with ``e + sum_k w_k e_k``, is that of all ``sum_k w_k z_k``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from mpicomp.algorithms.base import Local, require_positive
from mpicomp.algorithms.sums.base import AggregatedAlgorithm, S
from mpicomp.compression.base import Compressor, blocks
from mpicomp.compression.identity import Identity
from mpicomp.compression.message import Payload
from mpicomp.compression.wrap.feedback import ErrorFeedback, FeedbackState
from mpicomp.errors import ConfigError
from mpicomp.exchange.base import Exchange
from mpicomp.exchange.sums.aggregate import Aggregator
from mpicomp.kernels.reference import sqrt
from mpicomp.state import SERVERS, State


@dataclass
class TwoWayState:
    """What a rank keeps for its messages.

    Attributes:
        uplink: the error memory (n,), and the state of the compressor.
        server_error: (n,) what the server has left out; (0,) on ranks that are none.
        downlink: state of the server's compressor.

    """

    uplink: FeedbackState
    server_error: Tensor = field(metadata=SERVERS)
    downlink: State


@dataclass(frozen=True)
class TwoWayAdam(AggregatedAlgorithm[S]):
    """A method that takes steps of Adam's kind by itself, with the learning rates of the optimizer's groups.

    Their weight decay is decoupled as in AdamW, ``x (1 - lr weight_decay)``, on all ranks alike and never compressed.

    Attributes:
        downlink: of the server's answer; any contractive compressor.
        beta1: decay of the first moment, in [0, 1).
        beta2: decay of the second moment, in [0, 1).
        epsilon: added to the root of the second moment.
        bias_correction: whether the moments are corrected for their start at zero, as in `torch.optim.Adam`.

    """

    downlink: Compressor = Identity()
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    bias_correction: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.downlink.remembers_errors:
            raise ConfigError(
                f"downlink.error_feedback = true: the server of {self.name} has an error memory of its own and would "
                "count every error twice. Leave it out."
            )
        for key, value in (("beta1", self.beta1), ("beta2", self.beta2)):
            if not 0 <= value < 1:
                raise ConfigError(f"algorithm.{key} = {value} must be in [0, 1)")
        require_positive(epsilon=self.epsilon)

    def init_messages(self, local: Local, exchange: Exchange) -> TwoWayState:
        """Return errors of zero, and new states of the compressors.

        Raises:
            ConfigError: the optimizer has moments, or is to maximize, which would do nothing.

        """
        self.rank_weights(exchange.size)  # raises what is wrong with them
        if local.momentum:
            raise ConfigError(
                f"optimizer.momentum = {local.momentum:g} (or its betas): {self.name} takes its steps by itself, and "
                "of the optimizer only the learning rates and the weight decay. Use optimizer.kind = 'sgd' without "
                "momentum; algorithm.beta1 and algorithm.beta2 are the method's own."
            )
        if any(group.get("maximize") for _, group in local.groups):
            raise ConfigError(
                f"optimizer.maximize = True: {self.name} takes its steps by itself, and downhill. Change the sign of "
                "the loss"
            )
        spec, device = local.spec, local.x.device
        error = local.x.new_zeros(spec.numel if Aggregator(exchange).is_server else 0)
        uplink = ErrorFeedback(self.compressor).init(spec, device, exchange.rank)
        return TwoWayState(uplink, error, self.downlink.init(spec, device))

    def agree(self, z: Tensor, local: Local, state: TwoWayState, exchange: Exchange) -> Payload:
        """Return the server's answer q to the z_k of all ranks; valid until the next exchange.

        `z` is the z_k (n,) of this rank; its content is lost.
        """
        spec, aggregator = local.spec, Aggregator(exchange)
        own = ErrorFeedback(self.compressor).compress(z, spec, state.uplink)  # q_k and e_k
        aggregator.start(own, self.compressor, spec, self.rank_weights(exchange.size)).wait_on_servers(z)
        q: Payload = {}
        if aggregator.is_server:
            server = FeedbackState(state.server_error, state.downlink)
            q = ErrorFeedback(self.downlink).compress(z, spec, server)  # q and e
        return aggregator.answer(q, self.downlink.layout(spec))

    def steps_of_(self, m: Tensor, v: Tensor, local: Local, steps: tuple[int, int], scale: float = 1.0) -> None:
        """``g = scale lr m / (sqrt(v) + epsilon)``, all (n,), corrected for moments of `steps` (of m, of v) gradients.

        lr is that of each parameter's group.
        """
        for part, group in local.groups:
            lr, epsilon = scale * group["lr"], self.epsilon
            if self.bias_correction:
                root = (1 - self.beta2 ** steps[1]) ** 0.5
                lr, epsilon = lr * root / (1 - self.beta1 ** steps[0]), epsilon * root
            for start, stop in blocks(part.stop - part.start):
                block = slice(part.start + start, part.start + stop)
                torch.div(m[block], sqrt(v[block]).add_(epsilon), out=local.g[block]).mul_(lr)

    def decay_(self, local: Local, scale: float = 1.0) -> None:
        """``x = x (1 - scale lr weight_decay)``, with those of each parameter's group."""
        for part, group in local.groups:
            if weight_decay := group.get("weight_decay", 0.0):
                local.x[part].mul_(1 - scale * group["lr"] * weight_decay)

    def tell_optimizer(self, local: Local) -> None:
        """Have the optimizer step on nothing, so that its hooks run and schedulers see that it has been called."""
        local.update(slice(0, 0))

    def error_norms(self, state: TwoWayState) -> dict[str, float]:
        """Return ``error_norm``, |e_k|, and on servers ``server_error_norm``, |e|."""
        norms = {"error_norm": float(state.uplink.residual.norm())}
        if state.server_error.numel():
            norms["server_error_norm"] = float(state.server_error.norm())
        return norms


def moments_(m: Tensor, v: Tensor, g: Tensor, beta1: float, beta2: float) -> None:
    """``m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g g``, all (n,)."""
    m.mul_(beta1).add_(g, alpha=1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
