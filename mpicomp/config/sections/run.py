"""The run as a whole, its length and its checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from mpicomp.config.sections.base import Section
from mpicomp.config.signals import signal_number
from mpicomp.exchange.node_sums import NodeSums
from mpicomp.replica.clipping import Clip


class RunSection(Section):
    """``[run]``: the run as a whole."""

    section: ClassVar[str] = "run"

    seed: int = Field(0, ge=0, lt=2**63)
    """The seed of initialization, partition and batches; random graphs and compressors have seeds of their own."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; ``"auto"`` takes a GPU if there is one."""

    allow_shared_gpu: bool = False
    """Whether several ranks may share a GPU."""

    node_sums: NodeSums = "auto"
    """What adds up dense vectors inside a node, before MPI does between nodes: ``"nccl"`` between GPUs, ``"gloo"`` on
    the CPU, or ``"mpi"``. ``"auto"`` takes NCCL if every rank has a GPU of its own and a node has several ranks. For
    ``ssgd``, whose rounding may differ then."""

    log_every: PositiveInt = 10
    """Steps from one record in ``metrics.jsonl`` to the next."""

    evaluate_every_epochs: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Epochs from one evaluation of the averaged model to the next; may be fractional. The model after the last step is
    evaluated, too."""

    stop_signal: str = "USR1"
    """The signal, sent to any rank, that asks the run to store a checkpoint and to end with exit code 75."""

    hang_timeout_s: float = Field(600.0, ge=0, allow_inf_nan=False)
    """Seconds without a step after which a rank reports what it waits for, and the run ends; 0 for no limit."""

    on_peer_loss: Literal["stop", "continue"] = "stop"
    """What the other ranks do when one has died; ``"continue"`` for ``dpsgd``, ``choco``, ``adagossip`` and, on one
    machine, ``dc_gossip``."""

    def try_out(self, others: Mapping[str, Section]) -> None:
        """Check the name of the signal."""
        signal_number(self.stop_signal)


class TrainingSection(Section):
    """``[training]``: the length of the run, and the batch size."""

    section: ClassVar[str] = "training"

    epochs: PositiveInt | None = None
    """Passes over the data of all ranks together; or give `steps`."""

    steps: PositiveInt | None = None
    batch_size: PositiveInt = 32
    """Samples per rank and step."""

    clip_norm: float | None = Field(None, gt=0, allow_inf_nan=False)
    """The largest Euclidean norm of a rank's gradient, which is scaled down to it before anything is compressed."""

    @model_validator(mode="after")
    def _one_length(self) -> TrainingSection:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("needs exactly one of training.epochs and training.steps")
        return self

    def clip(self) -> Clip | None:
        """Return the limit for gradients."""
        return None if self.clip_norm is None else Clip(norm=self.clip_norm)


class CheckpointSection(Section):
    """``[checkpoint]``: when the state of all ranks is stored, and which of the checkpoints are kept."""

    section: ClassVar[str] = "checkpoint"

    every_steps: PositiveInt | None = None
    """Steps from one checkpoint to the next."""

    every_minutes: float = Field(15.0, ge=0, allow_inf_nan=False)
    """Minutes from one checkpoint to the next; 0 for none by time. A run also stores one when it ends or stops."""

    keep_last: NonNegativeInt = 2
    """How many of the newest checkpoints to keep; 0 for all."""

    keep_every: PositiveInt | None = None
    """Checkpoints at a multiple of so many steps are kept, too."""

    files: Literal["rank", "node"] = "rank"
    """What has a file in a checkpoint: each rank; or ``"node"``: each node (see `topology.node_size`), whose ranks take
    turns to write into it, for file systems that suffer from many files."""

    stop_before_end_s: float = Field(120.0, ge=0, allow_inf_nan=False)
    """Seconds before the end of the time limit at which to stop; at most a quarter of the limit."""
