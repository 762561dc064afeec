"""Host buffers between tensors and MPI: packed, reused from step to step, pinned and near the GPU where there is one.

On the CPU a payload is packed straight into the buffer that is sent, and read straight from the buffer that was
received. On a GPU it is packed on the device and crosses the bus in one copy each way. Buffers grow when a longer
layout comes by, and never shrink.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mpicomp.compression.message import Layout, Payload, Wire
from mpicomp.exchange.placement import cores_near, running_on

Bytes = np.ndarray


class Staging(Protocol):
    """The buffers of one exchange."""

    def pack(self, payload: Payload, layout: Layout) -> Bytes:
        """Return the packed `payload` in host memory, (used bytes,), ready to be sent."""

    def pack_each(self, payloads: Sequence[Payload], layout: Layout) -> list[Bytes]:
        """Return the packed `payloads`, each in host memory of its own."""

    def receive(self, count: int, layout: Layout) -> list[Bytes]:
        """Return `count` host buffers (layout.nbytes,) to receive into; they overwrite those of the last call."""

    def unpack(self, layout: Layout, sizes: Sequence[int]) -> list[Payload]:
        """Return the payloads in the first buffers given by `receive`, of which ``sizes[i]`` bytes were filled."""

    def load(self, data: Bytes, layout: Layout) -> Payload:
        """Return the payload packed in `data`, which nobody changes any more; it stays valid as long as it is held."""


def make_staging(device: torch.device) -> Staging:
    """Return the staging buffers for payloads on `device`."""
    if device.type == "cpu":
        return HostStaging()
    return DeviceStaging(device, cores=cores_near(str(torch.cuda.get_device_properties(device).uuid), Path("/")))


class _Buffers:
    """A list of uint8 vectors that grow when needed; pinned ones lie near `cores`."""

    def __init__(self, device: torch.device, is_pinned: bool = False, cores: AbstractSet[int] | None = None) -> None:
        self._device = device
        self._is_pinned = is_pinned
        self._cores = cores
        self._tensors: list[Tensor] = []

    def get(self, index: int, nbytes: int) -> Tensor:
        """Return the first `nbytes` bytes of buffer `index`."""
        while len(self._tensors) <= index:
            self._tensors.append(self._new(nbytes))
        if self._tensors[index].numel() < nbytes:
            self._tensors[index] = self._new(nbytes)
        return self._tensors[index][:nbytes]

    def _new(self, nbytes: int) -> Tensor:
        with running_on(self._cores):
            return torch.empty(nbytes, dtype=torch.uint8, device=self._device, pin_memory=self._is_pinned)


class HostStaging:
    """Payloads in host memory."""

    def __init__(self) -> None:
        self._sent = _Wires()
        self._received = _Wires()

    def pack(self, payload: Payload, layout: Layout) -> Bytes:
        """Pack into the first send buffer."""
        return self.pack_each([payload], layout)[0]

    def pack_each(self, payloads: Sequence[Payload], layout: Layout) -> list[Bytes]:
        """Pack into the send buffers."""
        wires = self._sent.get(len(payloads), layout)
        return [wire.pack(payload) for wire, payload in zip(wires, payloads, strict=True)]

    def receive(self, count: int, layout: Layout) -> list[Bytes]:
        """Return the receive buffers."""
        return [wire.array for wire in self._received.get(count, layout)]

    def unpack(self, layout: Layout, sizes: Sequence[int]) -> list[Payload]:
        """Return views of the receive buffers."""
        return [wire.unpack(nbytes) for wire, nbytes in zip(self._received.get(len(sizes), layout), sizes, strict=True)]

    def load(self, data: Bytes, layout: Layout) -> Payload:
        """Return views of `data`."""
        return layout.unpack(torch.from_numpy(data))


class _Wires:
    """Buffers in host memory, made ready for one layout at a time."""

    def __init__(self) -> None:
        self._buffers = _Buffers(torch.device("cpu"))
        self._layout: Layout | None = None
        self._wires: list[Wire] = []

    def get(self, count: int, layout: Layout) -> list[Wire]:
        """Return the first `count` buffers, ready for `layout`."""
        if layout is not self._layout:
            self._layout, self._wires = layout, []
        while len(self._wires) < count:
            self._wires.append(Wire(layout, self._buffers.get(len(self._wires), layout.nbytes)))
        return self._wires[:count]


class DeviceStaging:
    """Payloads on an accelerator, sent from and received in pinned host memory.

    Everything is ordered after what the current stream does, whichever that is when a method is called:

        pack      reads the payload after all earlier work of the current stream, and is done with it when it returns
        unpack    fills the payloads on the current stream, and later work of that stream sees them
        load      as unpack

    Work on a payload in another stream is the caller's to order. If `other` writes what is sent, then
    ``current.wait_stream(other)`` before `pack`. If `other` reads what was received, then
    ``other.wait_stream(current)`` after `unpack`, and ``current.wait_stream(other)`` before the next exchange, which
    fills the same memory.

    Args:
        device: where the payloads are.
        streams: makes and finds streams and events as ``torch.cuda`` does; that of the type of `device` if None.
        cores: those on the GPU's side of the machine, near which the host buffers are to lie; None if not known.

    """

    def __init__(self, device: torch.device, streams: Any = None, cores: AbstractSet[int] | None = None) -> None:
        host = torch.device("cpu")
        self._device = device
        self._streams = getattr(torch, device.type) if streams is None else streams
        self._sent = _Buffers(device)
        self._sent_host = _Buffers(host, is_pinned=True, cores=cores)
        self._received = _Buffers(device)
        self._received_host = _Buffers(host, is_pinned=True, cores=cores)
        self._side = self._streams.Stream(device)
        # Blocking events sleep; the default ones would spin on a core that another rank may need. `torch.Event` takes
        # `blocking` and ignores it, so streams and events are those of the device's module.
        self._is_sent = self._streams.Event(blocking=True)
        self._is_received = self._streams.Event(blocking=True)

    def pack(self, payload: Payload, layout: Layout) -> Bytes:
        """Pack on the device, copy to the host on a side stream, and wait for that copy only.

        Raises:
            DivergenceError: a NaN or an infinity among what was compressed, which the device alone knew of.

        """
        return self.pack_each([payload], layout)[0]

    def pack_each(self, payloads: Sequence[Payload], layout: Layout) -> list[Bytes]:
        """Pack all on the device, and wait once; otherwise as `pack`."""
        wires, hosts = [], []
        for i, payload in enumerate(payloads):
            wire = self._sent.get(i, layout.nbytes)
            nbytes = layout.pack(payload, wire)
            wires.append(wire[:nbytes])
            hosts.append(self._sent_host.get(i, layout.nbytes)[:nbytes])
        self._side.wait_stream(self._streams.current_stream(self._device))
        with self._streams.stream(self._side):
            for host, wire in zip(hosts, wires, strict=True):
                host.copy_(wire, non_blocking=True)
        self._is_sent.record(self._side)
        self._is_sent.synchronize()
        return [_bytes(host[: layout.finish(host)]) for host in hosts]

    def receive(self, count: int, layout: Layout) -> list[Bytes]:
        """Return the pinned receive buffers, once the last messages in them have reached the device."""
        self._is_received.synchronize()
        return [_bytes(self._received_host.get(i, layout.nbytes)) for i in range(count)]

    def unpack(self, layout: Layout, sizes: Sequence[int]) -> list[Payload]:
        """Copy to the device on the current stream, which is where the payloads are read next.

        Raises:
            IndexError: indices are damaged, which the device alone would know when it reads them.

        """
        payloads = []
        for i, nbytes in enumerate(sizes):
            host = self._received_host.get(i, nbytes)
            wire = self._received.get(i, nbytes)
            wire.copy_(host, non_blocking=True)
            payloads.append(_like(layout, host, wire))
        self._is_received.record(self._streams.current_stream(self._device))
        return payloads

    def load(self, data: Bytes, layout: Layout) -> Payload:
        """Copy to new memory of the device on the current stream, without waiting for it."""
        host = torch.empty(data.size, dtype=torch.uint8, pin_memory=True)  # torch gives it to others after the copy
        _bytes(host)[:] = data
        wire = torch.empty(data.size, dtype=torch.uint8, device=self._device)
        wire.copy_(host, non_blocking=True)
        return _like(layout, host, wire)


def _like(layout: Layout, host: Tensor, wire: Tensor) -> Payload:
    """Return the payload in `wire`, a copy of `host`, from which counts and codes are read without a device sync."""
    payload = layout.unpack(host)
    layout.check_codes(payload)
    for field in layout.fields:
        view = payload[field.name]
        begin = view.data_ptr() - host.data_ptr() if view.numel() else 0
        there = wire[begin : begin + view.numel() * view.element_size()].view(view.dtype)
        payload[field.name] = view.clone() if field.on_host else there
    return payload


def _bytes(host: Tensor) -> Bytes:
    array: Bytes = host.numpy()
    return array
