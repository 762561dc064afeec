import threading
from functools import partial

import pytest
import torch
from support.tmpfs import small_disk  # noqa: F401

from mpicomp.checkpoint import hdf5
from mpicomp.checkpoint.writer import Writer
from mpicomp.errors import CheckpointError


@pytest.fixture
def write():
    made = Writer()
    yield made
    made.close()


def to(path):
    return partial(hdf5.write, path, attributes={})


def test_the_state_may_change_while_it_is_written(tmp_path, write):
    may_begin = threading.Event()

    def slow(leaves):
        may_begin.wait(10)
        return hdf5.write(tmp_path / "a.h5", leaves, {})

    x = torch.ones(1000)
    write.copy({"x": x, "n": 3})
    write.start(slow)
    assert write.busy
    x.zero_()
    may_begin.set()
    assert hdf5.difference(tmp_path / "a.h5", write.wait()) is None
    assert not write.busy
    assert hdf5.read(tmp_path / "a.h5")["x"].eq(1).all()


def test_the_last_state_is_written_without_a_copy(tmp_path, write):
    x = torch.randn(1000)
    write.copy({"x": x})
    write.start(to(tmp_path / "a.h5"))
    first = write.wait()
    write.copy({"x": x}, in_place=True)
    write.start(to(tmp_path / "b.h5"))
    assert not write._copies
    assert write.wait() == first


def test_memory_is_kept_from_one_file_to_the_next(tmp_path, write):
    x = torch.randn(1000)
    write.copy({"x": x})
    write.start(to(tmp_path / "a.h5"))
    write.wait()
    memory = write._copies["x"].data_ptr()
    for other in (x + 1, torch.randn(1000)):
        write.copy({"x": other})
        write.start(to(tmp_path / "b.h5"))
        write.wait()
        assert write._copies["x"].data_ptr() == memory
    write.copy({"y": x})
    write.start(to(tmp_path / "c.h5"))
    assert isinstance(write.wait(), hdf5.Digest)
    assert set(write._copies) == {"y"}


def test_a_failure_is_returned_and_the_next_file_is_written(small_disk, write):  # noqa: F811
    write.copy({"x": torch.randn(2_000_000)})
    write.start(to(small_disk / "a.h5"))
    failure = write.wait()
    assert isinstance(failure, CheckpointError)
    assert "No space left on device" in str(failure)
    write.copy({"x": torch.randn(100)})
    write.start(to(small_disk / "b.h5"))
    assert isinstance(write.wait(), hdf5.Digest)


def test_a_failure_of_any_kind_is_returned(write):
    write.copy({"x": torch.ones(3)})
    write.start(lambda leaves: leaves["y"])
    failure = write.wait()
    assert isinstance(failure, CheckpointError)
    assert "the state cannot be written: KeyError: 'y'" in str(failure)
