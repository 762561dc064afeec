"""ASGD: hubs apply the gradients of the workers as they come, however late.

    worker m:   g = grad F_m(w_m);  send g;  w_m = the answer
    hub:        on a gradient g of worker m:  w = w - lr u(g);  send w to m

w is the model of the hub and w_m that of worker m, the one that the hub had when it answered m last; F_m the loss of
the batch of worker m; lr the learning rate; u(g) the direction that the hub's optimizer makes of g.

The exchange is that of `mpicomp.algorithms.asynchronous.hub`. Wire: a gradient up and a model down for each
gradient, compressed on request. Memory: at the hubs, one model for each worker. Dean et al. 2012 (DistBelief); the
control of DC-ASGD.

In a script (``train`` is the loop of a worker, which ends by ``gossip.finish()``):

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gossip = mpicomp.distribute(model, optimizer, ASGD(), topology=star)
    gossip.serve() if gossip.is_hub else train(gossip)
"""

from __future__ import annotations

from dataclasses import dataclass

from mpicomp.algorithms.asynchronous.hub import HubAlgorithm


@dataclass(frozen=True)
class ASGD(HubAlgorithm):
    """Asynchronous SGD; see `HubAlgorithm` for its parameters."""
