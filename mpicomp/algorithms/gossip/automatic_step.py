"""The automatic consensus step, ``gamma = "auto"``: four fifths of what the public copies bear.

Training is cut into windows of K steps. In one window the ranks measure; in the next they agree on the least of what
they have measured; at its end all of them change gamma, in the same step.

    gamma = min(0.4 delta(z) / mu, 1);  delta_i = infinity;  all sums and means are 0      before the first step
    repeat for t = 0, 1, ...:
        d_i = what rank i would send;  r_i = how far it is from its neighbors;  q_i = C(d_i)
        if 8 divides t:         D_i = D_i + |d_i|^2;   R_i = R_i + |d_i - q_i|^2
                                S_i = S_i + <q_i, d_i>;  Q_i = Q_i + |q_i|^2
                                A_i = A_i + sum_k r_ik^2 min(|q_ik| / |d_ik|, 1);  B_i = B_i + |r_i|^2
        if K divides t:         (p_i, a_i, w_i) = c (p_i, a_i, w_i) + (1 - c) ((1 - R_i / D_i) S_i / Q_i, A_i / B_i, 1)
                                delta_i = max(0.8 p_i, 0.5 a_i) / w_i
                                where D_i = 0 or B_i = 0: the means stay as they are, and delta_i = infinity
                                all sums are 0
        send q_i and delta_i to every neighbor, receive q_j and delta_j
        delta_i = min(delta_i, delta_j of all neighbors j)
        if K divides t + 1:     gamma = min(delta_i / mu, 1), unless delta_i is infinity

    mu = 1 - min_i W_ii;  twice that if all ranks leave out the same entries, as with random-k and random blocks
    c = 2^(-K / 128):  windows of 128 steps ago count half
    delta(z) = (1 - |z - C(z)|^2 / |z|^2) <C(z), z> / |C(z)|^2 of a vector z of normal numbers, the same on all ranks;
               0.1 where C is not contractive

C is the compressor, k an entry and W the mixing matrix. In CHOCO-SGD and what is made of it, d_i is the model minus its
public copy, and r_i the weighted sum of the neighborhood's public copies minus the own one. In DeepSqueeze d_i is the
model and the error memory, and r_i the model, for a rank knows no other; mu is twice as large there, for messages do
not vanish where ranks agree. K is long enough for delta_i to be the same on all ranks at the end of a window, so that
no message more is needed.

A rank on which nothing differed has measured nothing: it sends infinity, so the minimum over the ranks ignores it. So
it is in the first window where the public copies are still the models, with ``overlap`` or a learning rate of 0. If no
rank has measured anything, gamma stays as it is. It does so, too, in what is left of a window when a run goes on with
another number of ranks.

Why: take one mode of W, with eigenvalue 1 - m. Mixing moves x by ``-gamma m xhat`` and a message moves xhat by q, with
the mean ``<q, d> = s |d|^2``. If the lengths of xhat and of ``d = x - xhat`` stay the same,

    |xhat + q|^2 = |xhat|^2                             gives   <xhat, d> = -|q|^2 / (2 s)
    |d - q|^2 - 2 gamma m <xhat, d> = |d|^2             gives   gamma m = (1 - |d - q|^2 / |d|^2) s |d|^2 / |q|^2

and with a larger gamma, d grows. The right-hand side is delta: the ratio for random-k, the part of the squares that it
carries for top-k, and 1.3 to 1.4 times that for QSGD of 4 bits. Ranks that choose their entries by themselves spread
what they leave out over all modes, so that m is ``1 - W_ii``, of the rank where it is largest. If all leave out the
same entries, each mode keeps its own, and m is ``|I - W|_2``, up to twice as large. delta is measured in training and
not a constant of the compressor: top-k of 1 % carries 4 to 14 % of the squares, by how unequal the entries are, and
less later in a run than at its start. It is a mean over windows because few of the entries hold most of the squares, so
that with random-k the least of one window's, over all ranks, is a fraction of the ratio.

Why the larger of two: the squares are ruled by the largest entries of d_i. With `sign`, these are the entries that have
moved far on all ranks alike and are brought after with one small step a message; they say 2 % where gossip bears a
gamma of 0.67. ``A / B`` asks about the entries in which ranks differ, and also counts those that are not sent because
they are at rest: with top-k it is half of the other. Half of it is taken, by trial. A quarter was too little: with
`sign` the ranks drifted apart, and the farther they were, the less of it there was.

Why not a small first gamma: with `sign`, ranks drift apart in the first 30 steps, entries in which they are far apart
are brought together by one small step a message, and gamma stays small for it. The normal numbers have 0.64 for `sign`;
for top-k of 10 and 1 % they have 0.44 and 0.085, up to twice what training has, so gamma begins with half.

Wire: 4 bytes more a message. Memory and time: of 32,768 entries at most, in one step of eight, others each time; of one
message more, and two vectors, before the first step. The rule is this package's own; ``docs/studies/automatic_step.md``
has what it is worth.
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
from mpicomp.compression.base import Compressor
from mpicomp.compression.message import Field, Layout, Payload, Spec
from mpicomp.compression.wrap.by_rank import by_rank_of
from mpicomp.errors import ConfigError, TopologyError
from mpicomp.state import OWN
from mpicomp.topology.base import Schedule, Topology

Gamma = float | Literal["auto"]

MEASURED_EVERY = 8
"""Steps from one measurement to the next."""

SAMPLED = 1 << 15
"""The number of entries that are looked at in a measurement, at most."""

SHORTEST_WINDOW = MEASURED_EVERY
"""The least K, in steps: a window has a measurement."""

HALF_LIFE = 128
"""The age, in steps, of the measurements that count half in a mean."""

TAKEN = 0.8
"""The part of the limit p that is taken; half of that part at first."""

TAKEN_OF_APART = 0.5
"""The part that is taken of the share a, of the entries in which ranks differ."""

MOST_STEPS = 10_000
"""The number of steps in which all ranks must have heard of each other."""

FIRST_DELTA = 0.1
"""The delta from which the first gamma is made, of compressors that are not contractive."""

SMALLEST_DELTA = 1e-4
"""Below it delta is noise of rounding, or of a compressor that is not contractive."""

DELTA_FIELD = "delta"
"""The name of delta_i in a message."""


@dataclass
class AutomaticStep:
    """What a rank keeps.

    Attributes:
        mu: what delta is divided by.
        window: K.
        gamma: the consensus step of now, the same on all ranks.
        step: t, the number of steps done.
        least: (1,) float32, delta_i.
        measured: (6,) float64: D_i, R_i, S_i, Q_i, A_i and B_i.
        means: (3,) float64: p_i, a_i and w_i.

    """

    mu: float = field(metadata=OWN)
    window: int = field(metadata=OWN)
    gamma: float
    step: int
    least: Tensor = field(metadata=OWN)
    measured: Tensor = field(metadata=OWN)
    means: Tensor = field(metadata=OWN)

    @classmethod
    def start(
        cls, schedule: Schedule, compressor: Compressor, spec: Spec, device: torch.device, caution: float = 1.0
    ) -> AutomaticStep:
        """Return the state before the first step.

        Args:
            schedule: the graph, or those of all steps.
            compressor: of the messages.
            spec: of the model.
            device: of the model.
            caution: how many times smaller gamma is than for public copies.

        """
        fixed = isinstance(schedule, Topology)
        window = max(SHORTEST_WINDOW, steps_to_all(schedule) * (1 if fixed else 2))
        mu = caution * largest_move(schedule, window) * (2 if compressor.leaves_out_same_entries else 1)
        delta = delta_of_normal_numbers(compressor, spec, device) if compressor.is_contractive else FIRST_DELTA
        least = torch.full((1,), math.inf, device=device)
        measured, means = (torch.zeros(n, dtype=torch.float64, device=device) for n in (6, 3))
        return cls(mu, window, min(TAKEN / 2 * delta / mu, 1.0), 0, least, measured, means)

    @property
    def measures(self) -> bool:
        """Whether this step is one of those that are measured."""
        return self.step % MEASURED_EVERY == 0

    def sample(self, x: Tensor) -> Tensor:
        """Return a copy of every k-th entry of `x` (n,), at most `SAMPLED` of them, in float64; others each time."""
        every = max(1, -(-len(x) // SAMPLED))  # a rank of a node may have no part of a small model
        return x[self.step // MEASURED_EVERY % every :: every].to(torch.float64, copy=True)

    def measure(self, wanted: Tensor, left_out: Tensor, apart: Tensor) -> None:
        """Add up the sums of d_i, ``d_i - q_i`` and r_i, each as `sample` returns it."""
        q = wanted - left_out
        sent = (q / wanted).abs().clamp(max=1.0).nan_to_num(nan=1.0)  # 0 / 0: there was nothing to send
        weights = apart.square()
        pairs = ((wanted, wanted), (left_out, left_out), (q, wanted), (q, q), (weights, sent))
        self.measured += torch.stack([*(torch.dot(a, b) for a, b in pairs), weights.sum()])

    def with_delta(self, payload: Payload) -> Payload:
        """Return a message with delta_i; the first one of a window ends the measurement of the window before."""
        if self.step % self.window == 0:
            differed, left_out, along, squares, sent, apart = self.measured
            limit = ((1 - left_out / differed) * along / squares).nan_to_num(nan=0.0)  # 0 / 0: nothing sent
            now = torch.stack([limit, sent / apart, torch.ones_like(limit)])
            has_measured = (differed > 0) & (apart > 0)
            means = torch.lerp(now, self.means, 0.5 ** (self.window / HALF_LIFE))
            self.means = torch.where(has_measured, means, self.means)
            delta = torch.maximum(TAKEN * means[0], TAKEN_OF_APART * means[1]) / means[2]
            delta = delta.clamp(min=SMALLEST_DELTA)
            self.least = torch.where(has_measured, delta, torch.full_like(delta, math.inf)).float().reshape(1)
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


def delta_of_normal_numbers(compressor: Compressor, spec: Spec, device: torch.device) -> float:
    """Return delta(z) for a vector z of `spec`, in two digits: the same on devices that round differently.

    Of a compressor for each rank, it is that of the one that sends the least.
    """
    if not spec.numel:
        return 1.0
    if by_rank := by_rank_of(compressor):
        return min(delta_of_normal_numbers(each, spec, device) for each in set(by_rank.compressors))
    few = torch.randn(min(spec.numel, SAMPLED), generator=torch.Generator().manual_seed(0)).to(device, spec.dtype)
    z = few.repeat(-(-spec.numel // len(few)))[: spec.numel]
    left_out = z.clone()
    compressor.accumulate(compressor.compress(z, spec, compressor.init(spec, device)), spec, left_out, -1.0)
    whole, left, along = (torch.dot(a, b).double() for a, b in ((z, z), (left_out, left_out), (left_out, z)))
    delta = (1 - left / whole) * (whole - along) / (whole - 2 * along + left)
    return float(f"{max(float(delta.nan_to_num(nan=0.0)), SMALLEST_DELTA):.2g}")


def check_gamma(gamma: Gamma) -> None:
    """Raise ConfigError unless `gamma` is a finite number > 0, or ``"auto"``."""
    if isinstance(gamma, str):
        if gamma != "auto":
            raise ConfigError(f"algorithm.gamma = {gamma!r} must be a number > 0, or 'auto'")
    else:
        require_positive(gamma=gamma)


def without_delta(payload: Payload) -> Payload:
    """Return a message as its compressor made it."""
    return {name: tensor for name, tensor in payload.items() if name != DELTA_FIELD}


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
    """Return ``1 - min_i W_ii`` of a graph, or of those of the first `steps`; 1/2 for a single rank."""
    if schedule.size == 1:
        return 0.5
    graphs = [schedule] if isinstance(schedule, Topology) else [schedule(step) for step in range(steps)]
    return 1 - min(graph.weight(rank, rank) for graph in graphs for rank in range(graph.size))


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
