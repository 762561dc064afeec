"""The drop-in for a training script of one's own: its loop, loader, scheduler and Trainer stay as they are.

    gossip = mpicomp.distribute(model, optimizer, algorithm=AdaGossip(gamma=1e-2), topology=ring,
                                compressor=TopK(ratio=0.01))

    for batch in loader:                                 # with a function that computes the loss
        loss = gossip.step(lambda: loss_fn(model, batch))

    for batch in loader:                                 # or with the loop that people have
        loss = loss_fn(model, batch)
        loss.backward()
        gossip.optimizer.step()
        gossip.optimizer.zero_grad()

Both run the same `Algorithm.phases`, to the same bits. What an algorithm does before the gradient, such as sending
messages that travel behind it, is done at the first forward pass of a step; the rest when the gradient is there.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, cast, overload

import torch
from torch import Tensor, nn

from mpicomp.algorithms.asynchronous.base import AnyAlgorithm, AsynchronousAlgorithm
from mpicomp.algorithms.base import Algorithm, Meanwhile, Phases
from mpicomp.compression.base import Compressor
from mpicomp.compression.identity import Identity
from mpicomp.compression.wrap.by_rank import require_size
from mpicomp.errors import ConfigError, TopologyError
from mpicomp.exchange.base import Gather, World
from mpicomp.exchange.guard import install_excepthook
from mpicomp.exchange.placement import DeviceKind
from mpicomp.exchange.watchdog import Watchdog
from mpicomp.replica.clipping import Clip
from mpicomp.replica.consistency import EVERY_STEPS, require_same_model
from mpicomp.replica.device import device_of, place
from mpicomp.replica.flat import Hook
from mpicomp.replica.meter import Meter
from mpicomp.replica.optimizer import DistributedOptimizer
from mpicomp.replica.record import Record
from mpicomp.replica.replica import Replica
from mpicomp.topology.base import Schedule, Topology

if TYPE_CHECKING:
    from mpicomp.replica.asynchronous_distributed import AsynchronousDistributed

_distributed: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
"""The optimizers of models that are trained together."""


Buffers = Literal["averaged", "own"] | int
"""What becomes of batch-norm statistics: see `distribute`."""


class Distributed(Replica):
    """A model that is trained together with those of the other ranks; made by `distribute`.

    Attributes:
        optimizer: what a training loop calls in the place of its own optimizer, whose groups and state it shares.
        is_compared: whether ranks that must hold the same model are compared now and then.
        watchdog: hears how far this rank is; None if nobody looks after it.
        buffers_every: steps from one averaging of batch-norm statistics in training to the next; 0 for none.
        meter: what the steps have cost since the last record.

    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        algorithm: AnyAlgorithm,
        schedule: Schedule,
        world: World,
    ) -> None:
        super().__init__(model, optimizer, algorithm, schedule, world)
        self._algorithm = algorithm
        self._phases: Phases | None = None
        self._meanwhile: Meanwhile = None
        self._frozen: list[tuple[Tensor, Tensor]] = []
        self._is_joining = False
        self._ends: Gather | None = None
        self.optimizer = DistributedOptimizer(self)
        self.is_compared = False
        self.watchdog: Watchdog | None = None
        self.buffers_every = 0
        self.meter = Meter(torch.zeros((), dtype=torch.float64, device=self.local.x.device))
        if algorithm.begins_before_gradient:
            begin = torch.compiler.disable(self._before_forward)  # type: ignore[no-untyped-call]
            model.register_forward_pre_hook(Hook(begin))

    def step(self, closure: Callable[[], Tensor | None], micro_batches: int = 1) -> Tensor:
        """Do one step of training and return the loss, detached; collective on all ranks.

        Args:
            closure: computes the loss of the next batch, a scalar. It may call ``zero_grad()`` and ``backward()`` as
                closures of `torch.optim` do; the backward pass is made here if it does not. It may then return None,
                and the loss is not known.
            micro_batches: how many batches make up a step: the closure is called as often, and the gradient and the
                loss are the means over these calls.

        Raises:
            DivergenceError: the loss, or what is to be sent, is not a number; names step and rank.
            ConfigError: the model or the optimizer is no longer the one that was distributed; names the tensor.

        """
        if micro_batches < 1:
            raise ConfigError(f"micro_batches = {micro_batches} must be at least 1")
        self.local.closure, self.local.micro_batches = closure, micro_batches
        with self.meter:
            self._step(self.local.gradient)
            if self.local.has_loss and self.local.x.device.type == "cpu":  # a GPU would be waited for in every step
                self.check_finite()
            self._end()
            if self.local.has_loss:
                self.meter.add(self.local.loss)
        return self.local.loss

    def step_with_gradients(self, is_skipped: bool = False, scale: Tensor | None = None) -> None:
        """Do one step of training with the gradients in ``p.grad``; collective on all ranks.

        Args:
            is_skipped: whether this rank has no gradient to use, as after an overflow in float16. It takes part in the
                exchange all the same: in gossip without a local step, in a sum with a gradient of zero.
            scale: what the gradients are to be divided by, a scalar; None if they are not scaled.

        Raises:
            DivergenceError: what is to be sent is not a number; names step and rank.
            ConfigError: the model or the optimizer is no longer the one that was distributed; names the tensor. Or the
                step has begun without a forward pass, which GMC+ needs to compute its gradient where it wants it.

        """
        if self._phases is None and self._algorithm.moves_model_for_gradient and not is_skipped:
            raise ConfigError(
                f"{self._algorithm.name} computes its gradient at another point than the model's, which it takes up "
                "before the first forward pass: call the model itself, in training mode, or use gossip.step(closure)"
            )
        with self.meter:
            self._step(lambda _: self._skip() if is_skipped else self.local.take_gradients(scale))
            self._end()

    def metrics(self, loss: Tensor | float | None = None) -> Record:
        """Return the means over ranks since the last call, the same on all of them; collective on all ranks.

        Loss, bytes, seconds by part with those that are hidden, consensus distance (estimated from 4,096 of the
        parameters), and in `diagnostics` what the algorithm reports, e.g. ``compression_error``. The seconds ``other``
        are the caller's own between two steps: loading and evaluation, and forward and backward pass where they are
        made outside of `step`. Steps before a restart are not in it.

        Args:
            loss: of this rank, where only the caller knows it; it takes the place of the mean over the steps.

        Raises:
            DivergenceError: a loss that is not finite, or public copies that have been running away for three records.
            ConfigError: in the middle of a step.

        """
        self.require_between_steps("gossip.metrics()")
        return self.meter.record(self, loss)

    @contextmanager
    def join(self) -> Iterator[None]:
        """Let ranks have unequal numbers of batches within the block; collective on all ranks.

        A rank that has left the block goes on to take part in the exchanges, as in a skipped step (see
        `step_with_gradients`), until all have left. In a sum its gradient counts as zero, not as absent. Costs an
        all-gather of one number a step, which travels behind the gradient.
        """
        self.require_between_steps("join()")
        self._is_joining = True
        try:
            yield
        finally:
            self._is_joining = False
        self.require_between_steps("the end of join()")
        while not all(has_left for (has_left,) in self.world.start_gather([True]).wait()):
            self.step_with_gradients(is_skipped=True)

    def require_between_steps(self, what: str) -> None:
        """Raise ConfigError if a step has begun: `what` is to be done before a forward pass, or after its step."""
        if self._phases is not None:
            raise ConfigError(
                f"{what} in the middle of a step: a forward pass in training mode has begun it. Call it after "
                "gossip.optimizer.step(), and evaluate in model.eval() or torch.no_grad()"
            )

    def _connect(self) -> None:
        assert isinstance(self.algorithm, Algorithm)
        self.link = self._exchange = self.world.exchange(self.schedule)
        self.state = self.algorithm.init(self.local, self._exchange)

    def _make_phases(self) -> Phases:
        """Return the phases of a step."""
        assert isinstance(self.algorithm, Algorithm)
        return self.algorithm.phases(self.local, self.state, self._exchange)

    def begin(self) -> None:
        """Begin a step, unless that has been done; collective on all ranks.

        Calling the model in training mode does so by itself. This is for a loop that calls only parts of it, so that
        messages of methods with overlap travel behind the forward pass there, too.
        """
        with self.naming_divergence():
            self._begin()

    def _step(self, compute: Callable[[Meanwhile], object]) -> None:
        """Do one step of the algorithm with the gradient that `compute` brings into ``local.g``."""
        with self.naming_divergence():
            self._begin()
            compute(self._meanwhile)
            assert self._phases is not None
            phases, self._phases = self._phases, None
            for _ in phases:
                raise AssertionError(f"{self._algorithm.name}.phases yields more than once")

    def _begin(self) -> None:
        """Do what the algorithm does before the gradient, unless that has been done."""
        if self._phases is not None:
            return
        self.local.check()
        if self.is_compared and self.steps % EVERY_STEPS == 0:
            require_same_model(self.world, self.local)
        if self._is_joining:
            self._ends = self.world.start_gather([False])
        self._frozen = self.local.frozen()
        self._phases = self._make_phases()
        self._meanwhile = next(self._phases)
        self.local.show_parameters()
        self.local.listen(self._meanwhile)

    def _skip(self) -> None:
        """Take part in this step without a gradient."""
        self.local.zero_grad()
        self.local.skips_update = not self._algorithm.ranks_stay_equal

    def _end(self) -> None:
        """Finish what is not the algorithm's."""
        for x, before in self._frozen:
            x.copy_(before)
        self.local.skips_update = False
        self.local.end_step()
        self.steps += 1
        if self.watchdog is not None:
            self.watchdog.moved(self.steps)
        if self.buffers_every and self.steps % self.buffers_every == 0:
            for buffer in self.local.buffers():
                self._exchange.mean_(buffer.view(-1))
        if self._ends is not None:
            self._ends.wait()
            self._ends = None

    def _before_forward(self, module: nn.Module, _: object) -> None:
        """Begin a step with the first forward pass of training, so that messages travel behind it.

        A forward pass within a backward one is a recomputation (`torch.utils.checkpoint`): too late for GMC+.
        """
        if module.training and torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1:
            self.begin()


