"""The data sets that can be downloaded: from where, their hashes, and how the downloads become arrays."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

CIFAR_ARCHIVE = "cifar-10-binary.tar.gz"
CIFAR_RECORD = 1 + 3 * 32 * 32


@dataclass(frozen=True)
class Origin:
    """The source of a data set.

    Attributes:
        file: its name in the data folder.
        base: the address of the folder of the downloads, ending in a slash.
        downloads: the names of the downloads.
        sha256: the hash of a download by its name, or of an array by its path in `file`; not all are known.
        decode: makes the arrays of `file`, by their paths, from the downloads; None if the download is the file itself.

    """

    file: str
    base: str
    downloads: tuple[str, ...]
    sha256: dict[str, str]
    decode: Callable[[dict[str, bytes]], dict[str, Bytes]] | None = field(default=None, repr=False)


def decode_fashion_mnist(downloads: dict[str, bytes]) -> dict[str, Bytes]:
    """Return the arrays of the four gzipped IDX files."""
    arrays = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        arrays[f"{split}/images"] = read_idx(downloads[f"{prefix}-images-idx3-ubyte.gz"])
        arrays[f"{split}/labels"] = read_idx(downloads[f"{prefix}-labels-idx1-ubyte.gz"])
    return arrays


def decode_cifar10(downloads: dict[str, bytes]) -> dict[str, Bytes]:
    """Return the arrays of the binary version: records of one label and 32x32 red, green and blue bytes."""
    members = {f"data_batch_{i}.bin": "train" for i in range(1, 6)} | {"test_batch.bin": "test"}
    pieces: dict[str, list[Bytes]] = {"train": [], "test": []}
    with tarfile.open(fileobj=io.BytesIO(downloads[CIFAR_ARCHIVE]), mode="r:gz") as archive:
        for name, split in members.items():
            member = archive.extractfile(f"cifar-10-batches-bin/{name}")
            if member is None:
                raise ValueError(f"{name} is not a file")
            pieces[split].append(np.frombuffer(member.read(), dtype=np.uint8).reshape(-1, CIFAR_RECORD))
    arrays = {}
    for split, records in ((split, np.concatenate(parts)) for split, parts in pieces.items()):
        arrays[f"{split}/images"] = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1).copy()
        arrays[f"{split}/labels"] = records[:, 0].copy()
    return arrays


def read_idx(packed: bytes) -> Bytes:
    """Return the uint8 array of a gzipped IDX file: zero, zero, type 8, dimensions, big-endian extents, bytes.

    Raises:
        ValueError: it is something else.

    """
    plain = gzip.decompress(packed)
    zeros, kind, dimensions = struct.unpack_from(">HBB", plain)
    if zeros != 0 or kind != 8:
        raise ValueError("it is not an IDX file of bytes")
    shape = struct.unpack_from(f">{dimensions}I", plain, 4)
    return np.frombuffer(plain, dtype=np.uint8, offset=4 + 4 * dimensions).reshape(shape)


ORIGINS: dict[str, Origin] = {
    "fashion_mnist": Origin(
        file="fashion_mnist.h5",
        base="https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
        downloads=(
            "train-images-idx3-ubyte.gz",
            "train-labels-idx1-ubyte.gz",
            "t10k-images-idx3-ubyte.gz",
            "t10k-labels-idx1-ubyte.gz",
        ),
        sha256={
            "train/images": "2e487a6c89124f78f2d7521542223cafe96f7123c3ca13d447772ac6ecbb3012",
            "train/labels": "657fbd221bfc9f4198cc14b5619cc33ec57c58dd0e47af4d99d6650759e869a7",
            "test/images": "c867c93ff95360594e8ec3287995350b824dd110b11595c0e13d5423f621867a",
            "test/labels": "3d0e6c6ea990b53b6f8f500a41cac93881d981b315f84578b7d915342ade01e9",
        },
        decode=decode_fashion_mnist,
    ),
    "cifar10": Origin(
        file="cifar10.h5",
        base="https://www.cs.toronto.edu/~kriz/",
        downloads=(CIFAR_ARCHIVE,),
        # The archive vouches for the pixels; a file made otherwise is checked by the hashes that it records itself.
        sha256={
            CIFAR_ARCHIVE: "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
            "train/labels": "2b7cd2f24487317614016b72ffd53071c3062f592f0eb300c18a770d41ae1253",
            "test/labels": "cec8a24a1e92aa2ecaa0bbd3dbfa86bf6cd8759fbd209a832824c8cf0afca9d5",
        },
        decode=decode_cifar10,
    ),
    "tinyshakespeare": Origin(
        file="tinyshakespeare.txt",
        base="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/",
        downloads=("input.txt",),
        sha256={"input.txt": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"},
    ),
}
