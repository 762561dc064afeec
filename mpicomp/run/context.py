"""The context of a running training on one rank: its arguments, its outputs, and how it restarts, stops and ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial

from torch import nn

from mpicomp.checkpoint.folder import Checkpoint, Checkpoints
from mpicomp.checkpoint.saver import check_fits
from mpicomp.config.config import RunConfig
from mpicomp.errors import CheckpointError, ConfigError, DivergenceError
from mpicomp.exchange.base import FailureDetector, World
from mpicomp.exchange.guard import together
from mpicomp.exchange.loopback.world import LoopbackWorld
from mpicomp.exchange.patience import patiently
from mpicomp.exchange.watchdog import Watchdog
from mpicomp.replica.meter import Meter
from mpicomp.replica.record import Callback, Record, report
from mpicomp.replica.replica import Replica
from mpicomp.replica.resize import load_resized
from mpicomp.run.evaluation import evaluate, evaluates_own
from mpicomp.run.folder import RunFolder
from mpicomp.run.lock import RunLock
from mpicomp.run.membership import ElasticMembership
from mpicomp.run.progress import Progress
from mpicomp.run.result import Result, summary
from mpicomp.run.setup import Setup, header
from mpicomp.run.stopping import Reason, StopRequests, same_ranks, stopped
from mpicomp.state import Leaf, flatten, restore_
from mpicomp.topology import spectral_gap

METER = "meter/"
"""The path of the meter's state in a checkpoint."""

DATA = "data/digest"
"""The path of the digest of the data set in a checkpoint."""

DIVERGED = 10
"""A loss of so many times that of guessing ends training, if `DIVERGED_RECORDS` in a row have it."""

WORSE = 3
"""A loss of so many times that of guessing, at the end of a run, is warned of."""

DIVERGED_RECORDS = 3


