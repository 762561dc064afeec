"""Tensors in host memory that say they are on a GPU: training runs as there, and what it asks of the GPU is counted.

All values are real, so that a step that reads one goes on as it would; the kernels run in Triton's interpreter, and an
operation on tensors of two devices is refused. FakeTensorMode has no values, and cannot index a tensor of a GPU where
torch is built without CUDA.

The host waits for a GPU when it reads a value, when it copies to memory of its own, and when it copies from memory that
is not pinned. Operations whose result has a length that only the device knows wait, too.

To Python these tensors are on ``cuda:0``. To torch's C++ they are on the device ``meta``, or its autograd engine would
ask for streams of a GPU, which a torch without CUDA does not have.
"""

import sys
import threading
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

import mpicomp
from mpicomp.exchange.mailbox.slots import SlotMailbox
from mpicomp.exchange.staging import DeviceStaging, HostStaging
from mpicomp.kernels import reference

CUDA = torch.device("cuda", 0)
_PACKAGE = Path(mpicomp.__file__).parent
_READS = {"item", "tolist", "cpu", "numpy", "equal", "__float__", "__int__", "__bool__", "__index__", "__contains__"}
_LENGTHS = {"nonzero", "masked_select", "repeat_interleave", "_unique2", "unique_dim", "bincount"}
_VIEWS = {"view", "slice", "select", "split", "split_with_sizes", "unbind", "detach", "alias", "as_strided", "expand"}
_VIEWS |= {"t", "transpose", "permute", "unsqueeze", "squeeze", "empty", "new_empty", "empty_like", "unfold"}
_VIEWS |= {"_unsafe_view", "empty_strided", "new_empty_strided", "_reshape_alias"}
_PLACE = {
    torch.Tensor.device.__get__: CUDA,
    torch.Tensor.is_cuda.__get__: True,
    torch.Tensor.is_cpu.__get__: False,
    torch.Tensor.is_meta.__get__: False,
}
_now = threading.local()
_interpreter = threading.Lock()


class StandIn(torch.Tensor):
    """A tensor that says it is on a GPU. Its storage is on the host; views share it, and so does ``p.data = x``."""

    @staticmethod
    def __new__(cls, plain):
        return torch.Tensor._make_subclass(
            cls, plain.detach(), False, dispatch_device=True, device_for_backend_keys=CUDA
        )

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if (seen := _PLACE.get(function)) is not None:
                return seen
            name = function.__name__
            if name in _READS:
                _now.device.wait(name)
                return function(*_to_host(args), **_to_host(kwargs))
            if name in _LENGTHS:
                _now.device.wait(name)
                return tree_map_only(torch.Tensor, StandIn, function(*_to_host(args), **_to_host(kwargs)))
            if name in ("__getitem__", "__setitem__"):  # C++ asks for a device guard, which is not there
                return _index(function, args)
            if name == "to":
                return _convert(args, kwargs)
            if name == "copy_":  # as above
                return _copy(*args, **kwargs)
            return function(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.prim.device.default:
            return torch.device("meta")
        name = function.overloadpacket.__name__
        plain = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and not isinstance(t, StandIn)]
        if any(t.dim() for t in plain):
            raise RuntimeError(f"{function} mixes tensors of the host and of the GPU")
        if name in _LENGTHS or name == "_local_scalar_dense" or (name in ("index", "index_put_") and _has_mask(args)):
            _now.device.wait(name)
        if name not in _VIEWS:
            _now.device.operations += 1
        kwargs = {key: value for key, value in (kwargs or {}).items() if key != "device"}
        call = reference.sqrt if name == "sqrt" else function  # a GPU rounds it correctly, torch's on the CPU may not
        found = call(*_to_host(args), **_to_host(kwargs))
        if name == "_local_scalar_dense":
            return found
        if function._schema.is_mutable:
            return kwargs.get("out", args[0])
        return tree_map_only(torch.Tensor, StandIn, found)


