"""By rank: each rank compresses with a compressor of its own, and every rank reads the messages of all.

    rank i sends C_i(x);  layout = one that the messages of all C_i fit

The compressors differ in their ``ratio`` or ``threshold`` only. A message holds all that is needed to read it, so the
receiver need not know the sender's compressor. In the common layout, a field whose length differs between ranks has
variable length (4 bytes for its count). Ranks may send a field in different types (few indices as numbers, many as a
code); then each type has a field of its own, and a message fills one of them. Equal compressors have the layout of one.

The worst rank decides: the contraction is that of the smallest ratio. A method whose step depends on it (gamma of
CHOCO-SGD, DC-gossip and DeepSqueeze) must be tuned to the smallest ratio, not to the mean.

`ByRank` goes around `PerTensor`, and `ErrorFeedback` around both, ``ErrorFeedback(ByRank((PerTensor(...), ...)))``;
`mpicomp.compression.allocate` makes one from data volumes. A compressor of your own works too if its ``accumulate``
reads everything from the message and nothing from its own ratio. The idea of a ratio for each rank: Lu et al. 2023,
arXiv 2311.07324; the common layout is ours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor

from mpicomp.compression.base import Compressor, Wrapper
from mpicomp.compression.message import Field, Layout, Payload, Spec
from mpicomp.errors import ConfigError
from mpicomp.state import OWN, State

STRENGTHS = ("ratio", "threshold")
"""The parameters that may differ from rank to rank."""


@dataclass
class ByRankState:
    """The state of `ByRank` on one rank.

    Attributes:
        rank: selects the compressor.
        inner: the state of that compressor.

    """

    rank: int = field(metadata=OWN)
    inner: State


@dataclass(frozen=True)
class ByRank(Compressor):
    """Compress on each rank with a compressor of its own.

    Attributes:
        compressors: one for each rank, alike but for their ``ratio`` or ``threshold``, without `ErrorFeedback`.

    """

    compressors: tuple[Compressor, ...]

    def __post_init__(self) -> None:
        if not self.compressors:
            raise ConfigError("ByRank needs a compressor for each rank: none is given")
        first = _without_strength(self.compressors[0])
        for rank, compressor in enumerate(self.compressors):
            if compressor.remembers_errors or by_rank_of(compressor):
                raise ConfigError(
                    f"ByRank: the compressor of rank {rank} is a {type(compressor).__name__}. Put ErrorFeedback around "
                    "ByRank, and no ByRank into another."
                )
            if not compressor.reads_any_strength and compressor != self.compressors[0]:
                raise ConfigError(
                    f"ByRank: {compressor} of rank {rank} cannot read messages of another ratio, and "
                    f"{self.compressors[0]} of rank 0 has one: use TopK, or the same ratio on all ranks"
                )
            if _without_strength(compressor) != first:
                raise ConfigError(
                    f"ByRank: {compressor} of rank {rank} differs from {self.compressors[0]} of rank 0 in more than "
                    f"{' or '.join(STRENGTHS)}, so its messages could not be read"
                )

    @property
    def is_unbiased(self) -> bool:
        """Whether the compressors of all ranks are unbiased."""
        return all(compressor.is_unbiased for compressor in self.compressors)

    @property
    def is_contractive(self) -> bool:
        """Whether the compressors of all ranks are contractive."""
        return all(compressor.is_contractive for compressor in self.compressors)

    @property
    def amplifies(self) -> bool:
        """Whether the compressor of a rank does."""
        return any(compressor.amplifies for compressor in self.compressors)

    @property
    def leaves_out_same_entries(self) -> bool:
        """Whether the compressors of all ranks do."""
        return all(compressor.leaves_out_same_entries for compressor in self.compressors)

    @property
    def relative_error(self) -> float:
        """The largest error bound of the ranks' compressors."""
        return max(compressor.relative_error for compressor in self.compressors)

    def exempts(self, part: Spec) -> bool:
        """See `Compressor.exempts`; all ranks' compressors agree."""
        return self.compressors[0].exempts(part)

    def init(self, spec: Spec, device: torch.device, stream: int = 0) -> ByRankState:
        """Return the initial state for rank `stream`; raise ConfigError if it has no compressor."""
        size = len(self.compressors)
        if stream not in range(size):
            raise ConfigError(
                f"ByRank has compressors for ranks 0 to {size - 1}, and none for {stream}: give one for each rank of "
                "the run, and put ByRank around PerTensor, not into it"
            )
        return ByRankState(stream, self.compressors[stream].init(spec, device, stream))

    def layout(self, spec: Spec) -> Layout:
        """Return the common layout: each field is long enough for all ranks, and of variable length if they differ."""
        return self._common(spec).layout

    def compress(self, x: Tensor, spec: Spec, state: ByRankState) -> Payload:
        """Compress `x` with the compressor of this rank; return the message in the common layout."""
        payload = self.compressors[state.rank].compress(x, spec, state.inner)
        return self._common(spec).write(payload)

    def compress_difference_(
        self, x: Tensor, x_hat: Tensor, spec: Spec, state: ByRankState, scratch: Tensor
    ) -> Payload:
        """Compress the difference with the compressor of this rank; return the message in the common layout."""
        payload = self.compressors[state.rank].compress_difference_(x, x_hat, spec, state.inner, scratch)
        return self._common(spec).write(payload)

    def accumulate(self, payload: Payload, spec: Spec, out: Tensor, weight: float = 1.0) -> None:
        """See `Compressor.accumulate`; the message tells all that is needed to read it."""
        self.compressors[0].accumulate(self._common(spec).read(payload), spec, out, weight)

    def _common(self, spec: Spec) -> _Common:
        """Return the common layout; it is made once for each `spec`, because algorithms ask for it in every step."""
        if spec not in self._made:
            self._made[spec] = _Common.of([compressor.layout(spec) for compressor in self.compressors])
        return self._made[spec]

    @cached_property
    def _made(self) -> dict[Spec, _Common]:
        return {}


