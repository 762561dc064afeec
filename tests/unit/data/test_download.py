"""Downloads: decoding, hashes, complete-or-absent files, and the commands; all from local files."""

import dataclasses
import gzip
import hashlib
import io
import os
import struct
import tarfile
from pathlib import Path

import h5py
import numpy as np
import pytest
from click.testing import CliRunner

from mpicomp.cli.data import data as command
from mpicomp.data import images
from mpicomp.data.datasets import load
from mpicomp.data.download import check, fetch, sha256
from mpicomp.data.files import FOLDER_VARIABLE
from mpicomp.data.origins import CIFAR_ARCHIVE, ORIGINS, read_idx
from mpicomp.errors import DataError

COUNTS = {"train": 30, "test": 20}
REAL = os.environ.get(FOLDER_VARIABLE)


def idx(array):
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    return gzip.compress(header + array.tobytes(), mtime=0)  # the time would be in the names of tests


def arrays_of(shape):
    generator = np.random.default_rng(0)
    arrays = {}
    for split, n in COUNTS.items():
        arrays[f"{split}/images"] = generator.integers(0, 256, (n, *shape), dtype=np.uint8)
        arrays[f"{split}/labels"] = generator.integers(0, 10, n, dtype=np.uint8)
    return arrays


def cifar_archive(arrays):
    def records(split, start, stop):
        images = arrays[f"{split}/images"][start:stop].transpose(0, 3, 1, 2).reshape(stop - start, -1)
        return np.hstack([arrays[f"{split}/labels"][start:stop, None], images]).tobytes()

    parts = {f"data_batch_{i}.bin": records("train", 6 * i - 6, 6 * i) for i in range(1, 6)}
    parts["test_batch.bin"] = records("test", 0, 20)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, content in parts.items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return packed.getvalue()


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A folder with small downloads of all data sets, whose hashes stand in place of the real ones."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    fashion, cifar = arrays_of((28, 28)), arrays_of((32, 32, 3))
    for split, prefix in (("train", "train"), ("test", "t10k")):
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(idx(fashion[f"{split}/images"]))
        (folder / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(idx(fashion[f"{split}/labels"]))
    archive = cifar_archive(cifar)
    (folder / CIFAR_ARCHIVE).write_bytes(archive)
    text = b"To be, or not to be.\n" * 100
    (folder / "input.txt").write_bytes(text)
    hashes = {
        "fashion_mnist": {name: sha256(array) for name, array in fashion.items()},
        "cifar10": {
            CIFAR_ARCHIVE: hashlib.sha256(archive).hexdigest(),
            **{name: sha256(array) for name, array in cifar.items() if "labels" in name},
        },
        "tinyshakespeare": {"input.txt": hashlib.sha256(text).hexdigest()},
    }
    for kind, known in hashes.items():
        monkeypatch.setitem(ORIGINS, kind, dataclasses.replace(ORIGINS[kind], sha256=known))
    counts = tuple(COUNTS.items())
    monkeypatch.setattr(images, "IMAGE_COUNTS", {"fashion_mnist": counts, "cifar10": counts})
    return folder


@pytest.mark.parametrize(("kind", "shape"), [("fashion_mnist", (28, 28)), ("cifar10", (32, 32, 3))])
def test_fetched_images_are_the_original_ones(kind, shape, mirror, tmp_path):
    path = fetch(kind, tmp_path / "made" / "here", mirror.as_uri())
    assert path == tmp_path / "made" / "here" / f"{kind}.h5"
    with h5py.File(path) as file:
        for name, array in arrays_of(shape).items():
            assert np.array_equal(file[name][:], array)
    assert check(kind, path.parent) == dict.fromkeys(
        ("train/images", "train/labels", "test/images", "test/labels"), True
    )
    assert len(load(kind, path.parent).train) == 30
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_fetched_text_is_the_download(mirror, tmp_path):
    path = fetch("tinyshakespeare", tmp_path, mirror.as_uri() + "/")
    assert path.read_bytes() == (mirror / "input.txt").read_bytes()
    assert check("tinyshakespeare", tmp_path) == {"tinyshakespeare.txt": True}


def test_progress_is_told(mirror, tmp_path):
    told = []
    fetch("tinyshakespeare", tmp_path, mirror.as_uri(), lambda *what: told.append(what))
    assert told[-1] == ("input.txt", 2100, 2100)


@pytest.mark.parametrize(
    ("kind", "file", "content", "message"),
    [
        ("tinyshakespeare", "input.txt", b"other", r"input\.txt from file:.* is not the original: its SHA-256 is"),
        ("cifar10", CIFAR_ARCHIVE, b"other", r"cifar-10-binary\.tar\.gz from .* is not the original"),
        (
            "fashion_mnist",
            "train-labels-idx1-ubyte.gz",
            idx(np.zeros(30, np.uint8)),
            "train/labels from .* not the orig",
        ),
        ("fashion_mnist", "t10k-images-idx3-ubyte.gz", b"no gzip", r"cannot be decoded"),
        (
            "fashion_mnist",
            "t10k-images-idx3-ubyte.gz",
            gzip.compress(b"\0\0\x0d\1\0\0\0\0", mtime=0),
            "not an IDX file of bytes",
        ),
        ("fashion_mnist", "t10k-images-idx3-ubyte.gz", idx(np.zeros(9, np.uint8))[:-12], r"cannot be decoded"),
    ],
)
def test_what_is_not_the_original_is_refused_and_leaves_nothing(kind, file, content, message, mirror, tmp_path):
    (mirror / file).write_bytes(content)
    folder = tmp_path / "data"
    with pytest.raises(DataError, match=message):
        fetch(kind, folder, mirror.as_uri())
    assert not folder.exists() or list(folder.iterdir()) == []


def test_a_damaged_archive_whose_hash_is_unknown_is_refused(mirror, tmp_path, monkeypatch):
    monkeypatch.setitem(ORIGINS, "cifar10", dataclasses.replace(ORIGINS["cifar10"], sha256={}))
    whole = (mirror / CIFAR_ARCHIVE).read_bytes()
    (mirror / CIFAR_ARCHIVE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="cannot be decoded"):
        fetch("cifar10", tmp_path, mirror.as_uri())


def test_a_failed_download_names_the_address_and_the_way_by_hand(tmp_path):
    with pytest.raises(DataError) as caught:
        fetch("cifar10", tmp_path, (tmp_path / "nothing").as_uri())
    for part in (
        "nothing/cifar-10-binary.tar.gz",
        "https://www.cs.toronto.edu/~kriz/",
        "mpicomp data fetch cifar10 --from FOLDER",
    ):
        assert part in str(caught.value)


def test_a_folder_that_cannot_be_made_is_named(mirror, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=r"cannot write .*--to"):
        fetch("tinyshakespeare", tmp_path / "file", mirror.as_uri())


@pytest.mark.parametrize(("kind", "recorded"), [("fashion_mnist", False), ("cifar10", True)])
def test_a_changed_pixel_is_found(kind, recorded, mirror, tmp_path):
    path = fetch(kind, tmp_path, mirror.as_uri())
    with h5py.File(path, "a") as file:
        file["test/images"][3, 4, 5] ^= 1
        if not recorded:
            del file["test"].attrs["images_sha256"]
    with pytest.raises(DataError, match=r"is damaged: the SHA-256 of test/images"):
        check(kind, tmp_path)


def test_pixels_without_a_known_hash_pass_and_are_reported(mirror, tmp_path):
    path = fetch("cifar10", tmp_path, mirror.as_uri())
    with h5py.File(path, "a") as file:
        for split in ("train", "test"):
            del file[split].attrs["images_sha256"]
    assert check("cifar10", tmp_path)["train/images"] is False
    assert check("cifar10", tmp_path)["train/labels"] is True


def test_a_changed_text_is_found(mirror, tmp_path):
    path = fetch("tinyshakespeare", tmp_path, mirror.as_uri())
    path.write_text("x" * 2100)
    with pytest.raises(DataError, match="SHA-256 is not that of the original"):
        check("tinyshakespeare", tmp_path)


def test_idx_files_of_any_dimension_are_read():
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    assert np.array_equal(read_idx(idx(array)), array)


def run(*arguments):
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def test_the_commands_fetch_check_and_list(mirror, tmp_path, monkeypatch):
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "data"))
    assert isinstance(run("check").exception, DataError)
    assert "missing; mpicomp data fetch cifar10" in run("ls").output
    fetched = run("fetch", "cifar10", "--from", mirror)
    assert fetched.exit_code == 0 and "hashes are right" in fetched.output
    assert "is there already" in run("fetch", "cifar10", "--from", mirror).output
    assert "cifar10: train/images: right" in run("check").output
    listed = run("ls").output
    assert "MB" in listed and "missing; mpicomp data fetch fashion_mnist" in listed


def test_a_damaged_file_is_fetched_again(mirror, tmp_path):
    (tmp_path / "tinyshakespeare.txt").write_text("damaged")
    assert run("fetch", "tinyshakespeare", "--to", tmp_path, "--from", mirror).exit_code == 0
    assert (tmp_path / "tinyshakespeare.txt").stat().st_size == 2100


@pytest.mark.skipif(not REAL, reason=f"{FOLDER_VARIABLE} is not set: no folder of real data")
@pytest.mark.parametrize("kind", ["fashion_mnist", "tinyshakespeare"])
def test_the_hashes_are_those_of_the_real_files(kind):
    assert all(check(kind, Path(REAL)).values())
