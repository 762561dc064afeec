"""A run without common steps: every rank computes, sends and receives at its own pace.

Ranks exchange their status in the *pulse*: a non-blocking all-gather of a `Report` from every rank, repeated all the
time. All ranks see the same reports, so they take the same decisions: to evaluate, to store a checkpoint, to stop, or
to end because all batches are used up. Only for these do they wait for each other.

With ``algorithm.share = "by_speed"``, batches come from one queue: a free rank takes the next one, and each sample is
used once an epoch. With ``"equal"``, each rank has batches of its own. A rank without batches continues to serve the
others.

With ``run.on_peer_loss = "continue"`` ranks may die. Then `RankLost` is raised in whatever the survivors are doing, and
takes them to the one place where they regroup (see `mpicomp.exchange.mpi.survivors`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from statistics import fmean
from typing import cast

import torch
from torch import Tensor

from mpicomp.algorithms.asynchronous.base import AsynchronousAlgorithm
from mpicomp.errors import ConfigError, ExchangeError, RankLost, TopologyError
from mpicomp.exchange.patience import patiently
from mpicomp.exchange.watchdog import Waiting
from mpicomp.replica.asynchronous_replica import PEERS_S, AsynchronousReplica
from mpicomp.replica.gradient_delay import SLICE_S
from mpicomp.replica.meter import Meter
from mpicomp.replica.pulse import Pulse
from mpicomp.replica.record import Record
from mpicomp.replica.state import seed_random
from mpicomp.run.asynchronous.batches import Batches
from mpicomp.run.asynchronous.report import ASYNCHRONOUS_PARTS, Report, mean_loss, mean_seconds
from mpicomp.run.checkpoints import RunCheckpoints
from mpicomp.run.context import RunContext
from mpicomp.run.evaluation import averaged_score, tested
from mpicomp.run.membership import MEMBERSHIP, ElasticMembership
from mpicomp.run.result import Result
from mpicomp.run.stopping import Reason, Status
from mpicomp.state import Leaf
from mpicomp.topology.base import Topology


def train_asynchronously(run: RunContext) -> Result | None:
    """Train with an asynchronous algorithm; see `mpicomp.run.loop.train`."""
    config, setup = run.config, run.setup
    if run.resize:
        raise ConfigError(
            f"--resize: algorithm.kind = {config.algorithm.kind!r} cannot go on with another number of ranks yet"
        )
    stored: Mapping[str, Leaf] = {}
    if run.checkpoint and run.checkpoint.manifest.size == run.world.size:
        read = partial(run.checkpoint.read, run.world.rank, {MEMBERSHIP})
        stored = patiently(run.world, read, run.watchdog.moved)
    membership = ElasticMembership.of(stored, run.world.size)
    if membership.lost:
        setup.schedule, setup.trainers = membership.graph(config.topology.build(membership.size)), membership.size
    training = _Training(run, membership)
    while True:
        try:
            with run.watching():
                return training.go_on()
        except RankLost:
            training.regroup()


class _Training:
    """One rank of an asynchronous run. Making one starts it or restores a checkpoint (collective on all ranks)."""

    def __init__(self, run: RunContext, membership: ElasticMembership) -> None:
        config, world, setup = run.config, run.world, run.setup
        self._run = run
        self._membership = membership
        assert isinstance(setup.algorithm, AsynchronousAlgorithm) and isinstance(setup.schedule, Topology)
        self._algorithm = setup.algorithm
        self._replica = AsynchronousReplica(setup.model, setup.optimizer, setup.algorithm, setup.schedule, world)
        self._meter = Meter(torch.zeros((), dtype=torch.float64, device=world.device), parts=ASYNCHRONOUS_PARTS)
        trainers = self._algorithm.trainers(world.size)
        self._is_trainer = world.rank in trainers
        self._share = trainers.index(world.rank) if self._is_trainer and setup.assignment.size > 1 else 0
        self._delay = self._replica.local.delay = config.gradient_delay(world)
        self._replica.local.clip = config.training.clip()
        if rest := self._replica.mailbox.rest:
            self._delay.rest = rest
        if self._replica.mailbox.needs_poke:
            self._delay.sleep = self._sleep_and_poke
        self._learning_rate = config.schedule.build(setup.epoch(setup.steps))
        # MPI may yet write into the buffers of a pulse that was given up.
        self._given_up: list[Pulse] = []
        self._last_look = time.monotonic()
        seed_random(config.run.seed, world.rank)
        run.look_out(in_step=False, is_able=self._replica.mailbox.how == "window")
        start, held = 0, None
        stored: Mapping[str, Leaf] = {}
        if run.checkpoint:
            stored = run.restore_(self._replica, self._meter)
            run.go_back(self._length, can_end_later=True)
            start, number = int(stored["data/next"]), int(stored["data/held"])
            held = None if number < 0 else number
        self._delay.gradients = self._meter.steps
        self._checkpoints = RunCheckpoints(run, self._replica)
        self._loss = 0.0  # of the last record
        self._begin(start, held)
        run.start(self._logged, self._part_done)
        if "data/reported" in stored:  # checkpoints of before 2026-11-30 lack it, and begin to count anew
            self._restore_records(stored)
        self._meter.skip()

    def go_on(self) -> Result | None:
        """Train until all batches are used up, or the run is asked to stop."""
        while True:
            reports = self._new_reports()
            if reports is not None:
                if all(report.is_done for report in reports):
                    return self._end()
                agreed = Status.maxima(report.status for report in reports)
                if agreed.stop:
                    self._stop(Reason(agreed.stop))
                    return None
                if self._decide(reports, agreed):
                    continue  # with a new pulse, as a run does that continues from this checkpoint
            self._work()

    def regroup(self) -> None:
        """Continue without the ranks that have died; collective on the others."""
        run, membership = self._run, self._membership
        self._given_up.append(self._pulse)
        self._checkpoints.give_up()
        self._batches.hold()
        with run.regrouped(membership) as names:
            schedule = run.setup.schedule = membership.graph(run.config.topology.build(membership.size))
            try:
                self._algorithm.check(schedule)
            except TopologyError as error:
                raise ExchangeError(
                    f"{', '.join(names)} died, which leaves a graph that is not connected, so that the other ranks "
                    "cannot go on: go on from the last checkpoint with --resume"
                ) from error
            self._replica.regroup(schedule)
            start = max(run.world.all_gather(self._batches.next))
            membership.taken = start - sum(run.world.all_gather(self._taken))
            run.take_over_progress(self._part_done)
            self._begin(start, self._batches.held)
        self._meter.skip()

    def _begin(self, start: int, held: int | None) -> None:
        """Begin to take batches, to store checkpoints, and to gather reports; collective on all ranks."""
        world = self._run.world
        self._batches = Batches(self._run.setup, world, self._is_trainer, start, held)
        self._last_reports = self._gathered_reports()
        self._logged = self._step(self._last_reports)
        self._evaluations = self._due_evaluations(self._last_reports)
        self._checkpoints.begin(self._logged)
        self._pulse = Pulse(world)

    def _restore_records(self, stored: Mapping[str, Leaf]) -> None:
        """Go on counting from the last record before the checkpoint; collective on all ranks."""
        reported = cast(Tensor, stored["data/reported"])
        self._last_reports = [Report.read(row) for row in self._run.world.all_gather(reported.tolist())]
        self._logged = self._step(self._last_reports)
        self._evaluations = int(stored["data/evaluations"])
        self._loss = float(stored["data/loss"])

    def _new_reports(self) -> list[Report] | None:
        """Return the reports of all ranks if new ones are complete, else None."""
        rows = self._pulse.beat(lambda: self._report().numbers())
        if rows is None:
            return None
        reports = [Report.read(row) for row in rows]
        self._run.watchdog.moved(self._step(reports))
        return reports

    def _work(self) -> None:
        """Compute a gradient or serve other ranks; pause if there is nothing to do."""
        run, replica, algorithm, meter = self._run, self._replica, self._algorithm, self._meter
        self._look_at_peers()
        is_ready = self._batches.is_ready()  # before the learning rate, which is that of the batch
        run.setup.set_learning_rate(self._learning_rate(self._own_epoch()))
        before = meter.steps
        if is_ready:
            replica.local.closure = self._closure
            with replica.naming_divergence():
                has_moved = algorithm.step(replica.local, replica.state, replica.mailbox)
            if meter.steps > before:
                replica.steps = meter.steps
                replica.check_finite()
                replica.check_copies()
                meter.loss += replica.local.loss.reshape(())
        else:
            with replica.naming_divergence():
                has_moved = algorithm.serve(replica.local, replica.state, replica.mailbox)
        meter.work(is_step=meter.steps > before)
        if has_moved:
            run.watchdog.moved()
            return
        with Waiting("mail or the reports"):
            replica.mailbox.pause()
        meter.wait()

    def _decide(self, reports: list[Report], agreed: Status) -> bool:
        """Evaluate, record and store a checkpoint if due, alike on all ranks; return whether one is being stored."""
        step = self._step(reports)
        self._checkpoints.publish_if_written(agreed)
        if not self._evaluate_if_due(reports) and step - self._logged >= self._run.config.run.log_every:
            self._record(reports, with_accuracy=False)
        is_due = self._checkpoints.is_due(step, agreed)
        if is_due:
            self._save()
        return is_due

    def _stop(self, reason: Reason) -> None:
        """Store the last checkpoint of a run that was asked to stop."""
        step = self._save_last()
        self._free()
        self._run.stop(step, self._length, reason)

    def _end(self) -> Result:
        """Receive the remaining messages, and finish the run."""
        self._replica.drain()
        self._meter.work()
        record = self._record(self._gathered_reports(), with_accuracy=True)
        self._run.lost = self._membership.lost
        return self._run.finish(self._replica, self._meter, record, self._save_and_free)

    def _save_and_free(self) -> None:
        self._save_last()
        self._free()

    def _closure(self) -> Tensor:
        """Return the loss of the next batch."""
        setup, number = self._run.setup, self._batches.take()
        self._meter.steps += 1
        return setup.batch_loss(number, self._share, self._run.world.device)

    def _own_epoch(self) -> float:
        """Return the epoch of the batch that this rank holds, or of the next one; on a hub, of its updates."""
        if not self._is_trainer:
            return self._algorithm.updates(self._replica.state) / self._gradients_per_epoch
        number = self._batches.held
        return self._run.setup.epoch(self._batches.next if number is None else number)

    @property
    def _gradients_per_epoch(self) -> int:
        return self._run.setup.assignment.per_epoch * self._run.setup.assignment.size

    def _step(self, reports: list[Report]) -> int:
        """Return the mean number of steps per rank."""
        return self._done(reports) // self._run.setup.trainers

    @property
    def _length(self) -> int:
        """The length of the run in steps per rank."""
        setup = self._run.setup
        return setup.steps * setup.assignment.size // setup.trainers

    def _done(self, reports: list[Report]) -> int:
        """Return the number of batches done, including those that dead ranks had taken."""
        return sum(report.gradients for report in reports) + self._membership.taken

    @property
    def _part_done(self) -> float:
        return self._done(self._last_reports) / (self._run.setup.steps * self._run.setup.assignment.size)

    @property
    def _taken(self) -> int:
        """The number of batches that this rank has taken."""
        return self._meter.steps + (self._batches.held is not None)

    def _due_evaluations(self, reports: list[Report]) -> int:
        """Return how many evaluations are due by now, without the last one."""
        done, whole = self._done(reports), self._run.setup.steps * self._run.setup.assignment.size
        epochs = min(done, whole - 1) / self._gradients_per_epoch
        return int(epochs / self._run.config.run.evaluate_every_epochs)

    def _evaluate_if_due(self, reports: list[Report]) -> bool:
        """Evaluate if it is due, and return whether it was; if so, collective on all ranks."""
        due = self._due_evaluations(reports)
        is_due = due > self._evaluations
        if is_due:
            self._evaluations = due
            self._record(reports, with_accuracy=True)
        return is_due

    def _report(self) -> Report:
        return Report(
            gradients=self._meter.steps,
            loss=float(self._meter.loss),
            bytes_sent=self._replica.bytes_sent,
            is_done=int(self._batches.is_over),
            status=self._checkpoints.status(),
            seconds=tuple(self._meter.seconds),
        )

    def _gathered_reports(self) -> list[Report]:
        """Return the present reports of all ranks; collective on all ranks."""
        return [Report.read(row) for row in self._run.world.all_gather(self._report().numbers())]

    def _record(self, reports: list[Report], with_accuracy: bool) -> Record:
        """Write and show a record; collective on all ranks if it has an accuracy."""
        world, replica, before = self._run.world, self._replica, self._last_reports
        self._last_reports, self._logged = reports, self._step(reports)
        self._loss = mean_loss(reports, before, self._loss)
        score, distance = None, None
        delays: dict[str, list[int]] = {}
        diagnostics: dict[str, float] = {}
        if with_accuracy:
            self._meter.work()
            score = averaged_score(replica, self._run.setup.dataset)
            distance = replica.consensus_distance()
            own = self._algorithm.delays(replica.state, replica.mailbox)
            for rank, histograms in enumerate(world.all_gather(own)):
                delays.update({f"{rank}<{source}": _trimmed(counts) for source, counts in histograms.items()})
            rows = world.all_gather(self._algorithm.diagnostics(replica.local, replica.state))
            # Hubs, which come first, have numbers that their workers have not.
            diagnostics = {key: fmean(row[key] for row in rows if key in row) for key in rows[0]}
            self._meter.skip()
            self._run.watchdog.moved()
        record = Record(
            step=self._step(reports),
            epoch=self._done(reports) / self._gradients_per_epoch,
            loss=self._loss,
            lr=replica.local.lr,
            bytes_sent=sum(report.bytes_sent for report in reports),
            seconds=mean_seconds(reports, before),
            consensus_distance=distance,
            **tested(score, self._run.setup.dataset),
            diagnostics=diagnostics,
            gradients=[report.gradients for report in reports],
            delays=delays,
        )
        self._run.record(record)
        return record

    def _save(self) -> int:
        """Begin to store a checkpoint, and return its step; collective on all ranks."""
        self._replica.drain()
        self._batches.hold()
        reports = self._gathered_reports()
        step = self._step(reports)
        self._evaluate_if_due(reports)
        self._checkpoints.save(step, self._leaves())
        self._pulse = Pulse(self._run.world)
        self._run.watchdog.moved()
        return step

    def _leaves(self) -> Mapping[str, Leaf]:
        """Return the state of this rank for a checkpoint; collective on all ranks."""
        taken_by_all = sum(self._run.world.all_gather(self._taken)) + self._membership.taken
        return {
            **self._run.leaves(self._replica, self._meter),
            **self._membership.leaves(),
            "data/next": taken_by_all if self._run.setup.assignment.size == 1 else self._taken,
            "data/held": -1 if self._batches.held is None else self._batches.held,
            "data/reported": torch.tensor(self._last_reports[self._run.world.rank].numbers(), dtype=torch.float64),
            "data/evaluations": self._evaluations,
            "data/loss": self._loss,
        }

    def _save_last(self) -> int:
        """Store a checkpoint and wait for it; return its step."""
        step = self._save()
        self._checkpoints.end(step)
        return step

    def _free(self) -> None:
        if not self._given_up:
            self._batches.free()
            self._replica.mailbox.free()

    def _look_at_peers(self) -> None:
        now = time.monotonic()
        if now - self._last_look < PEERS_S:
            return
        self._last_look = now
        if self._run.failure_detector:
            self._run.failure_detector.look()
            return
        self._replica.require_neighbors(self._run.watchdog.members, "--resume")

    def _sleep_and_poke(self, seconds: float) -> None:
        world = self._run.world
        end = world.now() + seconds
        while (left := end - world.now()) > 0:
            self._replica.mailbox.poke()
            world.sleep(min(left, SLICE_S))


def _trimmed(counts: list[int]) -> list[int]:
    """Return a histogram without the zeros at its end."""
    while counts and not counts[-1]:
        counts = counts[:-1]
    return counts
