"""Wire buffers in host memory."""

import numpy as np
import torch

from mpicomp.compression.message import Field, Layout
from mpicomp.exchange.staging import HostStaging, make_staging

LAYOUT = Layout((Field("index", torch.int16, 9, True), Field("value", torch.float32, 9, True)))


def of_bytes(nbytes):
    return Layout((Field("x", torch.uint8, nbytes),))


def payload(count):
    return {"index": torch.arange(count, dtype=torch.int16), "value": torch.linspace(0, 1, count)}


def deliver(staging, wires, layout):
    """Copy `wires` into the receive buffers, as MPI would, and return what arrives."""
    for buffer, wire in zip(staging.receive(len(wires), layout), wires, strict=True):
        buffer[: wire.size] = wire
    return staging.unpack(layout, [wire.size for wire in wires])


def test_the_host_needs_no_device_buffers():
    assert isinstance(make_staging(torch.device("cpu")), HostStaging)


def test_only_the_used_bytes_are_sent():
    staging = HostStaging()
    for count in (0, 1, 4, 9):
        wire = staging.pack(payload(count), LAYOUT)
        assert wire.dtype == np.uint8
        assert wire.nbytes == LAYOUT.nbytes_of(payload(count)) <= LAYOUT.nbytes


def test_what_is_packed_is_unpacked():
    staging = HostStaging()
    wires = [staging.pack(payload(count), LAYOUT).copy() for count in (3, 9, 0)]
    for count, received in zip((3, 9, 0), deliver(staging, wires, LAYOUT), strict=True):
        assert all(torch.equal(received[name], tensor) for name, tensor in payload(count).items())


def test_buffers_are_kept_and_grow():
    staging = HostStaging()
    first = staging.pack(payload(2), LAYOUT)
    second = staging.pack(payload(9), LAYOUT)
    assert first.ctypes.data == second.ctypes.data
    small = [buffer.ctypes.data for buffer in staging.receive(2, of_bytes(100))]
    assert [buffer.ctypes.data for buffer in staging.receive(3, of_bytes(50))][:2] == small
    assert [buffer.nbytes for buffer in staging.receive(3, of_bytes(1000))] == [1000] * 3


def test_received_payloads_are_views_of_the_buffers():
    staging = HostStaging()
    (buffer,) = staging.receive(1, LAYOUT)
    (received,) = deliver(staging, [staging.pack(payload(9), LAYOUT).copy()], LAYOUT)
    begin = buffer.ctypes.data
    assert all(begin <= tensor.data_ptr() < begin + buffer.nbytes for tensor in received.values())
