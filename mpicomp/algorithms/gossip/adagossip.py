"""AdaGossip / AdaG-SGD: CHOCO-SGD with a consensus step per parameter.

A parameter whose gossip error is large suffers more from compression and is averaged with a smaller step, as Adam
does with gradients. Steps up to r_i are those of CHOCO-SGD.

    g_i = grad F_i(x_i)
    y_i = x_i - lr u_i
    q_i = C(y_i - xhat_i)                            send q_i to every neighbor, receive q_j
    xhat_i = xhat_i + q_i;  s_i = s_i + sum_j W_ij q_j
    r_i = s_i - xhat_i                               the gossip error, sum_j W_ij (xhat_j - xhat_i)
    t = t + 1;  v_i = beta v_i + (1 - beta) r_i * r_i
    vtilde_i = v_i / (1 - beta^t)                    (bias correction)
    Gamma_i = min(gamma / (sqrt(vtilde_i) + epsilon), gamma_clip)
    x_i = y_i + Gamma_i * r_i

x_i is the model (n,) of rank i and F_i the loss of its batch; lr the learning rate; u_i the direction that the
optimizer makes of g_i, with its momentum and weight decay; y_i the model after that local step; C the compressor and
q_i what is sent; xhat_i the public copy of the model; W_ij the weight of rank j in the average of rank i; s_i the
weighted sum of the public copies; t the number of mixings; v_i (n,) the running second moment of the gossip error;
Gamma_i (n,) the consensus step of each entry. Products, roots and quotients are elementwise. beta, epsilon, gamma and
gamma_clip are parameters.

With ``overlap`` the difference is ``q_i = C(x_i - xhat_i)`` and travels behind the next gradient, as in CHOCO-SGD.

gamma has the unit of a parameter, unlike CHOCO's: with the clip at 1, entries whose RMS gossip error is below gamma are
averaged with step 1, the others move by about gamma. ``"auto"`` is the step that CHOCO-SGD finds
(`mpicomp.algorithms.gossip.automatic_step`) times the root of the mean of vtilde over the entries, looked at in every
8th step: an entry of the usual gossip error gets CHOCO's step, one of a larger error less.

The mean over ranks is **not** preserved, because Gamma_i differs from rank to rank. Bias correction and clip are those
of the authors' code (aparna-aketi/AdaG_SGD); the abstract's formula shows neither, and both can be switched off. On a
small problem the trajectories are those of that code (recorded, compared in float64 to 1e-9; its files for graph and
top-k were of related code), with ``start = "zero"``.

``quasi_global_momentum`` (mu > 0) replaces the optimizer's momentum by the realized displacement of the model
(Lin et al. 2021, arXiv 2102.04761, with full replacement as in the authors' code): the optimizer gets
``g_i + mu min(1, 4 lr' / lr) m_i`` in the place of g_i, and after mixing ``m_i = (x_i^t - x_i^{t+1}) / lr`` and
``lr' = lr``, where x_i^t is the model before step t. m keeps its meaning when lr changes. But what the displacement
holds of the mixing does not become less with lr, so that a rate that rises would find m too large. Therefore m moves
the model by at most four times the displacement of which it was formed, and m and lr' stay as they are while lr is
below a hundredth of the largest so far. Groups of parameters with rates of their own are judged by these. That code
divides by every rate, and takes ``--qgm`` with Nesterov's momentum, whose m_i is then not the displacement; that is not
offered here.

Wire: as CHOCO-SGD; v is never sent. Memory: ``xhat``, ``s``, ``v`` and one scratch vector (and ``m``).
Aketi, Hashemi, Roy 2024, arXiv 2404.05919.

In a script:

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    gossip = mpicomp.distribute(model, optimizer, AdaGossip(gamma=2e-3, compressor=TopK(ratio=0.1)), topology=ring)
    loss = gossip.step(lambda: loss_fn(model, batch))
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from mpicomp import kernels
from mpicomp.algorithms.base import (
    Local,
    Phases,
    require_bounded_errors,
    require_fixed_symmetric,
    require_fraction,
    require_positive,
)
from mpicomp.algorithms.gossip.automatic_step import MEASURED_EVERY, Gamma, check_gamma
from mpicomp.algorithms.gossip.base import RegroupingGossip, divisors
from mpicomp.algorithms.gossip.choco import (
    ChocoState,
    Start,
    add_messages_,
    automatic_step,
    compression_error,
    initial_copies,
    renew_copies,
    send_difference,
)
from mpicomp.algorithms.sums.base import require_minimizing
from mpicomp.compression.base import Compressor
from mpicomp.compression.identity import Identity
from mpicomp.errors import ConfigError
from mpicomp.exchange.base import Exchange
from mpicomp.state import OWN
from mpicomp.topology.base import Schedule

LARGEST_RISE = 4.0
"""How many times the displacement of which it was formed a momentum may move the model, where the rate has risen.

