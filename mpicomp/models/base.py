"""The problem that a model is built for.

A model maps inputs to logits, (b, classes) for classification and (b, context, classes) for language, or to numbers,
(b, classes), for regression. The models of this package have no dropout or other randomness, so a step is a function of
parameters and batch only. The loss belongs to the data set: `mpicomp.data.dataset.Dataset.loss`.
"""

from __future__ import annotations

from dataclasses import dataclass

from mpicomp.data.dataset import Task
from mpicomp.errors import ConfigError


@dataclass(frozen=True)
class Problem:
    """The description of the data that a model has to fit.

    Attributes:
        input_shape: of one input: (C, H, W) of an image, (d,) of a vector, (context,) of a text.
        classes: how many numbers a prediction has: a logit for each class, or the targets of a regression.
        task: ``"classification"``, ``"language"`` or ``"regression"``.
        data_kind: the name of the data set, for messages.

    """

    input_shape: tuple[int, ...]
    classes: int
    task: Task = "classification"
    data_kind: str | None = None

    def refuse(self, kind: str, needs: str) -> ConfigError:
        """Return the error for a model that cannot read this data."""
        data = "data.kind" if self.data_kind is None else f"data.kind = {self.data_kind!r}"
        what = "tokens" if self.task == "language" else "images" if len(self.input_shape) == 3 else "vectors"
        return ConfigError(
            f"model.kind = {kind!r} needs {needs}, but {data} gives {what} of shape {self.input_shape}. "
            "Choose another model.kind or data.kind."
        )

    def require_numbers(self, kind: str) -> None:
        """Raise ConfigError unless the inputs are images or vectors."""
        if self.task == "language":
            raise self.refuse(kind, "images or vectors")

    def require_images(self, kind: str) -> tuple[int, int, int]:
        """Return (C, H, W); raise ConfigError unless the inputs are images."""
        if self.task == "language" or len(self.input_shape) != 3:
            raise self.refuse(kind, "images")
        channels, height, width = self.input_shape
        return channels, height, width

    def require_language(self, kind: str) -> None:
        """Raise ConfigError unless the inputs are sequences of tokens."""
        if self.task != "language":
            raise self.refuse(kind, "sequences of tokens")
