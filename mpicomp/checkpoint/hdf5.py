"""One HDF5 file: the state of one rank after one step, or those of the ranks of a node, or a model.

A leaf ``algorithm/x_hat`` is the dataset ``/algorithm/x_hat``. A tensor is stored contiguously, with its type in the
attribute ``dtype`` and the CRC-32 of its bytes in ``crc32``; bfloat16 and float16 are stored as their 16 bits in
uint16. In the file of a node, each rank has a group that is what its own file would be. Numbers and texts are
scalar datasets, with their type in the attribute ``type``. The root's attributes describe the file. Nothing is pickled;
plain h5py or ``h5ls -r`` shows everything. The same leaves give the same bytes.

HDF5 writes everything except the tensors, for which it leaves holes. This module then writes the tensors into the holes
itself, and hashes the file meanwhile. The reason: tensors may fill the disk, and HDF5 never closes a file that it
cannot complete.

Size and SHA-256 are checked before HDF5 opens a file, because a damaged header can make HDF5 crash or hang. If they are
wrong, the checksums in the file tell what is damaged (`mpicomp.checkpoint.damage`).
"""

from __future__ import annotations

import hashlib
import io
import os
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np
import torch
from torch import Tensor

from mpicomp.errors import CheckpointError
from mpicomp.state import Leaf

FORMAT = "mpicomp checkpoint"
VERSION = 1

_FORMAT_OF_HDF5 = ("v110", "v110")
"""The first version of the HDF5 file format with checksums in all headers, so that damage there is found, too."""

_PIECE_NBYTES = 2**20
"""Bytes read, or written and hashed, at a time: few enough for a core's cache."""

_FLUSH_NBYTES = 2**23
"""Bytes after which the system is asked to start writing them to the disk, to shorten the wait at the end."""

_PYTHON: dict[str, Callable[[h5py.Dataset], Leaf]] = {
    "bool": lambda dataset: bool(dataset[()]),
    "int": lambda dataset: int(dataset[()]),
    "float": lambda dataset: float(dataset[()]),
    "str": lambda dataset: str(dataset.asstr()[()]),
}


@dataclass(frozen=True)
class Digest:
    """The size of a file in bytes, and its SHA-256 in hexadecimal."""

    nbytes: int
    sha256: str


