"""What a message is, and how it lies on the wire.

A message is a `Payload`, a dict of tensors. Its `Layout` is known before a byte is sent: which fields, of which type,
how many entries at most. On the wire the fields lie one behind the other in one contiguous buffer of bytes, each
aligned to its element size; a field of variable length is preceded by its count. Bytes predicted from the layout are
the bytes sent. Indices take 16 or 32 bits, or fewer in a code; they are not sent as 64-bit integers or floats.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mpicomp.errors import DivergenceError
from mpicomp.kernels.reference import NAN, NOT_FINITE, check_code, trim_code
from mpicomp.timing import traced

LONGEST = 2**31
"""Entries of the longest vector that indices of 32 bits reach."""

Payload = dict[str, Tensor]
"""A message: named, contiguous, one-dimensional tensors in the order of its layout, which names those that are sent."""


@dataclass(frozen=True)
class Spec:
    """The flat vector of a model: which tensors it is made of, in order.

    Attributes:
        names: a name for each tensor.
        shapes: its shape.
        dtype: the type of all of them.

    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype = torch.float32

    @classmethod
    def flat(cls, numel: int, dtype: torch.dtype = torch.float32) -> Spec:
        """Return the spec of a vector (numel,) without inner structure."""
        return cls(("x",), ((numel,),), dtype)

    @cached_property
    def numel(self) -> int:
        """The number of entries of the flat vector."""
        return sum(math.prod(shape) for shape in self.shapes)

    @cached_property
    def parts(self) -> tuple[Spec, ...]:
        """The specs of the single tensors."""
        return tuple(Spec((n,), (s,), self.dtype) for n, s in zip(self.names, self.shapes, strict=True))

    @property
    def is_vector(self) -> bool:
        """Whether it is one tensor of less than two dimensions."""
        return len(self.shapes) == 1 and len(self.shapes[0]) < 2

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the tensors of the flat `x` (numel,) as flat views."""
        return torch.split(x, [part.numel for part in self.parts])


@dataclass(frozen=True)
class Field:
    """One tensor of a message.

    Attributes:
        name: its key in the payload.
        dtype: its element type.
        numel: the number of entries; the most that there can be if `variable`.
        variable: whether a message may hold fewer; its count then travels as 4 bytes ahead of it.
        must_be: what the entries must be, and are unless the vector has a NaN, or an infinity. Compressors raise
            DivergenceError; on a device, where they would have to wait, who sends the message does.
        parts: names of tensors, and how many consecutive entries come from each, for that error.
        code_of: the entries of the vector, if this is the code of its indices, with zeros behind it where a device made
            it; else 0.
        count: how many indices the code is of; 0 if as many as there are ``values``.
        has_zeros_behind: whether zeros at the end of these bytes are not sent, which only the host can cut.
        on_host: whether the tensor, of one number, stays in host memory, as the host must know it to read the message.

    """

    name: str
    dtype: torch.dtype
    numel: int
    variable: bool = False
    must_be: Literal["", "a number", "finite"] = ""
    parts: tuple[tuple[str, int], ...] = ()
    code_of: int = 0
    count: int = 0
    has_zeros_behind: bool = False
    on_host: bool = False

    @property
    def is_cut(self) -> bool:
        """Whether the host cuts zeros behind it that a device has left there."""
        return bool(self.code_of) or self.has_zeros_behind

    def check(self, entries: Tensor) -> None:
        """Raise DivergenceError unless `entries` are what they must be; names the tensor."""
        if not self.must_be:
            return
        wrong = entries.isnan() if self.must_be == "a number" else ~entries.isfinite()
        if bool(wrong.any()):
            place, name = int(wrong.nonzero()[0]), ""
            for part, count in self.parts:
                if 0 <= place < count:
                    name = f"{part}: "
                place -= count
            raise DivergenceError(name + (NAN if self.must_be == "a number" else NOT_FINITE))


def _aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


@dataclass(frozen=True)
class Layout:
    """How a payload lies in a contiguous buffer of bytes."""

    fields: tuple[Field, ...]

    def _places(self, counts: Mapping[str, int] | None) -> Iterator[tuple[Field, int, int, int]]:
        """Yield ``(field, offset of its count, offset of its data, entries)``; `counts` of None means the most."""
        offset = 0
        for field in self.fields:
            count_at = offset
            if field.variable:
                count_at = _aligned(offset, 4)
                offset = count_at + 4
            numel = counts[field.name] if counts is not None and field.variable else field.numel
            offset = _aligned(offset, field.dtype.itemsize)
            yield field, count_at, offset, numel
            offset += numel * field.dtype.itemsize

    @cached_property
    def nbytes(self) -> int:
        """The bytes of the longest possible message."""
        return self._end(None)

    def _end(self, counts: Mapping[str, int] | None) -> int:
        end = 0
        for field, _, offset, numel in self._places(counts):
            end = offset + numel * field.dtype.itemsize
        return end

    @cached_property
    def is_fixed(self) -> bool:
        """Whether all messages are equally long."""
        return not any(field.variable for field in self.fields)

    def nbytes_of(self, payload: Payload) -> int:
        """Return the bytes that `payload` takes on the wire."""
        return self.nbytes if self.is_fixed else self._end({name: tensor.numel() for name, tensor in payload.items()})

    @traced("pack")
    def pack(self, payload: Payload, wire: Tensor, non_blocking: bool = True) -> int:
        """Copy `payload` to the front of `wire`, a uint8 vector of at least `nbytes`; return the bytes used."""
        end = 0
        counts = {name: tensor.numel() for name, tensor in payload.items()}
        for field, count_at, offset, numel in self._places(counts):
            tensor = payload[field.name]
            if tensor.dtype != field.dtype or tensor.numel() != numel or numel > field.numel:
                most = "at most " if field.variable else ""
                raise ValueError(
                    f"a message has {tensor.numel()} entries of {tensor.dtype} for {field.name!r}, but its layout says "
                    f"{most}{field.numel} of {field.dtype}: compress() and layout() of the compressor must agree"
                )
            if field.variable:
                wire[count_at : count_at + 4].view(torch.int32).fill_(numel)
            end = offset + numel * field.dtype.itemsize
            if field.on_host:
                wire[offset:end].view(field.dtype).fill_(tensor.item())  # a copy to a device would wait for it
            else:
                wire[offset:end].view(field.dtype).copy_(tensor, non_blocking=non_blocking)
        return end

    @traced("unpack")
    def unpack(self, wire: Tensor) -> Payload:
        """Return the payload in `wire`; its tensors are views of `wire`, but for those that must be on the host."""
        payload: Payload = {}
        offset = 0
        for field in self.fields:
            numel = field.numel
            if field.variable:
                offset = _aligned(offset, 4)
                numel = int(wire[offset : offset + 4].view(torch.int32).item())
                assert 0 <= numel <= field.numel, f"a count of {numel} for {field}: sender and receiver differ"
                offset += 4
            offset = _aligned(offset, field.dtype.itemsize)
            end = offset + numel * field.dtype.itemsize
            view = wire[offset:end].view(field.dtype)
            payload[field.name] = view.cpu() if field.on_host else view
            offset = end
        return payload

    def finish(self, wire: Tensor) -> int:
        """Check a message that was packed on a device, and has come to the host in `wire`; return the bytes used.

        They are fewer than before by the zeros that are cut.

        Raises:
            DivergenceError: a NaN or an infinity among what was compressed.

        """
        if not any(field.must_be or field.is_cut for field in self.fields):
            return wire.numel()
        payload = self.unpack(wire)
        has_moved = False
        for field in self.fields:
            tensor = payload[field.name]
            field.check(tensor)
            if field.is_cut:
                tensor = trim_code(tensor)
            payload[field.name] = tensor.clone() if has_moved else tensor  # it would be copied over itself
            has_moved |= field.is_cut
        return self.pack(payload, wire, non_blocking=False) if has_moved else wire.numel()

    def check_codes(self, payload: Payload) -> None:
        """Raise IndexError if a code in `payload`, which is in host memory, is damaged: a device would have to wait."""
        for field in self.fields:
            code = payload[field.name]
            if field.code_of and code.numel():
                count = field.count or payload[field.name.partition("indices")[0] + "values"].numel()
                check_code(code, count, field.code_of)

    @staticmethod
    def concatenate(layouts: Sequence[Layout], names: Sequence[str] = ()) -> Layout:
        """Return one layout for several messages; the fields of message i are named ``"i.name"``.

        `names` are those of the tensors that the messages are of.
        """
        return Layout(
            tuple(
                replace(
                    field,
                    name=f"{i}.{field.name}",
                    parts=((names[i], field.numel),) if names else field.parts,
                )
                for i, layout in enumerate(layouts)
                for field in layout.fields
            )
        )


class Wire:
    """Memory of the host for messages of one layout, one after the other.

    It does as `Layout.pack` and `Layout.unpack`. Where all messages are equally long, their fields have always the same
    place, and the views of them are made once: to make them takes longer than to copy a short message.

    Args:
        layout: of the messages.
        memory: (layout.nbytes,) uint8; shorter where a sender had another layout, whose messages are to be refused.

    Attributes:
        layout: of the messages.
        array: the memory.

    """

    def __init__(self, layout: Layout, memory: Tensor) -> None:
        self.layout = layout
        self.array: np.ndarray = memory.numpy()
        self._memory = memory
        self._views = None
        if layout.is_fixed and memory.numel() == layout.nbytes and not any(field.on_host for field in layout.fields):
            self._views = layout.unpack(memory)

    @traced("pack")
    def pack(self, payload: Payload) -> np.ndarray:
        """Copy `payload` here, and return the bytes used."""
        if self._views is None:
            return self.array[: self.layout.pack(payload, self._memory)]
        for name, view in self._views.items():
            tensor = payload[name]
            assert tensor.dtype == view.dtype and tensor.shape == view.shape, (name, tensor.dtype, tensor.shape)
            view.copy_(tensor)
        return self.array

    @traced("unpack")
    def unpack(self, nbytes: int) -> Payload:
        """Return the payload of `nbytes` bytes that is here; its tensors are views."""
        if self._views is None or nbytes != self.layout.nbytes:
            return self.layout.unpack(self._memory[:nbytes])
        return dict(self._views)


def index_dtype(numel: int) -> torch.dtype:
    """Return the narrowest type that holds the indices of a vector of `numel` entries: 16 or 32 bits.

    Indices from 32768 on are stored modulo 2**16 in int16.
    """
    if numel > LONGEST:
        raise ValueError(f"a vector of {numel} entries is too long for 32-bit indices: compress per tensor")
    return torch.int16 if numel <= 2**16 else torch.int32
