"""DC-ASGD: asynchronous SGD whose hubs correct each gradient for how far the model has moved meanwhile.

    worker m:   g = grad F_m(w_m);  send g;  w_m = the answer
    hub:        on a gradient g of worker m, which was computed at the model b_m:
                  constant (DC-ASGD-c):  lambda_t = lambda0
                  adaptive (DC-ASGD-a):  MeanSquare = decay MeanSquare + (1 - decay) g g
                                         lambda_t = lambda0 / sqrt(MeanSquare + epsilon)
                  w = w - lr u(g + lambda_t g g (w - b_m))              elementwise
                  send w to m;  b_m = w

w is the model of the hub and w_m that of worker m; b_m the copy of w_m that the hub keeps; F_m the loss of the batch of
worker m; MeanSquare (n,) is over the gradients of all workers; lr the learning rate; u() the direction that the hub's
optimizer makes of the corrected gradient. lambda0, decay and epsilon are parameters.

The exchange is that of `mpicomp.algorithms.asynchronous.hub`. lambda0 = 0 is ASGD. A gradient that came through a
lossy compressor is corrected as it arrives.

Wire: as ASGD, a gradient up and a model down for each gradient, compressed on request. Memory: at the hubs, one model
for each worker, and one mean square for the adaptive variant.

Zheng et al. 2017, arXiv 1609.08326, Algorithms 1 and 2; defaults as in the authors' code.

In a script (``train`` is the loop of a worker, which ends by ``gossip.finish()``):

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gossip = mpicomp.distribute(model, optimizer, DCASGD(TopK(ratio=0.1)), topology=star)
    gossip.serve() if gossip.is_hub else train(gossip)
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
