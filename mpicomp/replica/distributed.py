"""A model that all ranks train with common steps, through a closure or through an optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mpicomp.algorithms.asynchronous.base import AnyAlgorithm
from mpicomp.algorithms.base import Algorithm, Meanwhile, Phases
from mpicomp.algorithms.gossip.base import RegroupingGossip
from mpicomp.errors import ConfigError
from mpicomp.exchange.base import Exchange, Gather, Node, World
from mpicomp.exchange.guard import agree
from mpicomp.exchange.loss import LossyExchange
from mpicomp.exchange.watchdog import Watchdog
from mpicomp.replica.consistency import EVERY_STEPS, require_same_model
from mpicomp.replica.flat import Frozen
from mpicomp.replica.hooks import Hook
from mpicomp.replica.meter import Meter
from mpicomp.replica.node_shard import NodeShard
from mpicomp.replica.optimizer import DistributedOptimizer
from mpicomp.replica.record import Record
from mpicomp.replica.replica import Replica
from mpicomp.state import waiting
from mpicomp.topology.base import Schedule


class Distributed(Replica):
    """A model that is trained together with those of the other ranks; made by `distribute`.

    Attributes:
        optimizer: to be called instead of your own optimizer; it shares the groups and the state of that one.
        is_compared: whether ranks that must hold the same model are compared now and then.
        watchdog: told about each step of this rank; None for no watchdog.
        buffers_every: steps from one averaging of batch-norm statistics in training to the next; 0 for none.
        meter: losses and seconds of the steps since the last record.

    """

    _exchange: Exchange

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        algorithm: AnyAlgorithm,
        schedule: Schedule,
        world: World,
        node: Node | None = None,
    ) -> None:
        super().__init__(model, optimizer, algorithm, schedule, world, node)
        self._phases: Phases | None = None
        self._meanwhile: Meanwhile = None
        self._frozen: Frozen = {}
        self._is_joining = False
        self._is_stepping = False
        self._ends: Gather | None = None
        # The exchanges with ranks that have died: MPI may yet write into their buffers.
        self._given_up: list[Exchange] = []
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
                closures of `torch.optim` do; otherwise the backward pass is run here. If it runs the backward pass
                itself, it may return None; the loss is then unknown.
            micro_batches: the number of batches in a step: the closure is called so often, and gradient and loss are
                the means over these calls.

        Raises:
            DivergenceError: the loss, or a value to be sent, is not finite, or the public copy has run away from the
                model; names step and rank.
            ConfigError: the model or the optimizer is no longer the one that was distributed; names the tensor.

        """
        if not callable(closure):
            raise ConfigError(
                f"gossip.step() takes a function that computes the loss, not a {type(closure).__name__}: "
                "gossip.step(lambda: loss_fn(model, batch))"
            )
        if micro_batches < 1:
            raise ConfigError(f"micro_batches = {micro_batches} must be at least 1")
        self.local.closure, self.local.micro_batches = closure, micro_batches
        with self.meter, self._stepping():
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
                exchange nevertheless: in gossip without a local step, in a sum with a gradient of zero.
            scale: a scalar by which the gradients are divided; None if they are not scaled.

        Raises:
            DivergenceError: a value to be sent is not finite, or the public copy has run away from the model; names
                step and rank.
            ConfigError: the model or the optimizer is no longer the one that was distributed (names the tensor); or no
                forward pass began the step, and GMC+ needs one, because it computes the gradient at another point.

        """
        is_late = self._phases is None and self.algorithm.moves_model_for_gradient
        if is_late and not is_skipped and self._is_trainable():
            raise ConfigError(
                f"{self.algorithm.name} computes its gradient at another point than the model's, which it takes up "
                "before the first forward pass: call the model itself, in training mode, or use gossip.step(closure)"
            )
        with self.meter, self._stepping():
            self._step(lambda _: self._skip() if is_skipped else self.local.take_gradients(scale))
            self._end()

    def lose_messages(self, probability: float, seed: int) -> None:
        """Lose each message from now on with this `probability`; draws depend on (seed, source, target, step)."""
        place = 0 if self.node is None else self.node.place
        self.link = self._exchange = LossyExchange(self._exchange, probability, (seed, place), lambda: self.steps)

    def stay_away(self) -> None:
        """Let a step pass in which this rank is away: it does nothing for as long as a gradient takes.

        The graph of the others' step must be one without this rank.
        """
        assert isinstance(self.algorithm, Algorithm)
        with self.meter.meeting():
            self.local.delay.keep(0.0)
        self.algorithm.skip(self.state)
        self.steps += 1

    def metrics(self, loss: Tensor | float | None = None) -> Record:
        """Return the means over ranks since the last call, the same on all of them; collective on all ranks.

        The record has loss, bytes, seconds by part (also hidden ones), consensus distance (estimated from 4,096 of the
        parameters), and in `diagnostics` what the algorithm reports, e.g. ``compression_error``. The seconds ``other``
        are the caller's own between two steps: loading and evaluation, and forward and backward pass if they run
        outside of `step`. Steps before a restart are not included.

        Args:
            loss: of this rank, if only the caller knows it; replaces the mean over the steps.

        Raises:
            DivergenceError: a loss is not finite.
            ConfigError: a step has begun and is not finished.

        """
        self._require_company("gossip.metrics()")
        self.require_between_steps("gossip.metrics()")
        return self.meter.record(self, loss)

    @contextmanager
    def join(self) -> Iterator[None]:
        """Allow unequal numbers of batches within the block; collective on all ranks.

        A rank that reaches the end of the block continues to take part in the exchanges, as in a skipped step (see
        `step_with_gradients`), until all have reached it. In a sum its gradient counts as zero, not as absent. This
        costs an all-gather of one number in each step, which overlaps with the gradient. Where all models stay equal,
        it also compares the learning rates: step a scheduler after the block, because a rank without batches does not
        step it within.

        Other collective calls, such as `averaged`, `save` and `metrics`, are refused within the block: a rank that has
        reached its end would not take part in them.

        Raises:
            ConfigError: on all ranks: learning rates differ, of a method whose models stay equal.

        """
        self.require_between_steps("join()")
        self._is_joining = True
        try:
            yield
        finally:
            self._is_joining = False
        self.require_between_steps("the end of join()")
        while not self._have_left(self._start_ends(has_left=True)):
            self.step_with_gradients(is_skipped=True)

    def _start_ends(self, has_left: bool) -> Gather:
        """Tell the other ranks whether this rank has left `join`, and its learning rates where they must be equal."""
        rates = [float(group["lr"]) for group in self.local.optimizer.param_groups] if self.is_compared else []
        return self.world.start_gather([has_left, *rates])

    def _have_left(self, ends: Gather) -> bool:
        """Return whether all ranks have left `join`; raise ConfigError on all if their learning rates differ."""
        told = ends.wait()
        rates = [tuple(row[1:]) for row in told]
        if other := next((rank for rank, each in enumerate(rates) if each != rates[0]), None):
            shown = [", ".join(f"{rate:g}" for rate in rates[rank]) for rank in (other, 0)]
            raise ConfigError(
                f"rank {other} has the learning rates {shown[0]} within join(), rank 0 {shown[1]}: both need the same. "
                "A rank without batches does not step its scheduler: let all ranks step it after the block"
            )
        return all(has_left for has_left, *_ in told)

    def steps_of_all(self) -> int:
        """Return the number of steps; collective on all ranks.

        Raises:
            ConfigError: on all ranks: they have done different numbers of steps.

        """
        done = self.world.all_gather(self.steps)
        error = None
        if min(done) != max(done):
            error = ConfigError(
                f"the ranks have done different numbers of steps: rank {done.index(min(done))} {min(done)}, rank "
                f"{done.index(max(done))} {max(done)}. save() and metrics() need all ranks after the same step. A "
                "signal such as Ctrl-C comes to each rank in a step of its own: let its handler set a flag, tell the "
                "others by gossip.world.all_gather(flag) after each step, and stop where one is set"
            )
        agree(self.world, error)
        return self.steps

    @property
    def is_in_step(self) -> bool:
        """Whether a step has begun and is not finished."""
        return self._is_stepping or self._phases is not None

    def require_between_steps(self, what: str) -> None:
        """Raise ConfigError if a step has begun; `what` names the call that must be made between steps."""
        if self._is_stepping:
            raise ConfigError(
                f"{what} in the middle of step {self.steps}: an exception, such as Ctrl-C, has ended the step before "
                "its end, or the call is made within the step. The model is half-way between two steps, and other "
                "ranks may be in another one: go on from the last checkpoint"
            )
        super().require_between_steps(what)

    def _require_company(self, what: str) -> None:
        """Raise ConfigError within `join`, or if an exception has ended a step."""
        if self._is_joining:
            raise ConfigError(
                f"{what} within gossip.join(): ranks that have no more batches do not take part in it. Call it after "
                "the block; one block for each epoch, for example"
            )
        if self._is_stepping:
            self.require_between_steps(what)

    def _connect(self) -> None:
        assert isinstance(self.algorithm, Algorithm)
        connected = self.world if self.node is None else self.node
        self.link = self._exchange = connected.exchange(self.schedule)
        self.state = self.algorithm.init(self.part, self._exchange)

    def continue_over(self, schedule: Schedule, steps: int) -> None:
        """Continue over the graph of the ranks that are left, after `steps` steps; collective on these.

        A step that was under way ends here, after the optimizer's part of it or before.
        """
        assert isinstance(self.algorithm, RegroupingGossip)
        self._given_up.append(self._exchange)
        sent = self.bytes_sent
        self._phases = None
        self._is_stepping = False
        self._restore_frozen()
        self.local.end_step()
        self.schedule = schedule
        self.link = self._exchange = self.world.exchange(schedule)
        self._exchange.bytes_sent = sent
        self.algorithm.regroup_(self.part, self.state, self._exchange)
        self.steps = steps

    def _make_phases(self) -> Phases:
        """Return the phases of a step."""
        assert isinstance(self.algorithm, Algorithm)
        phases = self.algorithm.phases(self.part, self.state, self._exchange)
        return self._between_nodes(phases, self.part) if isinstance(self.part, NodeShard) else phases

    def _between_nodes(self, phases: Phases, shard: NodeShard) -> Phases:
        """Do the phases of an algorithm that works on a shard; see `mpicomp.replica.node_shard`."""
        for meanwhile in phases:
            if self.algorithm.moves_model_for_gradient:
                shard.share_model()
            yield meanwhile
            shard.share_gradient()
        shard.share_model()

    def begin(self) -> None:
        """Begin a step, unless it has begun; collective on all ranks.

        A call of the model in training mode does this by itself. Call it in a loop that calls only parts of the model,
        so that messages of methods with overlap travel during the forward pass there, too.
        """
        with self.naming_divergence():
            self._begin()

    @contextmanager
    def _stepping(self) -> Iterator[None]:
        """Note that the block makes a step, and forever if an exception ends it."""
        self._is_stepping = True
        yield
        self._is_stepping = False

    def _step(self, compute: Callable[[Meanwhile], object]) -> None:
        """Do one step of the algorithm with the gradient that `compute` writes into ``local.g``."""
        with self.naming_divergence():
            self._begin()
            compute(self._meanwhile)
            assert self._phases is not None
            phases, self._phases = self._phases, None
            self._frozen = self.local.frozen()  # the forward pass may have written into them
            with self._own_precision(), self._frozen_waiting():
                for _ in phases:
                    raise AssertionError(f"{self.algorithm.name}.phases yields more than once")

    def _begin(self) -> None:
        """Run the part of the algorithm before the gradient, unless it has run."""
        if self._phases is not None:
            return
        self.local.check()
        if self.is_compared and self.steps % EVERY_STEPS == 0:
            groups = None if self.node is None or self.algorithm.ranks_stay_equal else self.node.groups
            require_same_model(self.world, self.local, groups)
        if self._is_joining:
            self._ends = self._start_ends(has_left=False)
        self._frozen = self.local.frozen()
        self._phases = self._make_phases()
        with self._own_precision(), self._frozen_waiting():
            self._meanwhile = next(self._phases)
        self._restore_frozen()
        self.local.show_parameters()
        self.local.listen(self._meanwhile)

    def _skip(self) -> None:
        """Take part in the exchange of this step without a gradient."""
        self.local.zero_grad()
        self.local.skips_update = not self.algorithm.ranks_stay_equal and self.node is None

    def _end(self) -> None:
        """Finish the step: restore frozen parameters, show the new ones, count the step, average buffers if due."""
        self._restore_frozen()
        self.local.skips_update = False
        self.local.end_step()
        self.steps += 1
        self.check_copies()
        if self.watchdog is not None:
            self.watchdog.moved(self.steps)
        if self.buffers_every and self.steps % self.buffers_every == 0:
            for buffer in self.averaged_buffers():
                buffer /= self.world.size  # the sum of masks, such as the least number, would overflow
                (self._exchange if self.node is None else self.world).mean_(buffer.view(-1))
                buffer *= self.world.size
        if self._ends is not None:
            self._have_left(self._ends)
            self._ends = None

    def _restore_frozen(self) -> None:
        """Undo what the step has done to frozen parameters, but not to those thawed since its beginning."""
        self.local.restore_frozen(self._frozen)

    @contextmanager
    def _frozen_waiting(self) -> Iterator[None]:
        """Set error memories and moments of frozen parameters aside, and put them back at the end of the block.

        Otherwise messages would carry them, and the optimizer, which skips these parameters, would lose them. Without
        common steps there is no moment at which all ranks freeze, and nothing is set aside.
        """
        kept: list[tuple[Tensor, Tensor]] = []
        if isinstance(self.algorithm, Algorithm) and (parts := self.part.frozen_parts()):
            self.algorithm.follow_rates(self.part, self.state)
            kept = [(vector[part], vector[part].clone()) for vector in waiting(self.state) for part in parts]
        for entries, _ in kept:
            entries.zero_()
        try:
            yield
        finally:
            for entries, values in kept:
                entries.copy_(values)

    def _own_precision(self) -> torch.autocast:
        """Return a context in which methods compute in the types of their tensors, also where the caller autocasts."""
        return torch.autocast(self.local.x.device.type, enabled=False)

    def _is_trainable(self) -> bool:
        """Return whether any parameter requires a gradient."""
        return len(self.local.frozen_names()) < len(self.local.spec.names)

    def _before_forward(self, module: nn.Module, _: object) -> None:
        """Begin a step with the first forward pass of training, so that messages travel during it.

        A forward pass within a backward pass is a recomputation (`torch.utils.checkpoint`), which is too late for GMC+.
        One of a model that is frozen as a whole is part of the training of another, as of a GAN's generator.
        """
        is_first = self._phases is None and module.training and torch.is_grad_enabled()
        if is_first and torch._C._current_graph_task_id() == -1 and self._is_trainable():
            self.begin()
