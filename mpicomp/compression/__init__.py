"""WHAT is sent."""

from mpicomp.compression.base import Compressor, Spec
from mpicomp.compression.cast import Cast
from mpicomp.compression.identity import Identity
from mpicomp.compression.topk import TopK

ErrorFeedback = PerTensor = None
COMPRESSORS: dict[str, type[Compressor]] = {"identity": Identity, "topk": TopK, "cast": Cast}
