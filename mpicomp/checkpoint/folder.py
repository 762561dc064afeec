"""The checkpoints of a run: one folder for each step. A checkpoint is complete, or does not exist.

    checkpoints/latest                         the name of the newest one
    checkpoints/step_00000400/manifest.json    its description, and size and SHA-256 of every file; written last
    checkpoints/step_00000400/rank_00003.h5    the state of one rank (`mpicomp.checkpoint.hdf5`)
    checkpoints/step_00000400/node_00001.h5    instead: the states of the ranks of a node, /rank_00003 and others
    checkpoints/.step_00000500.tmp/            a checkpoint being written, or left by a killed run
    checkpoints/.step_00000400.replaced/       a checkpoint that a new one of the same step is about to replace
    checkpoints/.step_00000300.old/            a checkpoint being removed

A run may die at any moment. A folder without manifest is not a checkpoint, and a folder gets its name only when it is
complete and on the disk. A checkpoint that is being replaced is valid until the new one has its name. The newest
checkpoint is the one published last. If a run continues from an earlier checkpoint, checkpoints of higher steps may
remain, but are not the newest.

No MPI here; only one rank calls the functions that change the folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpicomp.checkpoint import damage, hdf5
from mpicomp.checkpoint.hdf5 import FORMAT, Digest
from mpicomp.errors import CheckpointError
from mpicomp.exchange.base import Groups
from mpicomp.files import replacing
from mpicomp.state import Leaf

MANIFEST = "manifest.json"
MANIFEST_VERSION = 2
"""The version of manifests that are written. Those of version 1 are read, too; they name no nodes."""

LATEST = "latest"

_NAME = re.compile(r"step_(\d{8,})|\.step_(\d{8,})\.replaced")


def rank_file(rank: int) -> str:
    """Return the name of a rank's file."""
    return f"rank_{rank:05d}.h5"


def node_file(number: int) -> str:
    """Return the name of a node's file."""
    return f"node_{number:05d}.h5"


def place(rank: int, nodes: Groups) -> tuple[str, str]:
    """Return the name of the file with the state of a rank, and the group in it.

    Args:
        rank: the rank.
        nodes: the ranks that share a file; empty if each has its own.

    """
    if not nodes:
        return rank_file(rank), "/"
    number = next(number for number, ranks in enumerate(nodes) if rank in ranks)
    return node_file(number), f"/rank_{rank:05d}"


def step_folder(step: int) -> str:
    """Return the name of the folder of a step."""
    return f"step_{step:08d}"


def is_step_folder(path: Path) -> bool:
    """Return whether the name of `path` is that of the folder of a step."""
    return re.fullmatch(r"step_\d{8,}", path.name) is not None


