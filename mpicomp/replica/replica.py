"""The replica: the model of one rank, with its state, its checkpoints, and the mean over all ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mpicomp.algorithms import AnyAlgorithm
from mpicomp.algorithms.base import Algorithm
from mpicomp.algorithms.sums.base import AggregatedAlgorithm
from mpicomp.checkpoint import nested
from mpicomp.checkpoint.folder import Checkpoints
from mpicomp.checkpoint.saver import RunIdentity, Saver, check_fits, find_checkpoint, topology_name
from mpicomp.errors import CheckpointError, ConfigError, DivergenceError
from mpicomp.exchange.base import Node, World
from mpicomp.exchange.guard import together
from mpicomp.exchange.patience import patiently
from mpicomp.replica.buffers import averaged_buffers
from mpicomp.replica.consistency import require_same_buffers, require_same_tensors
from mpicomp.replica.flat import FlatModel
from mpicomp.replica.node_shard import NodeShard
from mpicomp.replica.state import (
    WEIGHT,
    algorithm_leaves,
    extra_state_leaves,
    load_algorithm_,
    load_extra_state_,
    load_model_,
    load_optimizer_,
    load_random,
    model_leaves,
    optimizer_leaves,
    random_leaves,
)
from mpicomp.state import Leaf
from mpicomp.topology.base import Schedule

COPIES_EVERY = 20
"""Steps from one look at the public copies to the next."""

RUNAWAY_LOOKS = 3
"""Training ends after so many consecutive looks at which the public copy is farther from the model than zero is, and at
the last farther than at the first: after `load_state_dict` it is far, too, but comes closer."""


class Link(Protocol):
    """The transport of training messages: an `Exchange` or a `Mailbox`."""

    bytes_sent: int


class Replica(ABC):
    """A model that is trained together with those of the other ranks. Making one is collective on all ranks.

    Attributes:
        world: the ranks.
        algorithm: the training method.
        schedule: the graph of each step.
        local: the flat model.
        part: what the algorithm works on: the flat model, or the shard of it that falls to this rank of a node.
        node: the node that holds one model; None if each rank holds one.
        link: the transport of messages.
        state: of the algorithm.
        averages_buffers: whether the averaged model has averaged batch-norm statistics, or each rank's own.
        steps: the number of steps done.

    """

    link: Link
    state: Any

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        algorithm: AnyAlgorithm,
        schedule: Schedule,
        world: World,
        node: Node | None = None,
    ) -> None:
        algorithm.check(schedule)
        self.world = world
        self.node = node
        self.algorithm = algorithm
        self.schedule = schedule
        with together(world):
            self.local = FlatModel(model, optimizer)
        require_same_tensors(world, self.local)
        self.part: FlatModel | NodeShard = self.local if node is None else NodeShard(self.local, node)
        world.broadcast_(self.local.x)
        for tensor in self.local.untrained():
            common = tensor.detach().contiguous()
            world.broadcast_(common)
            tensor.detach().copy_(common)
        self.local.show_parameters()
        self.averages_buffers = True
        self.steps = 0
        self._far: list[float] = []
        self._folders: set[Path] = set()  # of checkpoints that are of this training
        self._connect()
        if isinstance(algorithm, Algorithm):
            is_own_step = not (algorithm.ranks_stay_equal or algorithm.updates_with_sum or node)
            if algorithm.keeps_anchor:
                self.local.keep_anchor(algorithm.name)
        else:
            is_own_step = not algorithm.owners(world.size, self.local.spec)  # no hub takes it
        self.local.skips_absent = is_own_step  # of a sum, all ranks must take the same step
        self.local.register()

    def steps_of_all(self) -> int:
        """Return the step number for checkpoints and records, the same on all ranks; collective on all ranks."""
        return self.steps

    @abstractmethod
    def _connect(self) -> None:
        """Make `link` and `state`; collective on all ranks."""

    @property
    def bytes_sent(self) -> int:
        """The bytes that this rank has sent in training messages."""
        return self.link.bytes_sent

    def check_finite(self) -> None:
        """Raise DivergenceError if the last loss is NaN or infinite."""
        if not bool(torch.isfinite(self.local.loss)):
            raise self._diverged(f"the loss is {self.local.loss.item()}")

    def check_copies(self) -> None:
        """Raise DivergenceError if the public copy has run away from the model; looks every `COPIES_EVERY` steps."""
        if self.steps % COPIES_EVERY:
            return
        error = self.algorithm.diagnostics(self.part, self.state).get("compression_error", 0.0)
        self._far = [*self._far[1 - RUNAWAY_LOOKS :], error] if error > 1 else []
        if len(self._far) == RUNAWAY_LOOKS and self._far[-1] > self._far[0]:
            raise DivergenceError(
                f"the public copies have left the models behind (compression_error {error:.3g} at step {self.steps} on "
                f"rank {self.world.rank}): algorithm.gamma is too large for this compressor, or optimizer.lr is, "
                "or, with DEF-ATC, weights are clamped, pruned or normalized after every step"
            )

    @contextmanager
    def naming_divergence(self) -> Iterator[None]:
        """Add tensor, step and rank to a DivergenceError that the block raises."""
        try:
            yield
        except DivergenceError as error:
            raise self._diverged(str(error)) from error

    def _diverged(self, what: str) -> DivergenceError:
        """Return the error for a step with a value that is not finite; names a tensor with such a value."""
        name = self.local.not_finite()
        place = f" (first in {name})" if name and not what.startswith(f"{name}:") else ""
        return DivergenceError(
            f"{what}{place} at step {self.steps} on rank {self.world.rank}: lower optimizer.lr or algorithm.gamma, "
            "or lengthen schedule.warmup"
        )

    def average_(self) -> None:
        """Overwrite the parameters and the batch-norm statistics with the mean over all ranks; collective on them.

        Raises:
            ConfigError: the model is no longer the one that was distributed; names the tensor.

        """
        with together(self.world):
            self.local.refresh()
        self._average_()

    def _average_(self) -> None:
        self.world.mean_(self.local.x)
        self.local.show_parameters()
        for buffer in self.averaged_buffers():
            mean = buffer.contiguous()
            self.world.mean_(mean)
            if mean is not buffer:
                buffer.copy_(mean)

    def averaged_buffers(self) -> list[Tensor]:
        """Return the buffers that the averaged model has averaged; collective on all ranks.

        Raises:
            ConfigError: on all ranks: a buffer has another shape or type on one of them; names it.

        """
        if not self.averages_buffers:
            return []
        buffers = averaged_buffers(self.local.model)
        require_same_buffers(self.world, buffers)
        return list(buffers.values())

    @property
    def is_in_step(self) -> bool:
        """Whether a step has begun and is not finished."""
        return False

    def require_between_steps(self, what: str) -> None:
        """Raise ConfigError if a step has begun; `what` names the call that must be made between steps."""
        if self.is_in_step:
            raise ConfigError(
                f"{what} in the middle of a step: a forward pass in training mode has begun it. Call it after "
                "gossip.optimizer.step(), and evaluate in model.eval() or torch.no_grad()"
            )

    def _require_company(self, what: str) -> None:
        """Raise ConfigError on this rank alone if others will not take part in the collective call `what`."""
        return

    def _require_own_model(self, what: str) -> None:
        """Raise ConfigError inside `averaged`; `what` names the call that needs the model of this rank."""
        if self.local.is_averaged:
            raise ConfigError(
                f"{what} inside averaged(), where the model is the mean over the ranks: call it after the block"
            )

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """Set the model to the mean over ranks (parameters and batch-norm statistics) within the block.

        This is the model to evaluate and to keep. It is in evaluation mode; afterwards every module is in its former
        mode. Entering is collective on all ranks and not counted as training traffic. The block itself is not
        collective: a single rank may evaluate in it. Inside, `save`, `resume` and steps are refused.

        Raises:
            ConfigError: a step has begun, or the model is no longer the one that was distributed.

        """
        self._require_company("averaged()")
        with together(self.world):
            self.require_between_steps("averaged()")
        modes = [(module, module.training) for module in self.local.model.modules()]
        was_averaged = self.local.is_averaged
        with self.local.unchanged():
            try:
                self.average_()
                self.local.is_averaged = True
                self.local.model.eval()
                yield self.local.model
            finally:
                self.local.is_averaged = was_averaged
                for module, mode in modes:
                    module.training = mode  # not by train(mode), which reaches those below, and may be the user's own

    def averaged_state_dict(self) -> dict[str, Any]:
        """Return the `state_dict` of the averaged model on the CPU, the same on all ranks; collective on all ranks.

        Names and order are those of ``model.state_dict()``; tied weights share one tensor. Counters, parameters that
        the optimizer does not hold, and the results of a module's `get_extra_state` are this rank's own. The call does
        not affect training.
        """
        with self.averaged() as model:
            averaged: dict[str, Any] = model.state_dict(keep_vars=True)  # parameters themselves, so that ties show
            copies: dict[int, Any] = {}
            for name, value in averaged.items():
                if id(value) not in copies:
                    is_tensor = isinstance(value, Tensor)
                    copies[id(value)] = value.detach().to("cpu", copy=True) if is_tensor else deepcopy(value)
                averaged[name] = copies[id(value)]
        return averaged

    def consensus_distance(self) -> float:
        """Return ``sqrt(mean_i |x_i - xbar|^2)``, the distance of the ranks' models from their mean; collective."""
        self._require_company("consensus_distance()")
        mean = self.local.x.clone()
        self.world.mean_(mean)
        return root_mean_square(self.world, float((self.local.x - mean).norm()))

    def identity(self, config: str = "") -> RunIdentity:
        """Return what checkpoints of this rank belong to; `config` is the text of a configuration, if there is one."""
        return RunIdentity(
            algorithm=repr(self.algorithm),
            topology=topology_name(self.schedule) + (f", nodes of {self.node.size} ranks" if self.node else ""),
            model=f"{type(self.local.model).__name__} with {self.local.spec.numel:,} parameters",
            config=config,
        )

    def state_dict(self) -> dict[str, Leaf]:
        """Return all state of this rank that a restart needs, by path (see `mpicomp.replica.state`); copies nothing.

        It has model, optimizer, public copies, moments, residuals and random generators, but not the caller's loader or
        scheduler.
        """
        return {
            **model_leaves(self.local),
            **extra_state_leaves(self.local.model),
            **optimizer_leaves(self.local),
            **algorithm_leaves(self.state),
            "exchange/steps": self.steps,
            "exchange/bytes_sent": self.link.bytes_sent,
            **self._weight(),
            **random_leaves(self.world.device),
        }

    def _weight(self) -> dict[str, Leaf]:
        """Return the leaf with what this rank counts in sums, for other numbers of ranks; none if all count alike."""
        if self.node is not None or not isinstance(self.algorithm, AggregatedAlgorithm):
            return {}
        weights = self.algorithm.rank_weights(self.world.size)
        return {WEIGHT: weights[self.world.rank]} if weights else {}

    def load_state_dict(self, stored: Mapping[str, Leaf]) -> None:
        """Restore the state that `state_dict` has returned on this rank.

        Raises:
            CheckpointError: the state is of another algorithm, compressor, optimizer or model.

        """
        load_model_(self.local, stored)
        self.local.show_parameters()
        self.local.accept_loaded()
        load_extra_state_(self.local.model, stored)
        load_optimizer_(self.local, stored)
        load_algorithm_(self.state, stored)
        self.steps = int(stored["exchange/steps"])
        self.link.bytes_sent = int(stored["exchange/bytes_sent"])
        load_random(self.world.device, stored)

    def save(
        self, folder: Path | str, extra: Mapping[str, Any] | None = None, keep_last: int = 2, replace: bool = False
    ) -> None:
        """Store a checkpoint of all ranks in `folder`, which they share, and wait for it; collective on all ranks.

        `resume` returns `extra` to this rank, with the same structure and types: for example the state of a scheduler,
        a sampler or a gradient scaler, or the epoch. It may contain None, booleans, numbers, texts, bytes, tensors and
        arrays, in nested dicts, lists and tuples (`mpicomp.checkpoint.nested`). If ranks name different folders, as
        with a time stamp in the name, rank 0's is the one.

        The last `keep_last` checkpoints up to this one are kept; 0 keeps all. Otherwise those of higher steps in
        `folder` are removed, if this training has gone back from them (`resume`), or with `replace`.

        Raises:
            ConfigError: a step has begun, or backward passes have left gradients for it; the call is inside `averaged`;
                the model is no longer the one that was distributed; or `folder` has a checkpoint of a higher step, of
                another training.
            DivergenceError: a parameter is NaN or infinite; nothing was written.
            CheckpointError: `extra` or the state of the optimizer has a value that cannot be stored, and nothing was
                written; or the checkpoint could not be written. Earlier checkpoints are intact.

        """
        self._require_company("save()")
        problems: list[str] = []
        step = self.steps_of_all()
        folder = self.world.broadcast(Path(folder))
        with self.local.unchanged() if self.local.is_elsewhere else nullcontext():
            with together(self.world), self.naming_divergence():
                self.require_between_steps("save()")
                self._require_own_model("save()")
                if self.local.has_gradients:
                    raise ConfigError(
                        "save() in the middle of an accumulation: backward passes have run since the last step, and a "
                        "checkpoint holds no gradients, so these would be missing in the first step after resume(). "
                        "Call it after gossip.optimizer.step(), or after zero_grad() if nothing needs them"
                    )
                self.local.check()
                if keep_last and not replace:
                    self._require_own_folder(folder, step)
                if not self.local.x.isfinite().all():
                    raise DivergenceError("save() has written nothing, because the model is not finite")
                own = nested.pack({} if extra is None else extra, "extra")
                leaves = {**self.state_dict(), **{f"extra/{name}": leaf for name, leaf in own.items()}}
                saver = Saver(self.world, folder, self.identity(), keep_last, None, problems.append)
            saver.start(step, leaves, in_place=True)
            is_sound = saver.finish()
            saver.close()
        if keep_last:
            self._folders.add(folder.resolve())
        if not is_sound:
            raise CheckpointError("; ".join(self.world.broadcast(problems)))

    def _require_own_folder(self, folder: Path, step: int) -> None:
        """Raise ConfigError if `folder` has a later checkpoint of a training that this one does not continue."""
        if self.world.rank or folder.resolve() in self._folders:
            return
        newest = Checkpoints(folder).newest_step()
        if newest is not None and newest > step:
            raise ConfigError(
                f"save() at step {step} in {folder} would remove the checkpoint of step {newest}, which is of another "
                "training: call gossip.resume(folder) before the loop to continue that, save in another folder, or "
                "pass replace=True"
            )

    def resume(self, folder: Path | str, step: int | None = None) -> dict[str, Any] | None:
        """Restore the newest checkpoint in `folder` and return its `extra`, or None if there is none; collective.

        Tensors of `extra` are on the CPU; a `load_state_dict` accepts them there. `step` asks for the checkpoint of
        that step instead, which must exist. `folder` is that of rank 0.

        Raises:
            ConfigError: a step has begun, or the call is inside `averaged`.
            CheckpointError: the checkpoint is damaged, or of another model, algorithm or number of ranks.

        """
        self._require_company("resume()")
        checkpoint = find_checkpoint(self.world, Path(folder), step)
        if checkpoint is None:
            return None
        with together(self.world):
            self.require_between_steps("resume()")
            self._require_own_model("resume()")
            check_fits(checkpoint, self.identity(), self.world.size)
        stored = patiently(self.world, partial(checkpoint.read, self.world.rank))
        with together(self.world):
            prefix = "extra/"
            extra = nested.unpack(
                {path.removeprefix(prefix): leaf for path, leaf in stored.items() if path.startswith(prefix)}
            )
            self.load_state_dict(stored)
        self._folders.add(checkpoint.path.parent.resolve())
        return extra


def root_mean_square(world: World, value: float) -> float:
    """Return the root of the mean over ranks of `value` squared; collective on all ranks."""
    values = world.all_gather(value)
    return float((sum(v * v for v in values) / len(values)) ** 0.5)
