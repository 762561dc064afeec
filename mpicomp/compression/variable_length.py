"""Variable-length codes: the larger an entry, the more bits it gets, and the smallest get none.

    K        = the most entries that a sign each and their indices would fit into the budget ``B = bits n / 8`` bytes
    groups   = the K largest entries, sorted by magnitude and cut at ``K 2^(-i (i + 1) / 4)``, i = 1 ... G - 2, and at 1
    cell     = one of 2^(b-1) of equal width between the smallest and the largest magnitude of a group, b = 1...8
    ``Q(x)_i = sign(x_i) 2 c d / (c + d)`` if x_i lies in the cell [c, d] of a group with b > 0, else 0
    b_g      = those with the least ``|Q(x) - x|^2`` of which codes and indices fit into B

A group takes b bits for each entry, the first of them the sign, and its indices as top-k does
(`mpicomp.compression.indices`), both at their longest. A dynamic program over 512 parts of the budget finds the
lengths, from the errors that all lengths would make at 256 ranks of each group. Equal lengths are quantization, and no
bits for all but the first group sparsification.

The harmonic mean of a cell is the mean of entries that fall as ``rank^(-1/2)``; being at most 2 c, it moves no entry by
more than its magnitude. The largest entry is a group that always fits, and a message is at least as good as that entry
alone, so Q contracts; it is biased, and needs error feedback, or a method that has it built in. Bytes: at most B, and
for each group 9 and two counts of 4, so it is for whole models and not for tensors of a few hundred entries.

``|Q(x) - x|^2 / |x|^2`` with 8 groups, and of top-k with the ratio that takes the same bytes, of float32 and of int8:

    data, 100,000 entries                 bits  this      top-k     top-k int8
    Gaussian                              0.25  0.84      0.94      0.88
                                          0.5   0.70      0.90      0.79
                                          1     0.51      0.83      0.64
    magnitudes ``rank^-0.75``             0.25  0.014     0.029     0.021
                                          1     0.0067    0.013     0.021
    magnitudes ``1 / rank``               0.25  0.00036   0.00098   0.0033
                                          1     0.000091  0.00024   0.0033
    gradient, MLP 64-256-256-10, digits   0.25  0.32      0.57      0.38
    (85,002, step 100 of SGD)             0.5   0.17      0.44      0.24
                                          1     0.11      0.30      0.12
                                          2     0.051     0.17      0.034

``scripts/studies/variable_length.py`` prints them. From 1 bit on, the indices of large groups, which are coded one by
one, take more than they should: there top-k of int8 may be better.

Fed-CVLC, Su et al. 2024, arXiv 2402.03770, has the idea: longer codes for larger entries, so that the error is least
within a budget, with quantization and sparsification as its extremes. From the paper's abstract and summaries; there a
power law fitted to the sorted magnitudes gives the lengths, and values are rounded without bias. Groups, cells, and the
search on measured errors in the place of the fit are this package's.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mpicomp import kernels
from mpicomp.compression.base import Compressor
from mpicomp.compression.indices import scatter_add_
from mpicomp.compression.message import Field, Layout, Payload, Spec, index_dtype
from mpicomp.errors import ConfigError
from mpicomp.kernels.reference import finite, index_code_nbytes, packed_nbytes, trim_code, unpack_codes
from mpicomp.state import State
from mpicomp.timing import timed, traced

_BITS = 8
"""Of the longest code, the sign's among them."""

_MOST_GROUPS = 16
_PARTS = 512  # of the budget
_SAMPLED = 256  # ranks of a group
_ONE = 2.0**50  # errors are summed as integers, so that the order does not matter: 256 of at most this

_top_k = traced("select")(kernels.top_k)


