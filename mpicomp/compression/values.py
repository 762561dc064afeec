"""How the values of a sparse message travel: as they are, or rounded to fewer bits.

The rounding error is not lost: every rank, the sender included, adds the decoded values to its copies, so the error
stays in the sender's error memory or public copy. Rounding to a type never makes ``|Q(x)_i - x_i|`` larger than
``|x_i|``, so a contractive compressor stays contractive. ``int8`` is ``round(127 v / max|v|)``; the scale
``max|v| / 127``, float32, travels in front.

Messages with a fixed number of values may also send 2 bits for each (``statistical``, of SparseLoCo, arXiv 2508.15706),
and in front four means for each tensor, float32:

    s = mean(v);  w = 6/4 sqrt(mean((v - s)^2));  bin = clamp(round((v - s) / w) + 2, 0, 3)      halfway, the even one
    a value is decoded as the mean of its bin

No vector of four levels is nearer to v with these bins, so ``|Q(v) - v|^2 <= |v|^2``, though a single entry may move by
more than its magnitude. At least one bin has a mean that is not 0, so Q contracts; it is biased. Sums are of integers,
``round(2^32 v / max|v|)`` and its square, so that the order does not matter and all devices agree.
"""

from __future__ import annotations

import functools
from typing import Literal, get_args

import torch
from torch import Tensor

from mpicomp import kernels
from mpicomp.compression.message import Field, Payload
from mpicomp.errors import ConfigError, DivergenceError
from mpicomp.kernels.reference import NOT_FINITE, finite, packed_nbytes, sqrt, unpack_codes

Values = Literal["full", "float32", "bfloat16", "float16", "int8"]
"""The types of values on the wire; ``"full"`` is the type of the model."""

FixedValues = Literal["full", "float32", "bfloat16", "float16", "int8", "statistical"]
"""`Values`, and ``"statistical"`` for messages with a fixed number of values."""

_LEVELS = 127

_BINS = 4
_BITS = 2
_ONE = 2.0**32  # a vector of at most 2**31 entries has sums below 2**63


def check_values(values: str) -> None:
    """Raise ConfigError for an unknown type of values."""
    _check(values, get_args(Values))


def check_fixed_values(values: str) -> None:
    """Raise ConfigError for an unknown type of a fixed number of values."""
    _check(values, get_args(FixedValues))


def _check(values: str, known: tuple[str, ...]) -> None:
    if values not in known:
        raise ConfigError(f"compression.values = {values!r} must be one of {', '.join(map(repr, known))}")


def value_fields(
    values: FixedValues,
    dtype: torch.dtype,
    k: int,
    variable: bool = False,
    parts: tuple[tuple[str, int], ...] | None = None,
) -> tuple[Field, ...]:
    """Return the fields ``values`` (k,), or at most that many, and ``scale`` (parts,) where it is needed.

    Statistical values are packed, and have ``means`` (4 parts,), those of a tensor one after the other. `parts` are the
    names of tensors that have a scale of their own, and how many consecutive values are of each; None is one scale.
    """
    scales, names = 1 if parts is None else len(parts), [name for name, _ in parts or ()]
    if values == "statistical":
        means = Field("means", torch.float32, _BINS * scales, False, "finite", tuple((name, _BINS) for name in names))
        return means, Field("values", torch.uint8, packed_nbytes(k, _BITS))
    if values == "int8":
        scale = Field("scale", torch.float32, scales, False, "a number", tuple((name, 1) for name in names))
        return scale, Field("values", torch.int8, k, variable)
    sent = dtype if values == "full" else getattr(torch, values)
    return (Field("values", sent, k, variable, "a number" if values == "full" else "finite", parts or ()),)