@overload
def distribute(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    algorithm: Algorithm[Any],
    topology: Schedule | Callable[[int], Schedule],
    compressor: Compressor | None = None,
    world: World | None = None,
    *,
    clip: Clip | None = None,
    buffers: Buffers = "averaged",
    device: DeviceKind | None = None,
    allow_shared_gpu: bool = False,
    hang_timeout_s: float = 600.0,
) -> Distributed: ...
@overload
def distribute(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    algorithm: AsynchronousAlgorithm[Any],
    topology: Schedule | Callable[[int], Schedule],
    compressor: Compressor | None = None,
    world: World | None = None,
    *,
    clip: Clip | None = None,
    buffers: Literal["averaged", "own"] = "averaged",
    device: DeviceKind | None = None,
    allow_shared_gpu: bool = False,
    hang_timeout_s: float = 600.0,
) -> AsynchronousDistributed: ...
def distribute(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    algorithm: AnyAlgorithm,
    topology: Schedule | Callable[[int], Schedule],
    compressor: Compressor | None = None,
    world: World | None = None,
    *,
    clip: Clip | None = None,
    buffers: Buffers = "averaged",
    device: DeviceKind | None = None,
    allow_shared_gpu: bool = False,
    hang_timeout_s: float = 600.0,
) -> Distributed:
    """Train `model` together with the other ranks of this MPI job; collective on all ranks.

    With an asynchronous algorithm it is an `AsynchronousDistributed` that comes back: ranks do not wait for each other,
    and end by ``gossip.finish()``.

    Args:
        model: any module; the parameters that the optimizer holds become views of one flat buffer. All ranks take rank
            0's values.
        optimizer: any first-order optimizer of `torch.optim` over all trainable parameters of `model`; it makes the
            local step. From here on call ``gossip.optimizer`` in its place.
        algorithm: an object of `mpicomp.algorithms`, e.g. ``Choco(gamma=0.2)``.
        topology: a graph or schedule, or a function of the number of ranks such as `mpicomp.topology.ring`.
        compressor: takes the place of ``algorithm.compressor``; `mpicomp.compression.allocate` makes one with a ratio
            for each rank.
        world: the ranks; by default those of ``mpiexec``. An uncaught exception then ends all of them.
        clip: how gradients are shortened; None leaves them as they are.
        buffers: what becomes of batch-norm statistics: ``"averaged"`` in `Distributed.averaged` and each rank's own in
            training; ``"own"`` also there; or a number of steps after which they are averaged in training, too, by an
            all-reduce.
        device: where to train: ``"cpu"``, ``"cuda"`` for the GPU of this rank, ``"auto"`` for a GPU if there is one;
            the model is moved there. By default it stays where it is.
        allow_shared_gpu: whether several ranks may use one GPU.
        hang_timeout_s: how long a rank may wait for others, in seconds, before the job ends with their names; 0 for
            ever. Longer than the longest evaluation on one rank alone. With a `world` of one's own there is no limit.

    Raises:
        ConfigError: a model and an optimizer that do not fit together (names the tensor and the ranks); a model on
            another device than its rank; a compressor for an algorithm that sends no compressed message, or one for
            another number of ranks.
        TopologyError: a graph that the algorithm cannot use, or of another size than the number of ranks.

    """
    if optimizer in _distributed or isinstance(optimizer, DistributedOptimizer):
        raise ConfigError("this optimizer is distributed already: make a new model and optimizer for another training")
    is_own_world, watchdog = world is None, None
    if world is None:
        from mpicomp.exchange.mpi.world import MpiWorld  # here, because it starts MPI

        world = MpiWorld.from_environment(device or device_of(model), allow_shared_gpu)
        install_excepthook(world)
        watchdog = Watchdog(world, hang_timeout_s, "hang_timeout_s", only_waiting=True)
        watchdog.__enter__()  # for the rest of the program
    place(model, optimizer, world, is_moved=device is not None)
    if compressor is not None:
        algorithm = with_compressor(algorithm, compressor)
    is_schedule = isinstance(getattr(topology, "union", None), Topology)  # a class has a property there, not a graph
    schedule = cast(Schedule, topology if is_schedule else topology(world.size))
    require_size(getattr(algorithm, "compressor", Identity()), world.size)
    if schedule.size != world.size:
        raise TopologyError(f"topology {schedule.name!r} has {schedule.size} ranks, but there are {world.size}")
    if isinstance(buffers, int) and buffers < 1:
        raise ConfigError(f"buffers = {buffers} must be 'averaged', 'own', or a number of steps that is at least 1")
    if clip is not None and clip.after_sum and not algorithm.updates_with_sum:
        raise ConfigError(
            f"Clip(after_sum=True): {algorithm.name} has no sum of gradients to clip: leave after_sum out"
        )
    if isinstance(algorithm, AsynchronousAlgorithm):
        if isinstance(buffers, int):
            raise ConfigError(f"buffers = {buffers}: {algorithm.name} has no common steps. Use 'averaged' or 'own'.")
        from mpicomp.replica.asynchronous_distributed import AsynchronousDistributed  # here, because it builds on this

        gossip: Distributed = AsynchronousDistributed(model, optimizer, algorithm, schedule, world, is_own_world)
    else:
        gossip = Distributed(model, optimizer, algorithm, schedule, world)
    gossip.watchdog = watchdog
    gossip.local.clip, gossip.local.clip_sum = (None, clip) if clip and clip.after_sum else (clip, None)
    gossip.averages_buffers = buffers != "own"
    gossip.buffers_every = buffers if isinstance(buffers, int) else 0
    gossip.is_compared = algorithm.ranks_stay_equal
    gossip.optimizer.take_over()
    _distributed.add(optimizer)
    return gossip


def with_compressor(algorithm: AnyAlgorithm, compressor: Compressor) -> AnyAlgorithm:
    """Return `algorithm` with `compressor` for what it sends."""
    if not hasattr(algorithm, "compressor"):
        raise ConfigError(f"{algorithm.name} sends uncompressed messages: leave out compressor (compression.kind)")
    return cast(AnyAlgorithm, dataclasses.replace(cast(Any, algorithm), compressor=compressor))
