"""The folder of a run, written by rank 0.

config.toml     the configuration with all defaults filled in; ``mpicomp train`` takes it as it is
metrics.jsonl   one `Record` a line
ranks.json      host and process of each rank, of the last start: MPICH's launcher names processes, not ranks
checkpoints/    the state of all ranks after some steps (`mpicomp.checkpoint.folder`)
trace/          a timeline, with ``--trace`` (`mpicomp.run.trace`)
tensorboard/    the records for TensorBoard, with ``--tensorboard`` (`mpicomp.replica.tensorboard`)
survivors_N     made by the survivors of N ranks, so that no others go on as well
stop            made by a user to ask the run to store a checkpoint and to end
lock            held while a run trains in the folder, and says which one (`mpicomp.run.lock`)
tokenizer.json  of a language model: what its tokens are (`mpicomp.data.tokens`)
result.json     the `Result`, once the run has finished
model.h5        the averaged model, as `mpicomp.checkpoint.hdf5` writes it: datasets ``parameters/<name>`` and
                ``buffers/<name>`` as in the `state_dict` of the module, where tied ones are links to one dataset, and
                the attributes ``format``, ``version`` and ``config`` (the text of config.toml)
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from mpicomp.checkpoint import hdf5
from mpicomp.checkpoint.folder import Checkpoints
from mpicomp.config.config import RunConfig
from mpicomp.data.dataset import Dataset
from mpicomp.errors import CheckpointError, ConfigError
from mpicomp.exchange.watchdog import Member
from mpicomp.files import Lines, replacing
from mpicomp.replica.model_checks import named_parameters, plain_name
from mpicomp.replica.record import Record
from mpicomp.replica.state import aliases
from mpicomp.run.result import Result, to_json

FORMAT = "mpicomp model"
RUNS = Path("runs")
"""The folder for runs without ``--run-dir``."""

_CLAIM = "survivors_{}"
"""The name of an empty file that survivors of so many ranks make, so that no others go on as well."""


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run, and the files in it."""

    path: Path

    @classmethod
    def create(cls, path: Path) -> RunFolder:
        """Make the folder for a new run; it may exist already, but must not hold a run.

        Raises:
            ConfigError: the folder holds a run, or cannot be made.

        """
        folder = cls(path)
        folder.check_is_new()
        folder.make()
        return folder

    @classmethod
    def create_named(cls, name: str) -> RunFolder:
        """Make ``runs/<name>-<date>-<time>``; if it exists already, append a number."""
        stamped = f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
        path, count = RUNS / stamped, 1
        while path.exists():
            count += 1
            path = RUNS / f"{stamped}-{count}"
        return cls.create(path)

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Return the folder of an earlier run; raise ConfigError if there is none."""
        folder = cls(path)
        if not folder.config_path.is_file():
            raise ConfigError(f"{path} is not the folder of a run: it has no {folder.config_path.name}")
        return folder

    def check_is_new(self) -> None:
        """Raise ConfigError if the folder holds a run already."""
        held = [file for file in (self.config_path, self.metrics_path, self.result_path) if file.exists()]
        if self.has_checkpoint:
            held.append(self.checkpoints_path)
        if held:
            raise ConfigError(
                f"the run folder {self.path} already holds a run ({held[0].name}): give another --run-dir, remove it, "
                "or go on with it (--resume)"
            )

    def make(self) -> None:
        """Make the folder, if it does not exist; raise ConfigError if that is not possible."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"the run folder {self.path} cannot be made: {error.strerror}") from error

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is a complete checkpoint."""
        return bool(Checkpoints(self.checkpoints_path).paths())

    @property
    def config_path(self) -> Path:
        """The path of ``config.toml``, the configuration with all defaults."""
        return self.path / "config.toml"

    @property
    def metrics_path(self) -> Path:
        """The path of ``metrics.jsonl``, the records."""
        return self.path / "metrics.jsonl"

    @property
    def result_path(self) -> Path:
        """The path of ``result.json``."""
        return self.path / "result.json"

    @property
    def ranks_path(self) -> Path:
        """The path of ``ranks.json``: where each rank of the last start runs, or ran."""
        return self.path / "ranks.json"

    @property
    def checkpoints_path(self) -> Path:
        """The path of the folder with the checkpoints."""
        return self.path / "checkpoints"

    @property
    def trace_path(self) -> Path:
        """The path of the folder with the timeline."""
        return self.path / "trace"

    @property
    def tensorboard_path(self) -> Path:
        """The path of the folder for TensorBoard."""
        return self.path / "tensorboard"

    @property
    def stop_path(self) -> Path:
        """The path of the file that asks the run to stop."""
        return self.path / "stop"

    @property
    def lock_path(self) -> Path:
        """The path of the file that is locked while a run trains in the folder."""
        return self.path / "lock"

    @property
    def tokenizer_path(self) -> Path:
        """The path of ``tokenizer.json``, which says what the tokens of a language model are."""
        return self.path / "tokenizer.json"

    @property
    def model_path(self) -> Path:
        """The path of ``model.h5``, the averaged model."""
        return self.path / "model.h5"

    @contextmanager
    def kept_if_used(self) -> Iterator[None]:
        """Remove the folder if the block fails before the first record and checkpoint: its name is free again."""
        try:
            yield
        except BaseException:
            if not self.metrics_path.exists() and not self.has_checkpoint:
                for path in (self.config_path, self.ranks_path, self.tokenizer_path, self.lock_path):
                    path.unlink(missing_ok=True)
                with suppress(OSError):  # the user's own files stay, and their folder with them
                    self.path.rmdir()
            raise

    def save_config(self, config: RunConfig) -> None:
        """Write ``config.toml``, the configuration with all defaults."""
        with _writing(self.config_path), replacing(self.config_path) as path:
            path.write_text(config.to_toml(), encoding="utf-8")

    def save_ranks(self, members: Sequence[Member]) -> None:
        """Write ``ranks.json``: where each rank runs."""
        with _writing(self.ranks_path), replacing(self.ranks_path) as path:
            path.write_text(json.dumps([dataclasses.asdict(member) for member in members], indent=1) + "\n")

    def claim(self, before: int) -> bool:
        """Claim the folder for survivors of `before` ranks; return False if others have.

        Raises:
            CheckpointError: the file of the claim cannot be made.

        """
        path = self.path / _CLAIM.format(before)
        try:
            path.touch(exist_ok=False)
        except FileExistsError:
            return False
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be made: {error.strerror}") from error
        return True

    def remove_claims(self) -> None:
        """Remove all claims, which an earlier start has left."""
        with _writing(self.path):
            for path in self.path.glob(_CLAIM.format("*")):
                path.unlink(missing_ok=True)

    @cached_property
    def _record_lines(self) -> Lines:
        return Lines(self.metrics_path)

    @property
    def waiting_records(self) -> int:
        """How many records wait in memory until they can be written."""
        return len(self._record_lines.waiting)

    def on_record(self, record: Record) -> None:
        """Append a record; when this returns it is in the file, even if the run is killed afterwards.

        Raises:
            ConfigError: it cannot be written, for example because the disk is full. It waits in memory, and is written
                with the next one, or by `write_records`.

        """
        with _writing(self.metrics_path):
            self._record_lines.append(to_json(record))

    def write_records(self) -> None:
        """Write the records that wait in memory; raise ConfigError if they still cannot be written."""
        with _writing(self.metrics_path):
            self._record_lines.write()

    def records(self) -> list[dict[str, Any]]:
        """Read all records; an incomplete last line, as a killed run may leave it, is left out.

        Raises:
            CheckpointError: the file is missing, or another line is damaged.

        """
        records = []
        lines = self._lines()
        for number, line in enumerate(lines, start=1):
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError as error:
                if number < len(lines):
                    raise CheckpointError(f"{self.metrics_path}: line {number} is damaged: {error}") from error
        return records

    def has_record(self, step: int) -> bool:
        """Return whether there is a record of `step`."""
        return any(record["step"] == step for record in self.sound_records()[0])

    def rewind(self, step: int) -> int:
        """Drop all records after `step`, and results written since, because the run continues from `step`.

        Damaged lines are dropped, too, so that they block no restart. Returns how many there were, without the last
        line, which a killed run may have cut off.
        """
        self.write_records()
        records, damaged = self.sound_records()
        kept = [record for record in records if record["step"] <= step]
        with _writing(self.metrics_path), replacing(self.metrics_path) as path:
            path.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        for path in (self.result_path, self.model_path):
            with _writing(path):
                path.unlink(missing_ok=True)
        return damaged

    def sound_records(self) -> tuple[list[dict[str, Any]], int]:
        """Return the records that can be read, and how many lines before the last one cannot; none without a file."""
        lines = self._lines() if self.metrics_path.exists() else []
        records = [_record(line) for line in lines]
        return [record for record in records if record is not None], records[:-1].count(None)

    def _lines(self) -> list[str]:
        """Return the lines of ``metrics.jsonl``; bytes that are no text become marks, which are no JSON."""
        try:
            return self.metrics_path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError as error:
            raise CheckpointError(f"{self.metrics_path}: cannot be read: {error.strerror}") from error

    def load_result(self) -> Result | None:
        """Return the result, or None if the run has not finished; raise CheckpointError if it is damaged."""
        try:
            return Result(**json.loads(self.result_path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (OSError, TypeError, ValueError) as error:
            raise CheckpointError(f"{self.result_path}: is damaged: {error}") from error

    def save_result(self, result: Result) -> None:
        """Write ``result.json`` atomically."""
        with _writing(self.result_path), replacing(self.result_path) as path:
            path.write_text(to_json(result, indent=2) + "\n", encoding="utf-8")

    def save_tokenizer(self, dataset: Dataset) -> None:
        """Write ``tokenizer.json`` atomically, if the data set has a tokenizer."""
        if dataset.tokenizer:
            with _writing(self.tokenizer_path), replacing(self.tokenizer_path) as path:
                path.write_text(dataset.tokenizer, encoding="utf-8")

    def save_model(self, model: nn.Module, config: RunConfig) -> None:
        """Write parameters and persistent buffers of `model` to ``model.h5``, atomically."""
        tensors = _tensors(model)
        links = {
            f"{group}/{name}": f"{group}/{other}"
            for name, other in aliases(model).items()
            for group in ("parameters", "buffers")
            if f"{group}/{other}" in tensors
        }
        with replacing(self.model_path) as path:
            hdf5.write(path, tensors, {"config": config.to_toml()}, FORMAT, links)

    @torch.no_grad()
    def load_model(self, model: nn.Module) -> None:
        """Overwrite parameters and persistent buffers of `model` with the stored ones.

        Raises:
            CheckpointError: the file is missing, damaged, or of another model.

        """
        if not self.model_path.exists():
            raise CheckpointError(f"{self.model_path}: there is no such file; did the run end well?")
        tensors, tied = _tensors(model), aliases(model)
        read = hdf5.read(self.model_path, form=FORMAT)
        stored = {name: cast(Tensor, leaf) for name, leaf in read.items() if name.partition("/")[2] not in tied}
        wrong = [f"lacks {name}" for name in tensors if name not in stored]
        wrong += [f"has {name}, which the model lacks" for name in stored if name not in tensors]
        wrong += [
            f"has {name} of shape {tuple(stored[name].shape)} instead of {tuple(tensor.shape)}"
            for name, tensor in tensors.items()
            if name in stored and stored[name].shape != tensor.shape
        ]
        if wrong:
            raise CheckpointError(f"{self.model_path}: is of another model: {'; '.join(wrong)}")
        for name, tensor in tensors.items():
            tensor.copy_(stored[name])


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn an OSError into a ConfigError that names `path`."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror or error}") from error


def _record(line: str) -> dict[str, Any] | None:
    """Return the record in a line; None if it is damaged."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and persistent buffers by name; tied parameters appear once."""
    persistent = model.state_dict()
    return {
        **{f"parameters/{name}": parameter.detach() for name, parameter in named_parameters(model)},
        **{f"buffers/{plain_name(name)}": b for name, b in model.named_buffers() if name in persistent},
    }
