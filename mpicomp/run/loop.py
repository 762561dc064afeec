"""One run from start to end: set up, train, evaluate. Ranks exchange messages in ``gossip.step``.

With ``run.on_peer_loss = "continue"`` ranks may die. Then `RankLost` is raised in whatever the survivors are doing, and
they regroup: they go on from the last step that all of them have done, each with its own model, over the graph of the
configuration for fewer ranks. Samples of the epoch that nobody has visited are dealt to them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial

from mpicomp.algorithms import AsynchronousAlgorithm
from mpicomp.checkpoint.folder import Checkpoint
from mpicomp.config.config import RunConfig
from mpicomp.errors import RankLost, TopologyError
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
from mpicomp.run.lock import RunLock
from mpicomp.run.membership import ElasticMembership
from mpicomp.run.progress import Progress
from mpicomp.run.result import Result
from mpicomp.run.setup import Setup, check_same_data, set_up, with_bandwidths
from mpicomp.run.stopping import Agreement, Reason, Status, StopRequests
from mpicomp.run.trace import Timeline
from mpicomp.state import Leaf
from mpicomp.timing import use_clock
from mpicomp.topology.absence import WithAbsences
from mpicomp.topology.base import Schedule


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
    lock: RunLock | None = None,
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
        lock: of `folder`, held by rank 0; pass it on all ranks, too.

    Raises:
        MpicompError: bad input, reported on all ranks before training starts; a loss that is not finite; a last
            checkpoint that could not be written.

    """
    use_clock(world.now)
    timeline = Timeline(world, folder.trace_path if folder else None, trace_steps)
    with Watchdog(world, config.run.hang_timeout_s) as watchdog, timeline:
        groups = config.topology.groups(world)
        given, config = config, with_bandwidths(config, world, groups, checkpoint)
        if config is not given and checkpoint is None and folder:
            with together(world):
                if world.rank == 0:
                    folder.save_config(config)
        watchdog.moved()
        with together(world):
            setup = set_up(config, world, groups)
        check_same_data(setup, world)
        watchdog.moved()
        run = RunContext(
            config, world, setup, watchdog, folder, progress, callbacks, requests, checkpoint, resize, lock
        )
        if isinstance(setup.algorithm, AsynchronousAlgorithm):
            return train_asynchronously(run)
        return _train_in_step(run)


def _train_in_step(run: RunContext) -> Result | None:
    """Train with a synchronous algorithm: all ranks do the same number of steps."""
    training = _Training(run)
    has_lost_ranks = False
    while True:
        try:
            if has_lost_ranks:
                training.regroup()
            with run.watching():
                return training.go_on()
        except RankLost:  # also while the survivors regroup
            has_lost_ranks = True