class Device(TorchFunctionMode):
    """Makes tensors on the GPU, and counts, in one thread.

    Attributes:
        waits: the number of times the host waited, by the function that had it wait.
        launches: of the kernels of this package.
        operations: of torch, views left out.

    """

    def __init__(self):
        super().__init__()
        self.reset()

    def reset(self):
        self.waits, self.launches, self.operations = Counter(), 0, 0

    def wait(self, why):
        """Count that the host waits, for the innermost function of the package."""
        frame = sys._getframe(1)
        while frame is not None and not frame.f_code.co_filename.startswith(str(_PACKAGE)):
            frame = frame.f_back
        where = "outside" if frame is None else Path(frame.f_code.co_filename).relative_to(_PACKAGE).with_suffix("")
        self.waits[f"{where}:{frame.f_code.co_qualname if frame else why}"] += 1

    def __enter__(self):
        _now.device = self
        return super().__enter__()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        kwargs.pop("pin_memory", None)
        device = kwargs.get("device")
        name = getattr(function, "__name__", "")
        on_host = not any(isinstance(leaf, StandIn) for leaf in tree_leaves((args, kwargs)))
        if on_host and name == "to" and CUDA in args:
            self.wait(name)
            return StandIn(args[0].clone())
        if device is not None and torch.device(device).type == "cuda" and on_host:
            del kwargs["device"]
            if name in ("tensor", "as_tensor", "to"):
                self.wait(name)
            self.operations += name != "empty"
            return StandIn(function(*args, **kwargs))
        return function(*args, **kwargs)


def host(x):
    """Return the tensor in host memory that shares the storage of a stand-in."""
    with torch._C.DisableTorchFunctionSubclass(), torch._C._DisableTorchDispatch():
        storage, offset, shape, stride = x.untyped_storage(), x.storage_offset(), x.shape, x.stride()
    return torch.empty(0, dtype=x.dtype).set_(storage, offset, shape, stride)


def _to_host(tree):
    return tree_map_only(StandIn, host, tree)


def _has_mask(args):
    return any(isinstance(t, torch.Tensor) and t.dtype == torch.bool for t in tree_leaves(args[1:2]))


def _index(function, args):
    if any(isinstance(t, torch.Tensor) and not isinstance(t, StandIn) and t.dim() for t in tree_leaves(args[1:])):
        raise RuntimeError("an index of the host for a tensor of the GPU, or a value")
    if _has_mask(args):
        _now.device.wait("index")
    found = function(*_to_host(args))
    _now.device.operations += found is None or any(isinstance(t, torch.Tensor) for t in tree_leaves(args[1:2]))
    return None if found is None else StandIn(found)


def _convert(args, kwargs):
    x, *to = args
    if any((isinstance(t, torch.device) and t.type == "cpu") or t == "cpu" for t in (*to, *kwargs.values())):
        _now.device.wait("to")
        return host(x).clone()
    to = [t.dtype if isinstance(t, torch.Tensor) else t for t in to if not isinstance(t, torch.device)]
    kwargs = {key: value for key, value in kwargs.items() if key != "device"}
    if not to and not kwargs:
        return x
    _now.device.operations += 1
    return StandIn(host(x).to(*to, **kwargs))


def _copy(x, other, non_blocking=False):
    if isinstance(x, StandIn) != isinstance(other, StandIn) and not non_blocking:
        _now.device.wait("copy_")
    _now.device.operations += 1
    host(x).copy_(host(other) if isinstance(other, StandIn) else other) if isinstance(x, StandIn) else x.copy_(
        host(other)
    )
    return x


def launch(kernel, programs, *args, **constants):
    """Run a kernel in Triton's interpreter, in the place of `compiled.launch`; one thread at a time, as it needs."""
    if programs:
        _now.device.launches += 1
        with _interpreter, torch._C.DisableTorchFunctionSubclass():
            kernel[(programs,)](*_to_host(args), **constants)