A linear warm-up doubles the rate at most.
"""


@dataclass
class AdaGossipState(ChocoState):
    """What a rank keeps beside CHOCO's copies.

    Attributes:
        v: (n,) running second raw moment of the gossip error.
        momentum: (n,) the realized displacement per learning rate, or None without quasi-global momentum.
        largest_lr: of each part of `Local.groups`, the largest learning rate so far; empty without such a momentum.
        rates: of each part, the learning rate at which the momentum was formed, 0 before; empty without.
        t: the number of mixings done.
        scale: with gamma = "auto", the root of the mean of vtilde when it was last looked at.

    """

    v: Tensor
    momentum: Tensor | None
    largest_lr: list[float]
    rates: list[float]
    t: int = 0
    scale: float = field(default=0.0, metadata=OWN)


@dataclass(frozen=True)
class AdaGossip(RegroupingGossip[AdaGossipState]):
    """AdaG-SGD with any optimizer as the local step.

    Attributes:
        gamma: consensus step, > 0, in the unit of a parameter, or ``"auto"``.
        compressor: any contractive compressor.
        beta: decay of the second moment, in [0, 1).
        epsilon: added to the root, > 0.
        bias_correction: whether v is divided by ``1 - beta^t``.
        gamma_clip: the largest step of an entry; infinity switches the clip off.
        quasi_global_momentum: mu in [0, 1); above 0 the optimizer must have no momentum of its own, and `gamma` must be
            a number.
        overlap: as in `Choco`.
        start: as in `Choco`.

    """

    gamma: Gamma
    compressor: Compressor = Identity()
    beta: float = 0.999
    epsilon: float = 1e-8
    bias_correction: bool = True
    gamma_clip: float = 1.0
    quasi_global_momentum: float = 0.0
    overlap: bool = False
    start: Start = "model"

    def __post_init__(self) -> None:
        check_gamma(self.gamma)
        require_positive(epsilon=self.epsilon)
        require_bounded_errors("AdaGossip", self.compressor)
        require_fraction(beta=self.beta, quasi_global_momentum=self.quasi_global_momentum)
        if self.gamma == "auto" and self.quasi_global_momentum:
            raise ConfigError(
                f"algorithm.gamma = 'auto' with algorithm.quasi_global_momentum = {self.quasi_global_momentum} "
                "diverged wherever it was tried. Give algorithm.gamma a number, such as 2e-3, or leave out "
                "quasi_global_momentum and set optimizer.momentum"
            )
        if not self.gamma_clip > 0:
            raise ConfigError(f"algorithm.gamma_clip = {self.gamma_clip} must be > 0; inf switches it off")

    def check(self, schedule: Schedule) -> None:
        """Raise TopologyError unless `schedule` is one undirected graph with symmetric weights."""
        require_fixed_symmetric("AdaGossip", schedule)

    def init(self, local: Local, exchange: Exchange) -> AdaGossipState:
        """Return the public copies as `start` says, and moments of zero.

        Raises:
            ConfigError: quasi-global momentum on top of the optimizer's own, or an optimizer that is to maximize.

        """
        self._require_no_momentum(local)
        if self.quasi_global_momentum:
            require_minimizing("AdaGossip with quasi_global_momentum", local)
        x = local.x
        parts = len(local.groups) if self.quasi_global_momentum else 0
        return AdaGossipState(
            **initial_copies(self.start, self.compressor, local, exchange),
            automatic=automatic_step(self.gamma, self.compressor, local, exchange),
            v=torch.zeros_like(x),
            momentum=torch.zeros_like(x) if self.quasi_global_momentum else None,
            largest_lr=[0.0] * parts,
            rates=[0.0] * parts,
        )

    def phases(self, local: Local, state: AdaGossipState, exchange: Exchange) -> Phases:
        """Do one step in the order of the module's docstring."""
        self._require_no_momentum(local)
        if self.overlap:
            own, pending = send_difference(self.compressor, local, state, exchange)
            yield pending.test
            add_messages_(self.compressor, local, state, exchange, own, pending)
            rates = self._update(local, state)
            self._move(local, state)
        else:
            yield None
            rates = self._update(local, state)
            self.mix(local, state, exchange)
        if state.momentum is not None:
            self._renew_momentum(state.momentum, local, rates)

    def mix(self, local: Local, state: AdaGossipState, exchange: Exchange) -> None:
        """Update the public copies, and move towards those of the neighbors."""
        own, pending = send_difference(self.compressor, local, state, exchange)
        add_messages_(self.compressor, local, state, exchange, own, pending)
        self._move(local, state)

    def regroup_(self, local: Local, state: AdaGossipState, exchange: Exchange) -> None:
        """Make the public copies anew; the moments stay, and the quasi-global momentum begins at zero."""
        renew_copies(self.compressor, self.gamma, local, state, exchange)
        if state.momentum is not None:
            state.momentum.zero_()  # in the midst of a step it is a model

    def check_local_steps(self) -> None:
        """Refuse to overlap, and a momentum that is the displacement by one step and one mixing."""
        super().check_local_steps()
        if self.quasi_global_momentum:
            raise ConfigError(
                f"algorithm.quasi_global_momentum = {self.quasi_global_momentum}: it is made of single steps that are "
                "mixed, and local steps are not. Set it to 0, and optimizer.momentum instead."
            )

    def _require_no_momentum(self, local: Local) -> None:
        """Raise ConfigError if there is quasi-global momentum on top of the optimizer's, which a scheduler may set."""
        if self.quasi_global_momentum and local.momentum:
            raise ConfigError(
                f"algorithm.quasi_global_momentum = {self.quasi_global_momentum} takes the place of the optimizer's "
                f"momentum: optimizer.momentum must be 0, not {local.momentum:g}. If a scheduler sets it, leave that "
                "out: OneCycleLR(..., cycle_momentum=False)"
            )

    def _gamma(self, state: AdaGossipState) -> float:
        """Return the consensus step of now; looks at v in some of the steps if it is automatic."""
        if state.automatic is None:
            return float(self.gamma)
        if state.t and state.t % MEASURED_EVERY == 0:
            correction = 1 - self.beta**state.t if self.bias_correction else 1.0
            state.scale = float((state.v.double().mean() / correction).sqrt())
        return state.automatic.gamma * state.scale

    def _move(self, local: Local, state: AdaGossipState) -> None:
        """From r_i on."""
        gamma = self._gamma(state)
        state.t += 1
        correction = 1 - self.beta**state.t if self.bias_correction else 1.0
        kernels.adaptive_mix_(
            local.x,
            state.s,
            state.x_hat,
            state.v,
            gamma,
            self.beta,
            correction,
            self.epsilon,
            self.gamma_clip,
        )

    def _update(self, local: Local, state: AdaGossipState) -> list[float]:
        """``y_i = x_i - lr u_i``; return the rates by which `_renew_momentum` divides.

        Where there is one, the quasi-global momentum is x_i until the displacement is known.
        """
        rates: list[float] = []
        if state.momentum is not None:
            rates = divisors(local, state.largest_lr)
            if len(state.rates) != len(rates):  # the groups were arranged anew
                state.rates[:] = [float(group["lr"]) for _, group in local.groups]
            for i, (part, group) in enumerate(local.groups):
                lr, most = float(group["lr"]), LARGEST_RISE * state.rates[i]
                m = state.momentum[part]
                local.g[part].add_(m, alpha=self.quasi_global_momentum * (most / lr if lr > most else 1.0))
                if rates[i]:
                    m.copy_(local.x[part])
                    state.rates[i] = rates[i]
        local.update()
        return rates

    def _renew_momentum(self, m: Tensor, local: Local, rates: list[float]) -> None:
        """``m_i = (x_i^t - x_i^{t+1}) / lr``, where there is a rate to divide by; elsewhere m_i stays as it is."""
        for (part, _), lr in zip(local.groups, rates, strict=True):
            if lr:
                m[part].sub_(local.x[part]).div_(lr)

    def diagnostics(self, local: Local, state: AdaGossipState) -> dict[str, float]:
        """Return ``compression_error``, |x - xhat| / |x|, and the ``gamma`` that was found."""
        found = {"compression_error": compression_error(local.x, state.x_hat, state.scratch)}
        return found if state.automatic is None else found | {"gamma": state.automatic.gamma * state.scale}
