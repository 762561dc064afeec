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

from torch import Tensor

from mpicomp.algorithms.base import Local, S, require_bounded_errors
from mpicomp.algorithms.sums.adam import OwnAdam
from mpicomp.algorithms.sums.base import AggregatedAlgorithm
from mpicomp.compression.base import Compressor
from mpicomp.compression.identity import Identity
from mpicomp.compression.message import Payload
from mpicomp.compression.wrap.feedback import ErrorFeedback, FeedbackState
from mpicomp.exchange.base import Exchange
from mpicomp.exchange.sums.aggregate import Aggregator
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
class TwoWayAdam(OwnAdam[S], AggregatedAlgorithm[S]):
    """A method that takes steps of Adam's kind by itself; weight decay is the same on all ranks, and never compressed.

    Attributes:
        downlink: of the server's answer; any contractive compressor.

    """

    downlink: Compressor = Identity()

    def __post_init__(self) -> None:
        OwnAdam.__post_init__(self)
        AggregatedAlgorithm.__post_init__(self)
        require_bounded_errors(f"the server of {self.name}", self.downlink, "downlink")

    def init_messages(self, local: Local, exchange: Exchange) -> TwoWayState:
        """Return errors of zero, and new states of the compressors.

        Raises:
            ConfigError: the optimizer is not SGD without momentum, or is to maximize, which would do nothing.

        """
        self.rank_weights(exchange.size)  # raises what is wrong with them
        self.require_plain_optimizer(local)
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

    def error_norms(self, state: TwoWayState) -> dict[str, float]:
        """Return ``error_norm``, |e_k|, and on servers ``server_error_norm``, |e|."""
        norms = {"error_norm": float(state.uplink.residual.norm())}
        if state.server_error.numel():
            norms["server_error_norm"] = float(state.server_error.norm())
        return norms
