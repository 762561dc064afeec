"""CHOCO-SGD: gossip of compressed differences to public copies.

Every rank holds a public copy of its model that all its neighbors know, and sends only the compressed difference
to it. Compression errors stay in the difference and are sent later; the mean over ranks is preserved exactly.

    g_i = grad F_i(x_i)
    y_i = x_i - lr u_i
    q_i = C(y_i - xhat_i)                            send q_i to every neighbor, receive q_j
    xhat_i = xhat_i + q_i
    s_i = s_i + sum_j W_ij q_j                       (j = i included; s_i = sum_j W_ij xhat_j)
    x_i = y_i + gamma (s_i - xhat_i)

x_i is the model (n,) of rank i and F_i the loss of its batch; lr the learning rate; u_i the direction that the
optimizer makes of g_i, with its momentum and weight decay; y_i the model after that local step; C the compressor and
q_i what is sent; xhat_i the public copy of the model; W_ij the weight of rank j in the average of rank i, 0 unless they
are neighbors; s_i the weighted sum of the public copies; gamma the consensus step.

With ``overlap`` the difference is taken right after the last mixing, and the exchange runs behind the next gradient;
the public copies are then one local step older:

    q_i = C(x_i - xhat_i), start the exchange;  g_i;  xhat_i, s_i as above
    y_i = x_i - lr u_i;  x_i = y_i + gamma (s_i - xhat_i)

When ranks have died (``run.on_peer_loss``), the others make their public copies anew on the graph that is left: each
tells its neighbors its model as it is, and ``xhat_i = x_i``, ``s_i = sum_j W_ij x_j``.

Wire: one compressed message, the same to every neighbor. Memory: ``xhat``, ``s`` and one scratch vector, whatever
the degree. Needs symmetric doubly stochastic weights on a fixed connected graph and a contractive C. gamma must
shrink with the contraction delta of C; values that worked: 0.45 for sign, 0.2 keeping 10 %, 0.04 keeping 1 %.
``gamma = "auto"`` measures one in training (`mpicomp.algorithms.gossip.automatic_step`).
Koloskova, Stich, Jaggi 2019, arXiv 1902.00340, Algorithm 2; the overlapped order is that of the code to
arXiv 1907.09356.

In a script:

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    gossip = mpicomp.distribute(model, optimizer, Choco(gamma=0.2, compressor=TopK(ratio=0.1)), topology=ring)
    loss = gossip.step(lambda: loss_fn(model, batch))
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from mpicomp import kernels
from mpicomp.algorithms.base import Local, Phases, require_bounded_errors, require_fixed_symmetric
from mpicomp.algorithms.gossip.automatic_step import (
    AutomaticStep,
    Gamma,
    check_gamma,
    layout_with_delta,
    without_delta,
)
from mpicomp.algorithms.gossip.base import RegroupingGossip
from mpicomp.compression.base import Compressor
from mpicomp.compression.identity import Identity
from mpicomp.compression.message import Layout, Payload, Spec
from mpicomp.exchange.base import Exchange, Pending
from mpicomp.state import PUBLIC_COPY, SCRATCH, State
from mpicomp.topology.base import Schedule

Start = Literal["model", "zero"]


@dataclass
class ChocoState:
    """What a rank keeps.

    Attributes:
        x_hat: (n,) the public copy of the own model.
        s: (n,) sum of the public copies of the neighborhood, weighted by the own row of W, the own copy included.
        scratch: (n,) room for a difference.
        compressor: state of the compressor.
        automatic: what finds gamma; None where it is given.

    """

    x_hat: Tensor = field(metadata=PUBLIC_COPY)
    s: Tensor = field(metadata=PUBLIC_COPY)
    scratch: Tensor = field(metadata=SCRATCH)
    compressor: State
    automatic: AutomaticStep | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class Choco(RegroupingGossip[ChocoState]):
    """CHOCO-SGD with any optimizer as the local step.

    Attributes:
        gamma: consensus step, > 0, dimensionless, or ``"auto"``: it is found in training.
        compressor: any contractive compressor.
        overlap: whether the exchange runs behind the next gradient.
        start: what the public copies are at first: the common initial ``"model"``, so that it need not be sent piece by
            piece, or ``"zero"``, which ranks that start apart need.

    """

    gamma: Gamma = "auto"
    compressor: Compressor = Identity()
    overlap: bool = False
    start: Start = "model"

    def __post_init__(self) -> None:
        check_gamma(self.gamma)
        require_bounded_errors("CHOCO-SGD", self.compressor)

    def check(self, schedule: Schedule) -> None:
        """Raise TopologyError unless `schedule` is one undirected graph with symmetric weights."""
        require_fixed_symmetric("CHOCO-SGD", schedule)

    def init(self, local: Local, exchange: Exchange) -> ChocoState:
        """Return the public copies as `start` says, and room for a difference."""
        copies = initial_copies(self.start, self.compressor, local, exchange)
        return ChocoState(**copies, automatic=automatic_step(self.gamma, self.compressor, local, exchange))

    def phases(self, local: Local, state: ChocoState, exchange: Exchange) -> Phases:
        """Do one step in the order of the module's docstring."""
        if self.overlap:
            own, pending = send_difference(self.compressor, local, state, exchange)
            yield pending.test
            add_messages_(self.compressor, local, state, exchange, own, pending)
            local.update()
            kernels.mix_(local.x, state.s, state.x_hat, self._gamma(state))
        else:
            yield from super().phases(local, state, exchange)

    def mix(self, local: Local, state: ChocoState, exchange: Exchange) -> None:
        """Update the public copies, and move towards those of the neighbors."""
        own, pending = send_difference(self.compressor, local, state, exchange)
        add_messages_(self.compressor, local, state, exchange, own, pending)
        kernels.mix_(local.x, state.s, state.x_hat, self._gamma(state))

    def regroup_(self, local: Local, state: ChocoState, exchange: Exchange) -> None:
        """Make the public copies anew."""
        renew_copies(self.compressor, self.gamma, local, state, exchange)

    def _gamma(self, state: ChocoState) -> float:
        """Return the consensus step of now."""
        return float(self.gamma) if state.automatic is None else state.automatic.gamma

    def diagnostics(self, local: Local, state: ChocoState) -> dict[str, float]:
        """Return ``compression_error``, |x - xhat| / |x|, which grows without end if gamma is too large."""
        found = {"compression_error": compression_error(local.x, state.x_hat, state.scratch)}
        return found if state.automatic is None else found | {"gamma": state.automatic.gamma}


