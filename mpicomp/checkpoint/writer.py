"""Writing in the background: a copy of the state in memory, and a thread that writes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch
from torch import Tensor

from mpicomp.checkpoint.hdf5 import Digest
from mpicomp.errors import CheckpointError
from mpicomp.state import Leaf

_threads = ThreadPoolExecutor(2, "checkpoint")
"""The threads that write, for all ranks of this process: HDF5 lets only one of them in at a time anyway."""


class Writer:
    """Writes one state at a time. The memory of the copy is reused for the next one; for state on a GPU it is pinned.

    `copy`, `start` and `wait` follow each other; time may pass between them.
    """

    def __init__(self) -> None:
        self._future: Future[Digest | CheckpointError | None] | None = None
        self._copies: dict[str, Tensor] = {}
        self._leaves: dict[str, Leaf] = {}

    @property
    def busy(self) -> bool:
        """Whether the state is being written."""
        return self._future is not None and not self._future.done()

    def copy(self, leaves: Mapping[str, Leaf], in_place: bool = False) -> None:
        """Copy the leaves; the caller may change them as soon as this returns.

        With `in_place`, tensors on the CPU are not copied, and must stay as they are until `wait` returns.
        """
        assert self._future is None, "wait for the last state first"
        if in_place:
            self._copies.clear()
        copies = {path: leaf for path, leaf in leaves.items() if in_place and _is_on_cpu(leaf)}
        copies |= self._copy({path: leaf for path, leaf in leaves.items() if path not in copies})
        self._leaves = {path: copies[path] for path in leaves}

    def start(self, write: Callable[[Mapping[str, Leaf]], Digest | None]) -> None:
        """Begin to write the copy by calling `write` in the background."""
        assert self._future is None, "wait for the last state first"
        self._future = _threads.submit(_write, write, self._leaves)
        self._leaves = {}

    def wait_for(self, seconds: float) -> bool:
        """Wait until the state is written, but no longer than `seconds`; return whether it is still being written."""
        if self._future is not None:
            wait([self._future], seconds)
        return self.busy

    def wait(self) -> Digest | CheckpointError | None:
        """Wait until the state is written and return what `write` did, or what went wrong."""
        assert self._future is not None, "nothing is being written"
        outcome = self._future.result()
        self._future = None
        return outcome

    def close(self) -> None:
        """Wait for a state that is being written, if there is one, and give the memory of copies back."""
        if self._future is not None:
            wait([self._future])
        self._leaves = {}
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
    write: Callable[[Mapping[str, Leaf]], Digest | None], leaves: Mapping[str, Leaf]
) -> Digest | CheckpointError | None:
    try:
        return write(leaves)
    except CheckpointError as error:
        return error
    except Exception as error:  # whatever it is, training need not end for it
        return CheckpointError(f"the state cannot be written: {type(error).__name__}: {error}")
