"""Files that are replaced as a whole, and files that grow by lines, on disks that may be full for a while."""

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


class Lines:
    """A file to which lines are appended. Lines that cannot be written wait in memory, in their order.

    Nobody else may write the file.

    Attributes:
        waiting: the lines that are not in the file yet.

    """

    def __init__(self, path: Path) -> None:
        self.waiting: list[str] = []
        self._path = path
        self._end: int | None = None  # where the first waiting line belongs, once an attempt has failed

    def append(self, line: str) -> None:
        """Append a line after those that wait; see `write`."""
        self.waiting.append(line)
        self.write()

    def write(self) -> None:
        """Write the lines that wait. If this raises OSError, they still wait, and may be in the file in part."""
        if self.waiting:
            with self._path.open("ab") as file:
                self._end = file.tell() if self._end is None else self._end
                file.truncate(self._end)
                file.write("".join(f"{line}\n" for line in self.waiting).encode())
            self.waiting.clear()
            self._end = None
