"""`GossipStrategy`: a Lightning `Trainer` on every MPI rank, trained together with those of its neighbors.

trainer = Trainer(strategy=GossipStrategy(Choco(gamma=0.2), topology=ring, compressor=TopK(ratio=0.01)))

Every rank runs a Trainer of one device; ``torch.distributed`` is never started. The Trainer knows its rank, so that
only rank 0 logs, and deals the samples out, as with DDP. Within `fit` all ranks do the same in the same order, and
validation and saving use the averaged model. After it the model is the averaged one on every rank.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.plugins.environments import MPIEnvironment
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch import LightningModule, Trainer, callbacks
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.callbacks import LearningRateFinder, OnExceptionCheckpoint
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler
from torchmetrics import Metric
from torchmetrics.metric import jit_distributed_available

from mpicomp.algorithms.base import Algorithm
from mpicomp.compression.base import Compressor
from mpicomp.errors import CheckpointError, ConfigError
from mpicomp.exchange.guard import install_excepthook, together
from mpicomp.exchange.mpi.world import MpiWorld
from mpicomp.exchange.node_sums import NodeSums
from mpicomp.exchange.placement import DeviceKind, claim_gpu, device_of
from mpicomp.integrations.samplers import SameDraws
from mpicomp.replica.distribute import Buffers, distribute
from mpicomp.replica.distributed import Distributed

OWN = "mpicomp"
"""The key in a checkpoint file that identifies the ranks' states belonging to it."""


