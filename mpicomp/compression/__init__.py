"""Compressors, what is sent: one in each file; those in `wrap` go around others."""

from mpicomp.compression.base import Compressor, Wrapper
from mpicomp.compression.block import RandomBlock
from mpicomp.compression.block_topk import BlockTopK
from mpicomp.compression.cast import Cast
from mpicomp.compression.identity import Identity
from mpicomp.compression.log_grid import LogGrid
from mpicomp.compression.message import Field, Layout, Payload, Spec
from mpicomp.compression.natural import Natural
from mpicomp.compression.qsgd import QSGD
from mpicomp.compression.randk import RandomK
from mpicomp.compression.sampled_topk import SampledTopK
from mpicomp.compression.sign import SignNorm
from mpicomp.compression.terngrad import TernGrad
from mpicomp.compression.threshold import HardThreshold
from mpicomp.compression.topk import TopK
from mpicomp.compression.uniform_grid import UniformGrid
from mpicomp.compression.variable_length import VariableLength
from mpicomp.compression.wrap.allocation import allocate
from mpicomp.compression.wrap.by_rank import ByRank
from mpicomp.compression.wrap.feedback import ErrorFeedback
from mpicomp.compression.wrap.per_tensor import PerTensor

COMPRESSORS: dict[str, type[Compressor]] = {
    "identity": Identity,
    "topk": TopK,
    "block_topk": BlockTopK,
    "sampled_topk": SampledTopK,
    "randk": RandomK,
    "threshold": HardThreshold,
    "block": RandomBlock,
    "sign": SignNorm,
    "qsgd": QSGD,
    "terngrad": TernGrad,
    "natural": Natural,
    "log_grid": LogGrid,
    "uniform_grid": UniformGrid,
    "variable_length": VariableLength,
    "cast": Cast,
}
"""The values of ``compression.kind``."""

__all__ = [
    "COMPRESSORS",
    "QSGD",
    "BlockTopK",
    "ByRank",
    "Cast",
    "Compressor",
    "ErrorFeedback",
    "Field",
    "HardThreshold",
    "Identity",
    "Layout",
    "LogGrid",
    "Natural",
    "Payload",
    "PerTensor",
    "RandomBlock",
    "RandomK",
    "SampledTopK",
    "SignNorm",
    "Spec",
    "TernGrad",
    "TopK",
    "UniformGrid",
    "VariableLength",
    "Wrapper",
    "allocate",
]
