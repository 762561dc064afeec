"""`GossipStrategy`: a Lightning `Trainer` on every MPI rank, trained together with those of its neighbors.

trainer = Trainer(max_epochs=5, strategy=GossipStrategy(Choco(gamma=0.2), topology=ring, compressor=TopK(ratio=0.01)))

Every rank that ``mpiexec`` or ``srun`` has started runs a Trainer with one device; ``torch.distributed`` is never started. The
Trainer knows rank and number of ranks, so that samples are dealt out, and only rank 0 logs and shows progress. Validation,
checkpoints and the model after `fit` are the averaged model's.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.environments import MPIEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import CPUAccelerator, CUDAAccelerator
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torchmetrics import Metric

from mpicomp.algorithms.base import Algorithm
from mpicomp.compression.base import Compressor
from mpicomp.errors import CheckpointError, ConfigError
from mpicomp.exchange.guard import agree, install_excepthook, together
from mpicomp.exchange.placement import choose_device
from mpicomp.exchange.world import MpiWorld
from mpicomp.training.distributed import Distributed, distribute

REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda every: every.double().mean(dim=0),
    "sum": lambda every: every.sum(dim=0),
    "max": lambda every: every.amax(dim=0),
    "min": lambda every: every.amin(dim=0),
}
"""From the values of all ranks, stacked, to one."""

OWN = "mpicomp"
"""The key of a checkpoint file that says what lies in the folder beside it."""


class GossipStrategy(ParallelStrategy):
    """Trains a `LightningModule` together with those of the other MPI ranks, for one optimizer.

    Making one, `fit`, `validate`, `test` and `save_checkpoint` are collective on all ranks. A checkpoint ``x.ckpt`` is a file
    as Lightning always writes, with the averaged model, and a folder ``x.ckpt.ranks`` beside it with what each rank needs to go
    on; ``fit(ckpt_path="x.ckpt")`` goes on bit for bit.

    Args:
        algorithm, topology, compressor: as for `mpicomp.distribute`.
        options: further arguments of `mpicomp.distribute`, e.g. ``hang_timeout_s``.

    Attributes:
        world: the ranks.
        gossip: what `mpicomp.distribute` has made; None before `fit`.

    Raises:
        ConfigError: a Trainer or a module with which ranks cannot train together.

    """

    strategy_name = "gossip"
    is_distributed = True
    """Has the Trainer deal out the samples, by `distributed_sampler_kwargs`."""

    def __init__(
        self, algorithm: Algorithm[Any], topology: Any, compressor: Compressor | None = None, **options: Any
    ) -> None:
        # Not Slurm's environment, whose signal handler would save a checkpoint on each rank in the middle of a step.
        super().__init__(cluster_environment=MPIEnvironment())
        self.cluster_environment.local_rank()  # asks the other ranks, once
        self.world = MpiWorld.from_environment("cpu")
        install_excepthook(self.world)
        rank_zero_only.rank = self.world.rank  # Lightning finds that of torchrun and Slurm only
        self.gossip: Distributed | None = None
        self._distribute = partial(distribute, algorithm=algorithm, topology=topology, compressor=compressor, **options)
        self._averaged: ExitStack | None = None
        self._checkpoint_path: Path | None = None
        self._root_device = torch.device("cpu")

    @property
    def root_device(self) -> torch.device:
        """The device of this rank."""
        return self._root_device

    @property
    def distributed_sampler_kwargs(self) -> dict[str, int]:
        """What `torch.utils.data.DistributedSampler` is to be made with."""
        return {"num_replicas": self.world.size, "rank": self.world.rank}

    def setup_environment(self) -> None:
        """Choose the GPU of this rank, if the Trainer wants one."""
        with together(self.world):
            if not isinstance(self.accelerator, CPUAccelerator | CUDAAccelerator):
                raise ConfigError(f"GossipStrategy trains on CPUs and CUDA GPUs, not on {self.accelerator}")
            kind = "cuda" if isinstance(self.accelerator, CUDAAccelerator) else "cpu"
            self._root_device = choose_device(kind, self.world.local_rank, torch.cuda.device_count())
        self.parallel_devices = [self._root_device]
        super().setup_environment()

    def model_to_device(self) -> None:
        """Move the model to the device of this rank."""
        self.model.to(self._root_device)

    def setup(self, trainer: Trainer) -> None:
        """Check the Trainer, and give its metrics the other ranks' values."""
        with together(self.world):
            refuse(trainer)
        for module in self.lightning_module.modules():
            if isinstance(module, Metric):
                module.distributed_available_fn = lambda: self.world.size > 1
                module.dist_sync_fn = self._gather
        super().setup(trainer)

    def setup_optimizers(self, trainer: Trainer) -> None:
        """Make the optimizer whose steps exchange messages; collective on all ranks."""
        super().setup_optimizers(trainer)
        with together(self.world):
            if len(self.optimizers) != 1 or not isinstance(self.optimizers[0], torch.optim.Optimizer):
                names = ", ".join(type(optimizer).__name__ for optimizer in self.optimizers)
                raise ConfigError(
                    f"configure_optimizers() gave {names}, but ranks train together with one optimizer: return one of "
                    "torch.optim over all trainable parameters, with groups where learning rates differ"
                )
            if self.gossip is not None and self.gossip.local.model is self.lightning_module:
                raise ConfigError(
                    "the module was distributed by an earlier fit(): train it on with a larger max_epochs and "
                    "fit(ckpt_path=...), or make a new Trainer and module. Tuner is for one rank alone"
                )
        self.gossip = self._distribute(self.lightning_module, self.optimizers[0])
        self.optimizers = [self.gossip.optimizer]

    def setup_precision_plugin(self) -> None:
        """Let float16 be clipped, which Lightning refuses to optimizers that go on after an overflow, as this one does."""
        super().setup_precision_plugin()
        self.precision_plugin.clip_gradients = partial(Precision.clip_gradients, self.precision_plugin)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Begin the exchange of methods with overlap, which travels behind the computation."""
        assert self.gossip is not None
        if self.gossip.algorithm.begins_before_gradient:  # modules need not call themselves, which would begin it
            self.gossip.begin()
        return super().training_step(*args, **kwargs)

    def optimizer_step(
        self, optimizer: Any, closure: Callable[[], Any], model: LightningModule | None = None, **kwargs: Any
    ) -> Any:
        """Run `closure`, clip, and do one step of training; collective on all ranks.

        Gradients of earlier micro-batches, and of manual optimization, are there before the closure runs, so that it is not
        passed to the optimizer, which would begin anew.
        """
        module, plugin = model or self.lightning_module, self.precision_plugin
        loss = closure()
        if (scaler := getattr(plugin, "scaler", None)) is not None:
            scaler.unscale_(optimizer)
        plugin._after_closure(module, optimizer)  # hooks, and clipping
        if scaler is None:
            optimizer.step(**kwargs)
        else:
            scaler.step(optimizer, **kwargs)
            scaler.update()
        return loss

    def on_train_start(self) -> None:
        """Refuse ranks with unequal numbers of batches, some of which would wait for ever."""
        counts = self.world.all_gather(self.lightning_module.trainer.num_training_batches)
        if len(set(counts)) > 1:
            agree(
                self.world,
                ConfigError(
                    f"the ranks have {counts} training batches by rank, and some would wait for the others for ever: pass "
                    f"the whole data set on every rank, which Lightning deals out, or Trainer(limit_train_batches="
                    f"{min(counts)})"
                ),
            )

    def on_train_end(self) -> None:
        """Make the model the averaged one, on every rank."""
        assert self.gossip is not None
        self.gossip.average_()

    def on_validation_start(self) -> None:
        """Validate the averaged model, as long as there is training; collective on all ranks."""
        if self.lightning_module.trainer.state.fn == TrainerFn.FITTING:
            assert self.gossip is not None
            self._averaged = ExitStack()
            self._averaged.enter_context(self.gossip.averaged())

    def on_validation_end(self) -> None:
        """Go on with the rank's own model."""
        if self._averaged is not None:
            self._averaged.close()
            self._averaged = None

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the averaged model's; collective on all ranks during `fit`."""
        if self.lightning_module.trainer.interrupted:
            raise CheckpointError(
                "no checkpoint of all ranks can be saved after an error on one: save every few steps instead "
                "(ModelCheckpoint(every_n_train_steps=...))"
            )
        if self.gossip is None or self._averaged is not None:
            return dict(super().lightning_module_state_dict())
        return self.gossip.averaged_state_dict()

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Return nothing: each rank's own is in the folder beside the checkpoint file."""
        return {}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write the checkpoint file and, beside it, the state of all ranks; collective on all ranks."""
        if self.gossip is not None and "optimizer_states" in checkpoint:
            if "://" in str(filepath):
                raise ConfigError(f"{filepath}: the state of the ranks can only be saved in a folder that all ranks share")
            is_validating = self._averaged is not None
            self.on_validation_end()  # what is saved is the rank's own
            self.gossip.save(ranks_folder(filepath), extra={"precision": self.precision_plugin.state_dict()})
            if is_validating:
                self.on_validation_start()
            # Last of all, and naming the step: a file that is replaced goes with its own states until the new one is there.
            checkpoint[OWN] = {"step": self.gossip.steps, "size": self.world.size}
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read the checkpoint file."""
        self._checkpoint_path = Path(checkpoint_path)
        return dict(super().load_checkpoint(checkpoint_path, *args, **kwargs))

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        """Have every rank go on from its own state; collective on all ranks."""
        assert self.gossip is not None and self._checkpoint_path is not None
        if OWN not in checkpoint:
            raise CheckpointError(
                f"{self._checkpoint_path}: has no state of GossipStrategy's ranks to go on from. To start from its model, "
                "load that (load_from_checkpoint of your module) and leave out ckpt_path"
            )
        extra = self.gossip.resume(ranks_folder(self._checkpoint_path), step=checkpoint[OWN]["step"])
        assert extra is not None
        self.precision_plugin.load_state_dict(extra["precision"])

    def remove_checkpoint(self, filepath: Any) -> None:
        """Remove a checkpoint file and the states of the ranks that go with it."""
        super().remove_checkpoint(filepath)
        if self.is_global_zero:
            shutil.rmtree(ranks_folder(filepath), ignore_errors=True)

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Return the mean of a tensor over all ranks, or its sum, maximum or minimum; collective on all ranks.

        The mean of integers is a floating-point number.
        """
        if not isinstance(tensor, Tensor):
            return tensor
        kind = str(reduce_op).rsplit(".", 1)[-1].lower()
        reduced = REDUCTIONS[{"avg": "mean"}.get(kind, kind)](torch.stack(self._gather(tensor)))
        return reduced if kind == "sum" else reduced.to(torch.promote_types(tensor.dtype, torch.float32))

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """Return the tensors of all ranks (size, ...), without a new axis for one rank; collective on all ranks."""
        if sync_grads:
            raise ConfigError("all_gather(sync_grads=True): gradients of one rank do not reach another: leave it out")
        return tensor if self.world.size == 1 else torch.stack(self._gather(tensor))

    def _gather(self, tensor: Tensor, group: Any = None) -> list[Tensor]:
        return [other.to(tensor.device) for other in self.world.all_gather(tensor.detach().cpu())]

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Return the object of rank `src`; collective on all ranks."""
        return self.world.broadcast(obj) if src == 0 else self.world.all_gather(obj)[src]

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Wait for all ranks."""
        self.world.barrier()


def ranks_folder(checkpoint_path: Any) -> Path:
    """Return the folder with the states of the ranks that belong to a checkpoint file, or to what a link points to."""
    path = Path(checkpoint_path).resolve()
    return path.with_name(f"{path.name}.ranks")


def refuse(trainer: Trainer) -> None:
    """Raise ConfigError for settings of a Trainer with which ranks cannot train together."""
    connector = trainer._accelerator_connector
    devices = len(connector._parallel_devices)
    if devices not in (1, trainer.accelerator.auto_device_count()):
        raise ConfigError(
            f"Trainer(devices={devices}): with GossipStrategy each rank has one device, and the launcher says how many ranks "
            f"there are: leave out devices, and start with mpiexec -n {devices}"
        )
    if connector._layer_sync is not None:
        raise ConfigError("Trainer(sync_batchnorm=True): batch statistics are each rank's own, and averaged for validation")
