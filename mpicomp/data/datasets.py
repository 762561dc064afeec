"""Data sets: train and test splits in memory, read from files of a data folder or generated.

Images stay uint8 and text stays token ids; `Dataset.batch` makes floats of one batch at a time. A data set is
read-only, so all ranks of one process share one.

The folder is ``data.path``, else the environment variable ``MPICOMP_DATA``, else ``./data``.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import h5py
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from mpicomp.data.arguments import require_positive
from mpicomp.data.partition import permutation, philox
from mpicomp.data.tokens import byte_pairs, read_text
from mpicomp.errors import ConfigError, DataError
from mpicomp.plugins import make

Task = Literal["classification", "language", "regression"]
Split = Literal["train", "test"]
Labels = npt.NDArray[np.int64]

FOLDER_VARIABLE = "MPICOMP_DATA"
CROP_PADDING = 4
DIGESTED = 2**28
"""Bytes of a tensor that a digest is made of, at most."""

# The first entry of every key of random bits; those of partition.py start at 1.
_SPLIT, _SYNTHETIC, _AUGMENT = 101, 102, 103


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
            for chosen in _split(self.train_labels, count / len(self.train), seed=0)
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


def digits(folder: Path | None) -> Dataset:
    """8x8 digits that ship with scikit-learn: 1,797 images, every fifth of a class for testing."""
    # Not by `sklearn.datasets.load_digits`: its import takes half as long as torch's, on every rank.
    spec = importlib.util.find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise DataError(
            "data.kind = 'digits' ships with scikit-learn, which is not installed: pip install scikit-learn"
        )
    path = Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz"
    rows = np.loadtxt(path, dtype=np.int64, delimiter=",")
    images, labels = rows[:, :-1], rows[:, -1]
    train, test = _split(labels, fraction=0.2, seed=0)
    inputs = torch.from_numpy(images.astype(np.uint8)).view(-1, 1, 8, 8)
    targets = torch.from_numpy(labels.copy())
    return Dataset(
        kind="digits",
        task="classification",
        classes=10,
        train=Samples(inputs[train], targets[train]),
        test=Samples(inputs[test], targets[test]),
        mean=(0.3053,),
        std=(0.3760,),
        scale=1 / 16,
    )


def fashion_mnist(folder: Path | None, augment: bool = False) -> Dataset:
    """28x28 grayscale pictures of clothes, 60,000 + 10,000, 10 classes (Xiao et al. 2017, arXiv 1708.07747)."""
    path = find("fashion_mnist", "fashion_mnist.h5", folder)
    train, test = (read_images("fashion_mnist", path, split, n, (28, 28)) for split, n in IMAGE_COUNTS["fashion_mnist"])
    return Dataset(
        kind="fashion_mnist",
        task="classification",
        classes=10,
        train=train,
        test=test,
        mean=(0.2860,),
        std=(0.3530,),
        scale=1 / 255,
        augment=augment,
    )


def cifar10(folder: Path | None, augment: bool = False) -> Dataset:
    """32x32 color photographs, 50,000 + 10,000, 10 classes (Krizhevsky 2009)."""
    path = find("cifar10", "cifar10.h5", folder)
    train, test = (read_images("cifar10", path, split, n, (32, 32, 3)) for split, n in IMAGE_COUNTS["cifar10"])
    return Dataset(
        kind="cifar10",
        task="classification",
        classes=10,
        train=train,
        test=test,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        scale=1 / 255,
        augment=augment,
    )


IMAGE_COUNTS: dict[str, tuple[tuple[Split, int], ...]] = {
    "fashion_mnist": (("train", 60_000), ("test", 10_000)),
    "cifar10": (("train", 50_000), ("test", 10_000)),
}

TINYSHAKESPEARE_CHARACTERS = 1_115_394


def tinyshakespeare(folder: Path | None, context: int = 64) -> Dataset:
    """1,115,394 characters of Shakespeare (Karpathy 2015, char-rnn); the last tenth for testing."""
    path = find("tinyshakespeare", "tinyshakespeare.txt", folder)
    try:
        text = read_text(path)
    except DataError as error:
        raise damaged("tinyshakespeare", path, "it is not UTF-8 text") from error
    if len(text) != TINYSHAKESPEARE_CHARACTERS:
        raise damaged("tinyshakespeare", path, f"{len(text)} characters instead of {TINYSHAKESPEARE_CHARACTERS}")
    return _character_windows("tinyshakespeare", path, text, context)


Tokenizer = Literal["characters", "bpe"]


def text(
    folder: Path | None,
    file: str | tuple[str, ...] = ("**/*.txt", "**/*.md"),
    context: int = 64,
    tokenizer: Tokenizer = "characters",
    vocabulary: int = 4096,
    cache: Path | None = None,
) -> Dataset:
    """UTF-8 text of one's own, a file or a folder of files, cut into windows; the last tenth for testing.

    Args:
        folder: the file, or the folder with the files.
        file: the files of the folder, by name or pattern. They are taken in the order of their paths. Patterns do not
            match hidden files.
        context: how many tokens a model sees.
        tokenizer: ``"characters"``: a token is a character, of at most 256 different ones, and the texts are joined by
            newlines. ``"bpe"``: byte-level byte-pair encoding, trained on the training part; see
            `mpicomp.data.tokens`.
        vocabulary: the largest number of different tokens of ``"bpe"``.
        cache: the folder that keeps the tokens of ``"bpe"``; by default ``.mpicomp`` beside the files.

    Raises:
        ConfigError: a value is out of its range, or ``"bpe"`` needs a package that is missing.
        DataError: there are no files, one is no UTF-8 text, or all are shorter than ten contexts.

    """
    if tokenizer not in get_args(Tokenizer):
        raise ConfigError(f"data.tokenizer = {tokenizer!r} must be one of {', '.join(map(repr, get_args(Tokenizer)))}")
    source, paths = data_folder(folder), _text_files(file, folder)
    if tokenizer == "characters":
        return _character_windows("text", source, "\n".join(map(read_text, paths)), context)
    found = byte_pairs(paths, vocabulary, cache or (source.parent if source.is_file() else source) / ".mpicomp")
    return _windows("text", source, (found.train, found.test), found.vocabulary, context)


def _text_files(file: str | tuple[str, ...], path: Path | None) -> list[Path]:
    """Return the files that `file` names in the data folder, in the order of their paths; or `path` if it is a file."""
    folder = data_folder(path)
    if folder.is_file():
        return [folder]
    wanted = [file] if isinstance(file, str) else file
    found: set[Path] = set()
    for name in wanted:
        if (folder / name).is_file():
            found.add(folder / name)
            continue
        try:
            matches = [match for match in folder.glob(name) if match.is_file()]
        except (ValueError, NotImplementedError) as error:
            raise ConfigError(f"data.file = {name!r} is no name or pattern of files in {folder}: {error}") from error
        found.update(m for m in matches if not any(part.startswith(".") for part in m.relative_to(folder).parts))
    if not found:
        raise DataError(
            f"data.kind = 'text' needs {' or '.join(wanted)}, and there is no such file in {folder.absolute()} "
            f"({_asked(path)}). Set data.path to a text or to a folder of texts, or data.file to their names."
        )
    return sorted(found, key=lambda path: path.as_posix())


def libsvm(
    folder: Path | None,
    file: str = "train.txt",
    test_file: str | None = None,
    test_fraction: float = 0.2,
    split_seed: int = 0,
) -> Dataset:
    """Sparse vectors in LIBSVM's text form, made dense float32; labels are mapped to 0..C-1 in ascending order.

    Without `test_file`, a stratified random `test_fraction` of `file` is kept for testing.
    """
    if not 0 < test_fraction < 1:
        raise ConfigError(f"data.test_fraction = {test_fraction:g}: must be between 0 and 1, both excluded.")
    paths = [find("libsvm", name, folder) for name in (file, test_file) if name is not None]
    inputs, values = _read_libsvm(paths)
    known = np.unique(values[0])
    if len(known) < 2:
        raise damaged("libsvm", paths[0], "all its labels are the same")
    targets = [torch.from_numpy(np.searchsorted(known, of).astype(np.int64)) for of in values]
    if len(paths) == 2:
        if unseen := sorted(set(values[1].tolist()) - set(known.tolist())):
            raise damaged("libsvm", paths[1], f"label {unseen[0]:g} does not occur in {paths[0].name}")
        train, test = (Samples(x, y) for x, y in zip(inputs, targets, strict=True))
    else:
        chosen = _split(targets[0].numpy(), test_fraction, split_seed)
        train, test = (Samples(inputs[0][of], targets[0][of]) for of in chosen)
        if not len(test) or not len(train):
            raise damaged("libsvm", paths[0], "it has too few samples of each class to keep any for testing")
    return Dataset("libsvm", "classification", len(known), train, test)


def synthetic(
    folder: Path | None,
    samples: int = 2000,
    features: int = 20,
    classes: int = 4,
    noise: float = 0.1,
    data_seed: int = 0,
) -> Dataset:
    """Gaussian vectors labeled by a linear teacher: ``y = argmax(x A + noise * sqrt(features) * e)``.

    ``x``, ``A`` (features, classes) and ``e`` are standard normal. A fifth more samples are made for testing, without
    noise in their labels.
    """
    require_positive("data", samples=samples, features=features)
    if classes < 2:
        raise ConfigError(f"data.classes = {classes}: must be at least 2.")
    if not (math.isfinite(noise) and noise >= 0):
        raise ConfigError(f"data.noise = {noise:g}: must not be negative.")
    generator = np.random.Generator(philox(_SYNTHETIC, data_seed))
    tests = max(1, samples // 5)
    x = generator.standard_normal((samples + tests, features), dtype=np.float32)
    scores = x @ generator.standard_normal((features, classes), dtype=np.float32)
    disturbance = generator.standard_normal((samples, classes), dtype=np.float32)
    scores[:samples] += np.float32(noise * math.sqrt(features)) * disturbance
    inputs, labels = torch.from_numpy(x), torch.from_numpy(scores.argmax(axis=1))
    return Dataset(
        kind="synthetic",
        task="classification",
        classes=classes,
        train=Samples(inputs[:samples], labels[:samples]),
        test=Samples(inputs[samples:], labels[samples:]),
    )


DATASETS: dict[str, Callable[..., Dataset]] = {
    "digits": digits,
    "fashion_mnist": fashion_mnist,
    "cifar10": cifar10,
    "tinyshakespeare": tinyshakespeare,
    "text": text,
    "libsvm": libsvm,
    "synthetic": synthetic,
}


def load(kind: str, path: Path | None = None, **params: object) -> Dataset:
    """Read or make the data set `kind`.

    Args:
        kind: a name in `DATASETS`, an import path, or a name that a package offers (see `mpicomp.plugins`).
        path: ``data.path``: the folder with the files, or the file itself; None looks elsewhere (see `find`).
        params: the further arguments of that data set, e.g. ``context``.

    Raises:
        ConfigError: `kind` or a parameter is unknown, or a value is out of its range.
        DataError: a file is missing or damaged.

    """
    dataset: Dataset = make("data.kind", kind, DATASETS, Dataset, path, **params)
    return dataset


def data_folder(path: Path | None) -> Path:
    """Return the data folder: `path`, else the environment variable ``MPICOMP_DATA``, else ``./data``."""
    return path if path is not None else Path(os.environ.get(FOLDER_VARIABLE) or "data")


def find(kind: str, file: str, path: Path | None) -> Path:
    """Return the path of `file` in the data folder, or `path` itself if it is a file.

    Raises:
        DataError: there is no such file.

    """
    folder = data_folder(path)
    found = folder if folder.is_file() else folder / file
    if found.is_file():
        return found
    remedy = f" Or download it: mpicomp data fetch {kind}." if kind in DOWNLOADABLE else ""
    raise DataError(
        f"data.kind = {kind!r} needs the file {file}, which is not in {folder.absolute()} ({_asked(path)}). Set "
        f"data.path or the environment variable {FOLDER_VARIABLE} to the folder that holds it.{remedy}"
    )


def _asked(path: Path | None) -> str:
    return f"data.path = {str(path)!r}" if path is not None else f"{FOLDER_VARIABLE} or ./data, as data.path is not set"


DOWNLOADABLE = ("fashion_mnist", "cifar10", "tinyshakespeare")


def damaged(kind: str, path: Path, reason: str) -> DataError:
    """Return the error for a file with unexpected content."""
    remedy = f"Download it again: mpicomp data fetch {kind}." if kind in DOWNLOADABLE else "Check the file."
    return DataError(f"data.kind = {kind!r}: the file {path} is damaged: {reason}. {remedy}")


def read_images(kind: str, path: Path, split: Split, count: int, shape: tuple[int, ...]) -> Samples:
    """Read ``<split>/images`` (count, *shape) uint8 and ``<split>/labels`` (count,) uint8 below 10 from HDF5.

    Raises:
        DataError: the file cannot be read, or holds something else.

    """
    try:
        with h5py.File(path, "r", locking="best-effort") as file:
            images, labels = (_array(kind, path, file, f"{split}/{name}") for name in ("images", "labels"))
            for array, expected in ((images, (count, *shape)), (labels, (count,))):
                if array.shape != expected or array.dtype != np.uint8:
                    found = f"{array.name} is {array.dtype} {array.shape} instead of uint8 {expected}"
                    raise damaged(kind, path, found)
            samples = Samples(_channels_first(images), torch.from_numpy(labels[:].astype(np.int64)))
    except (OSError, KeyError, RuntimeError, ValueError) as error:
        raise damaged(kind, path, f"HDF5 cannot read it ({error})") from error
    if int(samples.labels.max()) > 9:
        raise damaged(kind, path, f"{split}/labels holds {int(samples.labels.max())}, but there are 10 classes")
    return samples


def _array(kind: str, path: Path, file: h5py.File, name: str) -> h5py.Dataset:
    found = file.get(name)
    if not isinstance(found, h5py.Dataset):
        raise damaged(kind, path, f"it has no array {name}")
    return found


def _channels_first(images: h5py.Dataset) -> Tensor:
    """Read (n, H, W[, C]) into (n, C, H, W), piece by piece, so that memory never holds a second full copy."""
    channels = images.shape[3:] or (1,)
    out = np.empty((len(images), *channels, *images.shape[1:3]), dtype=np.uint8)
    for start in range(0, len(images), 1000):
        piece = images[start : start + 1000].reshape(-1, *images.shape[1:3], *channels)
        out[start : start + 1000] = piece.transpose(0, 3, 1, 2)
    return torch.from_numpy(out)


def _character_windows(kind: str, source: Path, text: str, context: int) -> Dataset:
    """Return a text of which each character is a token."""
    characters, ids = np.unique(np.frombuffer(text.encode("utf-32-le"), dtype="<u4"), return_inverse=True)
    if len(characters) > 256:
        raise DataError(
            f"data.kind = {kind!r}: the text {source} has {len(characters)} different characters, but at most 256 can "
            "be tokens. Set data.tokenizer = 'bpe'."
        )
    coded, tests = ids.astype(np.uint8), len(ids) // 10
    return _windows(kind, source, (coded[: len(ids) - tests], coded[len(ids) - tests :]), len(characters), context)


def _windows(kind: str, source: Path, tokens: Sequence[npt.NDArray[Any]], vocabulary: int, context: int) -> Dataset:
    """Cut training and test tokens into windows of ``context + 1`` that overlap by one: each is predicted once.

    The windows are views of the tokens.
    """
    require_positive("data", context=context)
    train, test = map(len, tokens)
    if min(train, test) < context + 1:
        raise DataError(
            f"data.context = {context}: the text {source} has {train} tokens for training and, in its last tenth, "
            f"{test} for testing, but each must be a window of {context + 1} at least. Take a longer text or a shorter "
            "context."
        )
    windows = [torch.from_numpy(part).unfold(0, context + 1, context) for part in tokens]
    first, last = (Samples(part, torch.zeros(len(part), dtype=torch.int64)) for part in windows)
    return Dataset(kind, "language", vocabulary, first, last)


def _read_libsvm(paths: list[Path]) -> tuple[list[Tensor], list[npt.NDArray[np.float64]]]:
    """Return the dense vectors and the raw labels of each file; all files have the same columns."""
    from sklearn.datasets import load_svmlight_files  # half as long to import as torch

    try:
        parsed = load_svmlight_files([str(path) for path in paths], dtype=np.float32)
    except (OSError, ValueError, OverflowError) as error:
        raise damaged("libsvm", paths[0], f"it is not LIBSVM text ({error})") from error
    inputs, labels = list(parsed[0::2]), list(parsed[1::2])
    for path, x, y in zip(paths, inputs, labels, strict=True):
        if x.shape[0] == 0:
            raise damaged("libsvm", path, "it has no samples")
        if not (np.isfinite(x.data).all() and np.isfinite(y).all()):
            raise damaged("libsvm", path, "it holds values that are not finite")
        if (y != np.rint(y)).any():
            raise damaged("libsvm", path, "its labels are not whole numbers; regression is not supported")
    return [torch.from_numpy(x.toarray()) for x in inputs], labels


def _split(labels: Labels, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return ascending train and test indices; `fraction` of every class is for testing, chosen by `seed`."""
    test = np.zeros(len(labels), dtype=bool)
    for c in np.unique(labels):
        members = np.flatnonzero(labels == c)
        test[members[permutation(len(members), _SPLIT, seed, int(c))[: round(fraction * len(members))]]] = True
    return torch.from_numpy(np.flatnonzero(~test)), torch.from_numpy(np.flatnonzero(test))