@dataclass(frozen=True)
class _Common:
    """A layout for the messages of several compressors.

    Attributes:
        layout: its fields; a name with several types becomes ``"name.type"``, one field for each type.
        doubled: the fields with such names.

    """

    layout: Layout
    doubled: dict[str, list[Field]]

    @classmethod
    def of(cls, layouts: Sequence[Layout]) -> _Common:
        """Return the common layout of messages of all `layouts`."""
        names = [field.name for field in layouts[0].fields]
        if any([field.name for field in layout.fields] != names for layout in layouts):
            raise ConfigError("ByRank: the messages of its compressors have different fields, so they cannot be read")
        fields: list[Field] = []
        doubled = {}
        for alike in zip(*(layout.fields for layout in layouts), strict=True):
            dtypes = sorted({field.dtype for field in alike}, key=str)
            merged = [_longest([field for field in alike if field.dtype == dtype]) for dtype in dtypes]
            if len(merged) > 1:
                merged = [
                    dataclasses.replace(
                        each, name=f"{each.name}.{str(each.dtype).removeprefix('torch.')}", variable=True
                    )
                    for each in merged
                ]
                doubled[alike[0].name] = merged
            fields += merged
        return cls(Layout(tuple(fields)), doubled)

    def write(self, payload: Payload) -> Payload:
        """Return a message of one compressor in the common layout."""
        if not self.doubled:
            return payload
        written: Payload = {}
        for name, tensor in payload.items():
            if name not in self.doubled:
                written[name] = tensor
                continue
            for each in self.doubled[name]:
                is_own = each.dtype == tensor.dtype
                written[each.name] = tensor if is_own else tensor.new_empty(0, dtype=each.dtype)
        return written

    def read(self, payload: Payload) -> Payload:
        """Return a message in the common layout as its compressor made it."""
        if not self.doubled:
            return payload
        read = dict(payload)
        for name, fields in self.doubled.items():
            forms = [read.pop(each.name) for each in fields]
            read[name] = next((tensor for tensor in forms if tensor.numel()), forms[0])
        return read


def _longest(fields: Sequence[Field]) -> Field:
    """Return a field that can hold the content of any of `fields`, which share name and type."""
    numel = max(field.numel for field in fields)
    is_variable = any(field.variable or field.numel != numel for field in fields)
    parts = fields[0].parts if all(field.parts == fields[0].parts for field in fields) else ()
    return dataclasses.replace(fields[0], numel=numel, variable=is_variable, parts=parts)


def _without_strength(compressor: Compressor) -> Compressor:
    """Return `compressor` with a fixed ratio or threshold, so that those which read messages alike are equal."""
    return with_strength(compressor, 1.0) if strength_of(compressor) else compressor


def strength_of(compressor: Compressor) -> tuple[str, float] | None:
    """Return ``("ratio", value)`` or ``("threshold", value)`` of `compressor`; None if it has neither."""
    if isinstance(compressor, Wrapper):
        return strength_of(compressor.inner)
    names = getattr(compressor, "__dataclass_fields__", ())  # mypy knows that the base class is no dataclass
    return next(((name, getattr(compressor, name)) for name in STRENGTHS if name in names), None)


def with_strength(compressor: Compressor, value: float) -> Compressor:
    """Return `compressor` with `value` for its ratio or threshold; it must have one."""
    if isinstance(compressor, Wrapper):
        return dataclasses.replace(compressor, inner=with_strength(compressor.inner, value))
    strength = strength_of(compressor)
    assert strength is not None, compressor
    return cast(Compressor, dataclasses.replace(cast(Any, compressor), **{strength[0]: value}))


def by_rank_of(compressor: Compressor) -> ByRank | None:
    """Return the `ByRank` that `compressor` is or wraps, if any."""
    while isinstance(compressor, Wrapper):
        compressor = compressor.inner
    return compressor if isinstance(compressor, ByRank) else None


def require_size(compressor: Compressor, size: int) -> None:
    """Raise ConfigError if `compressor` is made for another number of ranks than `size`."""
    by_rank = by_rank_of(compressor)
    if by_rank and len(by_rank.compressors) != size:
        raise ConfigError(
            f"ByRank has {len(by_rank.compressors)} compressors for {size} ranks: give one for each, e.g. "
            "allocate(compressor, world.all_gather(len(dataset)))"
        )
