import hashlib
import math
import os
import resource
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from support.tmpfs import small_disk  # noqa: F401

from mpicomp.checkpoint import hdf5
from mpicomp.errors import CheckpointError

TENSORS = {
    **{
        str(dtype).removeprefix("torch."): torch.linspace(-3, 3, 1001).to(dtype)
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8)
    },
    "uint8": torch.arange(256, dtype=torch.uint8),
    "bool": torch.arange(10) % 3 == 0,
    "complex": torch.complex(torch.randn(5), torch.randn(5)),
    "matrix": torch.randn(17, 33),
    "wide": torch.randn(3, 400_000),
    "transposed": torch.randn(17, 33).T,
    "every_other": torch.randn(100)[::2],
    "scalar": torch.tensor(1.5),
    "half_scalar": torch.tensor(1.5, dtype=torch.bfloat16),
    "empty": torch.empty(0),
    "empty_rows": torch.empty(0, 3),
    "one": torch.tensor([7.0]),
    "not_finite": torch.tensor([math.nan, math.inf, -math.inf, -0.0]),
}
NUMBERS = {
    "int": 2**62,
    "negative": -3,
    "float": 0.1,
    "nan": math.nan,
    "inf": -math.inf,
    "true": True,
    "text": "ä\n",
    "nothing": "",
}
LEAVES = {f"tensors/{name}": leaf for name, leaf in TENSORS.items()} | {
    f"numbers/{name}": leaf for name, leaf in NUMBERS.items()
}


def same(one, other):
    if isinstance(one, torch.Tensor):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        bits = (tensor.reshape(-1).clone().view(torch.uint8) for tensor in (one, other))
        return one.numel() == 0 or torch.equal(*bits)
    return type(one) is type(other) and repr(one) == repr(other)


@pytest.mark.parametrize("name", LEAVES)
def test_every_leaf_comes_back_bit_for_bit(tmp_path, name):
    hdf5.write(tmp_path / "file.h5", {name: LEAVES[name]}, {})
    (found,) = hdf5.read(tmp_path / "file.h5").values()
    assert same(LEAVES[name], found)


def test_the_digest_is_that_of_the_file(tmp_path):
    file = tmp_path / "file.h5"
    digest = hdf5.write(file, LEAVES, {})
    assert digest == hdf5.Digest(file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest())


def test_the_same_leaves_give_the_same_bytes(tmp_path):
    assert hdf5.write(tmp_path / "a.h5", LEAVES, {}) == hdf5.write(tmp_path / "b.h5", LEAVES, {})


def test_plain_h5py_reads_it(tmp_path):
    hdf5.write(tmp_path / "file.h5", LEAVES, {"step": 7})
    with h5py.File(tmp_path / "file.h5") as file:
        assert dict(file.attrs) == {"format": "mpicomp checkpoint", "version": 1, "step": 7}
        assert np.array_equal(file["tensors/float32"][()], TENSORS["float32"].numpy())
        assert file["tensors/wide"].attrs["crc32"] == zlib.crc32(TENSORS["wide"].numpy())
        half = file["tensors/bfloat16"]
        assert (half.dtype, half.attrs["dtype"]) == (np.uint16, "bfloat16")
        assert file["numbers/int"][()] == 2**62
        assert file["numbers/text"].asstr()[()] == "ä\n"


def test_many_leaves_of_any_shape_are_written(tmp_path):
    leaves = {f"group_{number % 7}/tensor_{number}": torch.randn(number % 5, number) for number in range(300)}
    leaves |= {f"numbers/{number}": number for number in range(50)} | {"long": torch.randn(3_000_000)}
    file = tmp_path / "file.h5"
    digest = hdf5.write(file, leaves, {f"attribute {number}": "x" * 1000 for number in range(50)})
    assert digest == hdf5.Digest(file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest())
    found = hdf5.read(file)
    assert found.keys() == leaves.keys()
    assert all(same(leaf, found[name]) for name, leaf in leaves.items())
    assert file.stat().st_size < sum(leaf.nbytes for leaf in leaves.values() if torch.is_tensor(leaf)) + 300_000


def test_some_leaves_alone(tmp_path):
    hdf5.write(tmp_path / "file.h5", LEAVES, {})
    assert set(hdf5.read(tmp_path / "file.h5", names=["numbers/int", "tensors/one"])) == {
        "numbers/int",
        "tensors/one",
    }
    with pytest.raises(CheckpointError, match=r"file.h5: the dataset /tensors/none is damaged or missing"):
        hdf5.read(tmp_path / "file.h5", names=["tensors/none"])


