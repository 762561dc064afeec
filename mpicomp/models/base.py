"""What a model is built for, and the loss and accuracy that all models share.

A model maps inputs to logits: (b, classes) for classification, (b, context, classes) for language. No model has dropout
or any other randomness, so a step is a function of parameters and batch alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from mpicomp.data.datasets import Task
from mpicomp.errors import ConfigError


@dataclass(frozen=True)
class Problem:
    """The data that a model has to fit.

    Attributes:
        input_shape: of one input: (C, H, W) of an image, (d,) of a vector, (context,) of a text.
        classes: how many logits a prediction has.
        task: ``"classification"`` or ``"language"``.
        data_kind: the name of the data set, for messages.

    """

    input_shape: tuple[int, ...]
    classes: int
    task: Task = "classification"
    data_kind: str | None = None

    def refuse(self, kind: str, needs: str) -> ConfigError:
        """Build the error for a model that cannot read this data."""
        data = "data.kind" if self.data_kind is None else f"data.kind = {self.data_kind!r}"
        what = "characters" if self.task == "language" else "images" if len(self.input_shape) == 3 else "vectors"
        return ConfigError(
            f"model.kind = {kind!r} needs {needs}, but {data} gives {what} of shape {self.input_shape}. "
            "Choose another model.kind or data.kind."
        )

    def require_classification(self, kind: str) -> None:
        """Raise ConfigError unless the inputs are images or vectors with one class each."""
        if self.task != "classification":
            raise self.refuse(kind, "images or vectors")

    def require_images(self, kind: str) -> tuple[int, int, int]:
        """Return (C, H, W); raise ConfigError unless the inputs are images."""
        if self.task != "classification" or len(self.input_shape) != 3:
            raise self.refuse(kind, "images")
        channels, height, width = self.input_shape
        return channels, height, width

    def require_language(self, kind: str) -> int:
        """Return the context; raise ConfigError unless the inputs are sequences of characters."""
        if self.task != "language":
            raise self.refuse(kind, "sequences of characters")
        return self.input_shape[0]


def loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross entropy over all predictions of a batch, a scalar.

    Args:
        logits: (b, classes) or (b, context, classes).
        targets: (b,) or (b, context) int64.

    """
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


def correct(logits: Tensor, targets: Tensor) -> int:
    """Return how many of the ``targets.numel()`` predictions are right; shapes as in `loss`."""
    return int((logits.argmax(dim=-1) == targets).sum())