@dataclass
class RunContext:
    """The context of a running training on one rank.

    Attributes:
        config: the configuration.
        world: the ranks.
        setup: model, data, algorithm and graph of this rank.
        watchdog: ends the run if it makes no progress.
        folder: the run folder, for records, checkpoints and the result.
        progress: the display of rank 0; None on other ranks.
        callbacks: called on rank 0 with each record, after `folder` and `progress`.
        requests: the requests to stop.
        checkpoint: the checkpoint to continue from; None for a new run.
        resize: whether `checkpoint` may have another number of ranks.
        lock: of `folder`, which rank 0 holds; a rank that becomes rank 0 takes it over.
        lost: the names of the ranks that have died.
        failure_detector: raises RankLost where this rank waits for ranks that have died; None if the run then ends.
        diverged: how many of the last records had a loss as of training that diverges.

    """

    config: RunConfig
    world: World
    setup: Setup
    watchdog: Watchdog
    folder: RunFolder | None = None
    progress: Progress | None = None
    callbacks: Sequence[Callback] = ()
    requests: StopRequests | None = None
    checkpoint: Checkpoint | None = None
    resize: bool = False
    lock: RunLock | None = None
    lost: list[str] = field(default_factory=list)
    failure_detector: FailureDetector | None = None
    diverged: int = 0

    @property
    def written_folder(self) -> RunFolder | None:
        """The run folder on rank 0, which writes it; None on other ranks."""
        return self.folder if self.world.rank == 0 else None

    def restore_(self, replica: Replica, meter: Meter) -> dict[str, Leaf]:
        """Restore replica and meter from `checkpoint`, and return all stored leaves; collective on all ranks.

        Raises:
            CheckpointError: the checkpoint is damaged, or of another run.

        """
        checkpoint, world = self.checkpoint, self.world
        assert checkpoint is not None
        has_own = checkpoint.manifest.size == world.size
        stored = patiently(world, lambda: checkpoint.read(world.rank) if has_own else {}, self.watchdog.moved)
        with together(world):
            if stored:
                self._check_data(stored)  # first: changed texts often make another model
            check_fits(checkpoint, replica.identity(self.config.to_toml()), world.size, self.resize)
            if stored:
                replica.load_state_dict(stored)
        if not stored:
            stored = load_resized(replica, checkpoint, self.watchdog.moved)
            with together(world):
                self._check_data(stored)
        restore_(meter, {path.removeprefix(METER): leaf for path, leaf in stored.items() if path.startswith(METER)})
        return stored

    def go_back(self, steps: int, can_end_later: bool = False) -> None:
        """Make the folder that of a run which continues from `checkpoint`; collective on all ranks.

        Args:
            steps: the length of the run.
            can_end_later: whether a checkpoint of so many steps may be one before the end.

        Raises:
            ConfigError: no step is left, and nothing was changed; or the folder cannot be written.

        """
        assert self.checkpoint is not None
        done, folder, damaged = self.checkpoint.manifest.step, self.written_folder, 0
        with together(self.world):
            has_ended = not can_end_later or (self.folder is not None and self.folder.result_path.exists())
            if done > steps or (done == steps and has_ended):
                raise ConfigError(
                    f"{self.checkpoint.path}: is after step {done}, and the run has {steps}, so nothing is left to do. "
                    "To train longer, set training.steps or training.epochs higher; or go on from an earlier "
                    "checkpoint (mpicomp checkpoint ls)"
                )
        with together(self.world):
            if folder:
                # First: a start that dies before its first checkpoint must not undo the user's choice of this one.
                Checkpoints(folder.checkpoints_path).go_back_to(self.checkpoint)
                folder.save_config(self.config)
                damaged = folder.rewind(done)
        if damaged and folder and self.progress:
            lines = "1 damaged line was" if damaged == 1 else f"{damaged} damaged lines were"
            self.progress.warn(f"{folder.metrics_path}: {lines} dropped")

    def _check_data(self, stored: Mapping[str, Leaf]) -> None:
        """Raise CheckpointError if the data set is not that of the checkpoint; that of a script names none."""
        assert self.checkpoint is not None
        if stored.get(DATA, self.setup.digest) != self.setup.digest:
            raise CheckpointError(
                f"{self.checkpoint.path}: the data set, data.kind = {self.config.data.kind!r}, is not the one that "
                "this run began with: its files have changed, or data.path leads to others. Put them back, or start "
                "a new run"
            )

    def leaves(self, replica: Replica, meter: Meter) -> dict[str, Leaf]:
        """Return the leaves that `restore_` restores."""
        found = {METER + path: leaf for path, leaf in flatten(meter).items()}
        return {**replica.state_dict(), **found, DATA: self.setup.digest}

    def start(self, step: int, part_done: float) -> None:
        """Show that training begins after `step` steps, with `part_done` of the run done."""
        with together(self.world):
            if folder := self.written_folder:
                folder.save_ranks(self.watchdog.members)
                folder.save_tokenizer(self.setup.dataset)
                folder.remove_claims()
        if self.progress:
            self.progress.start(header(self.config, self.setup, self.world, step), part_done)
            if (period := getattr(self.setup.algorithm, "period", 1)) > self.setup.steps:
                self.progress.warn(
                    f"algorithm.period = {period}: the run ends after {self.setup.steps} steps, before the ranks "
                    "exchange anything. Shorten the period, or train longer"
                )
            self._warn_of_large_batches(self.progress)
            is_alone = self.world.size == 1 and not isinstance(self.world, LoopbackWorld)
            if is_alone and self.config.algorithm.kind not in ("sgd", "ssgd"):
                self.progress.warn(
                    "one rank exchanges nothing: start several, by mpiexec -n 4 mpicomp train ..., or with --loopback 4"
                )

    def _warn_of_large_batches(self, progress: Progress) -> None:
        """Warn if a rank has fewer samples than a batch, in which it then repeats them."""
        assignment = self.setup.assignment
        share, batch = min(map(len, assignment.split(assignment.size))), assignment.batch_size
        if batch > share:
            whose = "there are only" if assignment.size == 1 else "the smallest share of a rank is"
            progress.warn(
                f"training.batch_size = {batch}: {whose} {share} samples, so that a batch holds some more than once. "
                "Lower training.batch_size, or start fewer ranks"
            )

    def look_out(self, in_step: bool, is_able: bool = True) -> None:
        """Look out for ranks that die, if the run is to continue without them; collective on all ranks.

        Args:
            in_step: whether all ranks do the same steps.
            is_able: whether the transport of messages allows it.

        """
        if self.config.run.on_peer_loss == "continue":
            if is_able:
                names = [str(member) for member in self.watchdog.members]
                self.failure_detector = self.world.failure_detector(names, in_step)
            if self.failure_detector is None and self.progress:
                self.progress.warn(
                    "run.on_peer_loss = 'continue' needs ranks that are processes of one machine and see each other "
                    "there, or, with common steps, mpiexec --with-ft ulfm of Open MPI; here it is 'stop'"
                )

    def watching(self) -> AbstractContextManager[None]:
        """Raise RankLost if the transport fails in the block because a rank has died, and the run can go on."""
        return self.failure_detector.watching() if self.failure_detector else nullcontext()

    @contextmanager
    def regrouped(self, membership: ElasticMembership) -> Iterator[list[str]]:
        """Make the world one of the survivors, for the block to continue in; it gets the names of those that have died.

        Collective on the survivors; see `FailureDetector.regrouped`. A network that is cut leaves survivors on both
        sides of it, and both would write the same run folder. The first to make a file there goes on.

        Raises:
            CheckpointError: other survivors of the run have gone on without these.

        """
        assert self.failure_detector is not None
        before = self.world.size
        with self.failure_detector.regrouped() as names:
            if not self.world.broadcast(self.written_folder is None or self._take_over(self.written_folder, before)):
                place = self.folder.path if self.folder else None
                raise CheckpointError(f"{place}: ranks on the other side of a cut network go on with this run")
            members = self.watchdog.members  # without those that a block before this one has taken out
            dead = [rank for rank, member in enumerate(members) if str(member) in names]
            membership.lose(dead, [str(members[rank]) for rank in dead])
            self.watchdog.members = [member for rank, member in enumerate(members) if rank not in dead]
            yield names
            if folder := self.written_folder:
                folder.save_ranks(self.watchdog.members)
        if self.progress:
            ranks = "the other rank goes on" if self.world.size == 1 else f"the other {self.world.size} ranks go on"
            self.progress.warn(f"{', '.join(names)} died; {ranks}, numbered anew")
        self.watchdog.moved()

    def _take_over(self, folder: RunFolder, before: int) -> bool:
        """Claim the folder for the survivors of `before` ranks; return False if others have."""
        if self.lock:
            with suppress(ConfigError):  # a network file system may not yet know that the old rank 0 is dead
                self.lock.take(wait_s=0)
        return folder.claim(before)

    def take_over_progress(self, part_done: float) -> None:
        """Show the progress on a rank that has become rank 0, with `part_done` of the run done."""
        if self.written_folder and not self.progress:
            self.progress = Progress(self.config.training.steps, self.config.training.epochs)
            self.progress.start([], part_done)

    def record(self, record: Record) -> None:
        """Write a record and show it, on rank 0; one that cannot be written waits for the next, or for the end.

        Raises:
            DivergenceError: the loss stays far above that of guessing.

        """
        if folder := self.written_folder:
            try:
                folder.on_record(record)
            except ConfigError as error:  # a disk that is full for a minute need not end training
                if folder.waiting_records == 1 and self.progress:
                    self.progress.warn(f"{error}: training goes on, and records wait in memory until they can be")
        report(record, self.world.rank, [self.progress, *self.callbacks])
        guessing = self.setup.dataset.loss_of_guessing
        if guessing is None or record.loss is None:
            return
        self.diverged = self.diverged + 1 if record.loss > DIVERGED * guessing else 0
        if self.diverged == DIVERGED_RECORDS:
            raise DivergenceError(
                f"training diverges: at step {record.step} the loss is {record.loss:.4g}, and guessing has "
                f"{guessing:.3g}. Lower {self._too_large}"
            )

    @property
    def _too_large(self) -> str:
        """What may be too large where training diverges."""
        return "optimizer.lr or algorithm.gamma" if hasattr(self.setup.algorithm, "gamma") else "optimizer.lr"

    def stop(self, step: int, steps: int, reason: Reason) -> None:
        """Remove the stop file, and show that the run has stopped with a checkpoint; collective on all ranks."""
        self._tidy_up()  # here, not at the next start, which may be asked to stop, too
        if self.progress:
            path = self.folder.path if self.folder else None
            self.progress.finish(stopped(step, steps, reason, path, same_ranks(self.world)))

    def finish(self, replica: Replica, meter: Meter, last: Record, end: Callable[[], object]) -> Result:
        """Store, show and return the result of the run; collective on all ranks.

        Args:
            replica: the trained model.
            meter: the meter of this rank.
            last: the record of the last step, with the accuracy.
            end: stores the last checkpoint.

        """
        config, world = self.config, self.world
        own = None
        is_hub = bool(last.gradients) and not last.gradients[world.rank]  # has the workers' model, not their statistics
        if evaluates_own(world.rank, world.size) and not is_hub:
            own = evaluate(replica.local.model, self.setup.dataset, world.device).accuracy
        assert last.loss is not None
        result = Result(
            algorithm=config.algorithm.kind,
            topology=config.topology.kind,
            compressor=config.compression.kind,
            ranks=world.size,
            steps=last.step,
            seconds=max(world.all_gather(meter.total_seconds)),
            train_loss=last.loss,
            test_accuracy=last.test_accuracy,
            test_accuracy_local=world.all_gather(own),
            bytes_sent=world.all_gather(replica.bytes_sent),
            consensus_distance=replica.consensus_distance(),
            parameters=replica.local.spec.numel,
            spectral_gap=spectral_gap(self.setup.schedule),
            gradients=last.gradients,
            delays=last.delays,
            lost=self.lost,
            test_loss=last.test_loss,
            evaluated_on=self.setup.dataset.evaluated_on,
            test_perplexity=last.test_perplexity,
            is_simulated=world.is_simulated,
            nodes=len(self.setup.groups) if self.setup.groups else None,
        )
        with replica.averaged() as model:
            patiently(world, partial(self._save, model, result), self.watchdog.moved)
        end()
        self._tidy_up()  # a stop file that came too late must not stop a start that is to train longer
        if self.folder and self.progress:
            self.progress.finish(summary(result, self.folder.path))
            loss, dataset = result.test_loss, self.setup.dataset
            if loss is not None and dataset.is_no_better_than_guessing(loss, result.test_accuracy):
                self.progress.warn(
                    f"nothing was learned: the loss is {loss:.4g}, that of guessing {dataset.loss_of_guessing:.4g}. "
                    f"Train longer, or lower {self._too_large}"
                )
            elif (guessing := dataset.loss_of_guessing) and result.train_loss > WORSE * guessing:
                self.progress.warn(
                    f"training diverges: the loss is {result.train_loss:.4g} at the end, and guessing has "
                    f"{guessing:.4g}. Lower {self._too_large}"
                )
        return result

    def _tidy_up(self) -> None:
        """Remove the stop file, and write the records that still wait; raise ConfigError if that is not possible."""
        with together(self.world):
            if folder := self.written_folder:
                folder.stop_path.unlink(missing_ok=True)
                folder.write_records()

    def _save(self, model: nn.Module, result: Result) -> None:
        """Write the averaged model and the result, on rank 0."""
        if folder := self.written_folder:
            folder.save_model(model, self.config)
            folder.save_result(result)
