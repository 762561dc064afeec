"""The data sets by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mpicomp.data.dataset import Dataset
from mpicomp.data.images import cifar10, digits, fashion_mnist
from mpicomp.data.text import text, tinyshakespeare
from mpicomp.data.vectors import libsvm, synthetic
from mpicomp.plugins import make

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
        path: ``data.path``: the folder with the files, or the file itself; None looks elsewhere (see
            `mpicomp.data.files`).
        params: the further arguments of that data set, e.g. ``context``.

    Raises:
        ConfigError: `kind` or a parameter is unknown, or a value is out of its range.
        DataError: a file is missing or damaged.

    """
    dataset: Dataset = make("data.kind", kind, DATASETS, Dataset, path, **params)
    return dataset
