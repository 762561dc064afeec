"""The consensus step that finds itself, ``gamma = "auto"``: as large as what compression leaves out allows.

Training is cut into windows of K steps. In one window the ranks measure; in the next they agree on the least of what
they have measured; at its end all of them change gamma, in the same step.

    gamma = min(0.1 / mu, 1);  delta_i = infinity;  D_i = R_i = A_i = B_i = 0       before the first step
    repeat for t = 0, 1, ...:
        d_i = what rank i would send;  r_i = how far it is from its neighbors;  q_i = C(d_i)
        if 8 divides t:         D_i = D_i + |d_i|^2;  R_i = R_i + |d_i - q_i|^2
                                A_i = A_i + sum_k r_ik^2 min(|q_ik| / |d_ik|, 1);  B_i = B_i + |r_i|^2
        if K divides t:         delta_i = max(1 - R_i / D_i, A_i / B_i / 2), or infinity where D_i = 0
                                D_i = R_i = A_i = B_i = 0
        send q_i and delta_i to every neighbor, receive q_j and delta_j
        delta_i = min(delta_i, delta_j of all neighbors j)
        if K divides t + 1:     gamma = min(delta_i / mu, 1), unless delta_i is infinity

C is the compressor and k an entry. In CHOCO-SGD and what is made of it, d_i is the model minus its public copy, and r_i
the weighted sum of the neighborhood's public copies minus the own one; in DeepSqueeze d_i is the model and the error
memory, and r_i the model, for a rank knows no other; gamma is half as large there, for messages do not vanish where
ranks agree. delta_i is the part of d_i that the messages carried, or the least part that rank i has heard of; mu bounds
``|I - W|_2``, W being the mixing matrix. K is long enough for delta_i to be the same on all ranks at the end of a
window, so that no message more is needed.

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

Why the larger of two: each falls short of the part that matters, in its own way. ``1 - R / D`` is ruled by the largest
entries of d_i. With `sign`, these are the entries that have moved far on all ranks alike and are brought after with one
small step a message; they say 2 % where gossip bears a gamma of 0.67. ``A / B`` asks about the entries in which ranks
differ, and also counts those that are not sent because they are at rest: with top-k it is half of the other. It is
halved because all of it was too much: with `sign`, on a hypercube of 32 ranks with other labels on each, training
diverged after more than ten epochs.

Wire: 4 bytes more a message. Memory and time: of about a million entries, in one step of eight. The rule is this
package's own.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mpicomp.algorithms.base import require_positive
from mpicomp.compression.message import Field, Layout, Payload
from mpicomp.errors import ConfigError, TopologyError
from mpicomp.state import OWN
from mpicomp.topology.base import Schedule, Topology
from mpicomp.topology.spectral import beta

Gamma = float | Literal["auto"]

MEASURED_EVERY = 8
"""Steps from one measurement to the next."""

SAMPLED = 1 << 20
"""The number of entries that are looked at in a measurement, at most."""

SHORTEST_WINDOW = 32
"""The least K, in steps."""

MOST_STEPS = 10_000
"""In which all ranks must have heard of each other."""

FIRST_DELTA = 0.1
"""The delta from which the first gamma is made."""

SMALLEST_DELTA = 1e-4
"""Below it delta is noise of rounding, or of a compressor that is not contractive."""

DELTA_FIELD = "delta"
"""The name of delta_i in a message."""


@dataclass
class AutomaticStep:
    """What a rank keeps.

    Attributes:
        mu: a bound of ``|I - W|_2``, or a multiple of it.
        window: K.
        gamma: the consensus step of now, the same on all ranks.
        step: t, the number of steps done.
        least: (1,) float32, delta_i.
        measured: (4,) float64: D_i, R_i, A_i and B_i.

    """

    mu: float = field(metadata=OWN)
    window: int = field(metadata=OWN)
    gamma: float
    step: int
    least: Tensor = field(metadata=OWN)
    measured: Tensor = field(metadata=OWN)

    @classmethod
    def start(cls, schedule: Schedule, device: torch.device, caution: float = 1.0) -> AutomaticStep:
        """Return the state before the first step on the graphs of `schedule`; gamma is `caution` times smaller."""
        fixed = isinstance(schedule, Topology)
        window = max(SHORTEST_WINDOW, steps_to_all(schedule) * (1 if fixed else 2))
        mu = caution * largest_move(schedule, window)
        least = torch.full((1,), math.inf, device=device)
        return cls(mu, window, min(FIRST_DELTA / mu, 1.0), 0, least, torch.zeros(4, dtype=torch.float64, device=device))

    @property
    def measures(self) -> bool:
        """Whether this step is one of those that are measured."""
        return self.step % MEASURED_EVERY == 0

    def measure(self, wanted: Tensor, left_out: Tensor, apart: Tensor) -> None:
        """Add up the four sums: d_i, ``d_i - q_i`` and r_i, each as `sample` returns it."""
        # 0 / 0: there was nothing to send
        sent = ((wanted - left_out) / wanted).abs().clamp(max=1.0).nan_to_num(nan=1.0)
        weights = apart.square()
        sums = (wanted.square().sum(), left_out.square().sum(), torch.dot(weights, sent), weights.sum())
        self.measured += torch.stack(sums)

    def with_delta(self, payload: Payload) -> Payload:
        """Return a message with delta_i; the first one of a window ends the measurement of the window before."""
        if self.step % self.window == 0:
            differed, left_out, sent, apart = (self.measured[i : i + 1] for i in range(4))
            # 0 / 0: the ranks agreed
            share = torch.maximum(1 - left_out / differed, (sent / apart / 2).nan_to_num(nan=0.0))
            share = share.clamp(min=SMALLEST_DELTA)
            self.least = torch.where(differed > 0, share, torch.full_like(share, math.inf)).float()
            self.measured.zero_()
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


def sample(x: Tensor) -> Tensor:
    """Return a copy of every k-th entry of `x` (n,), at most `SAMPLED` of them, in float64."""
    return x[:: -(-len(x) // SAMPLED)].to(torch.float64, copy=True)


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


def steps_to_all(schedule: Schedule) -> int:
    """Return after how many steps every rank has heard of every other; at most twice as many for a fixed graph.

    For graphs that change, these are the steps from 0 on; where they are drawn at random, later ones may need more.

    Raises:
        TopologyError: graphs that change, in which some rank has still not heard of another after `MOST_STEPS`.

    """
    if isinstance(schedule, Topology):
        return _farthest(schedule.sources) + _farthest(schedule.targets)
    heard = np.eye(schedule.size, dtype=bool)
    for steps in range(MOST_STEPS):
        if heard.all():
            return steps
        sources = schedule(steps).sources
        heard = np.stack([heard[[rank, *sources(rank)]].any(axis=0) for rank in range(schedule.size)])
    raise TopologyError(
        f"topology {schedule.name!r}: after {MOST_STEPS} steps there are ranks of which others have heard nothing, so "
        "that all cannot agree on algorithm.gamma = 'auto'. Give a number."
    )


def largest_move(schedule: Schedule, steps: int) -> float:
    """Return mu; for graphs that change, from the least weight that a rank gives itself in the first `steps`."""
    if schedule.size == 1:
        return 1.0
    if isinstance(schedule, Topology):
        return beta(schedule)
    own = min(schedule(step).weight(rank, rank) for step in range(steps) for rank in range(schedule.size))
    return 2 * (1 - own)


def _farthest(neighbors: Callable[[int], list[int]]) -> int:
    """Return how many edges there are from rank 0 to the rank that is farthest away."""
    distance, waiting = {0: 0}, deque([0])
    while waiting:
        rank = waiting.popleft()
        for other in neighbors(rank):
            if other not in distance:
                distance[other] = distance[rank] + 1
                waiting.append(other)
    return max(distance.values())
