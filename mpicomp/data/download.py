"""Download data sets once, check them by hash, and write them as the files that `mpicomp.data.datasets.load` reads.

The content is checked by the SHA-256 of the archive or text, or of the decoded arrays of pixels and labels. Files in
the data folder are replaced atomically.
"""

from __future__ import annotations

import hashlib
import struct
import tarfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import h5py
import numpy as np

from mpicomp.data import files
from mpicomp.data.datasets import load
from mpicomp.data.origins import ORIGINS, Bytes, Origin
from mpicomp.errors import DataError, unknown_name
from mpicomp.files import replacing

Progress = Callable[[str, int, int | None], None]
"""Called with ``(file, bytes so far, all bytes or None)`` while a download runs."""

TIMEOUT_S = 30.0
PIECE = 1 << 20


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