class _Training:
    """One rank of a synchronous run. Making one starts it or restores a checkpoint (collective on all ranks)."""

    def __init__(self, run: RunContext) -> None:
        config, world, setup = run.config, run.world, run.setup
        self._run = run
        node = world.node(setup.groups) if setup.groups else None
        schedule = setup.schedule
        if setup.absences.absences:
            schedule = WithAbsences(schedule, setup.absences, getattr(setup.algorithm, "period", 1))
        self._gossip = Distributed(setup.model, setup.optimizer, setup.algorithm, schedule, world, node)
        if config.simulation.loss:
            self._gossip.lose_messages(config.simulation.loss, config.run.seed)
        self._gossip.local.delay = config.gradient_delay(world)
        self._gossip.local.clip = config.training.clip()
        self._loss: float | None = None  # of the last record
        seed_random(config.run.seed, world.rank)
        stored: dict[str, Leaf] = {}
        if run.checkpoint:
            stored = run.restore_(self._gossip, self._gossip.meter)
            course = str(stored["data/course"])
            _restore_assignment(setup, run.checkpoint.manifest.size, course, self._gossip.steps, world.size)
            run.go_back(setup.steps)
        self._gossip.local.delay.gradients = self._gossip.steps
        self._recorded = min(self._gossip.steps, setup.steps - 1)  # the last step with a record, if it is to have one
        self._membership = ElasticMembership.of(stored, world.size)
        self._between_steps = _BetweenSteps(run, self._gossip, self._membership)
        run.start(self._gossip.steps, self._gossip.steps / setup.steps)
        run.look_out(in_step=True)

    def go_on(self) -> Result | None:
        """Train until the last step is done, or the run is asked to stop."""
        run, gossip, setup = self._run, self._gossip, self._run.setup
        learning_rate = run.config.schedule.build(setup.epoch(setup.steps))
        record = self._record_if_due()
        for step in range(gossip.steps, setup.steps):
            done = step + 1
            setup.set_learning_rate(learning_rate(setup.epoch(step)))
            if run.world.rank in setup.absences.away(step):
                gossip.stay_away()
            else:
                gossip.step(partial(setup.batch_loss, step, run.world.rank, run.world.device))
            run.watchdog.moved(done)
            record = self._record_if_due()
            if done < setup.steps and (reason := self._between_steps.after(done)):
                run.stop(done, setup.steps, reason)
                return None
        assert record is not None
        self._recorded = setup.steps - 1  # if a rank dies now, the accuracy is no longer that of the others
        run.lost = self._membership.lost
        return run.finish(gossip, gossip.meter, record, partial(self._between_steps.end, setup.steps))

    def regroup(self) -> None:
        """Continue without the ranks that have died, after the last step that all others have done.

        Collective on these.
        """
        run, gossip, setup = self._run, self._gossip, self._run.setup
        self._between_steps.give_up()
        with run.regrouped(self._membership) as names:
            size = run.world.size
            steps = min(run.world.all_gather(gossip.steps))
            setup.schedule, setup.trainers = self._graph(names), size
            setup.assignment = setup.assignment.resized(steps, size)
            gossip.continue_over(setup.schedule, steps)
            folder = run.written_folder
            has_record = self._recorded >= steps and (folder is None or folder.has_record(steps))
            if not any(self._due(steps)) or all(run.world.all_gather(has_record)):
                self._recorded = steps
                gossip.meter.take()  # of ranks that were ahead
            else:
                self._recorded = steps - 1
            if folder:
                folder.rewind(self._recorded)
            run.take_over_progress(steps / setup.steps)
            self._between_steps.begin(steps)
        gossip.meter.skip()

    def _record_if_due(self) -> Record | None:
        """Record the means over ranks since the last record, if there is to be one; collective on all ranks."""
        gossip, setup, done = self._gossip, self._run.setup, self._gossip.steps
        is_due, with_accuracy = self._due(done)
        if done <= self._recorded or not is_due:
            return None
        record = gossip.metrics()
        score = averaged_score(gossip, setup.dataset) if with_accuracy else None
        gossip.meter.skip()
        if record.loss is not None:
            self._loss = record.loss
        record = dataclasses.replace(
            record,
            loss=self._loss,  # a record that is made again, because ranks have died since, has no steps of its own
            epoch=setup.epoch(done),
            seconds={part: record.seconds[part] for part in MEASURED},
            **tested(score, setup.dataset),
        )
        self._run.watchdog.moved()
        with together(self._run.world):
            self._run.record(record)
        self._recorded = done
        return record

    def _due(self, done: int) -> tuple[bool, bool]:
        """Return whether there is to be a record after `done` steps, and whether with the accuracy."""
        setup, section = self._run.setup, self._run.config.run
        every = section.evaluate_every_epochs
        with_accuracy = done == setup.steps or int(setup.epoch(done) / every) > int(setup.epoch(done - 1) / every)
        return with_accuracy or done % section.log_every == 0, with_accuracy

    def _graph(self, names: Sequence[str]) -> Schedule:
        """Return the graph without the ranks `names`, which have died; raise TopologyError if there is none."""
        size = self._run.world.size
        try:
            schedule = self._run.config.topology.build(size)
            self._run.setup.algorithm.check(schedule)
        except TopologyError as error:
            raise TopologyError(
                f"{', '.join(names)} died, and there is no graph for the other {size} ranks ({error}): go on from the "
                "last checkpoint with --resume --resize"
            ) from error
        return schedule


class _BetweenSteps:
    """The work between two steps: checkpoints, and the agreement to stop."""

    def __init__(self, run: RunContext, gossip: Distributed, membership: ElasticMembership) -> None:
        self._run = run
        self._gossip = gossip
        self._membership = membership
        self._checkpoints = RunCheckpoints(run, gossip)
        # MPI may yet write into the buffers of an agreement that was given up.
        self._given_up: list[Agreement] = []
        self.begin(gossip.steps)

    def begin(self, step: int) -> None:
        """Begin after `step` steps."""
        self._agreement = Agreement(self._gossip.world, step)
        self._checkpoints.begin(step)

    def give_up(self) -> None:
        """Abandon what is under way, because ranks have died."""
        self._given_up.append(self._agreement)
        self._checkpoints.give_up()

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
        if self._membership.lost:
            leaves |= self._membership.leaves()
        self._checkpoints.save(step, leaves, in_place=is_last)


def _restore_assignment(setup: Setup, stored_size: int, history: str, steps: int, size: int) -> None:
    """Set the assignment of samples from `steps` on: as stored, or anew for another number of ranks."""
    assignment = dataclasses.replace(setup.assignment, size=stored_size, history=ResizeHistory.from_json(history))
    setup.assignment = assignment if stored_size == size else assignment.resized(steps, size)
