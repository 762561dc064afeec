"""One run from start to end: set up, train, evaluate. Ranks exchange messages in ``gossip.step``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial

from mpicomp.algorithms import AsynchronousAlgorithm
from mpicomp.checkpoint.folder import Checkpoint
from mpicomp.config.config import RunConfig
from mpicomp.exchange.base import World
from mpicomp.exchange.guard import together
from mpicomp.exchange.watchdog import Watchdog
from mpicomp.replica.distributed import Distributed
from mpicomp.replica.meter import MEASURED
from mpicomp.replica.record import Callback, Record
from mpicomp.replica.state import seed_random
from mpicomp.run.assignment import ResizeHistory
from mpicomp.run.asynchronous.loop import train_asynchronously
from mpicomp.run.checkpoints import RunCheckpoints
from mpicomp.run.context import RunContext
from mpicomp.run.evaluation import averaged_score, tested
from mpicomp.run.folder import RunFolder
from mpicomp.run.progress import Progress
from mpicomp.run.result import Result
from mpicomp.run.setup import Setup, set_up, with_bandwidths
from mpicomp.run.stopping import Agreement, Reason, Status, StopRequests
from mpicomp.run.trace import Timeline
from mpicomp.timing import use_clock


def train(
    config: RunConfig,
    world: World,
    folder: RunFolder | None = None,
    progress: Progress | None = None,
    *,
    checkpoint: Checkpoint | None = None,
    resize: bool = False,
    requests: StopRequests | None = None,
    trace_steps: int = 0,
    callbacks: Sequence[Callback] = (),
) -> Result | None:
    """Train as `config` says and return the result, the same on every rank; collective on all ranks.

    Args:
        config: the configuration.
        world: the ranks.
        folder: where rank 0 writes records, result and model, and every rank its part of the checkpoints.
        progress: the display of rank 0; None on other ranks.
        checkpoint: the checkpoint to continue from; None for a new run.
        resize: whether `checkpoint` may have another number of ranks (see `mpicomp.replica.resize`).
        requests: the requests to stop. A run that is asked to stop stores a checkpoint and returns None.
        trace_steps: how many steps the timeline shows, from the first step of this start on; 0 for none.
        callbacks: called on rank 0 with each record, after `folder` and `progress`. If ranks may die, another rank
            may become rank 0, so pass them on all ranks.

    Raises:
        MpicompError: bad input, reported on all ranks before training starts; a loss that is not finite; a last
            checkpoint that could not be written.

    """
    use_clock(world.now)
    timeline = Timeline(world, folder.trace_path if folder else None, trace_steps)
    with Watchdog(world, config.run.hang_timeout_s) as watchdog, timeline:
        groups = config.topology.groups(world)
        given, config = config, with_bandwidths(config, world, groups, checkpoint)
        if config is not given and checkpoint is None and folder and world.rank == 0:
            folder.save_config(config)
        watchdog.moved()
        with together(world):
            setup = set_up(config, world, groups)
        watchdog.moved()
        run = RunContext(config, world, setup, watchdog, folder, progress, callbacks, requests, checkpoint, resize)
        if isinstance(setup.algorithm, AsynchronousAlgorithm):
            return train_asynchronously(run)
        return _train_in_step(run)


def _train_in_step(run: RunContext) -> Result | None:
    """Train with a synchronous algorithm: all ranks do the same number of steps."""
    config, world, setup = run.config, run.world, run.setup
    node = world.node(setup.groups) if setup.groups else None
    gossip = Distributed(setup.model, setup.optimizer, setup.algorithm, setup.schedule, world, node)
    gossip.local.delay = config.gradient_delay(world)
    gossip.local.clip = config.training.clip()
    seed_random(config.run.seed, world.rank)
    if run.checkpoint:
        stored = run.restore_(gossip, gossip.meter)
        _restore_assignment(setup, run.checkpoint.manifest.size, str(stored["data/course"]), gossip.steps, world.size)
    learning_rate = config.schedule.build(setup.epoch(setup.steps))
    between_steps = _BetweenSteps(run, gossip)
    run.start(gossip.steps, gossip.steps / setup.steps)
    for step in range(gossip.steps, setup.steps):
        done = step + 1
        inputs, targets = setup.batch(step, world.rank, world.device)
        for group in setup.optimizer.param_groups:
            group["lr"] = config.optimizer.lr * learning_rate(setup.epoch(step))
        gossip.step(partial(setup.loss, inputs, targets))
        run.watchdog.moved(done)
        every = config.run.evaluate_every_epochs
        evaluate_now = done == setup.steps or int(setup.epoch(done) / every) > int(setup.epoch(step) / every)
        if evaluate_now or done % config.run.log_every == 0:
            record = _record(gossip, setup, evaluate_now)
            run.watchdog.moved()
            run.record(record)
        if done < setup.steps and (reason := between_steps.after(done)):
            run.stop(done, setup.steps, reason)
            return None
    return run.finish(gossip, gossip.meter, record, partial(between_steps.end, setup.steps))


class _BetweenSteps:
    """The work between two steps: checkpoints, and the agreement to stop."""

    def __init__(self, run: RunContext, gossip: Distributed) -> None:
        self._run = run
        self._gossip = gossip
        self._agreement = Agreement(gossip.world, gossip.steps)
        self._checkpoints = RunCheckpoints(run, gossip)
        self._checkpoints.begin(gossip.steps)

    def after(self, step: int) -> Reason:
        """Store a checkpoint if one is due; return why to stop now, after the last checkpoint, or `Reason.NONE`."""
        agreed = Status()
        if self._agreement.is_due(step):
            with self._gossip.meter.meeting():
                agreed = self._agreement.next_round(step, self._checkpoints.status())
            self._checkpoints.publish_if_written(agreed)
        if agreed.stop:
            self.end(step)
        elif self._checkpoints.is_due(step, agreed):
            self._save(step)
        return Reason(agreed.stop)

    def end(self, step: int) -> None:
        """Store the last checkpoint and wait for it; raise CheckpointError if that failed."""
        self._agreement.finish()
        self._save(step, is_last=True)
        self._checkpoints.end(step)

    def _save(self, step: int, is_last: bool = False) -> None:
        leaves = self._run.leaves(self._gossip, self._gossip.meter)
        leaves["data/course"] = self._run.setup.assignment.history.to_json()
        self._checkpoints.save(step, leaves, in_place=is_last)


def _restore_assignment(setup: Setup, stored_size: int, history: str, steps: int, size: int) -> None:
    """Set the assignment of samples from `steps` on: as stored, or anew for another number of ranks."""
    assignment = dataclasses.replace(setup.assignment, size=stored_size, history=ResizeHistory.from_json(history))
    setup.assignment = assignment if stored_size == size else assignment.resized(steps, size)


def _record(gossip: Distributed, setup: Setup, with_accuracy: bool) -> Record:
    """Return the means over ranks since the last record; collective on all ranks."""
    record = gossip.metrics()
    score = averaged_score(gossip, setup.dataset) if with_accuracy else None
    gossip.meter.skip()
    return dataclasses.replace(
        record,
        epoch=setup.epoch(gossip.steps),
        seconds={part: record.seconds[part] for part in MEASURED},
        **tested(score, setup.dataset),
    )
