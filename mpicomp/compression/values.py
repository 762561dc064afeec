"""How the values of a sparse message travel: as they are, or rounded to fewer bits.

The rounding error is not lost: every rank, the sender included, adds the decoded values to its copies, so the error
stays in the sender's error memory or public copy. Rounding never makes ``|Q(x)_i - x_i|`` larger than ``|x_i|``, so a
contractive compressor stays contractive. ``int8`` is ``round(127 v / max|v|)``; the scale ``max|v| / 127``, float32,
travels in front.
"""

from __future__ import annotations

import functools
from typing import Literal, get_args

import torch
from torch import Tensor

from mpicomp.compression.message import Field, Payload
from mpicomp.errors import ConfigError

Values = Literal["full", "float32", "bfloat16", "float16", "int8"]
"""The types of values on the wire; ``"full"`` is the type of the model."""

_LEVELS = 127


def check_values(values: str) -> None:
    """Raise ConfigError for an unknown type of values."""
    if values not in get_args(Values):
        raise ConfigError(f"compression.values = {values!r} must be one of {', '.join(map(repr, get_args(Values)))}")


def value_fields(
    values: Values, dtype: torch.dtype, k: int, variable: bool = False, scales: int = 1
) -> tuple[Field, ...]:
    """Return the fields ``values`` (k,), or at most that many, and ``scale`` (scales,) where it is needed."""
    if values == "full":
        return (Field("values", dtype, k, variable),)
    sent = Field("values", getattr(torch, values), k, variable)
    return (Field("scale", torch.float32, scales), sent) if values == "int8" else (sent,)


def write_values(x: Tensor, values: Values, counts: tuple[int, ...] = ()) -> Payload:
    """Return `x` (k,) rounded; values beyond the range of 16 bits saturate.

    `counts` gives the number of consecutive entries of each scale; without it there is one scale for all.
    """
    if values == "full":
        return {"values": x}
    if values == "int8":
        wide = x.to(torch.float32) if x.dtype != torch.float64 else x
        if counts:
            largest = wide.new_zeros(len(counts)).scatter_reduce_(0, _groups(counts, x.device), wide.abs(), "amax")
        else:
            largest = (wide.abs().max() if len(x) else wide.new_zeros(())).reshape(1)
        scale = (largest / _LEVELS).to(torch.float32)
        divisor = _each(scale.clamp_min(torch.finfo(torch.float32).smallest_normal), counts)
        codes = (wide / divisor).round_()
        return {"scale": scale, "values": codes.clamp_(-_LEVELS, _LEVELS).to(torch.int8)}
    target: torch.dtype = getattr(torch, values)
    largest_finite = min(torch.finfo(target).max, torch.finfo(x.dtype).max)
    return {"values": x.clamp(-largest_finite, largest_finite).to(target)}


def read_values(payload: Payload, dtype: torch.dtype, counts: tuple[int, ...] = ()) -> Tensor:
    """Return the values (k,) of a message in `dtype`; `counts` is that of `write_values`."""
    values = payload["values"]
    if "scale" in payload:
        return values.to(dtype).mul_(_each(payload["scale"].to(dtype), counts))
    return values.to(dtype)


def _each(scale: Tensor, counts: tuple[int, ...]) -> Tensor:
    """Return the scale of each entry, or the single scale of all."""
    return scale[_groups(counts, scale.device)] if counts else scale


@functools.lru_cache(maxsize=64)
def _groups(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the group number of each entry; the groups follow one another and have `counts` entries."""
    return torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).to(device)
