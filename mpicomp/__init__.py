"""mpicomp: train one model on many MPI ranks that exchange compressed messages with their neighbors.

Importing this package starts no MPI and needs none. Its parts are imported when they are first used, so that the
command line starts fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpicomp import algorithms, compression, exchange, topology
    from mpicomp.replica.clipping import Clip
    from mpicomp.replica.distribute import distribute
    from mpicomp.replica.distributed import Distributed
    from mpicomp.replica.several_optimizers import SeveralOptimizers
    from mpicomp.replica.tensorboard import TensorBoard

__version__ = "0.1.0"
__all__ = [
    "Clip",
    "Distributed",
    "SeveralOptimizers",
    "TensorBoard",
    "__version__",
    "algorithms",
    "compression",
    "distribute",
    "exchange",
    "topology",
]

_FOUND_IN = {
    "Clip": "mpicomp.replica.clipping",
    "Distributed": "mpicomp.replica.distributed",
    "SeveralOptimizers": "mpicomp.replica.several_optimizers",
    "TensorBoard": "mpicomp.replica.tensorboard",
    "distribute": "mpicomp.replica.distribute",
}


def __getattr__(name: str) -> object:
    if name in _FOUND_IN:
        return getattr(importlib.import_module(_FOUND_IN[name]), name)
    if name in __all__:
        return importlib.import_module(f"mpicomp.{name}")
    raise AttributeError(f"module 'mpicomp' has no attribute {name!r}")
