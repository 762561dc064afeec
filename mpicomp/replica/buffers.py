"""The buffers of a model: those that may be averaged over the ranks, and memory that can be written to."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mpicomp.replica.model_checks import plain_name

AVERAGED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""The types of buffers that are averaged."""


def averaged_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that may be averaged, by name: persistent floating-point ones, unlike counters.

    Batch-norm statistics are such buffers. Those that are not persistent are tables that a rank computes itself.
    """
    found: dict[Tensor, str] = {}
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.dtype in AVERAGED and name not in module._non_persistent_buffers_set:
                found.setdefault(buffer, plain_name(f"{prefix}.{name}".removeprefix(".")))
    return {name: buffer for buffer, name in found.items()}


def own_buffers(model: nn.Module) -> None:
    """Replace buffers by contiguous copies where they are not contiguous: an expanded one cannot be written to."""
    copies: dict[Tensor, Tensor] = {}  # one for a buffer with several names
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_contiguous():
                module._buffers[name] = copies.setdefault(buffer, buffer.contiguous())
