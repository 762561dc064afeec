"""DC-ASGD: asynchronous SGD whose hubs correct each gradient for how far the model has moved meanwhile.

    worker m:   g = gradient at its model;  send it
    hub:        on a gradient g of worker m, with b_m the model that m has computed it at:
                  constant (DC-ASGD-c):  lambda_t = lambda0
                  adaptive (DC-ASGD-a):  MeanSquare = decay MeanSquare + (1 - decay) g g
                                         lambda_t = lambda0 / sqrt(MeanSquare + epsilon)
                  w = w - lr (g + lambda_t g g (w - b_m))              elementwise
                  send w to m;  b_m = w

The exchange, compressed on request, is that of `mpicomp.algorithms.asynchronous.hub`; the wire is that of ASGD.
Memory at the hubs: one model for each worker, and one mean square for the adaptive variant. lambda0 = 0 is ASGD. A
gradient that came through a lossy compressor is corrected as it arrives.

Zheng et al. 2017, arXiv 1609.08326, Algorithms 1 and 2; defaults as in the authors' code.
"""

from __future__ import annotations

from dataclasses import dataclass

from mpicomp.algorithms.asynchronous.base import DelayCompensation
from mpicomp.algorithms.asynchronous.hub import HubAlgorithm


@dataclass(frozen=True)
class DCASGD(HubAlgorithm):
    """Delay-compensated asynchronous SGD; see `HubAlgorithm` for the other parameters.

    Attributes:
        adaptive: DC-ASGD-a, otherwise DC-ASGD-c.
        lambda0: strength of the correction, >= 0; None is the published one, 2 (a) or 0.04 (c).
        decay: of the mean square, in [0, 1).
        epsilon: added below the root, > 0.

    """

    adaptive: bool = True
    lambda0: float | None = None
    decay: float = 0.95
    epsilon: float = 1e-7

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.compensation  # checks the values

    @property
    def compensation(self) -> DelayCompensation:
        """That of the paper, with its strength for the variant unless another is given."""
        published = 2.0 if self.adaptive else 0.04
        lambda0 = published if self.lambda0 is None else self.lambda0
        return DelayCompensation(lambda0, self.adaptive, self.decay, self.epsilon)
