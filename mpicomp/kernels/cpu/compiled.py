"""Compilation: numba to machine code, once, kept on disk beside the source (or in ``NUMBA_CACHE_DIR``).

A kernel runs on the thread that calls it, without the interpreter's lock: it waits for memory more than for
arithmetic, and the other cores belong to other ranks. A few operations that compilers do not find by themselves are
written as vectors of 64 lanes, which LLVM cuts to the width that the processor has.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic as _intrinsic

F = TypeVar("F", bound=Callable[..., Any])

intrinsic = cast(Callable[[Any], Callable[..., Any]], _intrinsic)
"""The decorated function returns a signature for types, and what generates the code; calls leave `typing` out."""

LANES = 64
"""Entries that are compared at a time, one bit of a word for each."""


def compiled(function: F) -> F:
    """Have `function` compiled for the types of its arguments when it is first called with them."""
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    config: Any = numba.config
    before = config.CACHE_DIR
    config.CACHE_DIR = _folder(before)
    try:
        return cast(F, numba.njit(cache=True, **options)(function))
    except RuntimeError:  # no folder that can be written to
        return cast(F, numba.njit(**options)(function))
    finally:
        config.CACHE_DIR = before


@functools.cache
def _folder(wanted: str) -> str:
    """Return the folder for machine code; its name tells apart the sources of all kernels.

    numba itself looks only at the file of a function, and would go on using code with an old version of what it calls.
    """
    here = Path(__file__).parent
    sources = b"".join(path.read_bytes() for path in sorted(here.glob("*.py")))
    return str(
        (Path(wanted) if wanted else here / "__pycache__") / f"mpicomp-{hashlib.sha256(sources).hexdigest()[:16]}"
    )


def _address(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    """Return the address of entry `index` of a contiguous array."""
    data = context.make_array(array_type)(context, builder, value=array).data
    return builder.gep(data, [index], inbounds=True)


def _vector_at(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    """Return the address of entries ``index ... index + LANES - 1``."""
    vector = ir.VectorType(context.get_value_type(array_type.dtype), LANES)
    return builder.bitcast(_address(context, builder, array_type, array, index), vector.as_pointer())


def _load(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    """Return entries ``index ... index + LANES - 1`` as a vector."""
    pointer = _vector_at(context, builder, array_type, array, index)
    return builder.load(pointer, align=array_type.dtype.bitwidth // 8, typ=pointer.type.pointee)


def _splat(builder: Any, scalar: Any) -> Any:
    """Return a vector with `scalar` in every lane."""
    vector = ir.VectorType(scalar.type, LANES)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.Constant(ir.IntType(32), 0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), LANES), None)
    return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), zeros)


def _word(builder: Any, lanes: Any) -> Any:
    """Return booleans as the bits of a word, the first in the lowest bit."""
    return builder.bitcast(lanes, ir.IntType(LANES))


def _lanes(builder: Any, word: Any) -> Any:
    """Return the bits of a word as booleans."""
    return builder.bitcast(word, ir.VectorType(ir.IntType(1), LANES))


def _compare(builder: Any, floats: Any, low: Any) -> Any:
    """Return the word of the lanes of `floats` whose bits without the sign are at least `low`, a 64-bit integer."""
    lane = ir.IntType({"float": 32, "double": 64}[str(floats.type.element)])
    bits = builder.bitcast(floats, ir.VectorType(lane, LANES))
    bare = builder.and_(bits, _splat(builder, ir.Constant(lane, 2 ** (lane.width - 1) - 1)))
    low = builder.trunc(low, lane) if lane.width < 64 else low
    return _word(builder, builder.icmp_unsigned(">=", bare, _splat(builder, low)))


@intrinsic
def at_least(typing: Any, x: Any, start: Any, low: Any) -> Any:
    """Return the word whose bit i says whether ``magnitude(x[start + i]) >= low``."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, start, low = arguments
        return _compare(builder, _load(context, builder, signature.args[0], x, start), low)

    return types.uint64(x, types.int64, types.uint64), generate


@intrinsic
def difference_at_least(typing: Any, x: Any, y: Any, start: Any, low: Any) -> Any:
    """Return the word of `at_least` for ``x - y``."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, y, start, low = arguments
        a = _load(context, builder, signature.args[0], x, start)
        b = _load(context, builder, signature.args[1], y, start)
        return _compare(builder, builder.fsub(a, b), low)

    return types.uint64(x, y, types.int64, types.uint64), generate


@intrinsic
def magnitude(typing: Any, value: Any) -> Any:
    """Return the bits of a float without its sign, as a 64-bit integer: they order as magnitudes do, NaN last."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        lane = ir.IntType(signature.args[0].bitwidth)
        bits = builder.and_(builder.bitcast(arguments[0], lane), ir.Constant(lane, 2 ** (lane.width - 1) - 1))
        return builder.zext(bits, ir.IntType(64)) if lane.width < 64 else bits

    return types.uint64(value), generate


