"""Compilation and launches: Triton to machine code when a kernel first meets the types of its arguments.

Every kernel works on tiles of `BLOCK` entries, at offsets of 64 bits, and rounds products and sums apart, as the
definitions do on the CPU, unless it says `tl.fma`. Numbers that are not tensors come as float64, as Triton would
otherwise make them float32, and are rounded to the type of the vector by the kernel.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import tensor

jit = cast(Callable[[Callable[..., Any]], Any], triton.jit)
"""`triton.jit`, which has no types."""

BLOCK = 4096
"""Entries of a tile: 16 for each of its 256 threads."""

OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}
"""How kernels are compiled; unless told otherwise, products and sums would become fused."""


def launch(kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
    """Start `programs` programs of `kernel` on the device of the first argument, and do not wait for them."""
    if programs:
        with _on(args[0]):
            kernel[(programs,)](*args, **constants, **OPTIONS)


def _on(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Return a context in which Triton launches on the device of `x`; it asks torch for the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def tiles(n: int, block: int = BLOCK) -> int:
    """Return how many tiles `n` entries fill."""
    return -(-n // block)


@jit
def offsets(tile: tensor, BLOCK: tl.constexpr) -> tensor:
    """Return the places of the entries of a tile, int64 (BLOCK,)."""
    return tl.cast(tile, tl.int64) * BLOCK + tl.arange(0, BLOCK)


@jit
def rounded(number: tensor, like: tensor) -> tensor:
    """Return a number, which comes as float64, in the type of `like`."""
    return tl.full((1,), number, like.dtype)


@jit
def divide(a: tensor, b: tensor) -> tensor:
    """Return ``a / b``, rounded correctly; Triton's ``/`` is an approximation in float32."""
    if a.dtype == tl.float64:
        return a / b
    else:  # noqa: RET505 - Triton compiles what follows a return, too
        return tl.div_rn(a, b)


@jit
def root(a: tensor) -> tensor:
    """Return the square root, rounded correctly."""
    if a.dtype == tl.float64:
        return tl.sqrt(a)
    else:  # noqa: RET505
        return tl.sqrt_rn(a)
