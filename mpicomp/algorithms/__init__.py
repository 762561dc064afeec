"""Training methods: when a rank computes, and when it exchanges messages. One method a file; no MPI, no model."""

from mpicomp.algorithms.asynchronous.ad_psgd import ADPSGD
from mpicomp.algorithms.asynchronous.asgd import ASGD
from mpicomp.algorithms.asynchronous.base import AnyAlgorithm, AsynchronousAlgorithm
from mpicomp.algorithms.asynchronous.dc_asgd import DCASGD
from mpicomp.algorithms.asynchronous.dc_gossip import DCGossip
from mpicomp.algorithms.base import Algorithm, Local
from mpicomp.algorithms.gossip.adagossip import AdaGossip
from mpicomp.algorithms.gossip.base import Gossip
from mpicomp.algorithms.gossip.choco import Choco
from mpicomp.algorithms.gossip.deep_squeeze import DeepSqueeze
from mpicomp.algorithms.gossip.def_atc import DEFATC
from mpicomp.algorithms.gossip.diloco import DiLoCo
from mpicomp.algorithms.gossip.dpsgd import DPSGD
from mpicomp.algorithms.gossip.lead import LEAD
from mpicomp.algorithms.gossip.local_sgd import LocalSGD
from mpicomp.algorithms.gossip.motef import MoTEF
from mpicomp.algorithms.gossip.noloco import NoLoCo
from mpicomp.algorithms.gossip.power_gossip import PowerGossip
from mpicomp.algorithms.gossip.sgp import SGP
from mpicomp.algorithms.sgd import SGD
from mpicomp.algorithms.sums.demo import DeMo
from mpicomp.algorithms.sums.dgc import DGC
from mpicomp.algorithms.sums.ef_sgd import EFSGD
from mpicomp.algorithms.sums.efficient_adam import EfficientAdam
from mpicomp.algorithms.sums.fedadam_ssm import FedAdamSSM
from mpicomp.algorithms.sums.gmc import GMC
from mpicomp.algorithms.sums.onebit_adam import OneBitAdam
from mpicomp.algorithms.sums.powersgd import PowerSGD
from mpicomp.algorithms.sums.sketched_amsgrad import SketchedAMSGrad
from mpicomp.algorithms.sums.sparse_loco import SparseLoCo
from mpicomp.algorithms.sums.ssgd import SSGD
from mpicomp.algorithms.sums.streaming_diloco import StreamingDiLoCo

ALGORITHMS: dict[str, type] = {
    "sgd": SGD,
    "local_sgd": LocalSGD,
    "diloco": DiLoCo,
    "streaming_diloco": StreamingDiLoCo,
    "noloco": NoLoCo,
    "sparse_loco": SparseLoCo,
    "fedadam_ssm": FedAdamSSM,
    "ssgd": SSGD,
    "dpsgd": DPSGD,
    "choco": Choco,
    "adagossip": AdaGossip,
    "deep_squeeze": DeepSqueeze,
    "def_atc": DEFATC,
    "motef": MoTEF,
    "lead": LEAD,
    "sgp": SGP,
    "power_gossip": PowerGossip,
    "ef_sgd": EFSGD,
    "gmc": GMC,
    "dgc": DGC,
    "demo": DeMo,
    "efficient_adam": EfficientAdam,
    "onebit_adam": OneBitAdam,
    "sketched_amsgrad": SketchedAMSGrad,
    "powersgd": PowerSGD,
    "asgd": ASGD,
    "dc_asgd": DCASGD,
    "dc_gossip": DCGossip,
    "ad_psgd": ADPSGD,
}
"""The values of ``algorithm.kind``."""

GOSSIP: dict[str, type] = {kind: algorithm for kind, algorithm in ALGORITHMS.items() if issubclass(algorithm, Gossip)}
"""The values of ``algorithm.inner``."""

__all__ = [
    "ADPSGD",
    "ALGORITHMS",
    "ASGD",
    "DCASGD",
    "DEFATC",
    "DGC",
    "DPSGD",
    "EFSGD",
    "GMC",
    "GOSSIP",
    "LEAD",
    "SGD",
    "SGP",
    "SSGD",
    "AdaGossip",
    "Algorithm",
    "AnyAlgorithm",
    "AsynchronousAlgorithm",
    "Choco",
    "DCGossip",
    "DeMo",
    "DeepSqueeze",
    "DiLoCo",
    "EfficientAdam",
    "FedAdamSSM",
    "Gossip",
    "Local",
    "LocalSGD",
    "MoTEF",
    "NoLoCo",
    "OneBitAdam",
    "PowerGossip",
    "PowerSGD",
    "SketchedAMSGrad",
    "SparseLoCo",
    "StreamingDiLoCo",
]
