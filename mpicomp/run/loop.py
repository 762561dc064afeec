"""One run, straight down: set up, train, evaluate. The only line about distribution is ``gossip.step``."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from functools import partial

from mpicomp.algorithms import AsynchronousAlgorithm
from mpicomp.checkpoint.folder import Checkpoint
from mpicomp.checkpoint.saver import Saver, check_fits
from mpicomp.config.config import RunConfig
from mpicomp.errors import CheckpointError
from mpicomp.exchange.base import World
from mpicomp.exchange.guard import together
from mpicomp.exchange.watchdog import Watchdog
from mpicomp.replica.distributed import Distributed
from mpicomp.replica.meter import MEASURED
from mpicomp.replica.record import Callback, Record, report
from mpicomp.replica.state import seed_random
from mpicomp.run.asynchronous.loop import train_asynchronously
from mpicomp.run.evaluation import averaged_score, evaluate
from mpicomp.run.folder import RunFolder
from mpicomp.run.progress import Progress
from mpicomp.run.resize import Course, load_resized
from mpicomp.run.result import Result, summary
from mpicomp.run.setup import Setup, header, set_up
from mpicomp.run.stopping import Agreement, Reason, Signs, StopRequests, stopped
from mpicomp.run.trace import Timeline
from mpicomp.state import flatten, restore_
from mpicomp.timing import use_clock
from mpicomp.topology import spectral_gap


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
        config: the run.
        world: the ranks.
        folder: where rank 0 writes records, result and model, and every rank its part of the checkpoints.
        progress: what rank 0 shows; None on other ranks.
        checkpoint: what to go on from.
        resize: whether it may be of another number of ranks (see `mpicomp.run.resize`).
        requests: what may ask the run to stop. It then stores a checkpoint and returns None.
        trace_steps: how many steps the timeline shows, from the first one of this start on; 0 for none.
        callbacks: what rank 0 tells of each record, after `folder` and `progress`; where ranks may die, another one
            may become rank 0, so give them on all ranks.

    Raises:
        MpicompError: bad input, named on all ranks before training starts; a loss that is not finite; a last
            checkpoint that could not be written.

    """
    use_clock(world.now)
    timeline = Timeline(world, folder.trace_path if folder else None, trace_steps)
    with Watchdog(world, config.run.hang_timeout_s) as watchdog, timeline:
        with together(world):
            setup = set_up(config, world)
        watchdog.moved()
        if isinstance(setup.algorithm, AsynchronousAlgorithm):
            return train_asynchronously(
                config, world, setup, watchdog, folder, progress, callbacks, checkpoint, resize, requests
            )
        gossip = Distributed(setup.model, setup.optimizer, setup.algorithm, setup.schedule, world)
        gossip.local.pace = config.pace(world)
        seed_random(config.run.seed, world.rank)
        if checkpoint:
            _restore_(checkpoint, gossip, setup, config, resize)
            if folder and world.rank == 0:
                folder.save_config(config)
                folder.rewind(checkpoint.manifest.step)
        learning_rate = config.schedule.build(setup.epoch(setup.steps))
        pause = _Pause(config, gossip, setup.deal.course, folder, progress, requests)
        if folder and world.rank == 0:
            folder.save_ranks(watchdog.members)
        if progress:
            progress.start(header(config, setup, world, gossip.steps), gossip.steps / setup.steps)
        for step in range(gossip.steps, setup.steps):
            done = step + 1
            inputs, targets = setup.batch(step, world.rank, world.device)
            for group in setup.optimizer.param_groups:
                group["lr"] = config.optimizer.lr * learning_rate(setup.epoch(step))
            gossip.step(partial(setup.loss, inputs, targets))
            watchdog.moved(done)
            every = config.run.evaluate_every_epochs
            evaluate_now = done == setup.steps or int(setup.epoch(done) / every) > int(setup.epoch(step) / every)
            if evaluate_now or done % config.run.log_every == 0:
                record = _record(gossip, setup, evaluate_now)
                watchdog.moved()
                report(record, world.rank, [folder, progress, *callbacks])
            if done < setup.steps and (reason := pause.after(done)):
                if folder and world.rank == 0:  # not at the next start: a request may arrive while it begins
                    folder.stop_path.unlink(missing_ok=True)
                if progress:
                    progress.finish(stopped(done, setup.steps, reason, folder.path if folder else None))
                return None
        result = _result(config, gossip, setup, record)
        with gossip.averaged() as model:
            if folder and world.rank == 0:
                folder.save_model(model, config)
                folder.save_result(result)
        pause.end(setup.steps)
        if folder and progress:
            progress.finish(summary(result, folder.path))
        return result


