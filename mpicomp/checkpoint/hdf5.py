"""One HDF5 file: the state of one rank after one step.

A leaf ``algorithm/x_hat`` is the dataset ``/algorithm/x_hat``. Tensors are chunked and carry Fletcher's 32-bit checksum
for each chunk; bfloat16 and float16 are stored as their 16 bits in uint16, with their type in the attribute ``dtype``.
Numbers and texts are scalar datasets with their type in the
attribute ``type``. The root's attributes say what the file is. Nothing is pickled, and plain h5py or
``h5ls -r`` shows everything.

Whether a file is the one that was written is decided by its size and SHA-256, before HDF5 looks at it: a damaged header
can make HDF5 crash. The checksums of the chunks then tell which tensor is damaged.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from mpicomp.checkpoint.tree import Leaf
from mpicomp.errors import CheckpointError

FORMAT = "mpicomp checkpoint"
VERSION = 1

CHUNK_NBYTES = 2**20
"""Bytes of a chunk, and what is written at a time: HDF5 keeps Python's lock meanwhile, about a millisecond."""

FLUSH_NBYTES = 2**25
"""Bytes written before the disk is asked to take them."""

_READ_NBYTES = 2**22

_AS_BITS = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
_FROM_BITS = {name: dtype for dtype, name in _AS_BITS.items()}
_PYTHON: dict[str, Callable[[h5py.Dataset], Leaf]] = {
    "bool": lambda dataset: bool(dataset[()]),
    "int": lambda dataset: int(dataset[()]),
    "float": lambda dataset: float(dataset[()]),
    "str": lambda dataset: str(dataset.asstr()[()]),
}


@dataclass(frozen=True)
class Digest:
    """What a file must be: its size in bytes and its SHA-256 in hexadecimal."""

    nbytes: int
    sha256: str