def test_entries_show_shape_type_size_and_norm(tmp_path):
    hdf5.write(tmp_path / "file.h5", LEAVES, {})
    found = {entry.name: entry for entry in hdf5.entries(tmp_path / "file.h5")}
    assert found.keys() == LEAVES.keys()
    assert found["tensors/matrix"] == hdf5.Entry(
        "tensors/matrix", (17, 33), "float32", 17 * 33 * 4, float(TENSORS["matrix"].double().norm())
    )
    assert found["tensors/bfloat16"].dtype == "bfloat16"
    assert found["tensors/int64"].value is None
    assert found["numbers/float"].value == 0.1


def test_files_of_others_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"none.h5: there is no such file"):
        hdf5.read(tmp_path / "none.h5")
    (tmp_path / "text.h5").write_text("x" * 5000)
    with pytest.raises(CheckpointError, match=r"text.h5: is damaged, or no HDF5 file"):
        hdf5.read(tmp_path / "text.h5")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = 1
    with pytest.raises(CheckpointError, match=r"other.h5: is not a checkpoint of mpicomp"):
        hdf5.read(tmp_path / "other.h5")
    hdf5.write(tmp_path / "newer.h5", {"x": 1}, {})
    with h5py.File(tmp_path / "newer.h5", "r+") as file:
        file.attrs["version"] = 2
    with pytest.raises(CheckpointError, match=r"written by a newer mpicomp \(format version 2, this program reads 1\)"):
        hdf5.read(tmp_path / "newer.h5")


def test_a_full_disk_leaves_nothing_and_is_named(small_disk):  # noqa: F811
    descriptors = open_descriptors()
    for entries in (200_000, 262_000, 2_000_000):  # full in a chunk, at the end and long before it
        with pytest.raises(CheckpointError, match=r"file.h5: cannot be written: No space left on device"):
            hdf5.write(small_disk / "file.h5", {"x": torch.randn(entries), "y": torch.randn(100_000)}, {})
        assert list(small_disk.iterdir()) == []
        assert open_descriptors() == descriptors
    with pytest.raises(CheckpointError, match=r"file.h5: cannot be written: No space left on device"):
        hdf5.write(small_disk / "file.h5", {str(number): number for number in range(10_000)}, {})  # HDF5's own part
    assert list(small_disk.iterdir()) == []
    assert open_descriptors() == descriptors
    hdf5.write(small_disk / "file.h5", {"x": torch.randn(100)}, {})


@pytest.fixture
def file_limit():
    """Set the largest size of a file for a test (RLIMIT_FSIZE); Python ignores the signal that goes with it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda nbytes: resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("nbytes", [0, 100, 1000, 4000, 100_000, 500_000])
def test_a_limit_on_the_size_of_files_leaves_nothing_and_is_named(tmp_path, file_limit, nbytes):
    leaves = {"x": torch.randn(30_000), "y": torch.randn(100_000), "n": 3}
    file_limit(nbytes)
    with pytest.raises(CheckpointError, match=r"file.h5: cannot be written: File too large"):
        hdf5.write(tmp_path / "file.h5", leaves, {})
    with pytest.raises(CheckpointError, match=r"file.h5: cannot be written: File too large"):
        hdf5.write_group(tmp_path / "file.h5", "/rank_00000", leaves, {}, is_first=True, is_last=False)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fails_in_the_end_leaves_nothing(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(5, os.strerror(5))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(CheckpointError, match=r"file.h5: cannot be written: Input/output error"):
        hdf5.write(tmp_path / "file.h5", {"x": torch.randn(100)}, {})
    assert list(tmp_path.iterdir()) == []


def test_a_leaf_that_cannot_be_stored_is_named(tmp_path):
    for leaf in (2**70, "with a \0 in it", torch.zeros(3, dtype=torch.float8_e4m3fn)):
        with pytest.raises(CheckpointError, match=r"'algorithm/x' cannot be stored"):
            hdf5.write(tmp_path / "file.h5", {"algorithm/x": leaf}, {})
        assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"none/file.h5: cannot be written: No such file or directory"):
        hdf5.write(tmp_path / "none" / "file.h5", {"x": 1}, {})
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"file/file.h5: cannot be written: Not a directory"):
        hdf5.write(tmp_path / "file" / "file.h5", {"x": 1}, {})


def open_descriptors():
    return sorted(path.name for path in Path("/proc/self/fd").iterdir())
