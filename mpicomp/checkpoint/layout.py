"""Where everything lies in an HDF5 file that is going to be written.

HDF5 decides: it is made to write the file into memory, where the chunks of the tensors are left out as holes. What is
in memory then, a few kilobytes, and the tensors' own memory give the file from its first byte to its last, so it can be
written straight on, be hashed meanwhile, and fail (on a full disk) without HDF5 being in the middle of anything: HDF5
keeps a file open forever that it cannot complete.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from mpicomp.checkpoint.fletcher import CHECKSUM_NBYTES, fletcher32
from mpicomp.errors import CheckpointError
from mpicomp.state import Leaf

CHUNK_NBYTES = 2**20
"""Bytes of a chunk, at most. Large enough that the cost of each does not count, small enough for a core's cache."""

_FORMAT_OF_HDF5 = ("v110", "v110")
"""The first one that has checksums of its own in all headers, so that damage there is found, too."""

_PAGE_NBYTES = 4096

_PLACEHOLDER = b"a chunk belongs here"
"""With what HDF5 is given a chunk begins, to tell its write from those of headers that may come before it."""


@dataclass(frozen=True)
class Chunk:
    """A part of a tensor as it lies in the file: its bytes, zeros up to the size of a chunk, a checksum."""

    values: memoryview
    padding: int

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return len(self.values) + self.padding + CHECKSUM_NBYTES


def pieces(part: Chunk | bytes) -> list[bytes | memoryview]:
    """Return the bytes of a part of the file, in order; computes the checksum of a chunk."""
    if isinstance(part, bytes):
        return [part]
    return [part.values, bytes(part.padding), fletcher32(part.values, part.padding)]


class FileInMemory(io.RawIOBase):
    """A file that HDF5 writes, of which only what is not a hole is in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0
        self.chunks: dict[int, Chunk] = {}
        self._pages: dict[int, bytearray] = {}
        self._position = 0
        self._expected: Chunk | None = None

    def expect(self, chunk: Chunk) -> None:
        """Take the next write of `placeholder(chunk.nbytes)` for the place of `chunk`."""
        self.check_complete()
        self._expected = chunk

    def check_complete(self) -> None:
        """Assert that every expected chunk has its place."""
        assert self._expected is None, "HDF5 has not written the last chunk"

    def parts(self) -> Iterator[Chunk | bytes]:
        """Yield the whole file in order."""
        position = 0
        for start, chunk in sorted(self.chunks.items()):
            yield from self._between(position, start)
            yield chunk
            position = start + chunk.nbytes
        yield from self._between(position, self.nbytes)

    def readable(self) -> bool:
        """Return True."""
        return True

    def writable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to `offset` bytes from the start, from here or from the end."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.nbytes}[whence]
        self._position = base + offset
        return self._position

    def truncate(self, size: int | None = None) -> int:
        """Set the size of the file."""
        self.nbytes = self._position if size is None else size
        return self.nbytes

    def write(self, data: Any) -> int:
        """Keep `data`, or its place if it stands for the expected chunk."""
        size = len(data)
        if self._expected is not None and self._expected.nbytes == size and _is_placeholder(data):
            self.chunks[self._position] = self._expected
            self._expected = None
        else:
            for page, here, there in _pages(self._position, size):
                self._pages.setdefault(page, bytearray(_PAGE_NBYTES))[here] = data[there]
        self._position += size
        self.nbytes = max(self.nbytes, self._position)
        return size

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer`; what was never written, and what is a hole, is 0."""
        size = max(0, min(len(buffer), self.nbytes - self._position))
        for page, here, there in _pages(self._position, size):
            buffer[there] = self._pages.get(page, bytes(_PAGE_NBYTES))[here]
        self._position += size
        return size

    def _between(self, start: int, stop: int) -> Iterator[bytes]:
        for page, here, _ in _pages(start, stop - start):
            yield bytes(self._pages.get(page, bytes(_PAGE_NBYTES))[here])


