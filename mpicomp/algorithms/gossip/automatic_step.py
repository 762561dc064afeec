"""The consensus step that finds itself, ``gamma = "auto"``: as large as what compression leaves out allows.

Training is cut into windows of K steps. In one window the ranks measure; in the next they agree on the least of what
they have measured; at its end all of them change gamma, in the same step.

    gamma = min(0.01 / mu, 1);  delta_i = infinity;  D_i = R_i = 0      before the first step
    repeat for t = 0, 1, ...:
        if 8 divides t:         D_i = D_i + |x_i - xhat_i|^2
        q_i = C(x_i - xhat_i)
        if 8 divides t:         R_i = R_i + |x_i - xhat_i - q_i|^2
        if K divides t:         delta_i = 1 - R_i / D_i, or infinity where D_i = 0;  D_i = R_i = 0
        send q_i and delta_i to every neighbor, receive q_j and delta_j
        delta_i = min(delta_i, delta_j of all neighbors j)
        if K divides t + 1:     gamma = min(delta_i / mu, 1), unless delta_i is infinity

x_i is the model of rank i after its local step, xhat_i its public copy, C the compressor and q_i the message; D_i is
what differed in the steps that are measured, R_i what the messages left out of it, and delta_i the part that they
carried, or the least part that rank i has heard of; mu = 1 - the least eigenvalue of the mixing matrix W. K is at least
the diameter of the graph, so that at the end of a window delta_i is the same on all ranks, and no message more was
needed.

A rank on which nothing differed has measured nothing: it sends infinity, which leaves the word to the others. So it is
in the first window where the public copies are still the models, with ``overlap`` or a learning rate of 0. If no rank
has measured anything, gamma stays as it is. It does so, too, in what is left of a window when a run goes on with
another number of ranks.

Why: public copies follow the models with a lag of about 1 / delta steps. For a mode of W with eigenvalue 1 - m, mixing
and lag together are the oscillator ``x' = -gamma m xhat``, ``xhat' = delta (x - xhat)``, whose damping ratio is
``sqrt(delta / (gamma m)) / 2``. With gamma = delta / mu no mode is damped by less than one half. A smaller step mixes
slower than it could, and a larger one lets the copies overshoot, in the end without bound. delta is measured in
training and not a constant of the compressor: top-k of 1 % carries 4 to 14 % of a difference, by how unequal its
entries are, and less later in a run than at its start.

Wire: 4 bytes more a message. Memory: none to speak of. The rule is this package's own; the study of AdaGossip has its
figures.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from mpicomp import kernels
from mpicomp.algorithms.base import require_positive
from mpicomp.compression.message import Field, Layout, Payload
from mpicomp.errors import ConfigError
from mpicomp.state import OWN
from mpicomp.topology.base import Topology
from mpicomp.topology.spectral import extreme_eigenvalues

Gamma = float | Literal["auto"]

MEASURED_EVERY = 8
"""Steps from one measurement to the next: it reads the model twice."""

SHORTEST_WINDOW = 32
"""The least K, in steps."""

FIRST_DELTA = 0.01
"""The delta from which the first gamma is made."""

SMALLEST_DELTA = 1e-4
"""Below it delta is noise of rounding, or of a compressor that is not contractive."""

DELTA_FIELD = "delta"
"""The name of delta_i in a message."""


@dataclass
class AutomaticStep:
    """What a rank keeps.

    Attributes:
        mu: 1 - the least eigenvalue of the mixing matrix.
        window: K.
        gamma: the consensus step of now, the same on all ranks.
        step: t, the number of steps done.
        least: (1,) float32, delta_i.
        carried: (2,) float64, D_i and R_i.

    """

    mu: float = field(metadata=OWN)
    window: int = field(metadata=OWN)
    gamma: float
    step: int
    least: Tensor = field(metadata=OWN)
    carried: Tensor = field(metadata=OWN)

    @classmethod
    def start(cls, topology: Topology, device: torch.device) -> AutomaticStep:
        """Return the state before the first step on `topology`."""
        mu = 1 - extreme_eigenvalues(topology)[1] if topology.size > 1 else 1.0
        window = max(SHORTEST_WINDOW, 2 * eccentricity(topology))  # of rank 0; the diameter is at most twice as long
        least = torch.full((1,), math.inf, device=device)
        return cls(mu, window, min(FIRST_DELTA / mu, 1.0), 0, least, torch.zeros(2, dtype=torch.float64, device=device))

    @property
    def measures(self) -> bool:
        """Whether this step is one of those that are measured."""
        return self.step % MEASURED_EVERY == 0

    def measure_difference(self, x: Tensor, x_hat: Tensor) -> None:
        """``D_i += |x - xhat|^2``, before the message is added to xhat; all (n,)."""
        self.carried[0] += _squared_distance(x, x_hat)

    def measure_left_out(self, x: Tensor, x_hat: Tensor) -> None:
        """``R_i += |x - xhat|^2``, when xhat holds the message; all (n,)."""
        self.carried[1] += _squared_distance(x, x_hat)

    def with_delta(self, payload: Payload) -> Payload:
        """Return a message with delta_i; the first one of a window ends the measurement of the window before."""
        if self.step % self.window == 0:
            differed, left_out = self.carried[:1], self.carried[1:]
            share = (1 - left_out / differed).clamp(min=SMALLEST_DELTA)
            self.least = torch.where(differed > 0, share, torch.full_like(share, math.inf)).float()
            self.carried.zero_()
        return {**payload, DELTA_FIELD: self.least}

    def hear(self, payloads: Iterable[Payload]) -> None:
        """Take the least delta of the neighbors' messages; ends the step, and a window in its last one."""
        for payload in payloads:
            self.least = torch.minimum(self.least, payload[DELTA_FIELD].to(self.least.device))
        self.step += 1
        if self.step % self.window == 0:
            delta = float(self.least)
            if delta < math.inf:
                self.gamma = min(delta / self.mu, 1.0)


def check_gamma(gamma: Gamma) -> None:
    """Raise ConfigError unless `gamma` is a finite number > 0, or ``"auto"``."""
    if isinstance(gamma, str):
        if gamma != "auto":
            raise ConfigError(f"algorithm.gamma = {gamma!r} must be a number > 0, or 'auto'")
    else:
        require_positive(gamma=gamma)


def layout_with_delta(layout: Layout) -> Layout:
    """Return the layout of messages that carry a delta."""
    return Layout((*layout.fields, Field(DELTA_FIELD, torch.float32, 1)))


def eccentricity(topology: Topology) -> int:
    """Return how many edges there are from rank 0 to the rank that is farthest away."""
    distance, waiting = {0: 0}, deque([0])
    while waiting:
        rank = waiting.popleft()
        for source in topology.sources(rank):
            if source not in distance:
                distance[source] = distance[rank] + 1
                waiting.append(source)
    return max(distance.values())


def _squared_distance(x: Tensor, x_hat: Tensor) -> Tensor:
    """Return |x - xhat|^2 as a float64 scalar."""
    return kernels.norm(x - x_hat).double().square().reshape(())
