import threading

import pytest
import torch
from support.tmpfs import small_disk  # noqa: F401

from mpicomp.checkpoint import hdf5, writer
from mpicomp.checkpoint.writer import Writer
from mpicomp.errors import CheckpointError


@pytest.fixture
def write():
    made = Writer()
    yield made
    made.close()


def test_the_state_may_change_while_it_is_written(tmp_path, write, monkeypatch):
    may_begin = threading.Event()

    def slow(*arguments):
        may_begin.wait(10)
        return hdf5.write(*arguments)

    monkeypatch.setattr(writer, "write", slow)
    x = torch.ones(1000)
    write.start(tmp_path / "a.h5", {"x": x, "n": 3}, {})
    assert write.busy
    x.zero_()
    may_begin.set()
    digest = write.wait()
    assert not write.busy
    assert hdf5.read(tmp_path / "a.h5", digest)["x"].eq(1).all()


def test_the_last_state_is_written_without_a_copy(tmp_path, write):
    x = torch.randn(1000)
    write.start(tmp_path / "a.h5", {"x": x}, {})
    first = write.wait()
    write.start(tmp_path / "b.h5", {"x": x}, {}, in_place=True)
    assert not write._copies
    assert write.wait() == first


def test_memory_is_kept_from_one_file_to_the_next(tmp_path, write):
    x = torch.randn(1000)
    write.start(tmp_path / "a.h5", {"x": x}, {})
    write.wait()
    memory = write._copies["x"].data_ptr()
    for other in (x + 1, torch.randn(1000)):
        write.start(tmp_path / "b.h5", {"x": other}, {})
        write.wait()
        assert write._copies["x"].data_ptr() == memory
    write.start(tmp_path / "c.h5", {"y": x}, {})
    assert isinstance(write.wait(), hdf5.Digest)
    assert set(write._copies) == {"y"}


def test_a_failure_is_returned_and_the_next_file_is_written(small_disk, write):  # noqa: F811
    write.start(small_disk / "a.h5", {"x": torch.randn(2_000_000)}, {})
    failure = write.wait()
    assert isinstance(failure, CheckpointError)
    assert "No space left on device" in str(failure)
    write.start(small_disk / "b.h5", {"x": torch.randn(100)}, {})
    assert isinstance(write.wait(), hdf5.Digest)
