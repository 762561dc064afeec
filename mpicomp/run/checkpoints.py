"""When a run stores checkpoints: every so many steps or minutes, and at its end."""

from __future__ import annotations

import time
from collections.abc import Mapping

from mpicomp.checkpoint.saver import Saver
from mpicomp.errors import CheckpointError
from mpicomp.replica.replica import Replica
from mpicomp.run.context import RunContext
from mpicomp.run.stopping import Reason, Status
from mpicomp.state import Leaf


class RunCheckpoints:
    """Decides when to store checkpoints, and stores them; none before `begin`, and none without a run folder.

    Args:
        run: the run.
        replica: the replica to store.

    """

    def __init__(self, run: RunContext, replica: Replica) -> None:
        self._run = run
        self._replica = replica
        self._section = run.config.checkpoint
        self._last_save = time.monotonic()
        self._passed = 0
        self._begun_since_status = False
        self._saver: Saver | None = None

    def begin(self, step: int) -> None:
        """Begin after `step` steps; collective on all ranks.

        Called again, after ranks have died, it makes a checkpoint due at once.
        """
        run = self._run
        self._passed = self._multiples(step) - (self._saver is not None)
        self._begun_since_status = False
        if run.folder:
            self._saver = Saver(
                run.world,
                run.folder.checkpoints_path,
                self._replica.identity(run.config.to_toml()),
                self._section.keep_last,
                self._section.keep_every,
                run.progress.warn if run.progress else lambda line: None,
                run.config.topology.nodes(run.world) if self._section.files == "node" else (),
                run.watchdog.moved,
            )

    def status(self) -> Status:
        """Return what this rank reports to the others."""
        run = self._run
        minutes = (time.monotonic() - self._last_save) / 60
        is_overdue = run.written_folder is not None and 0 < self._section.every_minutes <= minutes
        return Status(
            stop=run.requests.reason() if run.requests else Reason.NONE,
            save=int(is_overdue),
            writing=int(self._saver is not None and self._saver.is_writing),
        )

    def publish_if_written(self, agreed: Status) -> None:
        """Publish a pending checkpoint if no rank still writes it; `agreed` is the maximum of the ranks' `status`.

        If the ranks of a node share a file, let those write it whose turn is next.
        """
        has_written = not agreed.writing and not self._begun_since_status
        self._begun_since_status = False
        if self._saver and self._saver.is_pending and has_written:
            self._saver.advance()
            self._begun_since_status = self._saver.is_pending

    def is_due(self, step: int, agreed: Status) -> bool:
        """Return whether to store a checkpoint after `step` steps."""
        return bool(agreed.save) or self._multiples(step) > self._passed

    def save(self, step: int, leaves: Mapping[str, Leaf], in_place: bool = False) -> None:
        """Begin to store `leaves`; collective on all ranks.

        With `in_place`, they must stay as they are until `end` returns, and are not copied in memory.
        """
        self._passed = self._multiples(step)
        if self._saver:
            self._saver.start(step, leaves, in_place)
            if self._run.world.is_simulated:  # simulated time must not depend on when the thread has written
                self._saver.publish()
            self._last_save = time.monotonic()
            self._begun_since_status = True

    def end(self, step: int) -> None:
        """Wait for the checkpoint of `step`, the last one; collective on all ranks.

        Raises:
            CheckpointError: it could not be written.

        """
        if self._saver:
            if not self._saver.finish():
                raise CheckpointError(f"the last checkpoint, of step {step}, could not be written: see above")
            self._saver.close()

    def give_up(self) -> None:
        """Abandon a checkpoint that is being written, because a rank has died."""
        if self._saver:
            self._saver.close()

    def _multiples(self, step: int) -> int:
        """Return how many multiples of ``checkpoint.every_steps`` are in `step`."""
        return step // self._section.every_steps if self._section.every_steps else 0