def lay_out(leaves: Mapping[str, Leaf], attributes: Mapping[str, str | int | float]) -> FileInMemory:
    """Return the file with `leaves` as datasets and `attributes` of its root.

    Raises:
        CheckpointError: a leaf that HDF5 cannot store; names it.

    """
    memory = FileInMemory()
    with h5py.File(memory, "w", libver=_FORMAT_OF_HDF5) as file:
        file.attrs.update(attributes)
        for name, leaf in leaves.items():
            try:
                if isinstance(leaf, Tensor):
                    _tensor(memory, file, name, leaf)
                else:
                    _scalar(file, name, leaf)
            except (OSError, OverflowError, RuntimeError, TypeError, ValueError) as error:
                raise CheckpointError(f"{name!r} cannot be stored: {error}") from error
    memory.check_complete()
    return memory


def placeholder(nbytes: int) -> bytes:
    """Return what HDF5 is given for a chunk of `nbytes` bytes."""
    return _PLACEHOLDER[:nbytes].ljust(nbytes, b"\0")


def _is_placeholder(data: Any) -> bool:
    return _PLACEHOLDER.startswith(bytes(data[: len(_PLACEHOLDER)]))


def dtype_name(dtype: torch.dtype) -> str:
    """Return ``"float32"`` and the like."""
    return str(dtype).removeprefix("torch.")


def stored(tensor: Tensor) -> np.ndarray[Any, Any]:
    """Return the memory of a tensor on the CPU as HDF5 has it: bfloat16 and float16 as uint16."""
    if tensor.dtype in (torch.bfloat16, torch.float16):
        return tensor.view(torch.int16).numpy().view(np.uint16)
    return tensor.numpy()


def _scalar(file: h5py.File, name: str, leaf: Leaf) -> None:
    dataset = file.create_dataset(name, data=leaf, dtype=h5py.string_dtype() if isinstance(leaf, str) else None)
    dataset.attrs["type"] = type(leaf).__name__


def _tensor(memory: FileInMemory, file: h5py.File, name: str, tensor: Tensor) -> None:
    values = stored(tensor.detach().cpu().contiguous())
    if values.ndim == 0 or values.size == 0:  # HDF5 does not divide these into chunks
        dataset = file.create_dataset(name, data=values)
    else:
        chunks = _chunk_shape(values.shape, values.itemsize)
        dataset = file.create_dataset(name, values.shape, values.dtype, chunks=chunks, fletcher32=True)
        nbytes = math.prod(chunks) * values.itemsize
        filler = placeholder(nbytes + CHECKSUM_NBYTES)
        for start, part in _chunks(values, chunks):
            memory.expect(Chunk(part, nbytes - len(part)))
            dataset.id.write_direct_chunk(start, filler)
    dataset.attrs["dtype"] = dtype_name(tensor.dtype)


def _chunk_shape(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """Return the largest shape of a chunk of at most CHUNK_NBYTES that is one piece of the tensor's memory."""
    axis, inner = len(shape) - 1, itemsize
    while axis > 0 and inner * shape[axis] <= CHUNK_NBYTES:
        inner *= shape[axis]
        axis -= 1
    count = math.ceil(shape[axis] / max(1, CHUNK_NBYTES // inner))
    return (*[1] * axis, math.ceil(shape[axis] / count), *shape[axis + 1 :])


def _chunks(values: np.ndarray[Any, Any], shape: Sequence[int]) -> Iterator[tuple[tuple[int, ...], memoryview]]:
    """Yield the position and the bytes of each chunk; those at the end of an axis may be shorter."""
    data = values.reshape(-1).view(np.uint8).data
    axis = next((axis for axis, extent in enumerate(shape) if extent > 1), len(shape) - 1)
    inner = math.prod(values.shape[axis + 1 :]) * values.itemsize
    line = values.shape[axis] * inner
    for number, outer in enumerate(itertools.product(*map(range, values.shape[:axis]))):
        for start in range(0, values.shape[axis], shape[axis]):
            stop = min(start + shape[axis], values.shape[axis])
            yield (*outer, start, *[0] * (values.ndim - axis - 1)), data[number * line :][start * inner : stop * inner]


def _pages(start: int, nbytes: int) -> Iterator[tuple[int, slice, slice]]:
    """Yield the pages that hold `nbytes` bytes from `start` on, the part within the page, and that within the bytes."""
    position = start
    while position < start + nbytes:
        page, offset = divmod(position, _PAGE_NBYTES)
        size = min(_PAGE_NBYTES - offset, start + nbytes - position)
        yield page, slice(offset, offset + size), slice(position - start, position - start + size)
        position += size