class GossipStrategy(ParallelStrategy):
    """A strategy of Lightning's `Trainer` whose module is trained together with those of the other MPI ranks.

    Making a strategy and all methods of the Trainer are collective on all ranks. A checkpoint is a file ``x.ckpt`` as
    Lightning writes it, with the averaged model, and a folder ``x.ckpt.ranks`` next to it, with the state of each rank.
    Where names differ, as with a metric of each rank in them, those of rank 0 hold, in writing and in reading.

    Args:
        algorithm, topology, compressor, buffers, allow_shared_gpu, groups, node_sums, hang_timeout_s: as for
            `mpicomp.distribute`.

    Attributes:
        world: the ranks.
        gossip: the result of `mpicomp.distribute`; None before `fit`.

    Raises:
        ConfigError: ranks cannot train together with this Trainer or module.

    """

    strategy_name = "gossip"
    is_distributed = True  # the Trainer asks for `distributed_sampler_kwargs`
    gossip: Distributed | None = None
    optimizers: list[Any]

    def __init__(
        self,
        algorithm: Algorithm[Any],
        topology: Any,
        compressor: Compressor | None = None,
        *,
        buffers: Buffers = "averaged",
        allow_shared_gpu: bool = False,
        groups: Sequence[Sequence[int]] | Literal["host"] | None = None,
        node_sums: NodeSums = "auto",
        hang_timeout_s: float = 600.0,
    ) -> None:
        # Not Slurm's environment, whose signal handler would save a checkpoint on each rank in the middle of a step.
        super().__init__(cluster_environment=MPIEnvironment())
        self.cluster_environment.local_rank()  # asks the other ranks, once
        self.world = MpiWorld.from_environment("cpu")
        install_excepthook(self.world)
        rank_zero_only.rank = self.world.rank  # Lightning finds that of torchrun and Slurm only
        self._algorithm = algorithm
        self._allow_shared_gpu = allow_shared_gpu
        self._distribute: Callable[..., Distributed] = partial(
            distribute,
            algorithm=algorithm,
            topology=topology,
            compressor=compressor,
            buffers=buffers,
            allow_shared_gpu=allow_shared_gpu,
            groups=groups,
            node_sums=node_sums,
            hang_timeout_s=hang_timeout_s,
        )
        self._averaged: ExitStack | None = None
        self._is_trained = False
        self._expects_own_samples = False
        self._root_device = torch.device("cpu")

    @property
    def root_device(self) -> torch.device:
        """The device of this rank."""
        return self._root_device

    @property
    def distributed_sampler_kwargs(self) -> dict[str, int]:
        """The arguments for `torch.utils.data.DistributedSampler`."""
        return {"num_replicas": self.world.size, "rank": self.world.rank}

    def process_dataloader(self, dataloader: Any) -> Any:
        """Give a loader random numbers of its own, and its sampler the same ones on all ranks; collective on them."""
        if not isinstance(dataloader, DataLoader):
            return dataloader
        if dataloader.generator is None:  # after a restart, Lightning starts a loader another number of times
            dataloader.generator = torch.Generator().manual_seed(torch.initial_seed())
        sampler = dataloader.sampler
        if isinstance(sampler, DistributedSamplerWrapper):
            # Each rank takes its part of what it draws itself.
            sampler.dataset._sampler = SameDraws(sampler.dataset._sampler, self.world.broadcast(sampler.seed))
        return dataloader

    def setup_environment(self) -> None:
        """Check the Trainer, and choose the GPU of this rank if it wants one."""
        with together(self.world):
            refuse(self.lightning_module.trainer)
        kind: DeviceKind = "cuda" if isinstance(self.accelerator, CUDAAccelerator) else "cpu"
        self._root_device = device_of(claim_gpu(self.world, kind, self._allow_shared_gpu))
        self.parallel_devices = [self._root_device]
        super().setup_environment()

    def model_to_device(self) -> None:
        """Move the model to the device of this rank, and let its metrics synchronize with other ranks."""
        self.model.to(self._root_device)
        for module in self.lightning_module.modules():
            if isinstance(module, Metric):
                module.distributed_available_fn = OfThisRun(self._has_others, stored=jit_distributed_available)
                module.dist_sync_fn = OfThisRun(self._gather, stored=None)

    def setup_optimizers(self, trainer: Trainer) -> None:
        """Make the optimizer whose steps exchange messages; collective on all ranks."""
        super().setup_optimizers(trainer)
        with together(self.world):
            if len(self.optimizers) != 1:
                names = ", ".join(type(optimizer).__name__ for optimizer in self.optimizers)
                raise ConfigError(
                    f"configure_optimizers() gave {names}, but ranks train together with one optimizer: return one "
                    "over all trainable parameters, with groups where learning rates differ, or "
                    "mpicomp.SeveralOptimizers([...]), which make their steps together"
                )
            if self._own_gossip is not None:
                raise ConfigError(
                    "the module was trained by an earlier fit(): go on in a new program by fit(ckpt_path=...) with a "
                    "larger max_epochs, or make a new Trainer and module. Tuner is for one rank, without GossipStrategy"
                )
        self.gossip = self._distribute(self.lightning_module, self.optimizers[0])
        self.optimizers = [self.gossip.optimizer]
        self._is_trained = False

    def setup_precision_plugin(self) -> None:
        """Allow clipping in float16, which Lightning refuses for optimizers that also step after an overflow."""
        super().setup_precision_plugin()
        self.precision_plugin.clip_gradients = partial(Precision.clip_gradients, self.precision_plugin)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Begin the step of methods with overlap, because a module may not call itself, which would begin it."""
        if self._algorithm.begins_before_gradient:
            assert self.gossip is not None
            self.gossip.begin()
        return super().training_step(*args, **kwargs)

    def optimizer_step(
        self, optimizer: Any, closure: Callable[[], Any], model: LightningModule | None = None, **kwargs: Any
    ) -> Any:
        """Run `closure`, clip, and do one step of training; collective on all ranks.

        The closure is not passed to the step, because a step with a closure begins without gradients. Here gradients of
        earlier micro-batches and of manual optimization may exist already.
        """
        loss = closure()
        scaler = getattr(self.precision_plugin, "scaler", None)
        if scaler is not None:
            scaler.unscale_(optimizer)
        self.precision_plugin._after_closure(model or self.lightning_module, optimizer)  # hooks, and clipping
        if scaler is None:
            optimizer.step(**kwargs)
        else:
            scaler.step(optimizer, **kwargs)
            scaler.update()
        return loss

    def on_train_start(self) -> None:
        """Raise ConfigError if ranks have unequal numbers of batches."""
        trainer = self.lightning_module.trainer
        samplers = [getattr(loader, "sampler", None) for loader in trainer.fit_loop._combined_loader.flattened]
        self._expects_own_samples = not all(isinstance(sampler, DistributedSampler) for sampler in samplers)
        counts = self.world.all_gather(trainer.num_training_batches)
        with together(self.world):
            if len(set(counts)) > 1:
                raise ConfigError(
                    f"the ranks have unequal numbers of training batches ({counts} by rank), so that some would wait "
                    "for the others for ever: pass the whole training set on every rank, each trains on its part of "
                    f"it, or set Trainer(limit_train_batches={min(counts)})"
                )

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Raise ConfigError if Lightning deals out no samples, and the first batch is the same on all ranks."""
        if not self._expects_own_samples:
            return
        self._expects_own_samples = False
        digests = set(self.world.all_gather(digest(batch)))
        with together(self.world):
            if self.world.size > 1 and len(digests) == 1 and None not in digests:
                raise ConfigError(
                    "the first batch is the same on all ranks, which would train on the same samples: an "
                    "IterableDataset, or a loader without DistributedSampler, is not dealt out, and torch.distributed "
                    "is not started. Take each rank's part by trainer.global_rank and trainer.world_size"
                )

    def on_train_end(self) -> None:
        """Replace the model by the averaged one."""
        assert self.gossip is not None
        self.gossip.average_()
        self._is_trained = True

    def on_validation_start(self) -> None:
        """Replace the model by the averaged one for a validation within `fit`."""
        trainer = self.lightning_module.trainer
        if trainer.state.fn == TrainerFn.FITTING:
            assert self.gossip is not None
            with together(self.world):
                if self.gossip.is_in_step:
                    raise ConfigError(
                        f"a validation in the middle of a step, whose messages {self._algorithm.name} has sent: "
                        "validate after a step of the optimizer, that is, let "
                        f"Trainer(val_check_interval={trainer.val_check_interval}) be a number of batches, a multiple "
                        f"of accumulate_grad_batches={trainer.accumulate_grad_batches}, or leave out one of them"
                    )
            self._averaged = ExitStack()
            self._averaged.enter_context(self.gossip.averaged())

    def on_validation_end(self) -> None:
        """Restore the model of this rank after a validation."""
        if self._averaged is not None:
            self._averaged.close()
            self._averaged = None

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the `state_dict` of the averaged model; collective on all ranks."""
        gossip = self._own_gossip
        # A trained model is averaged already, and no longer on its GPU.
        if gossip is None or self._averaged is not None or self._is_trained:
            return dict(super().lightning_module_state_dict())
        return gossip.averaged_state_dict()

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Return an empty dict: the optimizer state of each rank is in the folder next to the file."""
        return {}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Save the states of the ranks, and then the file, both where rank 0 says; collective on all ranks."""
        gossip = self._own_gossip
        if gossip is not None and "optimizer_states" in checkpoint:
            is_validating = self._averaged is not None
            self.on_validation_end()  # what is saved is the model of this rank
            device = self.lightning_module.device
            self.lightning_module.to(self._root_device)  # from where Lightning moves it at the end of fit()
            gossip.local.forget_gradients()  # Lightning saves wherever it is in an accumulation, and stores none
            extra = {"precision": self.precision_plugin.state_dict()}
            gossip.save(ranks_folder(filepath), extra, replace=True)  # as the file is replaced
            self.lightning_module.to(device)
            if is_validating:
                self.on_validation_start()
            # A file that is to be replaced names its own states. If this one is not written, they are still there,
            # unless they are of a later step.
            checkpoint[OWN] = {"step": gossip.steps}
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Read the file that rank 0 names, which alone is written if names differ; collective on all ranks."""
        return super().load_checkpoint(self.world.broadcast(checkpoint_path), *args, **kwargs)

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        """Restore the state of every rank from the folder; collective on all ranks."""
        path = self.lightning_module.trainer.ckpt_path
        with together(self.world):
            if OWN not in checkpoint:
                raise CheckpointError(
                    f"{path}: has no states of ranks to go on from, as GossipStrategy saves them. To begin with its "
                    "model, load that (load_from_checkpoint of your module) and leave out ckpt_path"
                )
        assert self.gossip is not None
        extra = self.gossip.resume(ranks_folder(path), step=checkpoint[OWN]["step"])
        assert extra is not None
        self.precision_plugin.load_state_dict(extra["precision"])

    def remove_checkpoint(self, filepath: Any) -> None:
        """Remove a file, and the states of the ranks that belong to it."""
        super().remove_checkpoint(filepath)
        if self.is_global_zero:
            shutil.rmtree(ranks_folder(filepath), ignore_errors=True)

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Return the mean (a floating-point number), sum, max or min of a tensor over all ranks; collective."""
        if not isinstance(tensor, Tensor):
            return tensor
        kind = str(reduce_op).rsplit(".", 1)[-1].lower()  # a text, or one of torch.distributed.ReduceOp
        every = torch.stack(self._gather(tensor))
        if kind in ("mean", "avg"):
            return every.double().mean(dim=0).to(torch.promote_types(tensor.dtype, torch.float32))
        return getattr(every, {"sum": "sum", "max": "amax", "min": "amin"}[kind])(dim=0)

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """Return the tensors of all ranks (size, ...), without that axis for one rank; collective on all ranks."""
        if sync_grads:
            raise ConfigError("all_gather(sync_grads=True): no gradient goes from rank to rank, leave it out")
        return tensor if self.world.size == 1 else torch.stack(self._gather(tensor))

    @property
    def _own_gossip(self) -> Distributed | None:
        """The training of the Trainer's module; None if it was not trained, as one that was only validated."""
        is_own = self.gossip is not None and self.gossip.local.model is self.lightning_module
        return self.gossip if is_own else None

    def _has_others(self) -> bool:
        return self.world.size > 1

    def _gather(self, tensor: Tensor, group: Any = None) -> list[Tensor]:
        return [other.to(tensor.device) for other in self.world.all_gather(tensor.detach().cpu())]

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Return the object of rank `src`; collective on all ranks."""
        return self.world.broadcast(obj) if src == 0 else self.world.all_gather(obj)[src]

    def barrier(self, name: str | None = None) -> None:
        """Wait for all ranks."""
        self.world.barrier()


class OfThisRun:
    """A function of a metric that belongs to this run: copies of the metric have the same, and stored ones `stored`.

    Otherwise copying a metric would copy the whole training state with it.
    """

    def __init__(self, function: Callable[..., Any], stored: Callable[..., Any] | None) -> None:
        self._function = function
        self._stored = stored

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        return self._function(*args, **kwargs)

    def __deepcopy__(self, _: object) -> OfThisRun:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _same, (self._stored,)


def _same(value: Any) -> Any:
    return value


def digest(batch: Any) -> bytes | None:
    """Return a hash of the tensors, numbers and texts in a batch; None if there are others, or none at all."""
    total, leaves = hashlib.blake2b(), list(_leaves(batch))
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
            total.update(leaf.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(leaf, int | float | str | bytes):
            total.update(repr(leaf).encode())
        else:
            return None
    return total.digest() if leaves else None


def _leaves(batch: Any) -> Iterator[Any]:
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    if isinstance(batch, list | tuple):
        for part in batch:
            yield from _leaves(part)
    else:
        yield batch


def ranks_folder(checkpoint_path: Any) -> Path:
    """Return the folder with the ranks' states for a checkpoint file, or for the target of a link."""
    if "://" in str(checkpoint_path):
        raise ConfigError(f"{checkpoint_path}: the states of ranks are saved in a folder that all ranks share only")
    path = Path(checkpoint_path).resolve()
    return path.with_name(f"{path.name}.ranks")


