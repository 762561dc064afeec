"""The files of data sets: where they are, and what is said of those that are missing or damaged.

The folder is ``data.path``, else the environment variable ``MPICOMP_DATA``, else ``./data``.
"""

from __future__ import annotations

import os
from pathlib import Path

from mpicomp.data.origins import ORIGINS
from mpicomp.errors import DataError

FOLDER_VARIABLE = "MPICOMP_DATA"


def data_folder(path: Path | None) -> Path:
    """Return the data folder: `path`, else the environment variable ``MPICOMP_DATA``, else ``./data``."""
    return path if path is not None else Path(os.environ.get(FOLDER_VARIABLE) or "data")


def find(kind: str, file: str, path: Path | None) -> Path:
    """Return the path of `file` in the data folder, or `path` itself if it is a file.

    Raises:
        DataError: there is no such file.

    """
    folder = data_folder(path)
    found = folder if folder.is_file() else folder / file
    if found.is_file():
        return found
    remedy = f" Or download it: mpicomp data fetch {kind}." if kind in ORIGINS else ""
    raise DataError(
        f"data.kind = {kind!r} needs the file {file}, which is not in {folder.absolute()} ({folder_origin(path)}). Set "
        f"data.path or the environment variable {FOLDER_VARIABLE} to the folder that holds it.{remedy}"
    )


def folder_origin(path: Path | None) -> str:
    """Return what has decided on the data folder, for messages."""
    return f"data.path = {str(path)!r}" if path is not None else f"{FOLDER_VARIABLE} or ./data, as data.path is not set"


def damaged(kind: str, path: Path, reason: str) -> DataError:
    """Return the error for a file with unexpected content."""
    remedy = f"Download it again: mpicomp data fetch {kind}." if kind in ORIGINS else "Check the file."
    return DataError(f"data.kind = {kind!r}: the file {path} is damaged: {reason}. {remedy}")
