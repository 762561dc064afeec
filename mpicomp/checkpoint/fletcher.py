"""Fletcher's 32-bit checksum as HDF5 stores it behind a chunk.

    w_0 ... w_n-1    the bytes as 16-bit words, first the high byte of each; a last odd byte has a zero behind it
    first            w_0 + ... + w_n-1                        modulo 65535, where a multiple is 65535, not 0
    second           n w_0 + (n - 1) w_1 + ... + w_n-1        likewise
    checksum         65536 second + first                     as 4 bytes, the low one first

HDF5 computes it under its own lock; here numpy does, at the same speed and without holding Python's. The words are laid
out in rows, so that sums of rows and of columns give both. 2^16 = 1 modulo 65535, so swapping the bytes of a word
multiplies it by 256: the sums are taken over the words as little-endian memory has them, and multiplied at the end.
"""

from __future__ import annotations

import numpy as np

CHECKSUM_NBYTES = 4

_COLUMNS = 1024
_MAX_NBYTES = 2 * _COLUMNS * 2**16
"""With this, the sum of a row or column of 16-bit words fits into 32 bits."""


def fletcher32(data: memoryview, padding: int = 0) -> bytes:
    """Return the checksum (4 bytes) of `data`, bytes, followed by `padding` zeros."""
    assert data.nbytes <= _MAX_NBYTES
    total, weighted = _sums(np.frombuffer(data, np.uint8))
    words = (data.nbytes + padding + 1) // 2
    first, second = 256 * total, 256 * (words * total - weighted)
    return (_reduced(second) << 16 | _reduced(first)).to_bytes(CHECKSUM_NBYTES, "little")


def _sums(data: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> tuple[int, int]:
    """Return the sum of w_i and that of i w_i, with w_i little-endian."""
    rows = data.size // (2 * _COLUMNS)
    body = data[: 2 * _COLUMNS * rows].view("<u2").reshape(rows, _COLUMNS)
    tail = np.zeros(_COLUMNS, "<u2")
    tail.view(np.uint8)[: data.size - 2 * body.size] = data[2 * body.size :]
    of_rows = np.append(body.sum(axis=1, dtype=np.uint32), tail.sum(dtype=np.uint32)).astype(np.uint64)
    of_columns = body.sum(axis=0, dtype=np.uint32).astype(np.uint64) + tail
    weighted = _COLUMNS * int(of_rows @ np.arange(rows + 1, dtype=np.uint64))
    weighted += int(of_columns @ np.arange(_COLUMNS, dtype=np.uint64))
    return int(of_rows.sum()), weighted


def _reduced(total: int) -> int:
    """Return `total` modulo 65535 as HDF5 has it: 0 for 0 only."""
    return (total - 1) % 65535 + 1 if total else 0
