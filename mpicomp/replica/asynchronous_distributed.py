"""The drop-in for asynchronous algorithms: every rank has a loop of its own, or serves those that have one.

    gossip = mpicomp.distribute(model, optimizer, algorithm=DCGossip(gamma=0.3), topology=ring)
    for batch in loader:                                   # any number of batches, at any pace
        loss = gossip.step(lambda: loss_fn(model, batch))  # or backward(); gossip.optimizer.step()
    gossip.finish()                                        # serves the others until all have come here

    gossip = mpicomp.distribute(model, optimizer, algorithm=DCASGD(), topology=star)
    if gossip.is_hub:
        gossip.serve(after_update=scheduler.step)          # until all workers have called finish()
    else:
        ...                                                # the loop, and gossip.finish(), as above

Collective calls are *meetings*: `averaged`, `save`, `consensus_distance`, `metrics` and `finish` wait until all ranks
have called them, at any step of their loops. Meanwhile a waiting rank receives messages, so it does not hold up the
others. A hub in `serve` and a rank in `finish` take part in any meeting. If ranks call different meetings, all of them
raise an error.

In the *pulse* (`mpicomp.replica.pulse`) each rank reports that it trains, that it serves, or which meeting it has
called. A meeting begins with the first pulse in which no rank trains; all ranks see the same pulses.
"""

from __future__ import annotations

import atexit
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from mpicomp.algorithms.asynchronous.base import AsynchronousAlgorithm, Attempt
from mpicomp.algorithms.base import Meanwhile, Phases
from mpicomp.errors import ConfigError
from mpicomp.exchange.base import World
from mpicomp.exchange.guard import agree, guard, has_failed
from mpicomp.exchange.watchdog import Waiting, roster
from mpicomp.replica.asynchronous_replica import PEERS_S, AsynchronousReplica
from mpicomp.replica.distributed import Distributed
from mpicomp.replica.pulse import Pulse
from mpicomp.replica.record import Record
from mpicomp.topology.base import Schedule

_TRAINS, _SERVES, _AVERAGED, _DISTANCE, _METRICS, _SAVE, _RESUME = range(7)
_CALLS = ("step()", "serve() or finish()", "averaged()", "consensus_distance()", "metrics()", "save()", "resume()")
"""The calls that a rank reports in the pulse, by number."""

_IS_AT_WORK, _HAS_COME = range(2)
"""What a rank announces to its neighbors instead of a step, so that a waiting rank can name the missing ones."""

Extra = Callable[[], Mapping[str, Any]]


