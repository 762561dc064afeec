"""Pinned staging: a payload on the GPU crosses to the host and back unchanged, and only when it must."""

import pytest
import torch

from mpicomp.compression.message import Field, Layout
from mpicomp.exchange import loopback
from mpicomp.exchange.staging import DeviceStaging, HostStaging, make_staging
from mpicomp.topology import ring

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device that torch can use"),
]

LAYOUT = Layout(
    (Field("index", torch.int16, 999, True), Field("sign", torch.uint8, 13), Field("value", torch.float32, 999, True))
)


@pytest.fixture
def device():
    return torch.device("cuda", torch.cuda.current_device())


def payload(count, device, seed=0):
    return {
        "index": torch.arange(count, dtype=torch.int16, device=device),
        "sign": torch.full((13,), seed, dtype=torch.uint8, device=device),
        "value": torch.linspace(seed, seed + 1, count, device=device),
    }


def deliver(staging, wires, layout):
    for buffer, wire in zip(staging.receive(len(wires), layout), wires, strict=True):
        buffer[: wire.size] = wire
    return staging.unpack(layout, [wire.size for wire in wires])


def test_the_gpu_gets_pinned_staging(device):
    staging = make_staging(device)
    assert isinstance(staging, DeviceStaging)
    wire = torch.from_numpy(staging.pack(payload(5, device), LAYOUT))
    assert wire.is_pinned()
    assert all(torch.from_numpy(buffer).is_pinned() for buffer in staging.receive(2, LAYOUT))


@pytest.mark.parametrize("count", [0, 1, 500, 999])
def test_the_bytes_are_those_of_the_host(device, count):
    on_gpu = DeviceStaging(device).pack(payload(count, device), LAYOUT)
    on_host = HostStaging().pack(payload(count, "cpu"), LAYOUT)
    assert on_gpu.size == on_host.size == LAYOUT.nbytes_of(payload(count, "cpu"))
    for name, tensor in LAYOUT.unpack(torch.from_numpy(on_gpu)).items():
        assert torch.equal(tensor, payload(count, device)[name].cpu())


def test_there_and_back(device):
    staging = DeviceStaging(device)
    for step in range(20):
        counts = [(7 * step + 31 * i) % 1000 for i in range(3)]
        wires = [staging.pack(payload(count, device, i), LAYOUT).copy() for i, count in enumerate(counts)]
        received = deliver(staging, wires, LAYOUT)
        for i, count in enumerate(counts):
            for name, tensor in payload(count, device, i).items():
                assert received[i][name].device == device
                assert torch.equal(received[i][name], tensor)


def test_work_before_packing_is_waited_for_and_changes_after_it_are_not_sent(device):
    layout = Layout((Field("x", torch.float32, 1_000_000),))
    staging = DeviceStaging(device)
    big = torch.randn(4000, 4000, device=device)
    for step in range(5):
        x = (big @ big)[0, 0] * 0 + torch.full((1_000_000,), float(step), device=device)
        wire = staging.pack({"x": x}, layout)
        x.fill_(-1)
        assert torch.equal(torch.from_numpy(wire).view(torch.float32), torch.full((1_000_000,), float(step)))


def test_receive_buffers_are_not_overwritten_before_they_have_reached_the_device(device):
    layout = Layout((Field("x", torch.float32, 1_000_000),))
    staging = DeviceStaging(device)
    total = torch.zeros(1_000_000, device=device)
    big = torch.randn(4000, 4000, device=device)
    for step in range(20):
        (buffer,) = staging.receive(1, layout)
        buffer.view("float32")[:] = step
        _ = big @ big  # keeps the stream busy, so that the copy to the device is late
        (received,) = staging.unpack(layout, [layout.nbytes])
        total += received["x"]
    assert torch.equal(total.cpu(), torch.full((1_000_000,), float(sum(range(20)))))


def test_loopback_on_the_gpu(device):
    def function(world):
        topology = ring(world.size)
        exchange = world.exchange(topology)
        total = 0.0
        for step in range(5):
            received = exchange.start(payload(100, world.device, world.rank + step), LAYOUT, topology).wait()
            total += sum(float(message["value"][0]) for message in received.values())
        x = torch.full((10,), float(world.rank), device=world.device)
        world.mean_(x)
        return total, float(x[0]), exchange.bytes_sent

    on_gpu, on_host = (loopback.run(4, function, device=where) for where in (device, "cpu"))
    assert on_gpu == on_host
