"""The judge of the tests of staging is right about races and delays that are known."""

import numpy as np
import pytest
import torch
from support.simulated_gpu import SimulatedGpu


@pytest.fixture
def gpu():
    with SimulatedGpu() as gpu:
        yield gpu


def pinned(numel):
    return torch.empty(numel, dtype=torch.uint8, pin_memory=True)


def test_one_stream_orders_its_operations(gpu):
    x = torch.zeros(10)
    x += 1
    x.sum()
    assert gpu.accesses >= 4 and gpu.races == [] and gpu.ordered == 0


def test_two_streams_that_read_do_not_race(gpu):
    x = torch.zeros(10)
    side = gpu.Stream()
    side.wait_stream(gpu.current_stream())
    with gpu.stream(side):
        x.sum()
    x.sum()
    assert gpu.races == [] and gpu.ordered == 1


def test_two_streams_without_a_wait_race(gpu):
    x = torch.zeros(10)
    with gpu.stream(gpu.Stream()):
        x += 1
    assert len(gpu.races) == 1
    assert "the default stream" in gpu.races[0] and "side stream 1" in gpu.races[0]


def test_other_bytes_of_the_same_memory_do_not_race(gpu):
    x = torch.zeros(10)
    side = gpu.Stream()
    side.wait_stream(gpu.current_stream())
    x[:5] += 1
    with gpu.stream(side):
        x[5:] += 1
        assert gpu.races == []
        x[4:] += 1
    assert gpu.races


def test_an_event_covers_what_lies_ahead_of_it_and_not_what_comes_later(gpu):
    x, side, event = torch.zeros(10), gpu.Stream(), gpu.Event()
    event.record()
    side.wait_event(event)
    with gpu.stream(side):
        x.sum()
        assert gpu.races == []
    x += 1
    event.wait(side)
    with gpu.stream(side):
        x.sum()
    assert gpu.races


def test_the_host_must_wait_for_a_copy_and_gets_its_bytes_then(gpu):
    host, event = pinned(4), gpu.Event()
    host.copy_(torch.arange(4).byte(), non_blocking=True)
    array = host.numpy()
    assert np.array_equal(array, [0xFF] * 4)
    gpu.host_reads(array, "too early")
    assert len(gpu.races) == 1
    event.synchronize()  # of an event that was never recorded
    assert np.array_equal(array, [0xFF] * 4)
    event.record()
    event.synchronize()
    gpu.host_reads(array, "in time")
    assert len(gpu.races) == 1
    assert np.array_equal(array, range(4))


def test_a_copy_that_blocks_has_run(gpu):
    host = pinned(4)
    host.copy_(torch.arange(4).byte())
    gpu.host_reads(host.numpy(), "in time")
    assert gpu.races == [] and gpu.ordered == 1
    assert np.array_equal(host.numpy(), range(4))


def test_a_late_copy_reads_its_source_late(gpu):
    host = pinned(4)
    host.fill_(1)
    device = torch.zeros(4, dtype=torch.uint8)
    device.copy_(host, non_blocking=True)
    host.fill_(2)
    assert len(gpu.races) == 1
    assert device.tolist() == [2] * 4


def test_a_stream_that_waits_runs_what_it_waits_for(gpu):
    side, host = gpu.Stream(), pinned(4)
    x = torch.zeros(4, dtype=torch.uint8)
    x.copy_(torch.arange(4).byte(), non_blocking=True)
    for wait in (False, True):
        if wait:
            side.wait_stream(gpu.current_stream())
        with gpu.stream(side):
            host.copy_(x, non_blocking=True)
            event = gpu.Event()
            event.record(side)
        event.synchronize()
        assert host.numpy().tolist() == ([0, 1, 2, 3] if wait else [0xFF] * 4)


@pytest.mark.parametrize("read", [torch.Tensor.tolist, lambda x: x.clone().tolist(), lambda x: [i.item() for i in x]])
def test_whatever_reads_a_late_copy_sees_it(gpu, read):
    x = torch.zeros(4)
    x.copy_(torch.arange(4.0), non_blocking=True)
    assert read(x) == [0, 1, 2, 3]


def test_a_kernel_on_the_cpu_is_an_operation_of_the_stream(gpu):
    x = torch.zeros(4)
    x.copy_(torch.arange(4.0), non_blocking=True)
    assert np.array_equal(np.asarray(x), range(4))
    with gpu.stream(gpu.Stream()):
        x.numpy()
    assert gpu.races
