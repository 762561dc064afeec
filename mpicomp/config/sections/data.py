"""The data set, its partition over the ranks, and the model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt
from pydantic import NonNegativeInt
from torch import nn

from mpicomp import models
from mpicomp.config.parameters import Choice
from mpicomp.config.sections.base import Section
from mpicomp.data.dataset import Dataset
from mpicomp.data.datasets import DATASETS, load
from mpicomp.data.partition import PARTITIONS, Indices, partition


class DataSection(Section):
    """``[data]``: the data set, and its partition over the ranks."""

    section: ClassVar[str] = "data"
    choices: ClassVar[Mapping[str, Choice]] = {"kind": Choice(DATASETS, 1), "partition": Choice(PARTITIONS, 3)}

    kind: str = "digits"
    path: str | None = None
    """The data folder, or the file itself; by default the environment variable ``MPICOMP_DATA``, else ``./data``."""

    partition: str = "iid"

    validation: NonNegativeInt = 0
    """How many training samples are held out and evaluated in place of the test samples, to choose settings by."""

    def load(self) -> Dataset:
        """Read the data set; raise DataError if it is missing or damaged."""
        dataset = load(self.kind, Path(self.path) if self.path else None, **self.arguments())
        return dataset.with_validation(self.validation) if self.validation else dataset

    def split(self, labels: npt.NDArray[np.int64], ranks: int, seed: int) -> list[Indices]:
        """Return the training samples of each rank, given the class (n,) of every sample."""
        return partition(self.partition, labels, ranks, seed, **self.arguments("partition"))


class ModelSection(Section):
    """``[model]``: the model to train."""

    section: ClassVar[str] = "model"
    choices: ClassVar[Mapping[str, Choice]] = {"kind": Choice(models.MODELS, 1)}

    kind: str = "mlp"

    def build(self, dataset: Dataset, seed: int) -> nn.Module:
        """Return the model for `dataset` on the CPU; its parameters depend only on the arguments."""
        return models.build(
            self.kind,
            dataset.input_shape,
            dataset.classes,
            seed,
            task=dataset.task,
            data_kind=dataset.kind,
            **self.arguments(),
        )
