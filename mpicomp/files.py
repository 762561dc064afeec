"""Atomic replacement of files."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to. If the block succeeds, the file replaces `path`; if not, it is removed.

    No other process, on any machine, gets the same temporary path. The file is surely on the disk afterwards only if
    the block has called fsync.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
