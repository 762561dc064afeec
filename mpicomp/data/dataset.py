"""A data set: train and test splits in memory, the making of batches, and the task.

Images stay uint8 and text stays token ids; `Dataset.batch` makes floats of one batch at a time. A data set is
read-only, so all ranks of one process share one.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from mpicomp.data.partition import permutation, philox
from mpicomp.errors import ConfigError, DataError

Task = Literal["classification", "language", "regression"]
Split = Literal["train", "test"]
Labels = npt.NDArray[np.int64]

CROP_PADDING = 4
DIGESTED = 2**28
"""Bytes of a tensor that a digest is made of, at most."""

# The first entry of keys of random bits; those of partition.py start at 1, vectors.py has 102.
_SPLIT, _AUGMENT = 101, 103


@dataclass(frozen=True)
class Samples:
    """One split.

    Attributes:
        inputs: (n, C, H, W) uint8 images, (n, d) float32 vectors, or (n, context + 1) windows of a text: uint8
            characters, or int16 or int32 tokens.
        labels: (n,) int64; zeros for a text, whose targets are the next tokens. (n,) or (n, k) float32 of a
            regression.

    Raises:
        DataError: the numbers of labels and inputs differ.

    """

    inputs: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.labels):
            raise DataError(f"a split of the data has {len(self.inputs)} inputs, but {len(self.labels)} labels")

    def __len__(self) -> int:
        return len(self.inputs)


@dataclass(frozen=True)
class Dataset:
    """Two splits, the making of batches, and the task: its loss and its score.

    A subclass may override `batch`, `loss` and `score`.

    Attributes:
        kind: the name in `DATASETS`, or another one, for messages.
        task: ``"classification"``; ``"language"``: predict the next token; ``"regression"``: predict numbers.
        classes: how many numbers a model predicts: one for each class, or different token, or k of a regression.
        train: the samples that are partitioned over the ranks.
        test: the samples for evaluation.
        mean: of an input that becomes float, per channel: ``(x * scale - mean) / std``.
        std: see `mean`.
        scale: see `mean`; 1/255 for bytes.
        augment: whether training images are cropped and flipped at random (He et al. 2016, arXiv 1512.03385, 4.2).
        evaluated_on: what `test` holds: ``"validation"`` after `with_validation`.
        tokenizer: of a text, the content of its ``tokenizer.json`` (`mpicomp.data.tokens`), else empty.

    """

    kind: str
    task: Task
    classes: int
    train: Samples
    test: Samples
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    scale: float = 1.0
    augment: bool = False
    evaluated_on: Literal["test", "validation"] = "test"
    tokenizer: str = field(default="", repr=False)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one input: (C, H, W), (d,) or (context,)."""
        shape = tuple(self.train.inputs.shape[1:])
        return (shape[0] - 1,) if self.task == "language" else shape

    @property
    def train_labels(self) -> Labels:
        """The class of each training sample, (n,), for the partition over ranks; zeros where there are none."""
        if self.task == "regression":
            return np.zeros(len(self.train), dtype=np.int64)
        return self.train.labels.numpy()

    @property
    def loss_of_guessing(self) -> float | None:
        """The loss if all classes, or tokens, are given the same probability; None for any other loss."""
        if self.task == "regression" or self.classes < 2 or type(self).loss is not Dataset.loss:
            return None
        return math.log(self.classes)

    def is_no_better_than_guessing(self, loss: float, accuracy: float | None) -> bool:
        """Return whether a model with this test loss, and accuracy if there is one, has learned nothing.

        So it is if the loss is not below `loss_of_guessing`, and the same answer to all test samples would be right as
        often. False where the loss of guessing is not known.
        """
        if self.loss_of_guessing is None or loss < self.loss_of_guessing:
            return False
        if accuracy is None:
            return True
        _, counts = np.unique(self.test.labels.numpy(), return_counts=True)
        return bool(accuracy <= counts.max() / counts.sum())

    def digest(self) -> str:
        """Return 16 hexadecimal digits that depend on all shapes, types and whole numbers, such as pixels and tokens.

        Of a tensor of more than 256 MB, only every so many samples count. Of floating-point numbers only shape and type
        do: other processors may compute other last digits.
        """
        total = hashlib.blake2b(digest_size=8)
        for values in (self.train.inputs, self.train.labels, self.test.inputs, self.test.labels):
            total.update(f"{values.dtype} {tuple(values.shape)}".encode())
            if values.numel() and not values.is_floating_point():
                sample_nbytes = values[0].numel() * values.element_size()
                chosen = values[:: max(1, -(-len(values) * sample_nbytes // DIGESTED))]
                for part in torch.split(chosen, max(1, 2**20 // sample_nbytes)):
                    total.update(part.contiguous().numpy().data)
        return total.hexdigest()

    def with_validation(self, count: int) -> Dataset:
        """Return this data set with about `count` training samples taken out of `train`, as `test`.

        The choice depends on nothing but the data set and `count`. It takes the same fraction of every class, rounded.

        Raises:
            ConfigError: there are too few training samples.

        """
        if not 0 < count < len(self.train):
            raise ConfigError(
                f"data.validation = {count}: must be less than the {len(self.train)} training samples of "
                f"data.kind = {self.kind!r}"
            )
        kept, held_out = (
            Samples(self.train.inputs[chosen], self.train.labels[chosen])
            for chosen in stratified_split(self.train_labels, count / len(self.train), seed=0)
        )
        return replace(self, train=kept, test=held_out, evaluated_on="validation")

    def samples(self, split: Split) -> Samples:
        """Return the samples of `split`, ``"train"`` or ``"test"``."""
        return self.train if split == "train" else self.test

    def batch(
        self,
        split: Split,
        indices: Labels,
        device: torch.device | str = "cpu",
        draw: tuple[int, int, int, int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the inputs and targets of some samples.

        Args:
            split: ``"train"`` or ``"test"``.
            indices: (b,) which samples.
            device: where the tensors are to lie.
            draw: (seed, epoch, rank, step), on which random crops and flips depend; None for none.

        Returns:
            Float32 inputs (b, C, H, W) or (b, d) with int64 targets (b,); for language int64 ids (b, context) with the
            ids one token later, (b, context); for regression the targets are those of `Samples`.

        """
        samples = self.samples(split)
        chosen = torch.from_numpy(indices)
        inputs = samples.inputs[chosen]
        if self.task == "language":
            windows = inputs.to(device).long()
            return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
        if self.augment and draw is not None and split == "train":
            inputs = crop_and_flip(inputs, draw)
        return self._normalize(inputs.to(device)), samples.labels[chosen].to(device)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss of a batch, a scalar: the cross entropy, or the squared error of a regression.

        Args:
            outputs: of the model: (b, classes), or (b, context, classes) for language.
            targets: as `batch` has made them.

        Raises:
            ConfigError: the model does not predict as many numbers as there are targets.

        """
        if self.task == "regression":
            if outputs.numel() != targets.numel():
                raise ConfigError(
                    f"the model makes outputs of shape {tuple(outputs.shape)} for targets of shape "
                    f"{tuple(targets.shape)} of data.kind = {self.kind!r}: choose another model.kind or data.kind"
                )
            return F.mse_loss(outputs.flatten(), targets.flatten())
        return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())

    def score(self, outputs: Tensor, targets: Tensor) -> tuple[int, int] | None:
        """Return how many predictions of a batch are right, and how many there are.

        None if that is no measure of a model, as for regression and language; such a run has no accuracy. The mean
        test loss weights each batch by its number of predictions. Arguments as for `loss`.
        """
        if self.task != "classification":
            return None
        return int((outputs.argmax(dim=-1) == targets).sum()), targets.numel()

    def _normalize(self, inputs: Tensor) -> Tensor:
        if inputs.dtype != torch.uint8:
            return inputs
        shape = (-1, *[1] * (inputs.ndim - 2))
        factor = torch.tensor([self.scale / std for std in self.std], device=inputs.device).view(shape)
        shift = torch.tensor([m / s for m, s in zip(self.mean, self.std, strict=True)], device=inputs.device).view(
            shape
        )
        return inputs.float().mul_(factor).sub_(shift)


def crop_and_flip(images: Tensor, draw: tuple[int, int, int, int]) -> Tensor:
    """Shift each image by up to 4 pixels (black enters) and mirror every other one on average.

    Args:
        images: (b, C, H, W) uint8.
        draw: (seed, epoch, rank, step); the same draw gives the same shifts.

    Returns:
        (b, C, H, W) uint8, another tensor.

    """
    count, _, height, width = images.shape
    bits = philox(_AUGMENT, *draw).random_raw(3 * count).reshape(3, count) >> np.uint64(32)
    top, left = (torch.from_numpy((row % (2 * CROP_PADDING + 1)).astype(np.int64)) for row in bits[:2])
    flip = torch.from_numpy((bits[2] % 2).astype(bool))
    rows = top[:, None] + torch.arange(height)
    columns = left[:, None] + torch.arange(width)
    columns = torch.where(flip[:, None], columns.flip(1), columns)
    padded = torch.nn.functional.pad(images, [CROP_PADDING] * 4)
    # Indices on both sides of a slice move their axes to the front: (b, H, W, C).
    picked = padded[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2).contiguous()


def stratified_split(labels: Labels, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return ascending train and test indices; `fraction` of every class is for testing, chosen by `seed`."""
    test = np.zeros(len(labels), dtype=bool)
    for c in np.unique(labels):
        members = np.flatnonzero(labels == c)
        test[members[permutation(len(members), _SPLIT, seed, int(c))[: round(fraction * len(members))]]] = True
    return torch.from_numpy(np.flatnonzero(~test)), torch.from_numpy(np.flatnonzero(test))
