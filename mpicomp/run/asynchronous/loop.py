"""A run without common steps: every rank computes, sends and receives at its own pace.

What the ranks must know of each other travels in the *pulse*: numbers of all ranks are gathered again and again, and
nobody waits for them. All ranks see the same numbers, so all decide alike: to evaluate, to store a checkpoint, to stop,
or to end because all batches are used up. Only for these they come together.

Batches come from one pile (``algorithm.share = "by_speed"``: whoever is free takes the next, and each sample is used
once an epoch) or each rank has its own (``"equal"``). A rank without batches goes on to serve the others.

With ``run.on_peer_loss = "continue"`` ranks may die: whatever a rank is at then, `RankLost` takes it to the one place
where the survivors regroup (see `mpicomp.exchange.mpi.survivors`).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from torch import Tensor

from mpicomp.algorithms.asynchronous.base import AsynchronousAlgorithm
from mpicomp.checkpoint.folder import Checkpoint
from mpicomp.checkpoint.saver import Saver, check_fits
from mpicomp.config.config import RunConfig
from mpicomp.errors import CheckpointError, ConfigError, ExchangeError, RankLost, TopologyError
from mpicomp.exchange.base import Lookout, World
from mpicomp.exchange.guard import together
from mpicomp.exchange.watchdog import Waiting, Watchdog
from mpicomp.replica.asynchronous_replica import PEERS_S, AsynchronousReplica
from mpicomp.replica.pace import SLICE_S
from mpicomp.replica.pulse import Pulse
from mpicomp.replica.record import PARTS, Callback, Record, report, training_seconds
from mpicomp.replica.state import seed_random
from mpicomp.run.asynchronous.membership import Crew
from mpicomp.run.evaluation import averaged_score, evaluate
from mpicomp.run.folder import RunFolder
from mpicomp.run.progress import Progress
from mpicomp.run.result import Result, summary
from mpicomp.run.setup import Setup, header
from mpicomp.run.stopping import Reason, StopRequests, stopped
from mpicomp.state import SCRATCH, flatten, restore_
from mpicomp.timing import recorder, take_seconds
from mpicomp.topology import spectral_gap
from mpicomp.topology.base import Topology

ASYNCHRONOUS_PARTS = (*PARTS, "wait")


@dataclass
class _Meter:
    """What a rank has done since the start of the run.

    Attributes:
        gradients: how many it has computed.
        loss: the sum over its batches.
        seconds: by part, in the order of `ASYNCHRONOUS_PARTS`.
        elapsed_s: of training, without evaluations.
        since: when the time was taken last.

    """

    gradients: int = 0
    loss: float = 0.0
    seconds: list[float] = field(default_factory=lambda: [0.0] * len(ASYNCHRONOUS_PARTS))
    elapsed_s: float = 0.0
    since: float = field(default=0.0, metadata=SCRATCH)

    def work(self, now: float, is_step: bool = False) -> None:
        """Book the time since the last call as work; with a gradient, it is a step."""
        parts = take_seconds()
        if taker := recorder():
            (taker.end_step if is_step else taker.add_rest)(self.since, now)
        parts["mix"] = now - self.since - training_seconds(parts)
        self._book(now, parts)

    def wait(self, now: float) -> None:
        """Book the time since the last call as waiting."""
        take_seconds()
        if taker := recorder():
            taker.add_idle(self.since, now)
        self._book(now, {"wait": now - self.since})

    def skip(self, now: float) -> None:
        """Book the time since the last call as no training."""
        take_seconds()
        self.since = now

    def _book(self, now: float, parts: dict[str, float]) -> None:
        self.seconds = [
            total + parts.get(part, 0.0) for total, part in zip(self.seconds, ASYNCHRONOUS_PARTS, strict=True)
        ]
        self.elapsed_s += now - self.since
        self.since = now


@dataclass(frozen=True)
class _Report:
    """What a rank tells all others in a pulse; totals since the start.

    Attributes:
        gradients: how many it has computed.
        loss: the sum over its batches.
        bytes_sent: in training messages.
        is_done: 1 if it has no batch left.
        stop: a `Reason`.
        save: 1 if a checkpoint is due by the clock.
        writing: 1 if it still writes one.
        seconds: by part, in the order of `ASYNCHRONOUS_PARTS`.

    """

    gradients: int
    loss: float
    bytes_sent: int
    is_done: int
    stop: int
    save: int
    writing: int
    seconds: tuple[float, ...]

    def numbers(self) -> list[float]:
        """Return the fields, one behind the other."""
        *fields, seconds = (getattr(self, f.name) for f in dataclasses.fields(self))
        return [*fields, *seconds]

    @classmethod
    def read(cls, numbers: list[float]) -> _Report:
        """Take apart what `numbers` gave."""
        gradients, loss, sent, is_done, stop, save, writing, *seconds = numbers
        return cls(int(gradients), loss, int(sent), int(is_done), int(stop), int(save), int(writing), tuple(seconds))


class _Batches:
    """The batches that a rank takes, by number: from one pile for all ranks, or its own.

    Attributes:
        held: the one that it has taken, and not begun.
        next: the number after the last one that it has taken.

    """

    def __init__(self, setup: Setup, world: World, place: int, start: int, held: int | None) -> None:
        self.held = held
        self._total = setup.steps
        self._counter = world.counter(start) if setup.deal.size == 1 and setup.trainers > 1 else None
        self.next = start
        self._is_trainer = place >= 0

    @property
    def is_over(self) -> bool:
        """Whether this rank knows that there is no batch left for it."""
        return not self._is_trainer or (self.held is not None and self.held >= self._total)

    def is_ready(self) -> bool:
        """Return whether a batch can be taken now."""
        if self._is_trainer and self.held is None:
            if self._counter is None:
                self.held = self.next
            elif self._counter.test():
                self.held = self._counter.take()
            if self.held is not None:
                self.next = self.held + 1
        return not self.is_over and self.held is not None

    def take(self) -> int:
        """Return the number of the batch that is ready, and begin to get the next one."""
        assert self.held is not None
        number, self.held = self.held, None
        if self._counter is not None:
            self._counter.prefetch()
        return number

    def hold(self) -> None:
        """Wait for the batch that is on its way, so that it can be stored."""
        while self._is_trainer and self.held is None:
            self.is_ready()

    def free(self) -> None:
        """Give the counter back (collective on all ranks)."""
        if self._counter is not None:
            self._counter.free()


def train_asynchronously(
    config: RunConfig,
    world: World,
    setup: Setup,
    watchdog: Watchdog,
    folder: RunFolder | None,
    progress: Progress | None,
    callbacks: Sequence[Callback],
    checkpoint: Checkpoint | None,
    resize: bool,
    requests: StopRequests | None,
) -> Result | None:
    """Train with an asynchronous algorithm; see `mpicomp.run.loop.train`."""
    crew = Crew.of(world, checkpoint)
    if crew.lost:
        setup.schedule, setup.trainers = crew.graph(config.topology.build(crew.size)), crew.size
    run = _Run(config, world, setup, crew, watchdog, folder, progress, callbacks, requests)
    run.begin(checkpoint, resize)
    while True:
        try:
            return run.train()
        except RankLost:
            run.regroup()


class _Run:
    """One rank of an asynchronous run."""

    def __init__(
        self,
        config: RunConfig,
        world: World,
        setup: Setup,
        crew: Crew,
        watchdog: Watchdog,
        folder: RunFolder | None,
        progress: Progress | None,
        callbacks: Sequence[Callback],
        requests: StopRequests | None,
    ) -> None:
        self._config = config
        self._world = world
        self._setup = setup
        self._crew = crew
        self._watchdog = watchdog
        self._folder = folder
        self._progress = progress
        self._callbacks = callbacks
        self._requests = requests
        assert isinstance(setup.algorithm, AsynchronousAlgorithm) and isinstance(setup.schedule, Topology)
        self._algorithm = setup.algorithm
        self._replica = AsynchronousReplica(setup.model, setup.optimizer, setup.algorithm, setup.schedule, world)
        self._mailbox = self._replica.mailbox
        self._meter = _Meter()
        trainers = self._algorithm.trainers(world.size)
        self._place = trainers.index(world.rank) if world.rank in trainers else -1
        self._share = 0 if setup.deal.size == 1 else self._place
        self._pace = self._replica.local.pace = config.pace(world)
        if self._mailbox.needs_poke:
            self._pace.sleep = self._sleep_and_poke
        self._learning_rate = config.schedule.build(setup.epoch(setup.steps))
        self._saver = self._make_saver()
        self._lookout: Lookout | None = None
        # MPI may yet write into the buffers of a pulse that was given up.
        self._given_up: list[Pulse] = []
        self._last_save = self._last_look = time.monotonic()

    def begin(self, checkpoint: Checkpoint | None, resize: bool) -> None:
        """Start, or go on from a checkpoint; collective on all ranks."""
        world, setup, config = self._world, self._setup, self._config
        if resize:
            raise ConfigError(
                f"--resize: algorithm.kind = {config.algorithm.kind!r} cannot go on with another number of ranks yet"
            )
        seed_random(config.run.seed, world.rank)
        if config.run.on_peer_loss == "continue":
            self._look_out()
        start, held = 0, None
        if checkpoint:
            stored = self._restore(checkpoint)
            start, number = int(stored["data/next"]), int(stored["data/held"])
            held = None if number < 0 else number
            if self._folder and world.rank == 0:
                self._folder.save_config(config)
                self._folder.rewind(checkpoint.manifest.step)
        self._pace.gradients = self._meter.gradients
        self._begin(start, held)
        if self._progress:
            self._progress.start(header(config, setup, world, self._logged), self._part_done)
        self._meter.skip(world.now())

    def train(self) -> Result | None:
        """Train until all batches are used up, or somebody asks to stop."""
        while True:
            reports = self.pulse()
            if reports is not None:
                if all(report.is_done for report in reports):
                    return self.end()
                if reason := Reason(max(report.stop for report in reports)):
                    self.stop(reason)
                    return None
                self.look_after(reports)
            self.work()

    def regroup(self) -> None:
        """Go on without the ranks that have died; collective on the others."""
        assert self._lookout is not None
        self._given_up.append(self._pulse)
        if self._saver:
            self._saver.close()  # a checkpoint under way is given up
        self._batches.hold()
        world, setup, crew, members = self._world, self._setup, self._crew, self._watchdog.members
        with self._lookout.regrouped() as dead:
            names = [str(members[rank]) for rank in dead]
            self._watchdog.members = [member for rank, member in enumerate(members) if rank not in dead]
            crew.lose(dead, names)
            setup.schedule = crew.graph(self._config.topology.build(crew.size))
            try:
                self._algorithm.check(setup.schedule)
            except TopologyError as error:
                raise ExchangeError(
                    f"{', '.join(names)} died, which leaves a graph that is not connected, so that the other ranks "
                    "cannot go on: go on from the last checkpoint with --resume"
                ) from error
            self._replica.regroup(setup.schedule)
            self._mailbox = self._replica.mailbox
            start = max(world.all_gather(self._batches.next))
            crew.taken = start - sum(world.all_gather(self._taken))
            if world.rank == 0 and self._folder and not self._progress:
                training = self._config.training
                self._progress = Progress(training.steps, training.epochs)
                self._progress.start([], self._part_done)
            self._saver = self._make_saver()
            self._begin(start, self._batches.held)
        if self._progress:
            ranks = "the other rank goes on" if world.size == 1 else f"the other {world.size} ranks go on"
            self._progress.warn(f"{', '.join(names)} died; {ranks}, numbered anew")
        self._meter.skip(world.now())
        self._watchdog.moved()

    def _begin(self, start: int, held: int | None) -> None:
        """Begin to take batches, and to pulse; collective on all ranks."""
        world = self._world
        self._batches = _Batches(self._setup, world, self._place, start, held)
        self._last_reports = [_Report.read(row) for row in world.all_gather(self._report().numbers())]
        self._logged = self._step(self._last_reports)
        self._evaluations = self._due_evaluations(self._last_reports)
        self._saves = self._due_saves(self._logged)
        self._begun_before_save = False
        if self._folder and world.rank == 0:
            self._folder.save_ranks(self._watchdog.members)
        self._pulse = Pulse(world)

    def _look_out(self) -> None:
        """Look after all ranks, where they can go on without one; collective on all ranks."""
        if self._mailbox.how == "window":
            self._lookout = self._world.lookout([str(member) for member in self._watchdog.members])
        if self._lookout is None and self._progress:
            self._progress.warn(
                "run.on_peer_loss = 'continue' needs ranks that are processes of one machine, see each other there and "
                "write into windows; here it is 'stop'"
            )

    def _make_saver(self) -> Saver | None:
        if self._folder is None:
            return None
        return Saver(
            self._world,
            self._folder.checkpoints_path,
            self._replica.identity(self._config.to_toml()),
            self._config.checkpoint.keep_last,
            self._config.checkpoint.keep_every,
            self._progress.warn if self._progress else lambda line: None,
        )

    def pulse(self) -> list[_Report] | None:
        """Return the reports of all ranks, if there are new ones."""
        rows = self._pulse.beat(lambda: self._report().numbers())
        if rows is None:
            return None
        reports = [_Report.read(row) for row in rows]
        self._watchdog.moved(self._step(reports))
        return reports

    def work(self) -> None:
        """Compute a gradient, or serve; pause if there is nothing to do."""
        replica, algorithm = self._replica, self._algorithm
        self._look_at_peers()
        for group in self._setup.optimizer.param_groups:
            group["lr"] = self._config.optimizer.lr * self._learning_rate(self._own_epoch())
        before = self._meter.gradients
        if self._batches.is_ready():
            replica.local.closure = self._closure
            with replica.naming_divergence():
                has_moved = algorithm.step(replica.local, replica.state, self._mailbox)
            if self._meter.gradients > before:
                replica.steps = self._meter.gradients
                replica.check_finite()
                self._meter.loss += float(replica.local.loss)
        else:
            with replica.naming_divergence():
                has_moved = algorithm.serve(replica.local, replica.state, self._mailbox)
        self._meter.work(self._world.now(), is_step=self._meter.gradients > before)
        if has_moved:
            self._watchdog.moved()
            return
        with Waiting("mail or the reports"):
            self._mailbox.pause()
        self._meter.wait(self._world.now())

    def look_after(self, reports: list[_Report]) -> None:
        """Do what all ranks do now: evaluate, record, store a checkpoint."""
        step = self._step(reports)
        is_writing = self._begun_before_save or any(report.writing for report in reports)
        if self._saver and self._saver.is_pending and not is_writing:
            self._saver.publish()
        self._begun_before_save = False
        if not self._evaluate_if_due(reports) and step - self._logged >= self._config.run.log_every:
            self._record(reports, with_accuracy=False)
        if self._due_saves(step) > self._saves or any(report.save for report in reports):
            self._save()

    def stop(self, reason: Reason) -> None:
        """Store the last checkpoint of a run that is asked to stop."""
        step = self._save_last()
        self._free()
        if self._folder and self._world.rank == 0:
            self._folder.stop_path.unlink(missing_ok=True)
        if self._progress:
            steps = self._setup.steps * self._setup.deal.size // self._setup.trainers
            self._progress.finish(stopped(step, steps, reason, self._folder.path if self._folder else None))

    def end(self) -> Result:
        """Take in what is under way, and finish the run."""
        self._replica.drain()
        self._meter.work(self._world.now())
        world, replica = self._world, self._replica
        reports = [_Report.read(row) for row in world.all_gather(self._report().numbers())]
        record = self._record(reports, with_accuracy=True)
        own = evaluate(replica.local.model, self._setup.dataset, world.device)
        assert record.loss is not None
        result = Result(
            algorithm=self._config.algorithm.kind,
            topology=self._config.topology.kind,
            compressor=self._config.compression.kind,
            ranks=world.size,
            steps=self._step(reports),
            seconds=max(world.all_gather(self._meter.elapsed_s)),
            train_loss=record.loss,
            test_accuracy=record.test_accuracy,
            test_accuracy_local=world.all_gather(own.accuracy),
            bytes_sent=[report.bytes_sent for report in reports],
            consensus_distance=replica.consensus_distance(),
            parameters=replica.local.spec.numel,
            spectral_gap=spectral_gap(self._setup.schedule),
            gradients=record.gradients,
            delays=record.delays,
            lost=self._crew.lost,
            test_loss=record.test_loss,
        )
        with replica.averaged() as model:
            if self._folder and world.rank == 0:
                self._folder.save_model(model, self._config)
                self._folder.save_result(result)
        self._save_last()
        self._free()
        if self._folder and self._progress:
            self._progress.finish(summary(result, self._folder.path))
        return result

    def _closure(self) -> Tensor:
        """Return the loss of the next batch."""
        number = self._batches.take()
        self._meter.gradients += 1
        inputs, targets = self._setup.batch(number, self._share, self._world.device)
        return self._setup.loss(inputs, targets)

    def _own_epoch(self) -> float:
        """Return how far the run is, as this rank sees it."""
        if self._place < 0:
            return self._algorithm.updates(self._replica.state) / self._gradients_per_epoch
        number = self._batches.held
        return self._setup.epoch(self._meter.gradients * self._setup.trainers if number is None else number)

    @property
    def _gradients_per_epoch(self) -> int:
        return self._setup.deal.per_epoch * self._setup.deal.size

    def _step(self, reports: list[_Report]) -> int:
        """Return the steps of a rank on average."""
        return self._done(reports) // self._setup.trainers

    def _done(self, reports: list[_Report]) -> int:
        """Return the batches that are done, and those that the dead had taken."""
        return sum(report.gradients for report in reports) + self._crew.taken

    @property
    def _part_done(self) -> float:
        return self._done(self._last_reports) / (self._setup.steps * self._setup.deal.size)

    @property
    def _taken(self) -> int:
        """The batches that this rank has taken."""
        return self._meter.gradients + (self._batches.held is not None)

    def _due_evaluations(self, reports: list[_Report]) -> int:
        """Return how many evaluations are due by now, without the one at the end."""
        done, whole = self._done(reports), self._setup.steps * self._setup.deal.size
        epochs = min(done, whole - 1) / self._gradients_per_epoch
        return int(epochs / self._config.run.evaluate_every_epochs)

    def _evaluate_if_due(self, reports: list[_Report]) -> bool:
        """Evaluate if it is time to, and return whether it was; collective on all ranks then."""
        due = self._due_evaluations(reports)
        is_due = due > self._evaluations
        if is_due:
            self._evaluations = due
            self._record(reports, with_accuracy=True)
        return is_due

    def _due_saves(self, step: int) -> int:
        every = self._config.checkpoint.every_steps
        return step // every if every else 0

    def _report(self) -> _Report:
        minutes = (time.monotonic() - self._last_save) / 60
        due = 0 < self._config.checkpoint.every_minutes <= minutes
        return _Report(
            gradients=self._meter.gradients,
            loss=self._meter.loss,
            bytes_sent=self._replica.bytes_sent,
            is_done=int(self._batches.is_over),
            stop=self._requests.reason() if self._requests else Reason.NONE,
            save=int(due and self._saver is not None and self._world.rank == 0),
            writing=int(self._saver is not None and self._saver.is_writing),
            seconds=tuple(self._meter.seconds),
        )

    def _record(self, reports: list[_Report], with_accuracy: bool) -> Record:
        """Write and show a record; with accuracy it is collective on all ranks."""
        world, last = self._world, self._last_reports
        self._last_reports, self._logged = reports, self._step(reports)
        computed = sum(r.gradients for r in reports) - sum(r.gradients for r in last)
        score, distance, delays, diagnostics = None, None, {}, {}
        if with_accuracy:
            self._meter.work(world.now())
            score = averaged_score(self._replica, self._setup.dataset)
            distance = self._replica.consensus_distance()
            own = self._algorithm.delays(self._replica.state, self._mailbox)
            for rank, histograms in enumerate(world.all_gather(own)):
                delays.update({f"{rank}<{source}": _trimmed(counts) for source, counts in histograms.items()})
            rows = world.all_gather(self._algorithm.diagnostics(self._replica.local, self._replica.state))
            diagnostics = {key: fmean(row[key] for row in rows) for key in rows[0]}
            self._meter.skip(world.now())
            self._watchdog.moved()
        record = Record(
            step=self._step(reports),
            epoch=self._done(reports) / self._gradients_per_epoch,
            loss=(sum(r.loss for r in reports) - sum(r.loss for r in last)) / max(computed, 1),
            lr=self._replica.local.lr,
            bytes_sent=sum(r.bytes_sent for r in reports),
            seconds={
                part: fmean(new.seconds[i] - old.seconds[i] for new, old in zip(reports, last, strict=True))
                for i, part in enumerate(ASYNCHRONOUS_PARTS)
            },
            consensus_distance=distance,
            test_accuracy=score.accuracy if score else None,
            test_loss=score.loss if score else None,
            diagnostics=diagnostics,
            gradients=[r.gradients for r in reports],
            delays=delays,
        )
        report(record, world.rank, [self._folder, self._progress, *self._callbacks])
        return record

    def _save(self) -> int:
        """Begin to store a checkpoint, and return its step; collective on all ranks."""
        self._replica.drain()
        self._batches.hold()
        reports = [_Report.read(row) for row in self._world.all_gather(self._report().numbers())]
        step = self._step(reports)
        self._evaluate_if_due(reports)
        self._saves = self._due_saves(step)
        taken_by_all = sum(self._world.all_gather(self._taken)) + self._crew.taken
        if self._saver:
            leaves = {
                **self._replica.state_dict(),
                **{f"meter/{path}": leaf for path, leaf in flatten(self._meter).items()},
                **self._crew.leaves(),
                "data/next": taken_by_all if self._setup.deal.size == 1 else self._taken,
                "data/held": -1 if self._batches.held is None else self._batches.held,
            }
            self._saver.start(step, leaves)
            if self._world.is_simulated:  # when a thread has written is not for simulated time to know
                self._saver.publish()
            self._last_save = time.monotonic()
            self._begun_before_save = True
        self._pulse = Pulse(self._world)
        self._watchdog.moved()
        return step

    def _save_last(self) -> int:
        """Store a checkpoint and wait for it; return its step."""
        step = self._save()
        if self._saver:
            if not self._saver.finish():
                raise CheckpointError(f"the last checkpoint, of step {step}, could not be written: see above")
            self._saver.close()
        return step

    def _restore(self, checkpoint: Checkpoint) -> dict[str, Any]:
        world = self._world
        with together(world):
            check_fits(checkpoint, self._replica.identity(self._config.to_toml()), world.size)
            stored = checkpoint.read(world.rank)
            self._replica.load_state_dict(stored)
            prefix = "meter/"
            meter = {path.removeprefix(prefix): leaf for path, leaf in stored.items() if path.startswith(prefix)}
            restore_(self._meter, meter)
        return stored

    def _free(self) -> None:
        if not self._given_up:
            self._batches.free()
            self._mailbox.free()

    def _look_at_peers(self) -> None:
        now = time.monotonic()
        if now - self._last_look < PEERS_S:
            return
        self._last_look = now
        if self._lookout:
            self._lookout.look()
            return
        self._replica.require_neighbors(self._watchdog.members, "--resume")

    def _sleep_and_poke(self, seconds: float) -> None:
        end = self._world.now() + seconds
        while (left := end - self._world.now()) > 0:
            self._mailbox.poke()
            self._world.sleep(min(left, SLICE_S))


def _trimmed(counts: list[int]) -> list[int]:
    """Return a histogram without the zeros at its end."""
    while counts and not counts[-1]:
        counts = counts[:-1]
    return counts