def saturated(x: Tensor, target: torch.dtype) -> Tensor:
    """Return `x` in a type of 16 bits: what is beyond its range becomes its largest value, but infinity stays so.

    An infinity would never leave an error memory, and nobody would notice it.

    Raises:
        DivergenceError: infinity. Where that would have to wait for a device, who sends the values raises it.

    """
    is_infinite = x.isinf()
    if x.is_cpu and is_infinite.any():
        raise DivergenceError(NOT_FINITE)
    largest = min(torch.finfo(target).max, torch.finfo(x.dtype).max)
    return torch.where(is_infinite, x, x.clamp(-largest, largest)).to(target)


def write_values(x: Tensor, values: FixedValues, counts: tuple[int, ...] = ()) -> Payload:
    """Return `x` (k,) rounded; values beyond the range of 16 bits saturate.

    `counts` gives the number of consecutive entries of each scale; without it there is one scale for all.

    Raises:
        DivergenceError: infinity among values that are rounded. Where that would have to wait for a device, what is
            sent is not finite, and who sends it raises the error.

    """
    if values == "full":
        return {"values": x}
    if values == "statistical":
        return _write_statistical(x, counts)
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
    return {"values": saturated(x, getattr(torch, values))}


def read_values(payload: Payload, dtype: torch.dtype, counts: tuple[int, ...] = ()) -> Tensor:
    """Return the values (k,) of a message in `dtype`; `counts` is that of `write_values`."""
    values = payload["values"]
    if "means" in payload:
        bins = unpack_codes(values, _BITS, sum(counts)).long()
        return payload["means"].to(dtype)[_groups(counts, values.device) * _BINS + bins]
    if "scale" in payload:
        return values.to(dtype).mul_(_each(payload["scale"].to(dtype), counts))
    return values.to(dtype)


def _write_statistical(x: Tensor, counts: tuple[int, ...]) -> Payload:
    """Return the bins of `x` (k,), packed, and their means."""
    group, wide = _groups(counts, x.device), x.double()
    unit = wide.new_zeros(len(counts)).scatter_reduce_(0, group, wide.abs(), "amax")
    if x.is_cpu and len(counts):
        finite(float(unit.max()))
    parts = wide / unit.masked_fill(unit == 0, 1.0)[group]
    number = _numbers(counts, x.device)
    center = _sums(parts, group, len(counts)) / number
    offset = parts - center[group]
    width = 6 / _BINS * sqrt(_sums(offset.square(), group, len(counts)) / number)
    bins = (offset / width.masked_fill(width == 0, 1.0)[group]).round_().add_(_BINS // 2).clamp_(0, _BINS - 1)
    bins = bins.nan_to_num_(0.0).long()
    place = group * _BINS + bins
    members = torch.zeros(_BINS * len(counts), dtype=torch.int64, device=x.device)
    members.index_add_(0, place, torch.ones_like(place))
    means = (_sums(parts, place, len(members)) / members.clamp_min(1)).view(-1, _BINS) * unit[:, None]
    largest = torch.finfo(torch.float32).max
    packed = kernels.pack_codes(bins.to(torch.int16), _BITS)
    means = means.clamp_(-largest, largest).masked_fill_(~unit.isfinite()[:, None], torch.nan)
    return {"means": means.float().flatten(), "values": packed}


def _sums(x: Tensor, group: Tensor, groups: int) -> Tensor:
    """Return the sums of the entries in [-4, 4] of each group, in float64."""
    sums = torch.zeros(groups, dtype=torch.int64, device=x.device)
    return sums.index_add_(0, group, (x * _ONE).round_().long()).double() / _ONE


def _each(scale: Tensor, counts: tuple[int, ...]) -> Tensor:
    """Return the scale of each entry, or the single scale of all."""
    return scale[_groups(counts, scale.device)] if counts else scale


@functools.lru_cache(maxsize=64)
def _groups(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the group number of each entry; the groups follow one another and have `counts` entries."""
    return torch.arange(len(counts)).repeat_interleave(torch.tensor(counts, dtype=torch.int64)).to(device)


@functools.lru_cache(maxsize=64)
def _numbers(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """Return how many entries the groups have, at least 1, as float64."""
    return torch.tensor(counts, dtype=torch.float64).clamp_min(1).to(device)
