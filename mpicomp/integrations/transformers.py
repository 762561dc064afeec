"""`GossipTrainer`: a `transformers.Trainer` on every MPI rank, trained together with those of its neighbors.

trainer = GossipTrainer(model=model, args=args, train_dataset=train, eval_dataset=test,  # as for Trainer, and:
                        algorithm=Choco(gamma=0.2), topology=ring, compressor=TopK(ratio=0.01))

Every rank runs a Trainer of one process; ``torch.distributed`` is never started. The Trainer knows its rank, so that only
rank 0 shows progress and writes the model, and deals its samples out with ``accelerate``, as under torchrun. Within
`train` all ranks do the same in the same order: evaluation and saving use the averaged model. After it the model is the
averaged one on every rank, and evaluating or saving it needs no other rank.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate.utils import parse_flag_from_env
from transformers import Trainer, TrainingArguments
from transformers.training_args import ParallelMode

from mpicomp.algorithms.base import Algorithm
from mpicomp.compression.base import Compressor
from mpicomp.errors import CheckpointError, ConfigError
from mpicomp.exchange.guard import install_excepthook, together
from mpicomp.exchange.world import MpiWorld
from mpicomp.topology.base import Schedule
from mpicomp.training.distributed import Distributed, distribute

FOLDER = "gossip"
"""Within a checkpoint of the Trainer: what each rank needs to go on (`mpicomp.training.replica.Replica.save`)."""


class GossipTrainer(Trainer):
    """A `transformers.Trainer` whose model is trained together with those of the other MPI ranks.

    Making one and `train` are collective on all ranks. Pass the whole training set on every rank: each trains on its own
    part of every epoch. Subclasses of Trainer gossip too: ``class GossipSeq2SeqTrainer(GossipTrainer, Seq2SeqTrainer)``.

    Args:
        model, args, ...: as for `Trainer`; ``args.output_dir`` is a folder that all ranks share.
        algorithm, topology, compressor: as for `mpicomp.distribute`.

    Attributes:
        world: the ranks.
        gossip: what `mpicomp.distribute` has made; None before `train`.

    Raises:
        ConfigError: settings of the Trainer with which ranks cannot train together.

    """

    gossip: Distributed | None = None

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        *positional: Any,
        algorithm: Algorithm[Any],
        topology: Any,
        compressor: Compressor | None = None,
        **named: Any,
    ) -> None:
        args = TrainingArguments("tmp_trainer") if args is None else args  # the Trainer's own default
        self.world = MpiWorld.from_environment("cpu")
        install_excepthook(self.world)
        with together(self.world):
            refuse(args)
        self._distribute = partial(distribute, algorithm=algorithm, topology=topology, compressor=compressor)
        # From here on only rank 0 logs and writes. That there is more than one is told where it matters, and only there.
        state = args.distributed_state
        state.process_index, state.local_process_index = self.world.rank, self.world.local_rank
        super().__init__(model, args, *positional, **named)
        self.accelerator.dataloader_config.dispatch_batches = False  # would have rank 0 send batches by torch.distributed

    @contextmanager
    def _one_of_all(self) -> Iterator[None]:
        """Have accelerate know the number of ranks, within the block."""
        states = self.args.distributed_state, self.accelerator.state
        for state in states:
            state.num_processes = self.world.size
        try:
            yield
        finally:
            for state in states:
                state.num_processes = 1

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Give the model what all ranks have trained, within the block; collective during training, else nothing."""
        if self.gossip is None or not self.is_in_train:
            yield
            return
        with self.gossip.averaged():
            yield
        self.world.barrier()  # what rank 0 has written is there for all

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Make the optimizer whose steps exchange messages; collective on all ranks."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.gossip is None or self.gossip.local.model is not self.model:
            self.gossip = self._distribute(self.model, optimizer)
            self.optimizer = self.gossip.optimizer
            self.world = self.gossip.world  # with a watchdog
        return self.optimizer

    def get_train_dataloader(self) -> Any:
        """Return the loader of this rank's part of the training set, as long as those of the others; collective."""
        with self._one_of_all():
            loader = super().get_train_dataloader()
        lengths = self.world.all_gather(len(loader) if hasattr(loader, "__len__") else None)
        if len(set(lengths)) > 1:
            raise ConfigError(
                f"the ranks have training sets of unequal length ({lengths} batches by rank), so that some would wait "
                "for the others for ever: pass the whole training set on every rank, each trains on its part of it"
            )
        return loader

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        """Return the samples of one step, over all ranks."""
        return int(super().get_total_train_batch_size(args)) * self.world.size

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as the Trainer does; collective on all ranks. Then the model is the averaged one on every rank.

        ``resume_from_checkpoint=True`` goes on from the newest complete checkpoint, bit for bit.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self.world.broadcast(last_checkpoint(self.args.output_dir))
            if resume_from_checkpoint is None:
                raise CheckpointError(f"{self.args.output_dir}: has no complete checkpoint to go on from")
        result = super().train(resume_from_checkpoint, *args, **kwargs)
        assert self.gossip is not None
        self.gossip.average_()
        return result

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate the averaged model on every rank; within `train` rank 0's metrics count for all."""
        with self._averaged():
            output = super().evaluation_loop(*args, **kwargs)
        if not self.is_in_train:
            return output
        # Different processors round differently, and the ranks must agree on which model was the best.
        return output._replace(metrics=self.world.broadcast(output.metrics))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, and with the loss, which is this rank's own, the megabytes that this rank has sent."""
        if self.gossip is not None and "loss" in logs:
            logs["sent_mb"] = round(self.gossip.bytes_sent / 1e6, 3)
        super().log(logs, *args, **kwargs)

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """Have rank 0 write the averaged model; collective within `train`."""
        with self._averaged():
            super().save_model(*args, **kwargs)

    def _save_rng_state(self, output_dir: str) -> None:
        # The last of what a checkpoint needs, but for trainer_state.json, which rank 0 writes when all are done here.
        with self._one_of_all():
            super()._save_rng_state(output_dir)
        assert self.gossip is not None
        self.gossip.save(Path(output_dir) / FOLDER, keep_last=1)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with self._one_of_all():
            super()._load_rng_state(checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        assert self.gossip is not None
        if checkpoint is not None and self.gossip.resume(Path(checkpoint) / FOLDER) is None:
            raise CheckpointError(
                f"{checkpoint}: lacks the folder {FOLDER!r}, without which the ranks cannot go on where they were: it "
                "was written with save_only_model, or by another Trainer. To begin anew from its model, load that "
                "(from_pretrained), and leave out resume_from_checkpoint"
            )

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: every rank would try settings of its own."""
        raise ConfigError("hyperparameter_search: every rank would try other settings. Start a job for each of them")


def refuse(args: TrainingArguments) -> None:
    """Raise ConfigError for settings with which the ranks cannot train together, or would do so wrongly."""
    optimizer = str(getattr(args.optim, "value", args.optim))
    if args.parallel_mode == ParallelMode.DISTRIBUTED or torch.distributed.is_initialized():
        raise ConfigError(
            "torch.distributed has been started, but each MPI rank must be a Trainer of its own. accelerate starts it "
            "for use_cpu=True (leave that out; CUDA_VISIBLE_DEVICES= hides GPUs), for ACCELERATE_USE_CPU and for "
            "LOCAL_RANK (unset them); torchrun and `accelerate launch` do (start with mpiexec or srun)"
        )
    if args.n_gpu > 1:
        raise ConfigError(
            f"this rank sees {args.n_gpu} GPUs and the Trainer would use them all: let each rank see its own, by srun "
            "--gpus-per-task=1 or by setting CUDA_VISIBLE_DEVICES to the rank's number on its node before torch starts"
        )
    if args.deepspeed or args.fsdp or any(map(parse_flag_from_env, ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"))):
        raise ConfigError("deepspeed and fsdp split the model and its optimizer over the ranks, here each has all of it")
    if optimizer in ("lomo", "adalomo") or optimizer.endswith("layerwise"):
        raise ConfigError(f"optim={optimizer!r} takes its steps within the backward pass: choose one that does not")
    if optimizer.startswith("schedule_free"):
        raise ConfigError(f"optim={optimizer!r} evaluates other parameters than it trains: choose one that does not")
    if args.auto_find_batch_size:
        raise ConfigError("auto_find_batch_size: one rank might start anew while the others go on. Set the batch size")
    if getattr(args, "enable_jit_checkpoint", False):
        raise ConfigError("enable_jit_checkpoint: ranks would save after different steps. Use save_steps")


def last_checkpoint(folder: Path | str) -> str | None:
    """Return the newest checkpoint in `folder` that was written to its end, or None.

    `transformers.trainer_utils.get_last_checkpoint` returns one in the midst of whose writing the job was killed.
    """
    complete = [path.parent for path in Path(folder).glob("checkpoint-*/trainer_state.json") if _is_json(path)]
    newest = max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
    return None if newest is None else str(newest)


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return True
