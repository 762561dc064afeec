import hashlib
import math

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpicomp.checkpoint import hdf5, layout
from mpicomp.checkpoint.fletcher import fletcher32


def checksum_of_hdf5(path, values):
    """Let HDF5 write one chunk, and return the checksum behind it."""
    with h5py.File(path, "w") as file:
        dataset = file.create_dataset("x", data=values, chunks=values.shape, fletcher32=True)
        return dataset.id.read_direct_chunk((0,))[1][-4:]


@pytest.mark.parametrize("nbytes", [1, 2, 3, 718, 720, 721, 2047, 2048, 2049, 100_001, 2**20])
@pytest.mark.parametrize("kind", ["zeros", "ones", "random", "last"])
def test_the_checksum_is_that_of_hdf5(tmp_path, nbytes, kind):
    values = {
        "zeros": np.zeros(nbytes, np.uint8),
        "ones": np.full(nbytes, 255, np.uint8),  # every sum is a multiple of 65535
        "random": np.random.default_rng(nbytes).integers(0, 256, nbytes, np.uint8),
        "last": np.arange(nbytes) == nbytes - 1,
    }[kind].view(np.uint8)
    assert fletcher32(values.data) == checksum_of_hdf5(tmp_path / "x.h5", values)


def test_padding_counts_as_zeros():
    data = np.arange(1, 100, dtype=np.uint8)
    for padding in (1, 2, 5, 3000):
        assert fletcher32(data.data, padding) == fletcher32(np.append(data, np.zeros(padding, np.uint8)).data)


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 7), min_size=1, max_size=4).map(tuple),
    st.sampled_from([torch.uint8, torch.bfloat16, torch.float32, torch.float64]),
    st.sampled_from([8, 24, 64, 2**20]),
)
def test_any_shape_can_be_divided_into_chunks(tmp_path_factory, shape, dtype, chunk_nbytes):
    path = tmp_path_factory.mktemp("layout") / "x.h5"
    x = torch.arange(math.prod(shape)).to(dtype).reshape(shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "CHUNK_NBYTES", chunk_nbytes)
        digest = hdf5.write(path, {"x": x}, {})
    assert digest.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    with h5py.File(path) as file:
        assert math.prod(file["x"].chunks) * file["x"].dtype.itemsize <= chunk_nbytes
        assert np.array_equal(file["x"][()], layout.stored(x))  # HDF5 verifies its checksums
    assert torch.equal(hdf5.read(path, digest)["x"], x)


def test_many_chunks_and_datasets_are_laid_out(tmp_path, monkeypatch):
    monkeypatch.setattr(layout, "CHUNK_NBYTES", 64)
    leaves = {f"group_{number % 7}/tensor_{number}": torch.randn(number) for number in range(300)}
    leaves["long"] = torch.randn(50_000)
    digest = hdf5.write(tmp_path / "x.h5", leaves, {f"attribute {number}": "x" * 1000 for number in range(50)})
    found = hdf5.read(tmp_path / "x.h5", digest)
    assert found.keys() == leaves.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in leaves.items())


def test_tensors_are_not_copied():
    x = torch.zeros(3, 400_000)
    memory = layout.lay_out({"x": x}, {})
    x.fill_(1)
    chunks = [part for part in memory.parts() if isinstance(part, layout.Chunk)]
    assert b"".join(chunk.values for chunk in chunks) == x.numpy().tobytes()


def test_a_header_of_the_size_of_a_chunk_is_not_taken_for_it():
    memory = layout.FileInMemory()
    chunk = layout.Chunk(memoryview(bytes(range(60))), padding=0)
    memory.expect(chunk)
    header = b"OHDR".ljust(chunk.nbytes, b"\0")
    memory.write(header)
    with pytest.raises(AssertionError, match="has not written the last chunk"):
        memory.check_complete()
    memory.write(layout.placeholder(chunk.nbytes))
    memory.check_complete()
    assert memory.chunks == {len(header): chunk}
    assert b"".join(part for part in memory.parts() if isinstance(part, bytes)) == header
