"""GraVAC: the ratio of a sparsifier follows from how much of the gradients its messages carry.

    d_k = |p_k|;  c_k = |C_r(p_k)|                         sent with the message, 2 numbers
    D = (1 - alpha) D + sum_k w_k d_k;  G = (1 - alpha) G + sum_k w_k c_k
    after every `gain_window` messages:
        G / D < epsilon                                    r = min(r / s, r_0)
        otherwise, once in `ratio_period` messages         r = max(s r, r_1)
        D = G = 0

p_k (n,) is what rank k has to say, its gradient with all that was left out before; C_r the compressor with the ratio r,
the fraction of entries that it keeps; w_k what rank k counts in the sum; G / D the gain, in (0, 1] for a sparsifier;
alpha = 0.05; epsilon ``least_gain``; s ``ratio_factor``; r_0 ``compression.ratio``, the largest ratio and the first,
and r_1 ``smallest_ratio``. r / s is the ratio from before it was multiplied by s.

The numbers are added up with the messages, so all ranks hold the same D and G and change r in the same step, without a
message more. With ``overlap`` they arrive one step later, as the sums do. Nothing is timed: a run is the same again,
and after a restart.

Traps: the gain of top-k falls with all that is still to be sent, so epsilon must suit the error memory; see ``gain`` in
``metrics.jsonl``. A gain says nothing about the loss. Sums over a relay have ranks wait for the longest message, so all
have one r.

Differences from the paper: it compares times of steps too, and stops to lower the ratio when the best two products of
throughput and gain are near one another; times differ from rank to rank and from run to run, so here r goes on as long
as the gain allows. Where the gain is too small it sends with r_0, or a dense gradient; here r goes back by one factor a
window, and r_0 = 1 is dense. Differences from the authors' code (``sahiltyagi4/GraVAC``): it divides by the norm of the
bare gradient, and sums norms of tensors; it compresses twice in each step, measures the second message by the first
one, and jumps to the smallest ratio at once. The last three look like errors, and are not repeated here.

Wire: 2 numbers of the model's type more a message. Memory: one vector. Tyagi and Swany 2023, arXiv 2305.12201.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mpicomp import kernels
from mpicomp.compression.base import Compressor, Wrapper
from mpicomp.compression.message import Field, Layout, Payload, Spec
from mpicomp.compression.wrap.by_rank import by_rank_of, strength_of, with_strength
from mpicomp.errors import ConfigError
from mpicomp.state import SCRATCH

ALPHA = 0.05
"""What a step counts in the averages; a common factor of both cancels in the gain."""

NUMBERS = 2
KEY = "norms"


@dataclass
class RatioState:
    """What a rank keeps; equal on all ranks.

    Attributes:
        level: how many times the ratio has been lowered.
        messages: how many have been heard of.
        gain: G / D of the last window; 1 before there is one, and where there was nothing to carry.
        norms: (2,) float64, D and G.
        room: (n + 2,) for the sum of the messages, with that of their numbers behind it.

    """

    level: int
    messages: int
    gain: float
    norms: Tensor
    room: Tensor = field(metadata=SCRATCH)


@dataclass(frozen=True)
class RatioControl:
    """The controller of a ratio, which a step asks for its compressor.

    Attributes:
        compressor: its ratio is r_0.
        smallest_ratio: r_1, in (0, r_0].
        ratio_factor: s, in (0, 1).
        ratio_period: messages from one time that the ratio is lowered to the next, a multiple of `gain_window`.
        least_gain: epsilon, in (0, 1].
        gain_window: messages from one look at the gain to the next.

    """

    compressor: Compressor
    smallest_ratio: float
    ratio_factor: float
    ratio_period: int
    least_gain: float
    gain_window: int

    def __post_init__(self) -> None:
        strength = strength_of(self.compressor)
        if by_rank_of(self.compressor):
            raise ConfigError(
                "algorithm.smallest_ratio gives all ranks one ratio, and compression.allocation each its own: set "
                "compression.allocation = 'uniform', or leave out algorithm.smallest_ratio"
            )
        if not (strength and strength[0] == "ratio"):
            raise ConfigError(
                f"algorithm.smallest_ratio: {self.compressor} keeps no fraction of the entries that could change; use "
                "compression.kind = 'topk', or leave out algorithm.smallest_ratio"
            )
        if not 0 < self.smallest_ratio <= strength[1]:
            raise ConfigError(
                f"algorithm.smallest_ratio = {self.smallest_ratio} must be > 0 and at most compression.ratio = "
                f"{strength[1]}, which is the largest ratio and the first one"
            )
        if not 0 < self.ratio_factor < 1:
            raise ConfigError(f"algorithm.ratio_factor = {self.ratio_factor} must be in (0, 1): it lowers the ratio")
        if not 0 < self.least_gain <= 1:
            raise ConfigError(f"algorithm.least_gain = {self.least_gain} must be in (0, 1]: the part that is carried")
        if self.gain_window < 1:
            raise ConfigError(f"algorithm.gain_window = {self.gain_window} must be at least 1 message")
        if self.ratio_period < 1 or self.ratio_period % self.gain_window:
            raise ConfigError(
                f"algorithm.ratio_period = {self.ratio_period} must be a multiple of algorithm.gain_window = "
                f"{self.gain_window}: the gain is looked at when a window is over"
            )

    def init(self, spec: Spec, device: torch.device) -> RatioState:
        """Return the state before the first message."""
        room = torch.zeros(spec.numel + NUMBERS, dtype=spec.dtype, device=device)
        return RatioState(0, 0, 1.0, torch.zeros(NUMBERS, dtype=torch.float64, device=device), room)

    def ratio(self, level: int) -> float:
        """Return the ratio that has been lowered `level` times."""
        is_last = level == self.levels[-1]
        return self.smallest_ratio if is_last else self._largest * self.ratio_factor**level

    def at(self, level: int) -> Compressor:
        """Return the compressor with the ratio that has been lowered `level` times."""
        return with_strength(self.compressor, self.ratio(level))

    @property
    def levels(self) -> range:
        """How many times the ratio can have been lowered."""
        return range(1 + max(0, math.ceil(math.log(self.smallest_ratio / self._largest, self.ratio_factor) - 1e-9)))

    @property
    def _largest(self) -> float:
        strength = strength_of(self.compressor)
        assert strength is not None
        return strength[1]

    def attach(self, payload: Payload, before: Tensor, spec: Spec, state: RatioState) -> Payload:
        """Return the message with d_k, which is `before` (1,), and c_k."""
        sent = state.room[: spec.numel].zero_()
        self.at(state.level).accumulate(payload, spec, sent)
        return {**payload, KEY: torch.cat([before, kernels.norm(sent)]).to(spec.dtype)}

    def hear(self, norms: Tensor, state: RatioState) -> None:
        """Take ``sum_k w_k d_k`` and ``sum_k w_k c_k``, in `norms` (2,); change the ratio at the end of a window."""
        state.norms.mul_(1 - ALPHA).add_(norms)
        state.messages += 1
        if state.messages % self.gain_window == 0:
            had, carried = state.norms.tolist()
            state.gain = carried / had if had else 1.0
            if state.gain < self.least_gain:
                state.level = max(0, state.level - 1)
            elif state.messages % self.ratio_period == 0:
                state.level = min(state.level + 1, self.levels[-1])
            state.norms.zero_()

    def numbers(self, state: RatioState) -> dict[str, float]:
        """Return ``ratio``, r, and ``gain``, of the last window."""
        return {"ratio": self.ratio(state.level), "gain": state.gain}


@dataclass(frozen=True)
class WithNorms(Wrapper):
    """Reads messages that carry numbers (2,), as if they were the last entries of the vector; see `extended`."""

    def layout(self, spec: Spec) -> Layout:
        """Return the layout of `inner`, and the numbers."""
        return Layout((*self.inner.layout(_shortened(spec)).fields, Field(KEY, spec.dtype, NUMBERS)))

    def accumulate(self, payload: Payload, spec: Spec, out: Tensor, weight: float = 1.0) -> None:
        """Add ``weight * Q(x)`` to the first entries of `out`, and the numbers to the last ones."""
        message = {name: tensor for name, tensor in payload.items() if name != KEY}
        self.inner.accumulate(message, _shortened(spec), out[:-NUMBERS], weight)
        out[-NUMBERS:].add_(payload[KEY], alpha=weight)

    def summable(self, payload: Payload) -> Tensor:
        """Return what is to be added up of the message, and the numbers behind it."""
        return torch.cat([self.inner.summable(payload), payload[KEY]])

    def with_sum(self, payload: Payload, total: Tensor) -> Payload:
        """Return a message with `total` in the place of its `summable`."""
        return {**self.inner.with_sum(payload, total[:-NUMBERS]), KEY: total[-NUMBERS:]}


@functools.lru_cache(maxsize=64)
def extended(spec: Spec) -> Spec:
    """Return the spec of a vector with the numbers of a message behind it."""
    return Spec((*spec.names, KEY), (*spec.shapes, (NUMBERS,)), spec.dtype)


@functools.lru_cache(maxsize=64)
def _shortened(spec: Spec) -> Spec:
    return Spec(spec.names[:-1], spec.shapes[:-1], spec.dtype)