@dataclass(frozen=True)
class Manifest:
    """The description of a checkpoint.

    Attributes:
        step: the number of steps done.
        size: the number of ranks.
        algorithm: the algorithm with its hyper-parameters and compressor.
        topology: name and digest of the graph.
        model: class and number of parameters.
        config: the text of config.toml; empty for a script of the user.
        versions: the versions of mpicomp, torch and others, by name.
        created: date and time (ISO 8601, UTC).
        slurm_job: the job that wrote it, or None.
        files: the size and SHA-256 of each file, by name.
        nodes: the ranks that share a file, by the number of the file; empty if each has its own.

    """

    step: int
    size: int
    algorithm: str
    topology: str
    model: str
    config: str
    versions: Mapping[str, str]
    created: str
    slurm_job: str | None
    files: Mapping[str, Digest] = field(default_factory=dict)
    nodes: Groups = ()

    def to_json(self) -> str:
        """Return the text of ``manifest.json``; its key ``sha256`` is the hash of all other values."""
        values = {"format": FORMAT, "version": MANIFEST_VERSION, **dataclasses.asdict(self)}
        return json.dumps({**values, "sha256": _sha256(values)}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, path: Path) -> Manifest:
        """Parse the text of `path`; raise CheckpointError if it is damaged or of a newer version."""
        try:
            values: dict[str, Any] = json.loads(text)
            if values["format"] != FORMAT:
                raise CheckpointError(f"{path}: is not the manifest of a checkpoint of mpicomp")
            if (version := int(values["version"])) > MANIFEST_VERSION:
                raise CheckpointError(hdf5.newer(path, version, MANIFEST_VERSION))
            if values.pop("sha256") != _sha256(values):
                raise CheckpointError(f"{path}: is damaged, or was edited: it is not what its SHA-256 was computed of")
            del values["format"], values["version"]
            files = {name: Digest(**digest) for name, digest in values.pop("files").items()}
            nodes = tuple(map(tuple, values.pop("nodes", ())))
            manifest = cls(**values, files=files, nodes=nodes)
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: is damaged: {type(error).__name__}: {error}") from error
        return manifest


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on the disk."""

    path: Path
    manifest: Manifest

    def read(self, rank: int, names: Collection[str] | None = None) -> dict[str, Leaf]:
        """Return the leaves of a rank, all or only `names`; raise CheckpointError if its file is damaged."""
        self.check([rank])
        return self.read_checked(rank, names)

    def read_checked(self, rank: int, names: Collection[str] | None = None) -> dict[str, Leaf]:
        """Do as `read`, of a rank whose file `check` has accepted."""
        file, group = place(rank, self.manifest.nodes)
        return hdf5.read(self.path / file, names=names, group=group)

    def entries(self, rank: int) -> list[hdf5.Entry]:
        """Return the entries of a rank, with the norms of tensors; raise CheckpointError if its file is damaged."""
        self.check([rank])
        file, group = place(rank, self.manifest.nodes)
        return hdf5.entries(self.path / file, group)

    def check(self, ranks: Collection[int]) -> None:
        """Read the files of `ranks` through, each once; raise CheckpointError if one is damaged."""
        assert all(0 <= rank < self.manifest.size for rank in ranks)
        for name in dict.fromkeys(place(rank, self.manifest.nodes)[0] for rank in ranks):
            if problem := hdf5.difference(self.path / name, self.manifest.files[name]):
                raise CheckpointError(f"{self.path / name}: {problem}{self._held(name)}")

    def verify(self) -> list[str]:
        """Return a sentence for each damage in any file; an empty list if the checkpoint is intact."""
        return [
            problem + self._held(name)
            for name, digest in sorted(self.manifest.files.items())
            for problem in damage.damaged(self.path / name, digest)
        ]

    def _held(self, name: str) -> str:
        """Return which ranks have their state in a file, for messages; ``""`` if its name says so."""
        held = {node_file(number): ranks for number, ranks in enumerate(self.manifest.nodes)}
        return f" (the file of ranks {', '.join(map(str, held[name]))})" if name in held else ""


def open_checkpoint(path: Path) -> Checkpoint:
    """Return the checkpoint in the folder of a step; raise CheckpointError if it is missing or its manifest damaged."""
    manifest = path / MANIFEST
    try:
        text = manifest.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(f"{path}: is not a checkpoint: it has no {MANIFEST}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{manifest}: cannot be read: {error}") from error
    found = Manifest.from_json(text, manifest)
    if path.resolve().name not in (step_folder(found.step), _replaced_folder(found.step)):
        raise CheckpointError(f"{manifest}: is the manifest of step {found.step}, not of {path.resolve().name}")
    return Checkpoint(path, found)


@dataclass(frozen=True)
class Checkpoints:
    """The folder with the checkpoints of a run."""

    path: Path

    def temporary(self, step: int) -> Path:
        """Return the folder into which the ranks write before the checkpoint is published."""
        return self.path / f".{step_folder(step)}.tmp"

    def begin(self, step: int) -> Path:
        """Make the temporary folder of `step`, empty, and clean up what interrupted runs have left."""
        with _named(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            published = self.paths()
            for replaced in self.path.glob(".step_*.replaced"):
                if replaced in published:
                    replaced.rename(self.path / step_folder(_step(replaced)))
                else:
                    self._remove(replaced)
            for leftover in self.path.glob(".step_*"):
                shutil.rmtree(leftover)
            for leftover in self.path.glob(f".{LATEST}.*"):
                leftover.unlink()
            self.temporary(step).mkdir()
        return self.temporary(step)

    def publish(self, manifest: Manifest) -> Checkpoint:
        """Write the manifest into the temporary folder, in which all ranks have written, and give it its name."""
        temporary, final = self.temporary(manifest.step), self.path / step_folder(manifest.step)
        replaced = self.path / _replaced_folder(manifest.step)
        with _named(self.path):
            _write(temporary / MANIFEST, manifest.to_json())
            _flush(temporary)
            if final.exists():
                final.rename(replaced)
            temporary.rename(final)
            self._point_at(manifest.step)
            _flush(self.path.parent)
            if replaced.exists():
                self._remove(replaced)
        return Checkpoint(final, manifest)

    def go_back_to(self, checkpoint: Checkpoint) -> None:
        """Make a checkpoint of this folder the newest one, atomically; nothing changes for one from elsewhere."""
        with _named(self.path):
            if checkpoint.path.resolve().parent == self.path.resolve() and self._newest() != checkpoint.path:
                self._point_at(checkpoint.manifest.step)

    def _point_at(self, step: int) -> None:
        with replacing(self.path / LATEST) as latest:
            _write(latest, step_folder(step) + "\n")
        _flush(self.path)

    def discard(self, step: int) -> None:
        """Remove the temporary folder of `step`."""
        shutil.rmtree(self.temporary(step), ignore_errors=True)

    def all(self) -> list[Checkpoint]:
        """Return the published checkpoints by ascending step; raise CheckpointError if a manifest is damaged."""
        return [open_checkpoint(path) for path in self.paths()]

    def latest(self) -> Checkpoint | None:
        """Return the newest checkpoint, or None; raise CheckpointError if its manifest is damaged."""
        newest = self._newest()
        return open_checkpoint(newest) if newest else None

    def prune(self, keep_last: int, keep_every: int | None = None) -> list[Path]:
        """Remove old checkpoints, and return their folders.

        The last `keep_last` >= 1 up to the newest are kept, and of those before it the ones at a multiple of
        `keep_every` steps. Checkpoints of higher steps than the newest are all removed: the run has gone back from
        them, and they would take the places of its own.
        """
        assert keep_last >= 1
        published = self.paths()
        newest = self._newest()
        end = published.index(newest) + 1 if newest else 0
        old = [path for path in published[:end][:-keep_last] if not keep_every or _step(path) % keep_every]
        old += published[end:]
        with _named(self.path):
            for path in old:
                self._remove(path)
        return old

    def newest_step(self) -> int | None:
        """Return the step of the newest checkpoint, whose manifest may be damaged; None if there is no checkpoint."""
        newest = self._newest()
        return _step(newest) if newest else None

    def _newest(self) -> Path | None:
        """Return the folder that ``latest`` names; if that is not valid, the folder of the highest step."""
        published = self.paths()
        try:
            named = (self.path / LATEST).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            named = ""
        highest = published[-1] if published else None
        return next((path for path in published if step_folder(_step(path)) == named), highest)

    def paths(self) -> list[Path]:
        """Return the folders of the checkpoints by ascending step."""
        found = [*self.path.glob(".step_*.replaced"), *self.path.glob("step_*")]  # if both exist, the second counts
        by_step = {_step(path): path for path in found if _NAME.fullmatch(path.name) and (path / MANIFEST).exists()}
        return [path for _, path in sorted(by_step.items())]

    def _remove(self, path: Path) -> None:
        """Remove a checkpoint: rename it first, so that a partly removed one does not count as a checkpoint."""
        hidden = self.path / f".{step_folder(_step(path))}.old"
        shutil.rmtree(hidden, ignore_errors=True)
        path.rename(hidden)
        shutil.rmtree(hidden)


def _replaced_folder(step: int) -> str:
    return f".{step_folder(step)}.replaced"


def _step(path: Path) -> int:
    """Return the step of a published checkpoint's folder."""
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1] or match[2])


def _sha256(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _write(path: Path, text: str) -> None:
    """Write a file and wait until it is on the disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _flush(folder: Path) -> None:
    """Wait until the directory entries of `folder` are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _named(folder: Path) -> Iterator[None]:
    """Turn an OSError into a CheckpointError that names `folder`."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{error.filename or folder}: {error.strerror or error}") from error
