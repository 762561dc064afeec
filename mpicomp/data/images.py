"""Data sets of images."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor

from mpicomp.data.dataset import Dataset, Samples, Split, stratified_split
from mpicomp.data.files import damaged, find
from mpicomp.errors import DataError

IMAGE_COUNTS: dict[str, tuple[tuple[Split, int], ...]] = {
    "fashion_mnist": (("train", 60_000), ("test", 10_000)),
    "cifar10": (("train", 50_000), ("test", 10_000)),
}


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
    train, test = stratified_split(labels, fraction=0.2, seed=0)
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
