"""Fast versions of single operations on flat tensors: one function for each operation, with equal signatures.

`reference` defines every operation in plain torch. `cpu` and `gpu` have compiled versions, with the same results bit
for bit, for contiguous float32 and float64 vectors in the memory of the host or of a GPU. They need numba (the extra
``fast``) or Triton (the extra ``gpu``; torch for CUDA brings it), and are used wherever they can be.
``MPICOMP_KERNELS=reference`` in the environment selects the definitions.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from mpicomp.errors import ConfigError
from mpicomp.kernels import reference

P = ParamSpec("P")
R = TypeVar("R")

_VARIABLE = "MPICOMP_KERNELS"
_VERSIONS = {"cpu": "mpicomp.kernels.cpu", "cuda": "mpicomp.kernels.gpu"}


@functools.cache
def compiled(device: str = "cpu") -> ModuleType | None:
    """Return the compiled versions for a type of device; None if they cannot be used, or are disabled.

    Raises:
        ConfigError: ``MPICOMP_KERNELS`` has an unknown value.

    """
    wanted = os.environ.get(_VARIABLE, "auto")
    if wanted not in ("auto", "reference"):
        raise ConfigError(f"{_VARIABLE} = {wanted!r} must be 'auto' or 'reference'")
    if wanted == "reference" or sys.byteorder != "little" or device not in _VERSIONS:
        return None
    try:
        return importlib.import_module(_VERSIONS[device])
    except ImportError:  # numba and Triton are optional dependencies
        return None


_DTYPES = (torch.float32, torch.float64, torch.int32, torch.int16, torch.uint8, torch.int64)
"""Of values, of indices and codes (the next three), and of seeds."""


def _is_plain(x: Tensor) -> bool:
    return x.is_contiguous() and x.dtype in _DTYPES


def _chosen(definition: Callable[P, R]) -> Callable[P, R]:
    """Return a function that calls the fast version of `definition` for the device of its first argument, if any."""

    @functools.wraps(definition)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        x = args[0]
        assert isinstance(x, Tensor)
        fast = compiled(x.device.type) if _is_plain(x) else None
        version: Callable[P, R] = getattr(fast, definition.__name__, definition)
        return version(*args, **kwargs)

    return call


top_k = _chosen(reference.top_k)
top_k_of_difference = _chosen(reference.top_k_of_difference)
top_k_of_parts = _chosen(reference.top_k_of_parts)
top_k_of_blocks = _chosen(reference.top_k_of_blocks)
block_indices = _chosen(reference.block_indices)
above = _chosen(reference.above)
scatter_add_ = _chosen(reference.scatter_add_)
add_block_ = _chosen(reference.add_block_)
mix_ = _chosen(reference.mix_)
adaptive_mix_ = _chosen(reference.adaptive_mix_)
encode_indices = _chosen(reference.encode_indices)
decode_indices = _chosen(reference.decode_indices)
add_coded_ = _chosen(reference.add_coded_)
mean_magnitude = _chosen(reference.mean_magnitude)
largest = reference.largest
norm = _chosen(reference.norm)
noise = _chosen(reference.noise)
random_indices = _chosen(reference.random_indices)
quantize = _chosen(reference.quantize)
add_quantized_ = _chosen(reference.add_quantized_)
round_to_grid = _chosen(reference.round_to_grid)
add_gridded_ = _chosen(reference.add_gridded_)
pack_codes = _chosen(reference.pack_codes)
pack_signs = _chosen(reference.pack_signs)
add_signs_ = _chosen(reference.add_signs_)
