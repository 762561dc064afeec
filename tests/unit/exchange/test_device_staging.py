"""The order of copies, waits and messages between a GPU and MPI, on a GPU that is simulated."""

import inspect

import pytest
import torch
from support.simulated_gpu import SimulatedGpu, WatchedStaging

from mpicomp.compression.message import Field, Layout, Spec
from mpicomp.compression.topk import TopK
from mpicomp.exchange.staging import HostStaging

COUNTS = [(3, 9), (0, 2), (60, 50), (7,), (), (200, 1), (200, 200)]
"""Entries of the messages from each source, by exchange: they grow, shrink, are empty, and are none."""


def layout_of(longest):
    """Return a layout without gaps, whose bytes would be those of chance."""
    fields = ("index", torch.int32, longest, True), ("sign", torch.uint8, 8), ("value", torch.float32, longest, True)
    return Layout(tuple(Field(*field) for field in fields))


def payload(count, seed):
    return {
        "index": torch.arange(count, dtype=torch.int32) + seed,
        "sign": torch.full((8,), seed, dtype=torch.uint8),
        "value": torch.linspace(seed, seed + 1, count),
    }


def messages(step, layout):
    """Return the messages of an exchange as they arrive, made on the host."""
    wires = []
    for source, count in enumerate(COUNTS[step]):
        wire = torch.empty(layout.nbytes, dtype=torch.uint8)
        wires.append(wire[: layout.pack(payload(count, 10 * step + source), wire)].numpy())
    return wires


def late_copy(tensor):
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor, non_blocking=True)


def exchanges(staging, arriving, is_read_late):
    """Send and receive as an exchange does; return the messages as they were sent, the payloads as they were read."""
    sent, read = [], []
    for step, counts in enumerate(COUNTS):
        layout = layout_of(max(counts, default=1))
        buffers = staging.receive(len(counts), layout)
        if step != 2:  # a rank without targets
            message = payload(max(counts, default=1), step)
            sent.append(staging.pack(message, layout).copy())
            for tensor in message.values():
                tensor.zero_()
        for buffer, wire in zip(buffers, arriving[step], strict=True):
            buffer[: wire.size] = wire
        received = staging.unpack(layout, [wire.size for wire in arriving[step]])
        # Read late, payloads are on their way to the device when their buffers are received into again.
        read += [{name: late_copy(t) if is_read_late else t.clone() for name, t in m.items()} for m in received]
    staging.receive(2, layout_of(10))
    return sent, read


def simulate(**options):
    """Return the simulated GPU after two series of exchanges, and whether all bytes were those of the host."""
    arriving = [messages(step, layout_of(max(counts, default=1))) for step, counts in enumerate(COUNTS)]
    with SimulatedGpu(**options) as gpu:
        staging = WatchedStaging(gpu)
        found = [exchanges(staging, arriving, is_read_late) for is_read_late in (False, True)]
        gpu.synchronize()
    expected = [exchanges(HostStaging(), arriving, is_read_late) for is_read_late in (False, True)]
    return gpu, bytes_of(found) == bytes_of(expected)


def bytes_of(runs):
    return [
        (
            [wire.tobytes() for wire in sent],
            [{name: tensor.numpy().tobytes() for name, tensor in message.items()} for message in read],
        )
        for sent, read in runs
    ]


SITES = simulate()[0].sites


@pytest.mark.parametrize("is_late", [False, True])
def test_everything_is_ordered_and_arrives(is_late):
    gpu, are_same = simulate(is_late=is_late)
    assert gpu.races == []
    assert are_same
    assert gpu.accesses > 500 and gpu.ordered > 300
    assert (gpu.delayed > 100) == is_late
    assert gpu.are_blocking == [True, True]


def test_a_damaged_code_is_refused_as_it_arrives():
    """Only the device would know later, and nobody would wait for it to say so."""
    compressor, spec = TopK(0.1), Spec.flat(1000)
    layout = compressor.layout(spec)
    wire = torch.zeros(layout.nbytes, dtype=torch.uint8)
    wire = wire[: layout.pack(compressor.compress(torch.arange(1000.0), spec, None), wire)]
    with SimulatedGpu() as gpu:
        staging = WatchedStaging(gpu)
        staging.load(wire.numpy(), layout)
        wire[-1] ^= 255
        with pytest.raises(IndexError, match="damaged"):
            staging.load(wire.numpy(), layout)
        (buffer,) = staging.receive(1, layout)
        buffer[: len(wire)] = wire.numpy()
        with pytest.raises(IndexError, match="damaged"):
            staging.unpack(layout, [len(wire)])


def test_the_sites_are_known():
    """The mutants below are made from what was called: should a call escape, this says so."""
    assert [site.split(", ")[0] + site.split(":")[1] for site in SITES] == [
        "receive synchronize",
        "pack_each wait_stream",
        "pack_each stream",
        "pack_each record",
        "pack_each synchronize",
        "unpack record",
    ]


@pytest.mark.parametrize("site", SITES)
def test_without_a_wait_there_is_a_race(site):
    gpu, _ = simulate(is_late=False, left_out=site)
    assert gpu.races


class EventTooEarly(WatchedStaging):
    """A mutant: `pack` waits for an event that lies ahead of the copy."""

    def pack(self, payload, layout):
        self._is_sent.record(self._side)
        self._is_sent.record = lambda stream: None
        return super().pack(payload, layout)


class EventInAnotherStream(WatchedStaging):
    """A mutant: `unpack` records its event in a stream that does not copy."""

    def unpack(self, layout, sizes):
        payloads = super().unpack(layout, sizes)
        self._is_received.record(self._side)
        return payloads


@pytest.mark.parametrize("mutant", [EventTooEarly, EventInAnotherStream])
def test_an_event_in_the_wrong_place_is_a_race(mutant):
    arriving = [messages(step, layout_of(max(counts, default=1))) for step, counts in enumerate(COUNTS)]
    with SimulatedGpu(is_late=False) as gpu:
        exchanges(mutant(gpu), arriving, is_read_late=False)
    assert gpu.races


def test_torch_has_what_is_simulated():
    for name in ("Stream", "Event", "current_stream", "stream"):
        assert inspect.signature(getattr(torch.cuda, name)).parameters.keys() >= set(
            inspect.signature(getattr(SimulatedGpu, name)).parameters
        ) - {"self"}
    for name in ("record", "synchronize"):
        assert callable(getattr(torch.cuda.Event, name))
    assert callable(torch.cuda.Stream.wait_stream)


def test_reading_on_another_stream_needs_both_waits():
    for waits in range(4):
        with SimulatedGpu(is_late=False) as gpu:
            staging, other = WatchedStaging(gpu), gpu.Stream()
            for _ in range(2):
                layout = layout_of(3)
                (buffer,) = staging.receive(1, layout)
                wire = torch.empty(layout.nbytes, dtype=torch.uint8)
                layout.pack(payload(3, 0), wire)
                buffer[:] = wire.numpy()
                (received,) = staging.unpack(layout, [layout.nbytes])
                if waits & 1:
                    other.wait_stream(gpu.current_stream())
                with gpu.stream(other):
                    received["value"].sum()
                if waits & 2:
                    gpu.current_stream().wait_stream(other)
        assert bool(gpu.races) == (waits != 3)


@pytest.mark.parametrize("site", SITES)
def test_without_a_wait_a_late_copy_spoils_the_bytes(site):
    _, are_same = simulate(left_out=site)
    assert not are_same
