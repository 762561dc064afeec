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

The paper's listing has one MeanSquare. The authors' server (Multiverso) keeps one for each worker, of its gradients;
so does ``mean_square = "worker"``. With M workers, each is then updated M times less often.

The exchange is that of `mpicomp.algorithms.asynchronous.hub`. lambda0 = 0 is ASGD. A gradient that came through a
lossy compressor is corrected as it arrives.

Wire: as ASGD, a gradient up and a model down for each gradient, compressed on request. Memory: at the hubs, one model
for each worker, and one mean square, or one for each worker, for the adaptive variant.

Zheng et al. 2017, arXiv 1609.08326, Algorithms 1 and 2; defaults as in the authors' code.

In a script (``train`` is the loop of a worker, which ends by ``gossip.finish()``):

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gossip = mpicomp.distribute(model, optimizer, DCASGD(TopK(ratio=0.1)), topology=star)
    gossip.serve() if gossip.is_hub else train(gossip)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from mpicomp.algorithms.asynchronous.base import DelayCompensation
from mpicomp.algorithms.asynchronous.hub import HubAlgorithm
from mpicomp.errors import ConfigError

MeanSquare = Literal["common", "worker"]


@dataclass(frozen=True)
class DCASGD(HubAlgorithm):
    """Delay-compensated asynchronous SGD; see `HubAlgorithm` for the other parameters.

    Attributes:
        adaptive: DC-ASGD-a, otherwise DC-ASGD-c.
        lambda0: strength of the correction, >= 0; None is the published one, 2 (a) or 0.04 (c).
        decay: of the mean square, in [0, 1).
        epsilon: added below the root, > 0.
        mean_square: whether it is over the gradients of all workers, ``"common"``, or of each ``"worker"``.

    """

    adaptive: bool = True
    lambda0: float | None = None
    decay: float = 0.95
    epsilon: float = 1e-7
    mean_square: MeanSquare = field(default="common", repr=False)  # checkpoints from before do not name it

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mean_square not in get_args(MeanSquare):
            words = ", ".join(map(repr, get_args(MeanSquare)))
            raise ConfigError(f"algorithm.mean_square = {self.mean_square!r} must be one of {words}")
        _ = self.compensation  # checks the values

    @property
    def compensation(self) -> DelayCompensation:
        """That of the paper, with its strength for the variant unless another is given."""
        published = 2.0 if self.adaptive else 0.04
        lambda0 = published if self.lambda0 is None else self.lambda0
        return DelayCompensation(lambda0, self.adaptive, self.decay, self.epsilon)

    @property
    def keeps_mean_square_of_each_worker(self) -> bool:
        """Whether a mean square is of the gradients of one worker, as in the authors' server."""
        return self.mean_square == "worker"