@dataclass(frozen=True)
class Entry:
    """One leaf of a file, as `mpicomp checkpoint show` lists it.

    Attributes:
        name: its path.
        shape: of a tensor; empty for numbers and texts.
        dtype: ``"float32"`` and the like; ``"int"``, ``"float"``, ``"bool"`` or ``"str"`` for numbers and texts.
        nbytes: of its values.
        value: the norm of a floating-point tensor, a number or a text; None for other tensors.

    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    value: float | int | str | None


def write(path: Path, leaves: Mapping[str, Leaf], attributes: Mapping[str, str | int | float]) -> Digest:
    """Write a new file, wait until it is on the disk, and return what it must be.

    Raises:
        CheckpointError: it could not be written; no part of it is left.

    """
    try:
        with _Output(path) as output:
            with h5py.File(output, "w", track_order=True) as file:
                file.attrs.update({"format": FORMAT, "version": VERSION, **attributes})
                for name, leaf in leaves.items():
                    _write_leaf(file, name, leaf)
            if output.failure is not None:
                raise output.failure
            flushed = output.flush_behind()
            digest = _digest(path)
            flushed.result()
        return digest
    except OSError as error:
        path.unlink(missing_ok=True)
        raise CheckpointError(f"{path}: cannot be written: {_reason(error)}") from error


class _Output(io.FileIO):
    """A file that HDF5 writes to, that never fails while it does, and that is brought to the disk meanwhile.

    HDF5 cannot give up a file: after a write that failed, as on a full disk, it tries again when it closes the file and
    when it frees its objects, and keeps the file open for good. So the first failure is kept here, for `write`.
    The disk works while checksums are computed, and not only afterwards.
    """

    failure: OSError | None = None

    def __init__(self, path: Path) -> None:
        super().__init__(path, "w+b")
        self._flusher = ThreadPoolExecutor(1, "flusher")
        self._flushed: Future[None] | None = None
        self._since_flush = 0

    def close(self) -> None:
        """Wait for the disk and close the file."""
        self._flusher.shutdown()
        super().close()

    def flush_behind(self) -> Future[None]:
        """Begin to bring to the disk what was written so far."""
        self._since_flush = 0
        self._flushed = self._flusher.submit(os.fsync, self.fileno())
        return self._flushed

    def write(self, data: Any) -> int:
        """Write all of `data`, unless an earlier write has failed."""
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view) and self.failure is None:
            try:
                done += super().write(view[done:]) or 0
            except OSError as error:
                self.failure = error
        self._since_flush += done
        if self._since_flush >= FLUSH_NBYTES and (self._flushed is None or self._flushed.done()):
            self.flush_behind()
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        """Set the length, unless a write has failed."""
        return super().truncate(size) if self.failure is None else size or 0


def read(path: Path, digest: Digest | None = None, names: Collection[str] | None = None) -> dict[str, Leaf]:
    """Return the leaves of a file, or those of `names`; tensors are on the CPU.

    Raises:
        CheckpointError: the file is missing, not the one that `digest` describes, or damaged; names what is wrong.

    """
    if digest is not None:
        check(path, digest)
    with _opened(path) as file:
        found = list(_names(file)) if names is None else list(names)
        return {name: _read_leaf(path, file, name) for name in found}


def check(path: Path, digest: Digest) -> None:
    """Raise CheckpointError, saying which part is damaged, unless the file is what `digest` describes."""
    if problem := _difference(path, digest):
        raise CheckpointError(f"{path}: {problem}")


def entries(path: Path) -> list[Entry]:
    """Return what is in a file, with the norms of its tensors; raise CheckpointError if it is damaged."""
    with _opened(path) as file:
        return [_entry(path, file, name) for name in _names(file)]


def damaged(path: Path, digest: Digest) -> list[str]:
    """Return one sentence for each thing that is wrong with a file; an empty list if it is sound."""
    problem = _difference(path, digest)
    if problem is None:
        return []
    if "SHA-256" not in problem:
        return [f"{path}: {problem}"]
    tensors = _damaged_tensors(path)
    where = tensors or ["the damage is outside of all tensors: in the header, a name or a number"]
    return [f"{path}: {problem}: {sentence}" for sentence in where]


def _write_leaf(file: h5py.File, name: str, leaf: Leaf) -> None:
    if not isinstance(leaf, Tensor):
        dataset = file.create_dataset(name, data=leaf, dtype=h5py.string_dtype() if isinstance(leaf, str) else None)
        dataset.attrs["type"] = type(leaf).__name__
        return
    values = _array(leaf)
    shape = values.shape
    if values.size == 0 or not shape:
        dataset = file.create_dataset(name, data=values)
    else:
        rows = max(1, min(shape[0], CHUNK_NBYTES * shape[0] // values.nbytes))
        dataset = file.create_dataset(name, shape, values.dtype, chunks=(rows, *shape[1:]), fletcher32=True)
        for start in range(0, shape[0], rows):
            dataset[start : start + rows] = values[start : start + rows]
    dataset.attrs["dtype"] = _dtype_name(leaf.dtype)


def _read_leaf(path: Path, file: h5py.File, name: str) -> Leaf:
    try:
        dataset = file[name]
        if "type" in dataset.attrs:
            return _PYTHON[dataset.attrs["type"]](dataset)
        kind = str(dataset.attrs["dtype"])
        values = torch.from_numpy(np.array(dataset[()]))
    except (KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: the dataset /{name} is damaged or missing: {_reason(error)}") from error
    return values.view(_FROM_BITS[kind]) if kind in _FROM_BITS else values


def _entry(path: Path, file: h5py.File, name: str) -> Entry:
    leaf = _read_leaf(path, file, name)
    if not isinstance(leaf, Tensor):
        nbytes = len(leaf.encode()) if isinstance(leaf, str) else file[name].dtype.itemsize
        return Entry(name, (), type(leaf).__name__, nbytes, leaf)
    norm = float(leaf.to(torch.float64).norm()) if leaf.is_floating_point() else None
    return Entry(name, tuple(leaf.shape), _dtype_name(leaf.dtype), leaf.numel() * leaf.element_size(), norm)


def _array(tensor: Tensor) -> np.ndarray[Any, Any]:
    host = tensor.detach().cpu().contiguous()
    if host.dtype in _AS_BITS:
        return host.view(torch.int16).numpy().view(np.uint16)
    return host.numpy()


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _names(file: h5py.File) -> Iterator[str]:
    """Yield the paths of all datasets, in the order in which they were written."""
    found: list[str] = []
    file.visititems(lambda name, node: found.append(name) if isinstance(node, h5py.Dataset) else None)
    yield from found


def _opened(path: Path) -> h5py.File:
    """Open a file of ours for reading; raise CheckpointError if it is none."""
    try:
        file = h5py.File(path, "r", track_order=True, locking="best-effort")
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: there is no such file") from error
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path}: is damaged, HDF5 cannot open it: {_reason(error)}") from error
    try:
        stored = file.attrs.get("format"), int(file.attrs.get("version", 0))
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        file.close()
        raise CheckpointError(f"{path}: is damaged: {_reason(error)}") from error
    if stored[0] != FORMAT:
        file.close()
        raise CheckpointError(f"{path}: is not a checkpoint of mpicomp")
    if stored[1] > VERSION:
        file.close()
        raise CheckpointError(newer(path, stored[1]))
    return file


def newer(path: Path, version: int) -> str:
    """Return the message about a file of a version that this program does not know."""
    return f"{path}: was written by a newer mpicomp (format version {version}, this program reads {VERSION}): update it"


def _difference(path: Path, digest: Digest) -> str | None:
    """Return in what a file differs from `digest`."""
    try:
        found = _digest(path, digest.nbytes)
    except FileNotFoundError:
        return "the file is missing"
    except OSError as error:
        return f"cannot be read: {_reason(error)}"
    if found.nbytes != digest.nbytes:
        verb = "is cut off" if found.nbytes < digest.nbytes else "has grown"
        return f"{verb}: {found.nbytes:,} bytes instead of {digest.nbytes:,}"
    return None if found == digest else "is damaged (SHA-256)"


def _digest(path: Path, expected_nbytes: int | None = None) -> Digest:
    """Return size and SHA-256; the latter is left out if the size is not the expected one."""
    nbytes = path.stat().st_size
    if expected_nbytes is not None and nbytes != expected_nbytes:
        return Digest(nbytes, "")
    total = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(_READ_NBYTES):
            total.update(block)
    return Digest(nbytes, total.hexdigest())


def _damaged_tensors(path: Path) -> list[str]:
    """Return a sentence for each dataset whose checksum is wrong."""
    wrong = []
    try:
        with _opened(path) as file:
            for name in _names(file):
                try:
                    _read_leaf(path, file, name)
                except CheckpointError:
                    wrong.append(f"the dataset /{name}")
    except CheckpointError as error:
        wrong.append(str(error).removeprefix(f"{path}: "))
    return wrong


def _reason(error: BaseException) -> str:
    """Return what the system says, out of HDF5's long message."""
    number = getattr(error, "errno", None)
    text = str(error)
    if number is None and "errno = " in text:
        number = int(text.split("errno = ")[1].split(",")[0])
    return os.strerror(number) if number else text
