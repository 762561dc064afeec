"""Download data sets once, check them by hash, and write them as the files that `mpicomp.data.datasets.load` reads.

The content is checked by the SHA-256 of the archive or text, or of the decoded arrays of pixels and labels. Files in
the data folder are replaced atomically.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import struct
import tarfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import h5py
import numpy as np
import numpy.typing as npt

from mpicomp.data import files
from mpicomp.data.datasets import load
from mpicomp.errors import DataError, unknown_name
from mpicomp.files import replacing

Bytes = npt.NDArray[np.uint8]
Progress = Callable[[str, int, int | None], None]
"""Called with ``(file, bytes so far, all bytes or None)`` while a download runs."""

TIMEOUT_S = 30.0
PIECE = 1 << 20

CIFAR_ARCHIVE = "cifar-10-binary.tar.gz"
CIFAR_RECORD = 1 + 3 * 32 * 32


@dataclass(frozen=True)
class Origin:
    """The source of a data set.

    Attributes:
        file: its name in the data folder.
        base: the address of the folder of the downloads, ending in a slash.
        downloads: the names of the downloads.
        sha256: the hash of a download by its name, or of an array by its path in `file`; not all are known.
        decode: makes the arrays of `file`, by their paths, from the downloads; None if the download is the file itself.

    """

    file: str
    base: str
    downloads: tuple[str, ...]
    sha256: dict[str, str]
    decode: Callable[[dict[str, bytes]], dict[str, Bytes]] | None = field(default=None, repr=False)


def decode_fashion_mnist(downloads: dict[str, bytes]) -> dict[str, Bytes]:
    """Return the arrays of the four gzipped IDX files."""
    arrays = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        arrays[f"{split}/images"] = read_idx(downloads[f"{prefix}-images-idx3-ubyte.gz"])
        arrays[f"{split}/labels"] = read_idx(downloads[f"{prefix}-labels-idx1-ubyte.gz"])
    return arrays


def decode_cifar10(downloads: dict[str, bytes]) -> dict[str, Bytes]:
    """Return the arrays of the binary version: records of one label and 32x32 red, green and blue bytes."""
    members = {f"data_batch_{i}.bin": "train" for i in range(1, 6)} | {"test_batch.bin": "test"}
    pieces: dict[str, list[Bytes]] = {"train": [], "test": []}
    with tarfile.open(fileobj=io.BytesIO(downloads[CIFAR_ARCHIVE]), mode="r:gz") as archive:
        for name, split in members.items():
            member = archive.extractfile(f"cifar-10-batches-bin/{name}")
            if member is None:
                raise ValueError(f"{name} is not a file")
            pieces[split].append(np.frombuffer(member.read(), dtype=np.uint8).reshape(-1, CIFAR_RECORD))
    arrays = {}
    for split, records in ((split, np.concatenate(parts)) for split, parts in pieces.items()):
        arrays[f"{split}/images"] = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1).copy()
        arrays[f"{split}/labels"] = records[:, 0].copy()
    return arrays


def read_idx(packed: bytes) -> Bytes:
    """Return the uint8 array of a gzipped IDX file: zero, zero, type 8, dimensions, big-endian extents, bytes.

    Raises:
        ValueError: it is something else.

    """
    plain = gzip.decompress(packed)
    zeros, kind, dimensions = struct.unpack_from(">HBB", plain)
    if zeros != 0 or kind != 8:
        raise ValueError("it is not an IDX file of bytes")
    shape = struct.unpack_from(f">{dimensions}I", plain, 4)
    return np.frombuffer(plain, dtype=np.uint8, offset=4 + 4 * dimensions).reshape(shape)


ORIGINS: dict[str, Origin] = {
    "fashion_mnist": Origin(
        file="fashion_mnist.h5",
        base="https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
        downloads=(
            "train-images-idx3-ubyte.gz",
            "train-labels-idx1-ubyte.gz",
            "t10k-images-idx3-ubyte.gz",
            "t10k-labels-idx1-ubyte.gz",
        ),
        sha256={
            "train/images": "2e487a6c89124f78f2d7521542223cafe96f7123c3ca13d447772ac6ecbb3012",
            "train/labels": "657fbd221bfc9f4198cc14b5619cc33ec57c58dd0e47af4d99d6650759e869a7",
            "test/images": "c867c93ff95360594e8ec3287995350b824dd110b11595c0e13d5423f621867a",
            "test/labels": "3d0e6c6ea990b53b6f8f500a41cac93881d981b315f84578b7d915342ade01e9",
        },
        decode=decode_fashion_mnist,
    ),
    "cifar10": Origin(
        file="cifar10.h5",
        base="https://www.cs.toronto.edu/~kriz/",
        downloads=(CIFAR_ARCHIVE,),
        # The archive vouches for the pixels; a file made otherwise is checked by the hashes that it records itself.
        sha256={
            CIFAR_ARCHIVE: "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
            "train/labels": "2b7cd2f24487317614016b72ffd53071c3062f592f0eb300c18a770d41ae1253",
            "test/labels": "cec8a24a1e92aa2ecaa0bbd3dbfa86bf6cd8759fbd209a832824c8cf0afca9d5",
        },
        decode=decode_cifar10,
    ),
    "tinyshakespeare": Origin(
        file="tinyshakespeare.txt",
        base="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/",
        downloads=("input.txt",),
        sha256={"input.txt": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"},
    ),
}


def fetch(kind: str, folder: Path, base: str | None = None, progress: Progress | None = None) -> Path:
    """Download `kind` into `folder`, check it, and return the path of its file.

    Args:
        kind: a name in `ORIGINS`.
        folder: the data folder; made if it is missing.
        base: another address of the folder of the downloads, e.g. of a mirror (``https:``, ``file:``).
        progress: called with the progress of the download.

    Raises:
        DataError: there is no connection, a hash differs, or the folder cannot be written.

    """
    origin = _origin(kind)
    address = (base or origin.base).rstrip("/") + "/"
    downloads = {name: _download(kind, urljoin(address, name), name, progress) for name in origin.downloads}
    for name, content in downloads.items():
        _compare(kind, origin, name, hashlib.sha256(content).hexdigest(), address)
    path = folder / origin.file
    arrays = _decode(kind, origin, downloads, address) if origin.decode else {}
    for name, array in arrays.items():
        _compare(kind, origin, name, sha256(array), address)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            if arrays:
                write_arrays(partial, arrays)
            else:
                partial.write_bytes(downloads[origin.downloads[0]])
    except OSError as error:
        raise DataError(f"cannot write {path} ({error}). Choose another folder with --to.") from error
    return path


def check(kind: str, path: Path | None = None) -> dict[str, bool]:
    """Check the file of `kind` in the data folder (see `mpicomp.data.files.find`) by its hashes.

    Returns:
        For each part of the file, whether its hash is known and was checked.

    Raises:
        DataError: the file is missing or damaged, or a hash differs.

    """
    origin = _origin(kind)
    file = files.find(kind, origin.file, path)
    if origin.decode is None:
        if hashlib.sha256(file.read_bytes()).hexdigest() != origin.sha256[origin.downloads[0]]:
            raise files.damaged(kind, file, "its SHA-256 is not that of the original")
        return {origin.file: True}
    load(kind, file)
    verdict = {}
    with h5py.File(file, "r", locking="best-effort") as opened:
        for name in ("train/images", "train/labels", "test/images", "test/labels"):
            expected = origin.sha256.get(name) or recorded_sha256(opened, name)
            if expected is not None and sha256(opened[name][:]) != expected:
                raise files.damaged(kind, file, f"the SHA-256 of {name} is not {expected}")
            verdict[name] = expected is not None
    return verdict


def sha256(array: Bytes) -> str:
    """Return the SHA-256 of the bytes of an array in C order, in hexadecimal."""
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()


def recorded_sha256(file: h5py.File, name: str) -> str | None:
    """Return the hash that the group of an array records for it, if any."""
    group, array = name.split("/")
    recorded = file[group].attrs.get(f"{array}_sha256")
    return None if recorded is None else str(recorded)


def write_arrays(path: Path, arrays: dict[str, Bytes]) -> None:
    """Write arrays into an HDF5 file, with their hashes as attributes of their groups."""
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            options: dict[str, Any] = {"chunks": (1000, *array.shape[1:]), "compression": "gzip", "compression_opts": 1}
            stored = file.create_dataset(name, data=array, **options if len(array) > 1000 else {})
            stored.parent.attrs[f"{name.split('/')[1]}_sha256"] = sha256(array)


def _origin(kind: str) -> Origin:
    if kind not in ORIGINS:
        raise unknown_name("the data set", kind, ORIGINS)
    return ORIGINS[kind]


def _download(kind: str, url: str, name: str, progress: Progress | None) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response:
            length = response.headers.get("Content-Length")
            total = int(length) if length else None
            content = bytearray()
            while piece := response.read(PIECE):
                content += piece
                if progress is not None:
                    progress(name, len(content), total)
    except (OSError, ValueError, HTTPException) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        origin = ORIGINS[kind]
        raise DataError(
            f"cannot download {url} ({reason}). On a machine with internet, download {', '.join(origin.downloads)} "
            f"from {origin.base}, copy it here, and run: mpicomp data fetch {kind} --from FOLDER."
        ) from error
    if total is not None and len(content) != total:
        raise DataError(f"the download of {url} ended after {len(content)} of {total} bytes. Try again.")
    return bytes(content)


def _compare(kind: str, origin: Origin, name: str, found: str, address: str) -> None:
    expected = origin.sha256.get(name, found)
    if found != expected:
        raise DataError(
            f"{kind}: {name} from {address} is not the original: its SHA-256 is {found}, but should be {expected}. "
            "Nothing was written. Try again, or another source with --from."
        )


def _decode(kind: str, origin: Origin, downloads: dict[str, bytes], address: str) -> dict[str, Bytes]:
    assert origin.decode is not None
    try:
        return origin.decode(downloads)
    except (OSError, EOFError, KeyError, ValueError, struct.error, tarfile.TarError, zlib.error) as error:
        raise DataError(
            f"{kind}: what {address} holds cannot be decoded ({error}). Try another source with --from."
        ) from error