def automatic_step(gamma: Gamma, compressor: Compressor, local: Local, exchange: Exchange) -> AutomaticStep | None:
    """Return what finds gamma, or None if it is given."""
    if gamma != "auto":
        return None
    return AutomaticStep.start(exchange.schedule(0), compressor, local.spec, local.x.device)


def initial_copies(start: Start, compressor: Compressor, local: Local, exchange: Exchange) -> dict[str, Any]:
    """Return the fields of a `ChocoState` before the first step."""
    first = local.x.clone() if start == "model" else torch.zeros_like(local.x)
    return {
        "x_hat": first,
        "s": first.clone(),  # the rows of W sum to one
        "scratch": torch.empty_like(first),
        "compressor": compressor.init(local.spec, first.device, exchange.rank),
    }


def renew_copies(compressor: Compressor, gamma: Gamma, local: Local, state: ChocoState, exchange: Exchange) -> None:
    """Have ``xhat_i = x_i`` on the graph of `exchange`: neighbors send each other their models once, uncompressed."""
    rank, topology, spec, whole = exchange.rank, exchange.schedule(0), local.spec, Identity()
    payload = whole.compress(local.x, spec, None)
    arrived = exchange.start(payload, whole.layout(spec), topology).wait()
    state.x_hat.copy_(local.x)
    torch.mul(local.x, topology.weight(rank, rank), out=state.s)
    add_arrived_(whole, spec, state.s, exchange, arrived, None)
    state.compressor = compressor.init(spec, local.x.device, rank)
    state.automatic = automatic_step(gamma, compressor, local, exchange)


def send_difference(
    compressor: Compressor, local: Local, state: ChocoState, exchange: Exchange
) -> tuple[Payload, Pending]:
    """Form ``q_i = C(x_i - xhat_i)``, begin to exchange it, and have ``xhat_i += q_i``."""
    own, message, layout = compress_difference_(
        compressor, local.x, state.x_hat, state.s, local.spec, state.compressor, state.scratch, state.automatic
    )
    return own, exchange.start(message, layout, exchange.schedule(0))


def compress_difference_(
    compressor: Compressor,
    x: Tensor,
    x_hat: Tensor,
    s: Tensor,
    spec: Spec,
    state: State,
    scratch: Tensor,
    automatic: AutomaticStep | None,
) -> tuple[Payload, Payload, Layout]:
    """Return ``q = C(x - xhat)``, the message with it and the message's layout, and have ``xhat += q``.

    What finds gamma measures q and adds a field to the message.

    Args:
        compressor: C.
        x: the vector to be sent, (n,).
        x_hat: its public copy, (n,).
        s: the weighted sum of the neighborhood's public copies before this exchange, (n,).
        spec: of x.
        state: of the compressor.
        scratch: room for a difference, (n,).
        automatic: what finds gamma; None where it is given.

    """
    layout = compressor.layout(spec)
    if automatic is None:
        own = compressor.compress_difference_(x, x_hat, spec, state, scratch)
        return own, own, layout
    if automatic.measures:
        sample = automatic.sample
        wanted, apart = sample(x) - sample(x_hat), sample(s) - sample(x_hat)
    own = compressor.compress_difference_(x, x_hat, spec, state, scratch)
    if automatic.measures:
        automatic.measure(wanted, sample(x) - sample(x_hat), apart)
    return own, automatic.with_delta(own), layout_with_delta(layout)


def add_messages_(
    compressor: Compressor, local: Local, state: ChocoState, exchange: Exchange, own: Payload, pending: Pending
) -> None:
    """``s_i += sum_j W_ij q_j``, the own message first, then by ascending rank."""
    rank, topology = exchange.rank, exchange.schedule(0)
    compressor.accumulate(own, local.spec, state.s, topology.weight(rank, rank))
    add_arrived_(compressor, local.spec, state.s, exchange, pending.wait(), state.automatic)


def add_arrived_(
    compressor: Compressor,
    spec: Spec,
    total: Tensor,
    exchange: Exchange,
    arrived: Mapping[int, Payload],
    automatic: AutomaticStep | None,
) -> None:
    """``total += sum_j W_ij q_j`` (n,) of the neighbors' messages, by ascending rank; what finds gamma hears them."""
    topology = exchange.schedule(0)
    for source, payload in arrived.items():
        compressor.accumulate(without_delta(payload), spec, total, topology.weight(exchange.rank, source))
    if automatic:
        automatic.hear(arrived.values())


def compression_error(x: Tensor, x_hat: Tensor, scratch: Tensor) -> float:
    """Return |x - xhat| / |x|, and the difference in `scratch`; all (n,)."""
    torch.sub(x, x_hat, out=scratch)
    return float(scratch.norm() / x.norm().clamp_min(1e-30))
