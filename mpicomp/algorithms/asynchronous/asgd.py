"""ASGD: hubs apply the gradients of the workers as they come, however late.

    hub:  on a gradient g of worker m:  w = w - lr g;  send w to m

The exchange is that of `mpicomp.algorithms.asynchronous.hub`. Wire: a gradient up and a model down for each
gradient, compressed on request. Dean et al. 2012 (DistBelief); the control of DC-ASGD.
"""

from __future__ import annotations

from dataclasses import dataclass

from mpicomp.algorithms.asynchronous.hub import HubAlgorithm


@dataclass(frozen=True)
class ASGD(HubAlgorithm):
    """Asynchronous SGD; see `HubAlgorithm` for its parameters."""
