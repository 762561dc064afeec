"""The consensus step that finds itself, ``gamma = "auto"``: as large as what compression leaves out allows.

    every 8th step:   D_i = D_i + |x_i - xhat_i|^2;  R_i = R_i + |x_i - xhat_i - q_i|^2
    every K steps:    delta_i = 1 - R_i / D_i, what the messages of these steps carried of the differences
    in the next K:    every message has the least delta that its sender knows of, and its receiver keeps the lesser one,
                      so that all ranks come to know delta = min_i delta_i
    then, on all:     gamma = min(delta / mu, 1),   mu = 1 - the least eigenvalue of W

x_i is the model of rank i after its local step, xhat_i its public copy, q_i its message and W the mixing matrix; K is
at least the diameter of the graph, so the ranks agree without a message more and change gamma in the same step.

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

SHORTEST = 32
"""The least number of steps from one gamma to the next."""

UNKNOWN = 0.01
"""The delta before the first one is agreed upon."""

LEAST = 1e-4
"""Below it delta is noise of rounding, or of a compressor that is not contractive."""

KEY = "delta"


@dataclass
class AutomaticStep:
    """What a rank keeps.

    Attributes:
        mu: 1 - the least eigenvalue of the mixing matrix.
        window: K.
        gamma: the consensus step of now, the same on all ranks.
        step: the number of steps done.
        least: (1,) float32, the least delta of this window that the rank knows of.
        carried: (2,) float64, D_i and R_i of this window.

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
        window = max(SHORTEST, 2 * eccentricity(topology))  # of rank 0; the diameter is at most twice as long
        least = torch.full((1,), UNKNOWN, device=device)
        return cls(mu, window, min(UNKNOWN / mu, 1.0), 0, least, torch.zeros(2, dtype=torch.float64, device=device))

    @property
    def measures(self) -> bool:
        """Whether this step is one of those that are measured."""
        return self.step % MEASURED_EVERY == 0

    def measure(self, place: Literal[0, 1], x: Tensor, x_hat: Tensor) -> None:
        """Add ``|x - xhat|^2`` to D_i (`place` 0, before the message) or R_i (1, after it)."""
        self.carried[place] += kernels.norm(x - x_hat).double().square().reshape(())

    def attached(self, payload: Payload) -> Payload:
        """Return a message with the least delta; begins a window in its first step."""
        if self.step % self.window == 0:
            differed, left_out = self.carried[:1], self.carried[1:]
            share = (1 - left_out / differed).clamp(min=LEAST)
            self.least = torch.where(differed > 0, share, torch.ones_like(share)).float()  # 1: nothing has moved
            self.carried.zero_()
        return {**payload, KEY: self.least}

    def hear(self, payloads: Iterable[Payload]) -> None:
        """Take the least delta of the neighbors' messages; ends the step, and a window in its last one."""
        for payload in payloads:
            self.least = torch.minimum(self.least, payload[KEY].to(self.least.device))
        self.step += 1
        if self.step % self.window == 0:
            self.gamma = min(float(self.least) / self.mu, 1.0)


def check_gamma(gamma: Gamma) -> None:
    """Raise ConfigError unless `gamma` is a finite number > 0, or ``"auto"``."""
    if isinstance(gamma, str):
        if gamma != "auto":
            raise ConfigError(f"algorithm.gamma = {gamma!r} must be a number > 0, or 'auto'")
    else:
        require_positive(gamma=gamma)


def layout_with_delta(layout: Layout) -> Layout:
    """Return the layout of messages that carry a delta."""
    return Layout((*layout.fields, Field(KEY, torch.float32, 1)))


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