def refuse(trainer: Trainer) -> None:
    """Raise ConfigError if ranks cannot train together with the settings of the Trainer."""
    devices = len(trainer._accelerator_connector._parallel_devices)
    if devices not in (1, trainer.accelerator.auto_device_count()):
        raise ConfigError(
            f"Trainer(devices={devices}): with GossipStrategy each rank has one device, and the launcher says how many "
            f"ranks there are: leave out devices, and start with mpiexec -n {devices}"
        )
    if trainer._accelerator_connector._layer_sync is not None:
        raise ConfigError("Trainer(sync_batchnorm=True): every rank has batch statistics of its own, leave it out")
    for callback in trainer.callbacks:
        name = type(callback).__name__
        if isinstance(callback, LearningRateFinder):
            raise ConfigError(
                f"{name} is for one rank: look for the learning rate without GossipStrategy, and leave it out"
            )
        if isinstance(callback, getattr(callbacks, "WeightAveraging", ())):  # of Lightning 2.6
            raise ConfigError(
                f"{name} averages the models of one rank over time, and would put that into validation and checkpoints "
                "in place of the mean of all ranks: leave it out"
            )
        if isinstance(callback, OnExceptionCheckpoint) or getattr(callback, "save_on_exception", False):
            raise ConfigError(
                f"{name} would save after an error on one rank, and wait for the others for ever: save now and then "
                "instead, by ModelCheckpoint(every_n_train_steps=...)"
            )