@dataclass(frozen=True)
class Entry:
    """One leaf of a file, as `mpicomp checkpoint show` lists it.

    Attributes:
        name: its path.
        shape: the shape of a tensor; empty for numbers and texts.
        dtype: ``"float32"`` and the like; ``"int"``, ``"float"``, ``"bool"`` or ``"str"`` for numbers and texts.
        nbytes: the size of its values in bytes.
        value: the norm of a floating-point tensor, a number or a text; None for other tensors.

    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    value: float | int | str | None


def write(
    path: Path,
    leaves: Mapping[str, Leaf],
    attributes: Mapping[str, str | int | float],
    form: str = FORMAT,
    links: Mapping[str, str] | None = None,
) -> Digest:
    """Write a file, wait until it is on the disk, and return its digest. Tensors on the CPU are not copied.

    Args:
        path: of the file.
        leaves: by name.
        attributes: of the root.
        form: the kind of file; `read` must be called with the same.
        links: further names of leaves, each with its name in `leaves`.

    Raises:
        CheckpointError: the file could not be written, and no part of it is left; or a leaf cannot be stored.

    """
    with _removed_on_failure(path):
        return _fill(path, _write_headers(path, leaves, {**_header(form), **attributes}, links or {}))


def write_group(
    path: Path,
    group: str,
    leaves: Mapping[str, Leaf],
    attributes: Mapping[str, str | int | float],
    is_first: bool,
    is_last: bool,
) -> Digest | None:
    """Write a group into a file and wait until it is on the disk; return the digest of the file after the last one.

    One process at a time may do this. Nothing of the other groups is read into memory, except that the file is read
    through, piece by piece, for the digest.

    Args:
        path: of the file.
        group: its name.
        leaves: by name.
        attributes: of the group.
        is_first: whether to make the file.
        is_last: whether no other group follows.

    Raises:
        CheckpointError: the group could not be written, and the file is removed with all groups.

    """
    with _removed_on_failure(path):
        _fill_group(path, _write_headers(path, leaves, attributes, {}, group, is_first))
        return Digest(path.stat().st_size, _sha256(path)) if is_last else None


@contextmanager
def _removed_on_failure(path: Path) -> Iterator[None]:
    """Remove a file that the block cannot complete; turn an OSError into a CheckpointError that names it."""
    try:
        yield
    except Exception as error:
        with suppress(OSError):
            path.unlink()
        if not isinstance(error, OSError):
            raise
        raise CheckpointError(f"{path}: cannot be written: {error.strerror or error}") from error


def read(path: Path, names: Collection[str] | None = None, form: str = FORMAT, group: str = "/") -> dict[str, Leaf]:
    """Return the leaves in a group of a file, all or only `names`; tensors are on the CPU.

    Only damage to headers and tensors is found reliably, and HDF5 may crash on a damaged file: see `difference`.

    Raises:
        CheckpointError: the file is missing or damaged; names what is wrong.

    """
    with _opened(path, form, group) as found:
        return {name: _leaf(path, found, name) for name in (_names(found) if names is None else names)}


def difference(path: Path, digest: Digest) -> str | None:
    """Return how a file differs from `digest`, or None if it does not; reads it without HDF5."""
    try:
        nbytes = path.stat().st_size
        if nbytes != digest.nbytes:
            verb = "is cut off" if nbytes < digest.nbytes else "has grown"
            return f"{verb}: {nbytes:,} bytes instead of {digest.nbytes:,}"
        return None if _sha256(path) == digest.sha256 else "is damaged (SHA-256)"
    except FileNotFoundError:
        return "the file is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"


def entries(path: Path, group: str = "/") -> list[Entry]:
    """Return the entries in a group of a file that is as it was written, with the norms of its tensors."""
    with _opened(path, group=group) as found:
        return [_entry(path, found, name) for name in _names(found)]


def unreadable(path: Path) -> list[str]:
    """Return the names of damaged datasets. If a header is damaged, HDF5 may crash or hang.

    Raises:
        CheckpointError: the file cannot be opened, or its datasets cannot be listed.

    """
    damaged = []
    with _opened(path) as file:
        for name in _names(file):
            try:
                _leaf(path, file, name)
            except CheckpointError:
                damaged.append(name)
    return damaged


def newer(path: Path, version: int, known: int = VERSION) -> str:
    """Return the error message for a file of a newer version than this program knows."""
    return f"{path}: was written by a newer mpicomp (format version {version}, this program reads {known}): update it"


class _Disk(io.FileIO):
    """A file for HDF5 that hides from it what fails; `error` is the first error, after which it pretends to work."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write all of `data`."""
        rest = memoryview(data)
        with self._hiding():
            while rest and self.error is None:
                rest = rest[super().write(rest) :]
        return len(data)

    def truncate(self, size: int | None = None) -> int:
        """Set the length to `size`, by default to where the file stands."""
        size = self.tell() if size is None else size
        with self._hiding():
            if self.error is None:
                super().truncate(size)
        return size

    @contextmanager
    def _hiding(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.error = self.error or error


def _header(form: str) -> dict[str, str | int | float]:
    return {"format": form, "version": VERSION}


def _write_headers(
    path: Path,
    leaves: Mapping[str, Leaf],
    attributes: Mapping[str, str | int | float],
    links: Mapping[str, str],
    group: str = "/",
    is_new: bool = True,
) -> dict[int, memoryview]:
    """Let HDF5 write a file or a group with holes; return the offset of each hole and the tensor that belongs there."""
    holes: dict[int, memoryview] = {}
    sums: list[tuple[h5py.Dataset, Future[int]]] = []
    with _Disk(path, "w+" if is_new else "r+") as disk:
        mode = "w" if is_new else "r+"
        with ThreadPoolExecutor(2) as summing, h5py.File(disk, mode, libver=_FORMAT_OF_HDF5) as opened:
            file: h5py.Group = opened
            if group != "/":
                if is_new:
                    opened.attrs.update(_header(FORMAT))
                file = opened.create_group(group)
            file.attrs.update(attributes)
            for name, leaf in leaves.items():
                try:
                    if isinstance(leaf, Tensor):
                        values = _stored(leaf.detach().cpu().contiguous())
                        if values.ndim and values.size:
                            dataset = file.create_dataset(name, values.shape, values.dtype, dcpl=_hole())
                            holes[dataset.id.get_offset()] = _bytes(values)
                        else:
                            dataset = file.create_dataset(name, data=values)
                        dataset.attrs["dtype"] = _dtype_name(leaf.dtype)
                        sums.append((dataset, summing.submit(zlib.crc32, _bytes(values))))
                    else:
                        text = h5py.string_dtype() if isinstance(leaf, str) else None
                        dataset = file.create_dataset(name, data=leaf, dtype=text)
                        dataset.attrs["type"] = type(leaf).__name__
                except (OSError, OverflowError, RuntimeError, TypeError, ValueError) as error:
                    raise CheckpointError(f"{name!r} cannot be stored: {error}") from error
            for name, other in links.items():
                file[name] = file[other]
            for dataset, crc32 in sums:
                dataset.attrs["crc32"] = np.uint32(crc32.result())
        if disk.error is not None:
            raise disk.error
    return holes


def _fill(path: Path, holes: dict[int, memoryview]) -> Digest:
    """Write the tensors into the holes of a file, wait until it is on the disk, and return its digest."""
    sha256 = hashlib.sha256()
    with ThreadPoolExecutor(1) as hashing, path.open("r+b") as file:
        flushed = 0
        for start, values in sorted(holes.items()):
            hashing.submit(sha256.update, file.read(start - file.tell()))
            for first in range(0, len(values), _PIECE_NBYTES):
                piece = values[first : first + _PIECE_NBYTES]
                hashing.submit(sha256.update, piece)
                file.write(piece)
                if (written := file.tell()) - flushed >= _FLUSH_NBYTES:
                    _flush_soon(file, flushed, written)
                    flushed = written
        hashing.submit(sha256.update, file.read())
        file.flush()
        os.fsync(file.fileno())
        nbytes = file.tell()
    return Digest(nbytes, sha256.hexdigest())


def _fill_group(path: Path, holes: dict[int, memoryview]) -> None:
    """Write the tensors into the holes of a group, and wait until they are on the disk."""
    with path.open("r+b") as file:
        for start, values in holes.items():
            file.seek(start)
            file.write(values)
        file.flush()
        os.fsync(file.fileno())


def _hole() -> h5py.h5p.PropDCID:
    """Return the creation properties of a dataset that gets its place in the file, but no content."""
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    return properties


def _flush_soon(file: BinaryIO, start: int, stop: int) -> None:
    if hasattr(os, "posix_fadvise"):  # not on macOS
        os.posix_fadvise(file.fileno(), start, stop - start, os.POSIX_FADV_DONTNEED)


@contextmanager
def _opened(path: Path, form: str = FORMAT, group: str = "/") -> Iterator[h5py.Group]:
    """Open a file for reading and yield a group of it; raise CheckpointError unless this module wrote it."""
    try:
        with h5py.File(path, "r", locking="best-effort") as file:
            if file.attrs.get("format") != form:
                raise CheckpointError(f"{path}: is not a {form.removeprefix('mpicomp ')} of mpicomp")
            if (version := int(file.attrs["version"])) > VERSION:
                raise CheckpointError(newer(path, version))
            yield file[group]
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: there is no such file") from error
    except Exception as error:  # whatever h5py makes of damaged bytes
        raise CheckpointError(f"{path}: is damaged, or no HDF5 file: {error}") from error


def _names(group: h5py.Group, prefix: str = "") -> list[str]:
    """Return the paths of all datasets, with all names of a dataset that has several."""
    found: list[str] = []
    for name, node in group.items():
        found += _names(node, f"{prefix}{name}/") if isinstance(node, h5py.Group) else [prefix + name]
    return found


def _leaf(path: Path, group: h5py.Group, name: str) -> Leaf:
    try:
        dataset = group[name]
        if "type" in dataset.attrs:
            return _PYTHON[dataset.attrs["type"]](dataset)
        return _tensor(dataset, getattr(torch, dataset.attrs["dtype"]))
    except Exception as error:  # whatever h5py makes of damaged bytes
        full = f"{group.name.rstrip('/')}/{name}"
        raise CheckpointError(f"{path}: the dataset {full} is damaged or missing: {error}") from error


def _tensor(dataset: h5py.Dataset, dtype: torch.dtype) -> Tensor:
    tensor = torch.empty(dataset.shape, dtype=dtype)
    values = _stored(tensor)
    if values.dtype != dataset.dtype:
        raise TypeError(f"{dataset.dtype} instead of {values.dtype}")
    if values.size:
        dataset.read_direct(values)
    if zlib.crc32(_bytes(values)) != dataset.attrs["crc32"]:
        raise ValueError("its CRC-32 is another one")
    return tensor


def _stored(tensor: Tensor) -> np.ndarray[Any, Any]:
    """Return a tensor on the CPU as an array of the stored type, sharing memory: bfloat16 and float16 as uint16."""
    if tensor.dtype in (torch.bfloat16, torch.float16):
        return tensor.view(torch.int16).numpy().view(np.uint16)
    return tensor.numpy()


def _bytes(values: np.ndarray[Any, Any]) -> memoryview:
    return values.reshape(-1).view(np.uint8).data


def _dtype_name(dtype: torch.dtype) -> str:
    """Return the name of `dtype` without ``torch.``, such as ``"float32"``."""
    return str(dtype).removeprefix("torch.")


def _entry(path: Path, group: h5py.Group, name: str) -> Entry:
    leaf = _leaf(path, group, name)
    if not isinstance(leaf, Tensor):
        nbytes = len(leaf.encode()) if isinstance(leaf, str) else group[name].dtype.itemsize
        return Entry(name, (), type(leaf).__name__, nbytes, leaf)
    norm = float(torch.linalg.vector_norm(leaf, dtype=torch.float64)) if leaf.is_floating_point() else None
    return Entry(name, tuple(leaf.shape), _dtype_name(leaf.dtype), leaf.numel() * leaf.element_size(), norm)


def _sha256(path: Path) -> str:
    total, buffer = hashlib.sha256(), memoryview(bytearray(_PIECE_NBYTES))
    with path.open("rb", buffering=0) as file:
        while nbytes := file.readinto(buffer):
            total.update(buffer[:nbytes])
    return total.hexdigest()
