"""What EF-SGD and GMC do with what a message leaves out: remember all of it, or LoCo's moving average of it.

    q_k = C(p_k)
    e_k = p_k - q_k                                        error feedback, ``error_average = 0``
    e_k = beta e_k + (1 - beta) (p_k - q_k)                LoCo
    e_k = 0                                                after every T-th message, with ``error_reset_steps = T``

p_k (n,) is what rank k has to say, the sum of e_k and of what is new, x_k = p_k - e_k; C the compressor and q_k the
message; e_k (n,) the error memory, on the right the one from before the message; beta ``error_average``. An error of
few bits is noisy, and its moving average is less so.

Nothing is lost but by a reset. The last line but one is ``e_k + (1 - beta) (x_k - q_k)``, so that ``e_k / (1 - beta)``
is the sum of all x_k less that of all q_k, as the memory of error feedback is: LoCo's message is ``C(x_k + (1 - beta)
r_k)``, where r_k is all that has not been sent (tested against this form, too). So an error is corrected over about
``1 / (1 - beta)`` messages, not by the next one. That slows down a compressor that leaves out much in each message,
such as top-k of 1 %; the method is for quantizers of a few bits.

Traps: some texts call ``1 - beta`` what is beta here and in the authors' code. With beta near 1 hardly any error is
corrected. A reset forgets ``e_k / (1 - beta)``, more than what e_k holds. LoCo has nothing to do with DiLoCo, NoLoCo
and SparseLoCo, whose ``error_decay`` forgets.

Differences from the authors' code (in DeepSpeed): any compressor, where that has 4 bits with a scale for each group,
twice, inside a node and between nodes; e_k has the type of the model, where that keeps it in 8 bits; every rank's whole
memory is reset after T messages, where that counts tensors, not steps, and resets the one tensor at which its count has
passed T. There beta = 0.8 and T = 1024.

``smallest_ratio`` has GraVAC set the ratio of the compressor (see `mpicomp.algorithms.sums.ratio_control`).

Memory: with an average, room for the e_k from before the message, which is not stored. Xie et al. 2024,
arXiv 2407.04480.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol, TypeVar

from torch import Tensor

from mpicomp import kernels
from mpicomp.algorithms.base import Local, require_fraction
from mpicomp.algorithms.sums.base import GradientSum, GradientSumState
from mpicomp.algorithms.sums.ratio_control import RatioControl, RatioState, WithNorms, extended
from mpicomp.compression.base import Compressor
from mpicomp.compression.message import Payload, Spec
from mpicomp.compression.wrap.feedback import ErrorFeedback, FeedbackState
from mpicomp.errors import ConfigError
from mpicomp.exchange.base import Exchange
from mpicomp.exchange.sums.aggregate import PendingAverage
from mpicomp.state import SCRATCH
from mpicomp.timing import timed


@dataclass
class ErrorMemory(FeedbackState):
    """The error memory of a rank, and the state of its compressor.

    Attributes:
        previous: (n,) room for the error memory from before the message; None without an average.
        ratio: the state of the controller of the compressor's ratio; None without one.

    """

    previous: Tensor | None = field(default=None, metadata=SCRATCH)
    ratio: RatioState | None = None


class ErrorMemoryState(GradientSumState, Protocol):
    """What the state of an `ErrorMemorySum` has.

    Attributes:
        feedback: the error memory.

    """

    feedback: ErrorMemory


E = TypeVar("E", bound=ErrorMemoryState)


@dataclass(frozen=True)
class ErrorMemorySum(GradientSum[E]):
    """A sum of messages with an error memory, as above.

    Its `phases` calls `keep_error` while ``state.feedback.residual`` is e_k, forms p_k there, and calls `compress_sum`.

    Attributes:
        error_average: beta in [0, 1), the part of the error memory that stays; 0 is error feedback.
        error_reset_steps: T, the messages from one reset of the error memory to the next; 0 for none.
        smallest_ratio: the least that GraVAC may make of the compressor's ratio, which is the largest; 0: it is fixed.
        ratio_factor: by which it lowers the ratio, in (0, 1).
        ratio_period: messages from one time that it lowers the ratio to the next, a multiple of `gain_window`.
        least_gain: the least part of the norm that messages must carry, in (0, 1]; with less, the ratio is raised.
        gain_window: messages from one look at that to the next.

    """

    error_average: float = field(default=0.0, kw_only=True)
    error_reset_steps: int = field(default=0, kw_only=True)
    smallest_ratio: float = field(default=0.0, kw_only=True)
    ratio_factor: float = field(default=0.5, kw_only=True)
    ratio_period: int = field(default=2000, kw_only=True)
    least_gain: float = field(default=0.75, kw_only=True)
    gain_window: int = field(default=25, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_fraction(error_average=self.error_average)
        if self.error_reset_steps < 0:
            raise ConfigError(
                f"algorithm.error_reset_steps = {self.error_reset_steps} must be at least 1, the messages from one "
                "reset of the error memory to the next, or 0 for none"
            )
        _ = self.control  # raises what is wrong with it

    @cached_property
    def control(self) -> RatioControl | None:
        """The controller of the compressor's ratio; None if that is fixed."""
        if not self.smallest_ratio:
            return None
        window, period = self.gain_window, self.ratio_period
        return RatioControl(self.compressor, self.smallest_ratio, self.ratio_factor, period, self.least_gain, window)

    def init_memory(self, local: Local, exchange: Exchange) -> ErrorMemory:
        """Return an error memory of zero."""
        state = ErrorFeedback(self.compressor).init(local.spec, local.x.device, exchange.rank)
        previous = state.residual.clone() if self.error_average else None
        ratio = self.control.init(local.spec, local.x.device) if self.control else None
        return ErrorMemory(state.residual, state.inner, previous, ratio)

    def init_delayed(self, local: Local, steps: Sequence[int] = (0,)) -> Tensor | None:
        """Return room for the messages of every ratio; None without overlap."""
        if self.control is None:
            return super().init_delayed(local, steps)
        readers = [WithNorms(self.control.at(level)) for level in self.control.levels]
        return self.room_for([reader.layout(extended(local.spec)) for reader in readers], local)

    def reader(self, step: int, local: Local, state: E) -> tuple[Compressor, Spec]:
        """Return what reads the last messages that were made, and the spec of their sum."""
        ratio = state.feedback.ratio
        if self.control is None or ratio is None:
            return super().reader(step, local, state)
        return WithNorms(self.control.at(ratio.level)), extended(local.spec)

    def receive(self, pending: PendingAverage, local: Local, state: E) -> None:
        """Wait for a sum, put it in ``local.g``, and tell the controller the norms that came with it."""
        ratio = state.feedback.ratio
        if self.control is None or ratio is None:
            super().receive(pending, local, state)
            return
        pending.wait(ratio.room)
        local.g.copy_(ratio.room[: local.spec.numel])
        self.control.hear(ratio.room[local.spec.numel :], ratio)

    @timed("compress", is_event=False)
    def keep_error(self, state: E) -> None:
        """Keep e_k for the average."""
        memory = state.feedback
        if memory.previous is not None:
            memory.previous.copy_(memory.residual)

    @timed("compress")
    def compress_sum(self, local: Local, state: E) -> Payload:
        """Return ``q_k = C(p_k)``, and put the next e_k in the place of p_k."""
        memory, spec = state.feedback, local.spec
        if self.control is None or memory.ratio is None:
            q = ErrorFeedback(self.compressor).compress_sum(spec, memory)
        else:
            before = kernels.norm(memory.residual)
            q = ErrorFeedback(self.control.at(memory.ratio.level)).compress_sum(spec, memory)
            q = self.control.attach(q, before, spec, memory.ratio)
        if memory.previous is not None:
            memory.residual.lerp_(memory.previous, self.error_average)
        if self.error_reset_steps and (state.steps + 1) % self.error_reset_steps == 0:
            memory.residual.zero_()
        return q

    def diagnostics(self, local: Local, state: E) -> dict[str, float]:
        """Return ``error_norm``, |e|, and with a controller ``ratio`` and ``gain``."""
        memory = state.feedback
        numbers = {"error_norm": float(memory.residual.norm())}
        if self.control is not None and memory.ratio is not None:
            numbers.update(self.control.numbers(memory.ratio))
        return numbers
