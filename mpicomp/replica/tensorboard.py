"""Records for TensorBoard, through `torch.utils.tensorboard`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mpicomp.errors import ConfigError
from mpicomp.replica.record import Record

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoard:
    """Writes the numbers of each record (`Record.scalars`) into `folder`; on rank 0 alone.

    Making one writes nothing yet. Each record is in the file when `on_record` returns.

    Args:
        folder: to be shown by ``tensorboard --logdir``; made if need be.
        after_step: the number of steps done, for a run that continues from a checkpoint. Later records of an earlier
            start are hidden then.

    Raises:
        ConfigError: the package `tensorboard` is not installed; or, with the first record, the folder cannot be
            written to.

    """

    def __init__(self, folder: Path | str, after_step: int | None = None) -> None:
        require_tensorboard()
        self._folder = folder
        self._purge_step = None if after_step is None else after_step + 1
        self._writer: SummaryWriter | None = None

    def on_record(self, record: Record) -> None:
        """Write the numbers of `record`."""
        if self._writer is None:
            self._writer = self._open()
        for name, value in record.scalars().items():
            self._writer.add_scalar(name, value, record.step)
        self._writer.flush()

    def close(self) -> None:
        """Close the file; a later record opens another file."""
        if self._writer is not None:
            self._writer.close()
            self._writer, self._purge_step = None, None

    def _open(self) -> SummaryWriter:
        from torch.utils.tensorboard import SummaryWriter

        try:
            return SummaryWriter(str(self._folder), purge_step=self._purge_step)
        except OSError as error:
            raise ConfigError(f"TensorBoard cannot write into {self._folder}: {error.strerror}") from error


def require_tensorboard() -> None:
    """Raise ConfigError if the package `tensorboard` is missing, or too old for torch."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"TensorBoard is not installed ({error}): pip install tensorboard") from error
