"""Data sets of vectors."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mpicomp.data.arguments import require_positive
from mpicomp.data.dataset import Dataset, Samples, stratified_split
from mpicomp.data.files import damaged, find
from mpicomp.data.partition import philox
from mpicomp.errors import ConfigError

_SYNTHETIC = 102
"""The first entry of the key of random bits; see dataset.py."""


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
        chosen = stratified_split(targets[0].numpy(), test_fraction, split_seed)
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