class _Pause:
    """What happens between two steps: checkpoints, and the agreement to stop."""

    def __init__(
        self,
        config: RunConfig,
        gossip: Distributed,
        course: Course,
        folder: RunFolder | None,
        progress: Progress | None,
        requests: StopRequests | None,
    ) -> None:
        self._section = config.checkpoint
        self._gossip = gossip
        self._course = course
        self._requests = requests
        self._agreement = Agreement(gossip.world, gossip.steps)
        self._last_save = time.monotonic()
        self._begun_before_save = False
        self._saver: Saver | None = None
        if folder:
            self._saver = Saver(
                gossip.world,
                folder.checkpoints_path,
                gossip.identity(config.to_toml()),
                config.checkpoint.keep_last,
                config.checkpoint.keep_every,
                progress.warn if progress else _ignore,
            )

    def after(self, step: int) -> Reason:
        """Save if it is time to, and return why to stop now, if so; the last checkpoint is then stored."""
        agreed = Signs()
        if self._agreement.is_due(step):
            with self._gossip.meter.meeting():
                agreed = self._agreement.next_round(step, self._signs())
            if self._saver and self._saver.is_pending and not agreed.writing and not self._begun_before_save:
                self._saver.publish()
            self._begun_before_save = False
        if agreed.stop:
            self.end(step)
        elif agreed.save or (self._section.every_steps and step % self._section.every_steps == 0):
            self._save(step)
        return Reason(agreed.stop)

    def end(self, step: int) -> None:
        """Save once more and wait for it; raise CheckpointError if that failed."""
        self._agreement.finish()
        if self._saver:
            self._save(step)
            if not self._saver.finish():
                raise CheckpointError(f"the last checkpoint, of step {step}, could not be written: see above")
            self._saver.close()

    def _signs(self) -> Signs:
        minutes = (time.monotonic() - self._last_save) / 60
        return Signs(
            stop=self._requests.reason() if self._requests else Reason.NONE,
            save=int(bool(self._saver) and self._gossip.world.rank == 0 and 0 < self._section.every_minutes <= minutes),
            writing=int(bool(self._saver and self._saver.is_writing)),
        )

    def _save(self, step: int) -> None:
        if self._saver:
            own = {f"meter/{path}": leaf for path, leaf in flatten(self._gossip.meter).items()}
            leaves = {**self._gossip.state_dict(), **own, "data/course": self._course.to_json()}
            self._saver.start(step, leaves)
            self._last_save = time.monotonic()
            self._begun_before_save = True


def _ignore(line: str) -> None:
    """Take the report of another rank than 0: there is none."""


def _restore_(checkpoint: Checkpoint, gossip: Distributed, setup: Setup, config: RunConfig, resize: bool) -> None:
    """Take over the state in `checkpoint`; collective on all ranks."""
    world, size = gossip.world, checkpoint.manifest.size
    with together(world):
        check_fits(checkpoint, gossip.identity(config.to_toml()), world.size, resize)
        stored = checkpoint.read(world.rank) if size == world.size else {}
        if stored:
            gossip.load_state_dict(stored)
    if not stored:
        stored = load_resized(gossip, checkpoint)
    prefix = "meter/"
    meter = {path.removeprefix(prefix): leaf for path, leaf in stored.items() if path.startswith(prefix)}
    restore_(gossip.meter, meter)
    deal = dataclasses.replace(setup.deal, size=size, course=Course.from_json(str(stored["data/course"])))
    setup.deal = deal if size == world.size else deal.resized(gossip.steps, world.size)


def _record(gossip: Distributed, setup: Setup, with_accuracy: bool) -> Record:
    """Return the means over ranks since the last record; collective on all ranks."""
    record = gossip.metrics()
    score = averaged_score(gossip, setup.dataset) if with_accuracy else None
    gossip.meter.skip()
    return dataclasses.replace(
        record,
        epoch=setup.epoch(gossip.steps),
        seconds={part: record.seconds[part] for part in MEASURED},
        test_accuracy=score.accuracy if score else None,
        test_loss=score.loss if score else None,
    )


def _result(config: RunConfig, gossip: Distributed, setup: Setup, last: Record) -> Result:
    """Return what the whole run came to; collective on all ranks."""
    world = gossip.world
    own = evaluate(gossip.local.model, setup.dataset, world.device)
    assert last.loss is not None
    return Result(
        algorithm=config.algorithm.kind,
        topology=config.topology.kind,
        compressor=config.compression.kind,
        ranks=world.size,
        steps=gossip.steps,
        seconds=max(world.all_gather(gossip.meter.total_seconds)),
        train_loss=last.loss,
        test_accuracy=last.test_accuracy,
        test_accuracy_local=world.all_gather(own.accuracy),
        bytes_sent=world.all_gather(gossip.bytes_sent),
        consensus_distance=gossip.consensus_distance(),
        parameters=gossip.local.spec.numel,
        spectral_gap=spectral_gap(setup.schedule),
        test_loss=last.test_loss,
    )