def move_(model):
    """Move the parameters and buffers of a model to the stand-in, before its optimizer is made."""
    for module in model.modules():
        for name, p in module._parameters.items():
            module._parameters[name] = None if p is None else nn.Parameter(StandIn(p.detach()))
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else StandIn(buffer)


def synchronize(device):
    """Wait, in the place of ``torch.cuda.synchronize``."""
    _now.device.wait("synchronize")


class Streams:
    """What `DeviceStaging` asks of ``torch.cuda``; a wait for an event is a wait of the host."""

    class Stream:
        def __init__(self, device):
            pass

        def wait_stream(self, stream):
            pass

    class Event:
        def __init__(self, blocking=False):
            self.is_recorded = False

        def record(self, stream):
            self.is_recorded = True

        def synchronize(self):
            if self.is_recorded:
                _now.device.wait("synchronize")

    @staticmethod
    def current_stream(device):
        return None

    @staticmethod
    def stream(stream):
        return nullcontext()


def make_staging(device):
    """Return staging buffers, in the place of `staging.make_staging`."""
    return DeviceStaging(device, Streams) if device == CUDA else HostStaging()


class StagedExchange:
    """An exchange of tensors on a GPU over one of the host, through pinned buffers: a wait for each message sent."""

    def __init__(self, exchange):
        self._exchange = exchange
        self.rank, self.size, self.schedule = exchange.rank, exchange.size, exchange.schedule

    @property
    def bytes_sent(self):
        return self._exchange.bytes_sent

    @bytes_sent.setter
    def bytes_sent(self, count):
        self._exchange.bytes_sent = count

    def start(self, payload, layout, topology):
        wire = torch.zeros(layout.nbytes, dtype=torch.uint8, device=CUDA)
        nbytes = layout.pack(payload, wire)
        host = wire.cpu()[:nbytes]
        self.pending = self._exchange.start(layout.unpack(host[: layout.finish(host)]), layout, topology)
        self.layout = layout
        return self

    def start_each(self, payloads, layout, topology):
        wires = torch.zeros(len(payloads), layout.nbytes, dtype=torch.uint8, device=CUDA)
        used = [layout.pack(payload, wire) for payload, wire in zip(payloads.values(), wires, strict=True)]
        hosts = [host[:nbytes] for host, nbytes in zip(wires.cpu(), used, strict=True)]
        finished = [host[: layout.finish(host)] for host in hosts]
        unpacked = {target: layout.unpack(host) for target, host in zip(payloads, finished, strict=True)}
        self.layout = layout
        self.pending = self._exchange.start_each(unpacked, layout, topology)
        return self

    def test(self):
        return self.pending.test()

    def wait(self):
        received = self.pending.wait()
        on_host = {field.name for field in self.layout.fields if field.on_host}
        for message in received.values():
            self.layout.check_codes(message)
            message.update({name: t.clone() if name in on_host else StandIn(t.clone()) for name, t in message.items()})
        return received

    def mean_(self, x):
        _through_host_(self._exchange.mean_, x)


class StandInWorld:
    """A world of the loopback whose ranks train on stand-ins, and send from host memory as those of MPI do."""

    device = CUDA

    def __init__(self, world):
        self._world = world

    def __getattr__(self, name):
        return getattr(self._world, name)

    def exchange(self, schedule):
        return StagedExchange(self._world.exchange(schedule))

    def mailbox(self, topology, nbytes, depth=2):
        transport = self._world.mailbox(topology, nbytes, depth).transport
        return SlotMailbox(self.rank, CUDA, transport, topology, nbytes, depth)

    def mean_(self, x):
        _through_host_(self._world.mean_, x)

    def broadcast_(self, x, root=0):
        _through_host_(lambda host: self._world.broadcast_(host, root), x)


def _through_host_(function, x):
    copy = x.detach().cpu().clone()
    function(copy)
    x.detach().copy_(copy, non_blocking=True)
