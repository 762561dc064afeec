"""WHEN: one method per file; no MPI, no model."""

from mpicomp.algorithms.adagossip import AdaGossip
from mpicomp.algorithms.base import Algorithm, Local
from mpicomp.algorithms.choco import Choco
from mpicomp.algorithms.deep_squeeze import DeepSqueeze
from mpicomp.algorithms.dpsgd import DPSGD
from mpicomp.algorithms.local_sgd import LocalSGD
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
}
"""The values of ``algorithm.kind``."""

__all__ = [
    "ALGORITHMS",
    "DPSGD",
    "SGD",
    "SSGD",
    "AdaGossip",
    "Algorithm",
    "Choco",
    "DeepSqueeze",
    "Local",
    "LocalSGD",
]