class AsynchronousDistributed(AsynchronousReplica, Distributed):
    """A model that is trained by an asynchronous algorithm; made by `mpicomp.distribute`.

    Args:
        fails_without_end: whether a program that ends before `finish` or `serve` ends all ranks with an error.

    Attributes:
        is_hub: whether this rank is a hub: it holds a part of the model, computes no gradients, and must call `serve`.

    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        algorithm: AsynchronousAlgorithm[Any],
        schedule: Schedule,
        world: World,
        fails_without_end: bool = False,
    ) -> None:
        super().__init__(model, optimizer, algorithm, schedule, world)
        self._trainers = algorithm.trainers(world.size)
        self.is_hub = world.rank not in self._trainers
        self._members = roster(world)
        self._pulse = Pulse(world)
        self._doing = _TRAINS
        self._missing = self._training = [rank for rank in range(world.size) if rank != world.rank]
        self._after_update: Callable[[], object] | None = None
        self._settings: list[Any] | None = None
        self._is_open = self.is_hub
        self._last_look = time.monotonic()
        if fails_without_end:
            atexit.register(self._leave)

    def step(self, closure: Callable[[], Tensor | None], micro_batches: int = 1) -> Tensor:
        """Do one step of this rank and return the loss, detached; other ranks do theirs at their own pace.

        Waits for the answer of a hub, or for a neighbor if ``max_staleness`` demands it. See `Distributed.step` for the
        arguments.

        Raises:
            ConfigError: this rank is a hub; a worker has changed a learning rate or frozen a parameter, which only its
                hub can do; or a reason of `Distributed.step`.
            ExchangeError: a neighbor has died.

        """
        self._require_trainer()
        return super().step(closure, micro_batches)

    def step_with_gradients(self, is_skipped: bool = False, scale: Tensor | None = None) -> None:
        """Do one step of this rank with the gradients in ``p.grad``; see `step`.

        In a skipped step (`Distributed.step_with_gradients`), DC-gossip only mixes, and a worker sends nothing.
        """
        self._require_trainer()
        super().step_with_gradients(is_skipped, scale)

    def serve(self, after_update: Callable[[], object] | None = None, extra: Extra | None = None) -> None:
        """Apply the gradients of the workers and answer them, until all have called `finish`; on hubs only.

        Takes part in the meetings of the workers: `averaged`, `save`, `consensus_distance`, `metrics`.

        Args:
            after_update: called after each applied gradient; for example ``scheduler.step``, of a scheduler that counts
                the gradients of all workers. The hub's learning rate is used.
            extra: returns what this rank adds to a checkpoint that the workers `save`.

        Raises:
            ConfigError: this rank is not a hub.
            ExchangeError: a worker has died.

        """
        if not self.is_hub:
            kind = f"a worker of {self.algorithm.name}" if self._owners else f"{self.algorithm.name} has no hubs"
            raise ConfigError(
                f"serve() on rank {self.world.rank}: {kind}. Call step() in a loop, then finish(): "
                "'if gossip.is_hub: gossip.serve()', else the loop"
            )
        self.local.check()
        self._after_update = after_update
        self._attend(extra)

    def finish(self, extra: Extra | None = None) -> None:
        """Serve the others until all ranks have called this, or `serve`; collective on all ranks.

        Call it at the end of the loop, after any number of batches. Takes part in the meetings of ranks that still
        train, with `extra` for their checkpoints. Training may continue afterwards, up to another `finish`.

        Raises:
            ConfigError: this rank is a hub, or in the middle of a step.
            ExchangeError: a neighbor has died.

        """
        if self.is_hub:
            raise ConfigError(f"finish() on rank {self.world.rank}, which is a hub: call serve(), which ends by itself")
        self._attend(extra)

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """Yield the trained model, as `Replica.averaged`; all ranks must call it, at any step."""
        self._meet(_AVERAGED)
        with super().averaged() as model:
            yield model

    def consensus_distance(self) -> float:
        """Return the distance of the ranks' models from their mean; all ranks must call it, at any step."""
        self._meet(_DISTANCE)
        return super().consensus_distance()

    def metrics(self, loss: Tensor | float | None = None) -> Record:
        """Return the means over ranks, as `Distributed.metrics`; all ranks must call it, at any step.

        The record's step is the mean over ranks. Waiting for others counts as exchange.
        """
        with self.meter.meeting():
            self._meet(_METRICS)
        return super().metrics(loss)

    def join(self) -> NoReturn:
        """Raise ConfigError: asynchronous ranks need no common number of batches.

        Raises:
            ConfigError: always.

        """
        raise ConfigError(
            f"join() is for methods whose ranks wait for each other: with {self.algorithm.name} every rank makes as "
            "many steps as it has batches, and calls gossip.finish() after them"
        )

    def begin(self) -> None:
        """Begin a step, unless it has begun; waits for the answer of a hub."""
        self._require_trainer()
        super().begin()

    def save(
        self, folder: Path | str, extra: Mapping[str, Any] | None = None, keep_last: int = 2, replace: bool = False
    ) -> None:
        """Store a checkpoint, as `Replica.save`; all ranks must call it, at any step, for the same `folder`.

        Its step is the mean over ranks. Hubs in `serve` and ranks in `finish` take part.
        """
        self._meet(_SAVE)
        self._save((str(folder), keep_last, replace), lambda: extra or {})

    def resume(self, folder: Path | str, step: int | None = None) -> dict[str, Any] | None:
        """Restore a checkpoint, as `Replica.resume`; all ranks must call it, hubs before `serve`."""
        self._meet(_RESUME)
        self.drain()  # messages under way are of the training before
        self._settings = None
        return super().resume(folder, step)

    def take_in(self) -> None:
        """Receive and process all messages that have arrived."""
        while self._take_in_some():
            pass

    def drain(self) -> None:
        """Receive and process all messages still on their way; collective on all ranks.

        The mailboxes are then empty, as they are after a restart, so a checkpoint need not store them.
        """
        super().drain()
        self.mailbox.settle()

    def _leave(self) -> None:
        """End all ranks with an error if this program ends while others may wait for it."""
        if has_failed(self.world):
            return
        with guard(self.world):
            if self._is_open and self.world.size > 1:
                raise ConfigError(
                    f"the program has ended without gossip.{'serve' if self.is_hub else 'finish'}() on this rank, and "
                    "other ranks may wait for it: call it after the last step"
                )
            self.mailbox.free()

    def _require_trainer(self) -> None:
        """Raise ConfigError if this rank is a hub, or has changed what only a hub may change."""
        if self.is_hub:
            raise ConfigError(
                f"rank {self.world.rank} is a hub of {self.algorithm.name} and computes no gradients: "
                "'if gossip.is_hub: gossip.serve()', else the loop"
            )
        if not self._owners:
            return
        groups = self.local.optimizer.param_groups
        settings = [(float(group["lr"]), [p.requires_grad for p in group["params"]]) for group in groups]
        if self._settings is None:
            self._settings = settings
        elif settings != self._settings:
            raise ConfigError(
                f"rank {self.world.rank}, a worker of {self.algorithm.name}, has changed a learning rate or frozen a "
                "parameter since its last step, which has no effect: its hub makes the optimizer's step. Do it there: "
                "gossip.serve(after_update=scheduler.step)"
            )

    def _before_forward(self, module: nn.Module, inputs: object) -> None:
        if not self.is_hub:
            super()._before_forward(module, inputs)

    def _make_phases(self) -> Phases:
        """Return the phases of a step, which waits while the algorithm cannot continue."""
        self._is_open = True
        self._beat()
        self._look_at_peers()
        attempt, meanwhile = self._attempted()
        if attempt is None:
            with self._waiting_for_neighbors():
                while attempt is None:
                    self._pause()
                    attempt, meanwhile = self._attempted()
        yield meanwhile
        if self.local.skips_update and self._owners:
            attempt.close()
            return
        _rest(attempt)
        if self.algorithm.is_unfinished(self.state):
            with self._waiting_for_neighbors():
                while self.algorithm.is_unfinished(self.state):
                    if not _rest(self._attempt()):
                        self._pause()

    def _attempt(self) -> Attempt:
        return self.algorithm.phases(self.local, self.state, self.mailbox)

    def _attempted(self) -> tuple[Attempt | None, Meanwhile]:
        """Return an attempt that has come to its gradient, with what serves others meanwhile; None if none could."""
        attempt = self._attempt()
        for meanwhile in attempt:
            return attempt, meanwhile
        return None, None

    @contextmanager
    def _waiting_for_neighbors(self) -> Iterator[None]:
        with Waiting("message", lambda: self._missing):
            yield

    def _pause(self) -> None:
        """Yield the core in a step that cannot continue yet."""
        self._missing = self.algorithm.awaited(self.state, self.mailbox)
        self._look_at_peers()
        if self._beat() is None:
            self.mailbox.pause()

    def _beat(self) -> list[list[float]] | None:
        """Take part in the pulse; return what all ranks report if a pulse is complete."""
        return self._pulse.beat(lambda: [self._doing, self._phases is not None])

    def _take_in_some(self) -> bool:
        """Receive and process messages, on a hub one gradient; return whether there were any."""
        with self.naming_divergence():
            if not self.is_hub:
                frozen = self.local.frozen()
                has_moved = self.algorithm.drain(self.local, self.state, self.mailbox)
                self.local.restore_frozen(frozen)
                self.local.show_parameters()  # a neighbor may have averaged with this rank
                return has_moved
            has_moved = self.algorithm.serve(self.local, self.state, self.mailbox)
        if has_moved:
            self.local.end_step()
            self.steps = self.algorithm.updates(self.state)
            if self._after_update is not None:
                self._after_update()
        return has_moved

    def _attend(self, extra: Extra | None) -> None:
        """Serve, and take part in meetings, until no rank trains any more."""
        while (call := self._meet(_SERVES)) != _SERVES:
            if call == _AVERAGED:
                with super().averaged():
                    pass
            elif call == _DISTANCE:
                super().consensus_distance()
            elif call == _METRICS:
                super().metrics()
            else:
                self._save(None, extra or dict)
        self.drain()
        self._after_update = None
        self._settings = None
        self._is_open = False

    def _meet(self, call: int) -> int:
        """Serve until no rank trains; return the meeting that all ranks hold now, `_SERVES` if there is none.

        Raises:
            ConfigError: on all ranks, if they have called different meetings, or one is in the middle of a step.

        """
        self._doing = call
        # A rank that waits must not hold up others by a bound on their lead, and a neighbor's death must not go unseen
        # where there is no such bound.
        self.mailbox.announce(_HAS_COME, is_done=not self._owners)
        while True:
            with Waiting(_CALLS[call], lambda: self._missing):
                while (rows := self._beat()) is None and not self._take_in_some():
                    self._look_at_peers()
                    self.mailbox.pause()
            if rows is None:
                continue
            doing = [int(row[0]) for row in rows]
            self._missing = self._training = [rank for rank, what in enumerate(doing) if what == _TRAINS]
            if not self._training:
                break
        self._doing = _TRAINS
        self._pulse = Pulse(self.world)
        self.mailbox.announce(_IS_AT_WORK)
        self.mailbox.settle()
        return self._agreed(doing, [rank for rank, row in enumerate(rows) if row[1]])

    def _agreed(self, doing: list[int], begun: list[int]) -> int:
        """Return the meeting that the ranks have called, except those that only serve."""
        calls = set(doing) - {_SERVES}
        error = None
        if begun:
            error = ConfigError(
                f"{', '.join(sorted(_CALLS[call] for call in set(doing)))} in the middle of a step of ranks {begun}: a "
                "forward pass in training mode has begun it. Call it after gossip.optimizer.step(), and evaluate in "
                "model.eval() or torch.no_grad()"
            )
        elif len(calls) > 1 or (_RESUME in calls and _SERVES in doing):
            named = ", ".join(f"{_CALLS[call]} on rank {rank}" for rank, call in enumerate(doing))
            error = ConfigError(
                f"the ranks wait for each other in different calls: {named}. All ranks must call averaged(), save() "
                "and the like in the same order (hubs in serve() and ranks in finish() take part by "
                "themselves), and resume() before serve() and finish()"
            )
        agree(self.world, error)
        return next(iter(calls), _SERVES)

    def _save(self, arguments: tuple[str, int, bool] | None, extra: Extra) -> None:
        """Store a checkpoint in the folder that the training ranks have given."""
        self.drain()
        wishes = {wish for wish in self.world.all_gather(arguments) if wish is not None}
        error = None
        if len(wishes) > 1:
            error = ConfigError(
                "save() with different folders, keep_last or replace on the ranks: "
                f"{sorted(wishes)}. All ranks must name the same folder"
            )
        agree(self.world, error)
        folder, keep_last, replace = next(iter(wishes))
        super().save(folder, extra(), keep_last, replace)

    def steps_of_all(self) -> int:
        """Return the mean number of steps per rank; collective on all ranks."""
        done = self.world.all_gather(0 if self.is_hub else self.steps)
        return sum(done) // len(self._trainers)

    def _look_at_peers(self) -> None:
        now = time.monotonic()
        if now - self._last_look >= PEERS_S:
            self._last_look = now
            self.require_neighbors(self._members, "gossip.resume()")
            if self._doing != _TRAINS:
                peers = self.mailbox.peers()
                self._missing = [r for r in self._training if r not in peers or peers[r].step != _HAS_COME]


def _rest(attempt: Attempt) -> bool:
    """Run an attempt that has its gradient to its end; return whether it could continue."""
    try:
        next(attempt)
    except StopIteration as end:
        return bool(end.value)
    raise AssertionError("the phases of a step yield more than once")