@dataclass(frozen=True)
class _Plan:
    """What follows from the length of the vector.

    Attributes:
        bounds: first and last rank + 1 of each group.
        ends: first ranks, and last ranks, of all groups (2, G).
        sampled: ranks at which errors are measured (G, 256).
        weights: of an error there in the error of all (G, 1).
        costs: parts of the budget that a group takes with 0...8 bits (G, 9).
        room: 1 + how many parts there are (parts + 1, 1).
        group: of each rank (K,).

    """

    bounds: tuple[tuple[int, int], ...]
    ends: Tensor
    sampled: Tensor
    weights: Tensor
    costs: Tensor
    room: Tensor
    group: Tensor


def _indices_nbytes(n: int, k: int) -> int:
    """Return the bytes of the longest code of `k` of `n` indices; there is none of all."""
    return index_code_nbytes(n, k) if k < n else 0


def _budget(n: int, bits: float) -> int:
    """Return the bytes of codes and indices; they are at least enough for one sign."""
    return max(-(-int(n * bits + 1e-9) // 8), _indices_nbytes(n, 1) + 1)


@functools.lru_cache(maxsize=256)
def _groups(n: int, bits: float, groups: int) -> tuple[tuple[int, int], ...]:
    """Return the bounds of the ranks of each group; groups of short vectors may be fewer."""
    least, beyond = min(n, 1), n + 1
    if groups == 1 and packed_nbytes(n, 1) <= _budget(n, bits):  # which takes no indices
        least = n
    while beyond - least > 1:
        k = (least + beyond) // 2
        if _indices_nbytes(n, k) + packed_nbytes(k, 1) <= _budget(n, bits):
            least = k
        else:
            beyond = k
    cuts = [math.isqrt(least**2 >> i * (i + 1) // 2) for i in range(max(1, groups - 1))]
    stops = sorted({*cuts, least if groups == 1 else min(n, 1)} - {0})
    return tuple(zip([0, *stops[:-1]], stops, strict=True)) if stops else ()


@functools.lru_cache(maxsize=64)
def _plan(n: int, bits: float, groups: int, device: torch.device) -> _Plan:
    bounds = _groups(n, bits, groups)
    kept, budget = bounds[-1][1], _budget(n, bits)
    parts = min(budget, _PARTS)
    sizes = [stop - start for start, stop in bounds]
    nbytes = [[(_indices_nbytes(n, k) + packed_nbytes(k, b)) * (b > 0) for b in range(_BITS + 1)] for k in sizes]
    starts = torch.tensor(bounds)
    plan = (
        starts.T - torch.tensor([[0], [1]]),
        starts[:, :1] + torch.arange(_SAMPLED) * torch.tensor(sizes)[:, None] // _SAMPLED,
        torch.tensor(sizes, dtype=torch.float64)[:, None] / (4 * kept),  # of 256 errors: 2**56 for all of the energy
        -(-torch.tensor(nbytes) * parts // budget),
        torch.arange(1, parts + 2)[:, None],
        torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)),
    )
    return _Plan(bounds, *(table.contiguous().to(device) for table in plan))


def _levels(lengths: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return the magnitudes (..., 128) for the seven low bits of a code, float64, in ranges ``[low, high]``.

    `lengths` are those of the codes, at least 1; all have a last dimension of 1.
    """
    cells = torch.ones_like(lengths) << lengths - 1
    cell = torch.arange(1 << _BITS - 1, device=low.device) >> _BITS - lengths
    width = (high - low) / cells
    lower = low + cell * width
    upper = lower + width
    total = lower + upper
    return 2 * lower * upper / total.masked_fill(total == 0, 1.0)


def _least_error(errors: Tensor, plan: _Plan) -> Tensor:
    """Return the lengths (G,) of the least sum of `errors` (G, 9), int64, below ``2**56``, that fit into the budget."""
    choices = torch.arange(_BITS + 1, device=errors.device)
    errors = errors * 16 + choices  # of equal errors the shortest, on all devices
    beyond = errors.new_full((1,), 2**61)
    best, picks = torch.zeros_like(plan.room[:, 0]), []
    for error, cost in zip(errors.unbind(), plan.costs.unbind(), strict=True):
        left = (plan.room - cost).clamp_min_(0)
        best, pick = (torch.cat([beyond, best])[left] + error).min(dim=1)
        picks.append(pick)
    room, lengths = plan.room[-1] - 1, []
    for pick, cost in zip(reversed(picks), reversed(plan.costs.unbind()), strict=True):
        lengths.append(pick[room])
        room = room - cost[lengths[-1]]
    return torch.cat(lengths[::-1])


@dataclass(frozen=True)
class VariableLength(Compressor):
    """Give larger entries longer codes.

    Attributes:
        bits: for each entry on average, indices included, in (0, 8].
        groups: of entries with codes of the same length, at most, 1 to 16.

    """

    bits: float = 0.5
    groups: int = 8

    def __post_init__(self) -> None:
        if not 0 < self.bits <= _BITS:
            raise ConfigError(f"compression.bits = {self.bits} must be in (0, {_BITS}]: bits of an entry on average")
        if not 1 <= self.groups <= _MOST_GROUPS:
            raise ConfigError(f"compression.groups = {self.groups} must be in 1...{_MOST_GROUPS}: groups of entries")

    @property
    def is_contractive(self) -> bool:
        """False for a single group, of which nothing may be sent."""
        return self.groups > 1

    @property
    def amplifies(self) -> bool:
        """False: no entry is sent as more than twice its magnitude."""
        return False

    def layout(self, spec: Spec) -> Layout:
        """Return ``lengths`` (G,), ``ranges`` (2 G,) of magnitudes, and ``g.indices`` and ``g.values`` of each group.

        Values are packed, the sign first. Both are empty in groups that are not sent.
        """
        n, bounds = spec.numel, _groups(spec.numel, self.bits, self.groups)
        index_dtype(n)  # raises an error if the vector is too long
        fields = [
            Field("lengths", torch.uint8, len(bounds)),
            Field("ranges", torch.float32, 2 * len(bounds), must_be="finite"),
        ]
        for g, (start, stop) in enumerate(bounds):
            k = stop - start
            longest = _indices_nbytes(n, k)
            if longest:
                fields.append(Field(f"{g}.indices", torch.uint8, longest, variable=True, code_of=n, count=k))
            fields.append(
                Field(f"{g}.values", torch.uint8, packed_nbytes(k, _BITS), variable=True, has_zeros_behind=True)
            )
        return Layout(tuple(fields))

    @timed("compress")
    def compress(self, x: Tensor, spec: Spec, state: State) -> Payload:
        """Select, sort, choose the lengths, and pack; raise DivergenceError for NaN and infinity."""
        n = spec.numel
        if not n:
            return {"lengths": x.new_empty(0, dtype=torch.uint8), "ranges": x.new_empty(0, dtype=torch.float32)}
        plan = _plan(n, self.bits, self.groups, x.device)
        kept = plan.bounds[-1][1]
        values, indices = _top_k(x, kept)
        magnitude = values.to(torch.float64 if x.dtype == torch.float64 else torch.float32).abs()
        ordered, order = magnitude.sort(descending=True, stable=True)
        high, low = ordered[plan.ends].to(torch.float32)
        if x.is_cpu:
            finite(float(high[0]))
        lengths = _least_error(_errors(ordered[plan.sampled], low, high, plan), plan)

        places = (plan.group * kept + order).sort().values - plan.group * kept  # group by group, ascending in each
        values, magnitude, indices = values[places], magnitude[places], indices[places]
        code = _code(magnitude, low[plan.group], high[plan.group])
        sent = 2**_BITS - (1 << _BITS - lengths)  # the first bits
        code = (code | (values < 0).int() << _BITS - 1) & sent[plan.group]
        payload = {"lengths": lengths.to(torch.uint8), "ranges": torch.cat([low, high])}
        for g, (start, stop) in enumerate(plan.bounds):
            payload |= self._group(g, indices[start:stop], code[start:stop], lengths[g : g + 1], n)
        return payload

    def _group(self, g: int, indices: Tensor, code: Tensor, length: Tensor, n: int) -> Payload:
        """Return the fields of group `g`; on a device, which alone knows the length, with zeros behind."""
        payload: Payload = {}
        packed = kernels.pack_codes(code.to(torch.int16), _BITS).view(_BITS, -1).flip(0).flatten()
        if len(indices) < n:
            if not code.is_cpu:
                payload[f"{g}.indices"] = kernels.encode_indices(indices, n) * (length > 0)
                payload[f"{g}.decoded"] = indices
            elif int(length):
                payload[f"{g}.indices"] = kernels.encode_indices(indices, n)
            else:
                payload[f"{g}.indices"] = packed[:0]
        payload[f"{g}.values"] = trim_code(packed) if code.is_cpu else packed
        return payload

    @timed("compress")
    def accumulate(self, payload: Payload, spec: Spec, out: Tensor, weight: float = 1.0) -> None:
        """Compute ``out[indices] += weight * values``, group by group; raise IndexError if indices are damaged."""
        n, lengths = spec.numel, payload["lengths"].long()[:, None]
        low, high = payload["ranges"].double().view(2, -1, 1)
        levels = _levels(lengths.clamp_min(1), low, high) * (lengths > 0)
        table = torch.cat([levels, -levels], dim=1).to(out.dtype)
        is_sent = {g: payload.get(f"{g}.indices", levels).numel() > 0 for g in range(len(table))}
        bounds = [(g, *bound) for g, bound in enumerate(_groups(n, self.bits, self.groups)) if is_sent[g]]
        if not bounds:
            return
        planes = []
        for g, start, stop in bounds:
            packed = payload[f"{g}.values"]
            room = packed_nbytes(stop - start, _BITS) - packed.numel()
            planes.append(torch.nn.functional.pad(packed, (0, room)).view(_BITS, -1))
        joined = torch.cat(planes, dim=1).flip(0)
        codes = unpack_codes(joined.flatten(), _BITS, 8 * joined.shape[1])
        parts = torch.split(codes, [8 * each.shape[1] for each in planes])
        for (g, start, stop), code in zip(bounds, parts, strict=True):
            values = table[g][code[: stop - start].int()]
            if stop - start == n:
                out.add_(values, alpha=weight)
            else:
                indices = payload.get(f"{g}.decoded", payload[f"{g}.indices"])
                scatter_add_(out, {"indices": indices}, values, weight)


def _code(magnitude: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return which of 128 cells of ``[low, high]`` each magnitude lies in; the first bits say which of fewer cells."""
    width = (high - low).masked_fill_(high == low, 1.0)
    most = (1 << _BITS - 1) - 1
    return ((magnitude - low) / width * (most + 1)).floor_().nan_to_num_(0.0).clamp_(0, most).int()


def _errors(magnitude: Tensor, low: Tensor, high: Tensor, plan: _Plan) -> Tensor:
    """Return the squared error of each group with 0...8 bits (G, 9), in units of ``2**-56`` of the largest."""
    largest = magnitude[:1, :1].double()
    unit = largest.masked_fill(largest == 0, 1.0)
    code = _code(magnitude, low[:, None], high[:, None]).long()
    lengths = torch.arange(1, _BITS + 1, device=low.device).view(-1, 1, 1)
    levels = _levels(lengths, low.double()[:, None], high.double()[:, None])
    coded = levels.gather(2, code.expand(_BITS, *code.shape))
    decoded = torch.cat([torch.zeros_like(coded[:1]), coded])
    squares = ((decoded - magnitude) / unit).square().nan_to_num_(0.0).clamp_max_(1.0)
    return ((squares * _ONE).round_().long().sum(dim=2).T.double() * plan.weights).round_().long()
