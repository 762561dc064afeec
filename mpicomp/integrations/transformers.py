"""`GossipTrainer`: a `transformers.Trainer` on every MPI rank, trained together with those of its neighbors.

trainer = GossipTrainer(model=model, args=args, train_dataset=train, eval_dataset=test,  # as for Trainer, and:
                        algorithm=Choco(gamma=0.2), topology=ring, compressor=TopK(ratio=0.01))

Every rank runs a Trainer of one process, without ``torch.distributed``. It knows its rank, so that only rank 0 shows
progress and writes the model, and takes its part of the samples as under torchrun. Within `train` all ranks do the same
in the same order, and evaluation and saving use the averaged model. After it the model is the averaged one on every
rank, and evaluating or saving it needs no other rank.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from accelerate.data_loader import BatchSamplerShard, SeedableRandomSampler
from accelerate.utils import parse_flag_from_env
from torch.utils.data import IterableDataset, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import has_length
from transformers.training_args import ParallelMode

from mpicomp.algorithms.base import Algorithm
from mpicomp.compression.base import Compressor
from mpicomp.errors import CheckpointError, ConfigError
from mpicomp.exchange.base import World
from mpicomp.exchange.guard import install_excepthook, together
from mpicomp.exchange.mpi.world import MpiWorld
from mpicomp.exchange.node_sums import NodeSums
from mpicomp.integrations.samplers import SameDraws
from mpicomp.replica.distribute import Buffers, distribute
from mpicomp.replica.distributed import Distributed

FOLDER = "gossip"
"""The folder in a checkpoint of the Trainer with the state of each rank (`mpicomp.replica.replica.Replica.save`)."""

LAUNCHER_VARIABLES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "WORLD_SIZE", "LOCAL_RANK")
"""The environment variables by which `accelerate.PartialState` decides whether to start ``torch.distributed``."""


class GossipTrainer(Trainer):
    """A `transformers.Trainer` whose model is trained together with those of the other MPI ranks.

    Making one and `train` are collective on all ranks. Pass the whole training set on every rank: each trains on its
    own part of every epoch. Subclasses of Trainer can have it too: ``class Gossip(GossipTrainer, Seq2SeqTrainer)``.

    Args:
        model, args, ...: as for `Trainer`; ``args.output_dir`` is a folder that all ranks share.
        algorithm, topology, compressor, buffers, allow_shared_gpu, groups, node_sums, hang_timeout_s: as for
            `mpicomp.distribute`.

    Attributes:
        world: the ranks.
        gossip: the result of `mpicomp.distribute`; None before `train`.

    Raises:
        ConfigError: ranks cannot train together with the settings of the Trainer.

    """

    gossip: Distributed | None = None
    world: World

    _states: Sequence[tuple[Any, dict[str, Any]]] = ()
    _is_averaged = False
    _scaler_state: dict[str, Any] | None = None

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        *positional: Any,
        algorithm: Algorithm[Any],
        topology: Any,
        compressor: Compressor | None = None,
        buffers: Buffers = "averaged",
        allow_shared_gpu: bool = False,
        groups: Sequence[Sequence[int]] | Literal["host"] | None = None,
        node_sums: NodeSums = "auto",
        hang_timeout_s: float = 600.0,
        **named: Any,
    ) -> None:
        args = TrainingArguments("tmp_trainer") if args is None else args  # the Trainer's own default
        self.world = world = MpiWorld.from_environment("cpu")  # for the rank; `distribute` looks after the device
        install_excepthook(world)
        with together(world):
            refuse(args)
        how = {"algorithm": algorithm, "topology": topology, "compressor": compressor, "buffers": buffers}
        where = {"allow_shared_gpu": allow_shared_gpu, "groups": groups, "node_sums": node_sums}
        self._how: dict[str, Any] = how | where | {"hang_timeout_s": hang_timeout_s}
        # From here on only rank 0 logs and writes. That there are others is told where it matters, and only there.
        state = args.distributed_state
        state.process_index, state.local_process_index = world.rank, world.local_rank
        super().__init__(model, args, *positional, **named)
        self.accelerator.dataloader_config.dispatch_batches = False  # True: rank 0 sends them by torch.distributed
        self._states = [(each, dict(vars(each))) for each in (args.distributed_state, self.accelerator.state)]
        self.callback_handler.callbacks.insert(0, BeginAndEnd(self))

    def _hold_rank(self) -> None:
        """Tell accelerate again which rank this is: all objects share its state, and TrainingArguments reset that."""
        for state, values in self._states:
            vars(state).update(values)

    @contextmanager
    def _one_of_all(self) -> Iterator[None]:
        """Let accelerate see the number of ranks within the block."""
        self._hold_rank()
        for state, _ in self._states:
            state.num_processes = self.world.size
        try:
            yield
        finally:
            for state, _ in self._states:
                state.num_processes = 1

    @property
    def _has_own_model(self) -> bool:
        """Whether the model is this rank's own: within `train`, until it is averaged at the end."""
        return self.gossip is not None and self.is_in_train and not self._is_averaged

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Replace the model by the averaged one within the block; collective. Does nothing if it is that already."""
        self._hold_rank()
        if self.gossip is None or not self._has_own_model:
            yield
            return
        with together(self.world):
            if self.gossip.is_in_step:
                raise ConfigError(
                    f"evaluation or saving in the middle of step {self.gossip.steps}: {self.gossip.algorithm.name} has "
                    "begun it with the first of its batches (gradient_accumulation_steps), and a callback stops, "
                    "evaluates or saves before the last. Let the callback do so in on_step_end, not in on_substep_end"
                )
        with self.gossip.averaged():
            yield
        self.world.barrier()  # what rank 0 has written is there for all

    def is_world_process_zero(self) -> bool:
        """Return whether this is rank 0."""
        return self.world.rank == 0

    def require_gossip(self) -> Distributed:
        """Return `gossip`; raises ConfigError if the model of this training is not distributed."""
        if self.gossip is None or self.gossip.local.model is not self.model:
            raise ConfigError(
                f"{type(self).__name__}.create_optimizer() has not distributed the model, and every rank would train "
                "alone: it must call super().create_optimizer(), after it has set self.optimizer if it makes its own. "
                "Or leave it out, and pass optimizers=(optimizer, None)"
            )
        return self.gossip

    def average_at_end(self) -> None:
        """Make the model the averaged one, once in a training; collective on all ranks."""
        if not self._is_averaged:
            self.require_gossip().average_()
        self._is_averaged = True

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Make the optimizer whose steps exchange messages; collective on all ranks."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.gossip is None or self.gossip.local.model is not self.model:
            self.gossip = distribute(self.model, optimizer, **self._how)
            self.optimizer = self.gossip.optimizer
            self.world = self.gossip.world  # with a watchdog
        return self.optimizer

    def get_train_dataloader(self) -> Any:
        """Return the loader of this rank's part of the training set; all are equally long. Collective."""
        seed = self.args.data_seed
        seed = self.world.broadcast(torch.initial_seed() if seed is None else seed)
        with self._one_of_all():
            self.accelerator.dataloader_config.data_seed = seed
            loader = super().get_train_dataloader()
            part = self.args.process_index, self.args.world_size
        check_parts(self.world.all_gather((part, len(loader) if has_length(loader) else None)))
        draw_alike(loader, seed)
        return loader

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        """Return the number of samples in one step, of all ranks together."""
        return int(super().get_total_train_batch_size(args)) * self.world.size

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as the Trainer does; collective on all ranks. Afterwards every rank has the averaged model.

        ``resume_from_checkpoint=True`` continues from the newest complete checkpoint, bit for bit.
        """
        self._hold_rank()
        if not resume_from_checkpoint:
            self._refuse_old_anchor()
        self._is_averaged = False
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self.world.broadcast(last_checkpoint(self.args.output_dir))
            if resume_from_checkpoint is None:
                raise CheckpointError(f"{self.args.output_dir}: has no complete checkpoint to go on from")
        result = super().train(resume_from_checkpoint, *args, **kwargs)
        self.average_at_end()
        return result

    def _refuse_old_anchor(self) -> None:
        """Raise ConfigError if training would continue from another model than this one."""
        if self.gossip is None or self.model_init is not None:
            return
        if isinstance(algorithm := self.gossip.algorithm, Algorithm) and algorithm.keeps_anchor:
            raise ConfigError(
                f"a second train() would not continue from the averaged model: {algorithm.name} makes its next models "
                "of one that it has kept. Train for more epochs at once, continue from a checkpoint "
                "(resume_from_checkpoint), or save the model and make a new GossipTrainer with it (from_pretrained)"
            )

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate the averaged model on every rank; within `train` rank 0's metrics count for all."""
        with self._averaged():
            output = super().evaluation_loop(*args, **kwargs)
        if not self._has_own_model:
            return output
        # Different processors round differently, and the ranks must agree on which model was the best.
        return output._replace(metrics=self.world.broadcast(output.metrics))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, and with the loss, which is this rank's own, the megabytes that this rank has sent."""
        if self.gossip is not None and "loss" in logs:
            logs["sent_mb"] = round(self.gossip.bytes_sent / 1e6, 3)
        super().log(logs, *args, **kwargs)

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """Write the averaged model on rank 0; collective within `train`."""
        with self._averaged():
            super().save_model(*args, **kwargs)

    def _save_rng_state(self, output_dir: str) -> None:
        # The last of what a checkpoint needs, but for trainer_state.json, which rank 0 writes when all are done here.
        with self._one_of_all():
            super()._save_rng_state(output_dir)
        # Overflows in float16 are each rank's own, and so is the scale, of which the Trainer stores that of rank 0.
        scaler = self.accelerator.scaler
        extra = {} if scaler is None else {"scaler": scaler.state_dict()}
        self.require_gossip().save(Path(output_dir) / FOLDER, extra, keep_last=1)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with self._one_of_all():
            super()._load_rng_state(checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        gossip = self.require_gossip()
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        extra = gossip.resume(Path(checkpoint) / FOLDER)
        if extra is None:
            raise CheckpointError(
                f"{checkpoint}: lacks the folder {FOLDER!r}, without which the ranks cannot go on where they were: it "
                "was written with save_only_model, or by another Trainer. To begin anew from its model, load that "
                "(from_pretrained), and leave out resume_from_checkpoint"
            )
        self._scaler_state = extra.get("scaler")

    def _load_scaler(self, checkpoint: str | None) -> None:
        super()._load_scaler(checkpoint)
        if checkpoint is not None and self._scaler_state is not None:
            self.accelerator.scaler.load_state_dict(self._scaler_state)

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise ConfigError, because every rank would try other settings."""
        raise ConfigError("hyperparameter_search: every rank would try other settings. Start a job for each of them")


class BeginAndEnd(TrainerCallback):
    """What `GossipTrainer` does before the callbacks of the user see the beginning and the end of training."""

    def __init__(self, trainer: GossipTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Check that the ranks train together; collective on all ranks."""
        with together(self._trainer.world):
            self._trainer.require_gossip()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Average the model; collective on all ranks."""
        self._trainer.average_at_end()


def check_parts(found: Sequence[tuple[tuple[int, int], int | None]]) -> None:
    """Raise ConfigError unless each rank has its part of the samples, given (index, number of parts) and length."""
    parts, lengths = [part for part, _ in found], [length for _, length in found]
    if parts != [(rank, len(found)) for rank in range(len(found))]:
        raise ConfigError(
            f"the ranks would train on the parts {parts} of the samples (index and number of parts, by rank): "
            "TrainingArguments made within get_train_dataloader() have reset accelerate. Make them before train()"
        )
    if len(set(lengths)) > 1:
        raise ConfigError(
            f"the ranks have training sets of unequal length ({lengths} batches by rank), so that some would wait "
            "for the others for ever: pass the whole training set on every rank, each trains on its part of it"
        )


def draw_alike(loader: Any, seed: int) -> None:
    """Let the sampler of `loader` draw the same on all ranks and after a restart, unless it does so by itself."""
    part = batches = getattr(loader, "batch_sampler", None)
    if isinstance(part, BatchSamplerShard):
        batches = part.batch_sampler
        if hasattr(batches, "set_epoch"):
            part.set_epoch = batches.set_epoch  # after a restart in mid-epoch, the Trainer looks for it here only
    sampler = getattr(batches, "sampler", None)
    draws_alike = sampler is None or isinstance(sampler, SequentialSampler | SeedableRandomSampler)
    if not draws_alike and not isinstance(loader.dataset, IterableDataset):
        loader.set_sampler(SameDraws(sampler, seed))


@contextmanager
def hidden_launcher() -> Iterator[None]:
    """Hide the MPI launcher from accelerate within the block, in which you make `TrainingArguments`.

    Needed with ``use_cpu=True``: under mpiexec, accelerate would start ``torch.distributed``, or fail because
    MASTER_ADDR is not set. Also needed if LOCAL_RANK is set.
    """
    hidden = {name: os.environ.pop(name) for name in LAUNCHER_VARIABLES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def refuse(args: TrainingArguments) -> None:
    """Raise ConfigError if ranks cannot train together with these settings, or would give wrong results."""
    optimizer = str(getattr(args.optim, "value", args.optim))
    is_sharded = any(map(parse_flag_from_env, ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP")))
    reasons = {
        "torch.distributed has been started, but each MPI rank must be a Trainer of its own. TrainingArguments starts "
        "it under mpiexec for use_cpu=True, and where LOCAL_RANK is set: make them within `with hidden_launcher():` "
        "(of mpicomp.integrations.transformers). Start the script by mpiexec or srun, not by torchrun or accelerate": (
            args.parallel_mode == ParallelMode.DISTRIBUTED or torch.distributed.is_initialized()
        ),
        f"this rank sees {args.n_gpu} GPUs, and the Trainer would use them all: let it see its own only, by srun "
        "--gpus-per-task=1, or CUDA_VISIBLE_DEVICES set to its number on the node before torch starts": args.n_gpu > 1,
        "deepspeed and fsdp split a model over the ranks, but here each has one of its own: leave them out": (
            args.deepspeed or args.fsdp or is_sharded
        ),
        f"optim={optimizer!r} makes its steps within the backward pass: choose one that does not": (
            optimizer in ("lomo", "adalomo") or optimizer.endswith("layerwise")
        ),
        f"optim={optimizer!r} evaluates other parameters than it trains: choose one that does not": (
            optimizer.startswith("schedule_free")
        ),
        "auto_find_batch_size: one rank might start anew while others go on. Set per_device_train_batch_size": (
            args.auto_find_batch_size
        ),
        "enable_jit_checkpoint: ranks would save after different steps. Use save_steps": (
            getattr(args, "enable_jit_checkpoint", False)
        ),
    }
    if found := [reason for reason, holds in reasons.items() if holds]:
        raise ConfigError("\n".join(found))


def last_checkpoint(folder: Path | str) -> str | None:
    """Return the newest complete checkpoint in `folder`, or None.

    `transformers.trainer_utils.get_last_checkpoint` may return an incomplete one, left by a killed job.
    """
    found = Path(folder).glob("checkpoint-[0-9]*")
    for path in sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        with suppress(OSError, ValueError):
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            return str(path)
    return None
