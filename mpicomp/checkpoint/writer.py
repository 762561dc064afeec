"""Writing in the background: a copy of the state in memory, and a thread that writes it."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import torch
from torch import Tensor

from mpicomp.checkpoint.hdf5 import Digest, write
from mpicomp.errors import CheckpointError
from mpicomp.state import Leaf

_threads = ThreadPoolExecutor(2, "checkpoint")
"""The threads that write, for all ranks of this process: HDF5 lets only one of them in at a time anyway."""


class Writer:
    """Writes one file at a time. The memory of the copy is reused for the next one; for state on a GPU it is pinned."""

    def __init__(self) -> None:
        self._future: Future[Digest | CheckpointError] | None = None
        self._copies: dict[str, Tensor] = {}

    @property
    def busy(self) -> bool:
        """Whether a file is being written."""
        return self._future is not None and not self._future.done()

    def start(
        self,
        path: Path,
        leaves: Mapping[str, Leaf],
        attributes: Mapping[str, str | int | float],
        in_place: bool = False,
    ) -> None:
        """Copy the leaves and begin to write the copy; the caller may change them as soon as this returns.

        With `in_place`, tensors on the CPU are not copied, and must stay as they are until `wait` returns.
        """
        assert self._future is None, "wait for the last file first"
        if in_place:
            self._copies.clear()
        copies = {path: leaf for path, leaf in leaves.items() if in_place and _is_on_cpu(leaf)}
        copies |= self._copy({path: leaf for path, leaf in leaves.items() if path not in copies})
        self._future = _threads.submit(_write, path, {path: copies[path] for path in leaves}, attributes)

    def wait(self) -> Digest | CheckpointError:
        """Wait for the file and return its digest, or what went wrong."""
        assert self._future is not None, "nothing is being written"
        outcome = self._future.result()
        self._future = None
        return outcome

    def close(self) -> None:
        """Wait for a file that is being written, if there is one, and give the memory of copies back."""
        if self._future is not None:
            wait([self._future])
        self._copies.clear()

    def _copy(self, leaves: Mapping[str, Leaf]) -> dict[str, Leaf]:
        self._copies = {path: copy for path, copy in self._copies.items() if _fits(copy, leaves.get(path))}
        copies: dict[str, Leaf] = {}
        devices: set[torch.device] = set()
        for path, leaf in leaves.items():
            if isinstance(leaf, Tensor):
                is_remote = leaf.device.type == "cuda"
                if path not in self._copies:
                    self._copies[path] = torch.empty(leaf.shape, dtype=leaf.dtype, pin_memory=is_remote)
                self._copies[path].copy_(leaf.detach(), non_blocking=is_remote)
                devices.update({leaf.device} if is_remote else ())
                copies[path] = self._copies[path]
            else:
                copies[path] = leaf
        for device in devices:
            torch.cuda.synchronize(device)
        return copies


def _is_on_cpu(leaf: Leaf) -> bool:
    return isinstance(leaf, Tensor) and leaf.device.type == "cpu"


def _fits(copy: Tensor, leaf: Leaf | None) -> bool:
    return isinstance(leaf, Tensor) and leaf.shape == copy.shape and leaf.dtype == copy.dtype


def _write(
    path: Path, leaves: Mapping[str, Leaf], attributes: Mapping[str, str | int | float]
) -> Digest | CheckpointError:
    try:
        return write(path, leaves, attributes)
    except CheckpointError as error:
        return error
