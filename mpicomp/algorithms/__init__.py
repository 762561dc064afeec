"""WHEN: one method per file; no MPI, no model."""

from mpicomp.algorithms.adagossip import AdaGossip
from mpicomp.algorithms.asgd import ASGD
from mpicomp.algorithms.asynchronous import AnyAlgorithm, AsynchronousAlgorithm
from mpicomp.algorithms.base import Algorithm, Local
from mpicomp.algorithms.choco import Choco
from mpicomp.algorithms.dc_asgd import DCASGD
from mpicomp.algorithms.dc_gossip import DCGossip
from mpicomp.algorithms.deep_squeeze import DeepSqueeze
from mpicomp.algorithms.dgc import DGC
from mpicomp.algorithms.dpsgd import DPSGD
from mpicomp.algorithms.ef_sgd import EFSGD
from mpicomp.algorithms.efficient_adam import EfficientAdam
from mpicomp.algorithms.gmc import GMC
from mpicomp.algorithms.local_sgd import LocalSGD
from mpicomp.algorithms.onebit_adam import OneBitAdam
from mpicomp.algorithms.powersgd import PowerSGD
from mpicomp.algorithms.sgd import SGD
from mpicomp.algorithms.ssgd import SSGD

ALGORITHMS: dict[str, type] = {
    "sgd": SGD,
    "local_sgd": LocalSGD,
    "ssgd": SSGD,
    "dpsgd": DPSGD,
    "choco": Choco,
    "adagossip": AdaGossip,
    "deep_squeeze": DeepSqueeze,
    "ef_sgd": EFSGD,
    "gmc": GMC,
    "dgc": DGC,
    "efficient_adam": EfficientAdam,
    "onebit_adam": OneBitAdam,
    "powersgd": PowerSGD,
    "asgd": ASGD,
    "dc_asgd": DCASGD,
    "dc_gossip": DCGossip,
}
"""The values of ``algorithm.kind``."""

__all__ = [
    "ALGORITHMS",
    "ASGD",
    "DCASGD",
    "DGC",
    "DPSGD",
    "EFSGD",
    "GMC",
    "SGD",
    "SSGD",
    "AdaGossip",
    "Algorithm",
    "AnyAlgorithm",
    "AsynchronousAlgorithm",
    "Choco",
    "DCGossip",
    "DeepSqueeze",
    "EfficientAdam",
    "Local",
    "LocalSGD",
    "OneBitAdam",
    "PowerSGD",
]