@intrinsic
def nonnegative(typing: Any, x: Any, start: Any) -> Any:
    """Return the word whose bit i says whether ``x[start + i] >= 0``."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        floats = _load(context, builder, signature.args[0], *arguments)
        return _word(builder, builder.fcmp_ordered(">=", floats, ir.Constant(floats.type, None)))

    return types.uint64(x, types.int64), generate


@intrinsic
def bit_plane(typing: Any, codes: Any, start: Any, bit: Any) -> Any:
    """Return the word whose bit i says whether ``codes[start + i] & bit``."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        lanes = _load(context, builder, signature.args[0], *arguments[:2])
        chosen = builder.and_(lanes, _splat(builder, arguments[2]))
        return _word(builder, builder.icmp_unsigned("!=", chosen, ir.Constant(lanes.type, None)))

    return types.uint64(codes, types.int64, codes.dtype), generate


@intrinsic
def set_plane(typing: Any, codes: Any, start: Any, word: Any, bit: Any) -> Any:
    """Add `bit` to those of ``codes[start + i]`` whose bit i is set in `word`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        codes, start, word, bit = arguments
        pointer = _vector_at(context, builder, signature.args[0], codes, start)
        align = signature.args[0].dtype.bitwidth // 8
        before = builder.load(pointer, align=align, typ=pointer.type.pointee)
        chosen = builder.select(_lanes(builder, word), _splat(builder, bit), ir.Constant(before.type, None))
        builder.store(builder.or_(before, chosen), pointer, align=align)
        return context.get_dummy_value()

    return types.void(codes, types.int64, types.uint64, codes.dtype), generate


@intrinsic
def add_signed(typing: Any, out: Any, start: Any, word: Any, value: Any) -> Any:
    """Add `value` to those of ``out[start + i]`` whose bit i is set in `word`, and subtract it from the others."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        out, start, word, value = arguments
        pointer = _vector_at(context, builder, signature.args[0], out, start)
        align = signature.args[0].dtype.bitwidth // 8
        before = builder.load(pointer, align=align, typ=pointer.type.pointee)
        plus, minus = _splat(builder, value), _splat(builder, builder.fneg(value))
        builder.store(builder.fadd(before, builder.select(_lanes(builder, word), plus, minus)), pointer, align=align)
        return context.get_dummy_value()

    return types.void(out, types.int64, types.uint64, out.dtype), generate


@intrinsic
def lowest(typing: Any, word: Any) -> Any:
    """Return the place of the lowest bit set in `word`; 64 for none."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 0))

    return types.int64(types.uint64), generate


@intrinsic
def ones(typing: Any, word: Any) -> Any:
    """Return the number of bits set in `word`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.int64(types.uint64), generate


@intrinsic
def fused(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """Return ``a * b + c``, rounded once."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fma(*arguments)

    return a(a, a, a), generate


@intrinsic
def read_word(typing: Any, data: Any, offset: Any) -> Any:
    """Return bytes ``offset ... offset + 7`` of `data` as a word, wherever they lie."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.bitcast(
            _address(context, builder, signature.args[0], *arguments), ir.IntType(64).as_pointer()
        )
        return builder.load(pointer, align=1, typ=ir.IntType(64))

    return types.uint64(data, types.int64), generate


@intrinsic
def write_word(typing: Any, data: Any, offset: Any, word: Any) -> Any:
    """Write `word` to bytes ``offset ... offset + 7`` of `data`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = _address(context, builder, signature.args[0], *arguments[:2])
        builder.store(arguments[2], builder.bitcast(place, ir.IntType(64).as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(data, types.int64, types.uint64), generate


@compiled
def write_bytes(word: Any, data: Any, offset: int, nbytes: int) -> None:
    """Write the first `nbytes` bytes of `word`."""
    if nbytes == 8:
        write_word(data, offset, word)
    else:
        for i in range(nbytes):
            data[offset + i] = np.uint8((word >> np.uint64(8 * i)) & np.uint64(0xFF))


@compiled
def read_bytes(data: Any, offset: int, nbytes: int) -> Any:
    """Return `nbytes` bytes as the lowest ones of a word."""
    if nbytes == 8:
        return read_word(data, offset)
    word = np.uint64(0)
    for i in range(nbytes):
        word |= np.uint64(data[offset + i]) << np.uint64(8 * i)
    return word
