"""Checkpoints of a run, written in the background and published by all ranks together.

    begin      rank 0 makes the temporary folder; every rank copies its state in memory
    write      a thread on each rank writes the copy into a file; training continues
    publish    when all have written, the ranks gather sizes and SHA-256; rank 0 writes the manifest and renames the
               folder

If the ranks of a node share a file, they take turns: the first ranks of all nodes write, then the second ones, and so
on. No two processes have a file open at once, and each holds its own state only.

If a rank cannot write, this checkpoint fails. The failure is reported, earlier checkpoints stay, and training
continues. At most one checkpoint is written at a time.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import lru_cache, partial
from importlib.metadata import version
from pathlib import Path

import h5py
import numpy as np
import torch

from mpicomp.checkpoint import hdf5
from mpicomp.checkpoint.folder import Checkpoint, Checkpoints, Manifest, open_checkpoint, place, step_folder
from mpicomp.checkpoint.hdf5 import Digest
from mpicomp.checkpoint.writer import Writer
from mpicomp.errors import CheckpointError
from mpicomp.exchange.base import Groups, World
from mpicomp.exchange.guard import agree, together
from mpicomp.exchange.patience import wait_in_rounds
from mpicomp.state import ADDRESS, Leaf
from mpicomp.timing import traced
from mpicomp.topology.base import Schedule


@dataclass(frozen=True)
class RunIdentity:
    """What a checkpoint belongs to; a restart must agree in all of it.

    Attributes:
        algorithm: the algorithm with its hyper-parameters and compressor.
        topology: name and digest of the graph.
        model: its class and the number of its parameters.
        config: the text of config.toml; empty for a script of the user.

    """

    algorithm: str
    topology: str
    model: str
    config: str = ""


class Saver:
    """Saves checkpoints of a run. Every rank has a saver, and its methods are collective on all ranks.

    Args:
        world: the ranks.
        folder: where the checkpoints go, on a file system that all ranks share.
        identity: the run to which the checkpoints belong.
        keep_last: how many of the newest checkpoints to keep; 0 for all.
        keep_every: checkpoints at a multiple of so many steps are kept, too.
        report: called on rank 0 with a line about what went wrong.
        nodes: the ranks of each node, which share a file; empty for a file for each rank.
        moved: called on every rank again and again while it waits for writers, of any rank.

    """

    def __init__(
        self,
        world: World,
        folder: Path,
        identity: RunIdentity,
        keep_last: int,
        keep_every: int | None,
        report: Callable[[str], None],
        nodes: Groups = (),
        moved: Callable[[], None] = lambda: None,
    ) -> None:
        self._world = world
        self._folder = Checkpoints(folder)
        self._identity = identity
        self._keep_last = keep_last
        self._keep_every = keep_every
        self._report = report
        self._nodes = nodes
        self._moved = moved
        self._mates = next((ranks for ranks in nodes if world.rank in ranks), (world.rank,))
        self._turns = max(map(len, nodes), default=1)
        self._turn = 0
        self._writer = Writer()
        self._step: int | None = None
        self._digests: dict[str, Digest] = {}
        self._publisher = ThreadPoolExecutor(1, "publisher")
        self._publishing: Future[tuple[int, str | None]] | None = None
        self._is_sound = True
        self._newest = self._folder.newest_step() if world.rank == 0 else None

    @property
    def is_pending(self) -> bool:
        """Whether a checkpoint was started and is not yet published; the same on all ranks."""
        return self._step is not None

    @property
    def is_writing(self) -> bool:
        """Whether this rank still writes its state."""
        return self._writer.busy

    @traced("checkpoint", "")
    def start(self, step: int, leaves: Mapping[str, Leaf], in_place: bool = False) -> None:
        """Copy the state in memory and begin to write it; wait first for an earlier checkpoint, if it is pending.

        With `in_place`, the state is not copied if it is on the CPU, and must stay as it is until `finish` returns.
        """
        self.publish()
        self._await_publication()
        can_begin = self._world.broadcast(self._begin(step) if self._world.rank == 0 else False)
        if can_begin:
            self._step, self._turn, self._digests = step, 0, {}
            self._writer.copy(leaves, in_place)
            self._write(step)

    def advance(self) -> None:
        """Gather the results of the ranks whose turn it was to write. The next ones begin to write.

        If there are none, or writing failed, rank 0 publishes or discards the checkpoint in the background.
        """
        if self._step is not None:
            self._advance(self._step)

    def publish(self) -> None:
        """Let all ranks write, one turn after the other, until the checkpoint is no longer pending."""
        while self._step is not None:
            self._await_writers()
            self._advance(self._step)

    def _await_writers(self) -> None:
        """Wait until no rank writes."""
        wait_in_rounds(self._world, self._writer.wait_for, self._moved)

    def _await_publication(self) -> None:
        """Wait until rank 0 has published what is to be published."""
        wait_in_rounds(self._world, self._is_publishing, self._moved)

    def _is_publishing(self, seconds: float) -> bool:
        """Wait for the publication, on rank 0 and no longer than `seconds`, and return whether it goes on."""
        if self._publishing is None:
            return False
        wait([self._publishing], seconds)
        return not self._publishing.done()

    @traced("checkpoint", "")
    def _advance(self, step: int) -> None:
        outcome = self._writer.wait() if self._is_my_turn else None
        outcomes = self._world.all_gather(str(outcome) if isinstance(outcome, CheckpointError) else outcome)
        self._digests |= {
            place(rank, self._nodes)[0]: digest for rank, digest in enumerate(outcomes) if isinstance(digest, Digest)
        }
        failures = [f"{outcome} (on rank {rank})" for rank, outcome in enumerate(outcomes) if isinstance(outcome, str)]
        self._turn += 1
        if self._turn < self._turns and not failures:
            self._write(step)
            return
        if self._world.rank == 0:
            self._publishing = self._publisher.submit(self._publish, step, self._digests, failures)
        self._step = None

    @property
    def _is_my_turn(self) -> bool:
        return self._mates.index(self._world.rank) == self._turn

    def _write(self, step: int) -> None:
        """Begin to write the state of this rank if it is its turn."""
        if not self._is_my_turn:
            return
        file, group = place(self._world.rank, self._nodes)
        path, attributes = self._folder.temporary(step) / file, _attributes(self._world, step)
        if self._nodes:
            is_first, is_last = self._turn == 0, self._turn == len(self._mates) - 1
            write = partial(hdf5.write_group, path, group, attributes=attributes, is_first=is_first, is_last=is_last)
            self._writer.start(write)
        else:
            self._writer.start(partial(hdf5.write, path, attributes=attributes))

    @traced("checkpoint", "")
    def finish(self) -> bool:
        """Wait until a pending checkpoint is published; return whether the last checkpoint succeeded."""
        self.publish()
        self._await_publication()
        if self._world.rank == 0:
            self._settle()
        return self._world.broadcast(self._is_sound)

    def close(self) -> None:
        """End the thread and give memory back, after `finish`."""
        self._writer.close()
        self._publisher.shutdown()

    def _begin(self, step: int) -> bool:
        self._settle()
        try:
            self._folder.begin(step)
        except CheckpointError as error:
            self._fail(step, str(error))
            return False
        return True

    def _publish(self, step: int, digests: dict[str, Digest], failures: list[str]) -> tuple[int, str | None]:
        """Publish the temporary folder if every rank has written its state; return the step and the problem, if any."""
        try:
            if failures:
                self._folder.discard(step)
                return step, "; ".join(failures)
            self._newest = self._folder.publish(self._manifest(step, digests)).manifest.step
            if self._keep_last:
                self._folder.prune(self._keep_last, self._keep_every)
        except CheckpointError as error:
            return step, str(error)
        return step, None

    def _manifest(self, step: int, digests: dict[str, Digest]) -> Manifest:
        identity = self._identity
        return Manifest(
            step=step,
            size=self._world.size,
            algorithm=identity.algorithm,
            topology=identity.topology,
            model=identity.model,
            config=identity.config,
            versions=versions(),
            created=_now(),
            slurm_job=os.environ.get("SLURM_JOB_ID"),
            files=digests,
            nodes=self._nodes,
        )

    def _settle(self) -> None:
        """Wait for a pending publication on rank 0."""
        if self._publishing is not None:
            step, problem = self._publishing.result()
            self._publishing = None
            self._is_sound = True
            if problem is not None:
                self._fail(step, problem)

    def _fail(self, step: int, problem: str) -> None:
        self._is_sound = False
        kept = "there is none yet" if self._newest is None else f"the newest is that of step {self._newest}"
        self._report(f"the checkpoint of step {step} could not be written, {kept}: {problem}")


def topology_name(schedule: Schedule) -> str:
    """Return the name of `schedule` and a digest of its weights, which is the same on every machine."""
    return f"{schedule.name} {schedule.union.weights_digest[:12]}"


@lru_cache
def versions() -> dict[str, str]:
    """Return the versions of the software on which a checkpoint depends."""
    return {
        "mpicomp": version("mpicomp"),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "h5py": h5py.__version__,
    }


def _attributes(world: World, step: int) -> dict[str, str | int | float]:
    return {
        "step": step,
        "rank": world.rank,
        "size": world.size,
        "host": world.host,
        "created": _now(),
        "units": "bytes_sent: bytes; seconds: s; all else is without a unit",
        **{f"version of {name}": text for name, text in versions().items()},
    }


def _now() -> str:
    return datetime.fromtimestamp(time.time(), timezone.utc).isoformat(timespec="seconds")


def find_checkpoint(world: World, folder: Path, step: int | None = None) -> Checkpoint | None:
    """Return the newest checkpoint in `folder`, the same on all ranks, or None; collective on all ranks.

    Raises:
        CheckpointError: the newest checkpoint cannot be read; or `step` is given, and it has none.

    """
    newest, error = None, None
    if world.rank == 0:
        try:
            newest = Checkpoints(folder).latest() if step is None else open_checkpoint(folder / step_folder(step))
        except CheckpointError as failure:
            error = failure
    agree(world, error)
    path = world.broadcast(newest.path if newest else None)
    if path is None:
        return None
    with together(world):
        return open_checkpoint(path)


def check_fits(checkpoint: Checkpoint, identity: RunIdentity, size: int, resize: bool = False) -> None:
    """Raise CheckpointError, naming both sides, unless `identity` on `size` ranks may go on from `checkpoint`.

    On another number of ranks the graph is another one, and so are the volumes and ratios of ranks that a configured
    run gives its algorithm: of that the kind is compared, and the rest by `RunConfig.check_continues`.
    """
    manifest = checkpoint.manifest
    is_resized = manifest.size != size
    for what in ("algorithm", "model", "topology"):
        theirs, own = (ADDRESS.sub("", getattr(each, what)) for each in (manifest, identity))
        if is_resized and what == "topology":
            continue
        if is_resized and what == "algorithm" and manifest.config:
            theirs, own = (text.partition("(")[0] for text in (theirs, own))
        if theirs != own:
            raise CheckpointError(f"{checkpoint.path}: is of the {what} {theirs}, this run has {own}")
    if is_resized and not resize:
        raise CheckpointError(
            f"{checkpoint.path}: was written by {manifest.size} ranks, this run has {size}, and the memory of "
            f"compression errors belongs to ranks: start as many, or divide it anew with --resize"
        )
