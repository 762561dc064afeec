"""A GPU that is not there: its streams, its events and its copies, and a judge of who was ordered before whom.

`SimulatedGpu` has what `DeviceStaging` asks of ``torch.cuda``. Within ``with gpu:`` pinned memory is that of the host;
all other tensors count as memory of the device, and every operation on them as one of the current stream. All of it is
on the CPU.

*Races.* Host and streams have vector clocks: an operation is ordered after all that its stream has done and after what
the host did before it was issued; an event carries the clock of its stream; waiting for it takes that clock over. Two
accesses to the same bytes, one of which writes, race unless the clocks order them. `races` lists those that do.

*Delays.* A copy with ``non_blocking=True`` runs late: when the host waits for an event behind it, or an operation that
is ordered after it meets its bytes. Until then its target holds 0xFF.

*Left out.* `sites` has every place in `mpicomp.exchange.staging` that orders anything. With `left_out` the calls of one
of them do nothing.
"""

from __future__ import annotations

import sys
import threading
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from mpicomp.exchange import staging
from mpicomp.exchange.mailbox import slots
from mpicomp.exchange.staging import DeviceStaging

CPU = torch.device("cpu")
SYNCHRONIZING = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default}


@dataclass(frozen=True)
class Access:
    """Who read or wrote which bytes, as number `time` of what it did."""

    who: str
    time: int
    begin: int
    end: int
    is_write: bool
    what: str

    def conflicts(self, begin: int, end: int, is_write: bool) -> bool:
        return (self.is_write or is_write) and self.begin < end and begin < self.end

    def __str__(self):
        return f"{self.what} ({'writes' if self.is_write else 'reads'}, {self.who})"


class Stream:
    """Operations in order, and the copies among them that have not run."""

    def __init__(self, gpu, name):
        self.gpu, self.name = gpu, name
        self.clock = {}
        self.waiting = []  # what has not run: (its number, function, spans)
        self.issued = 0

    def wait_event(self, event):
        if not self.gpu._is_left_out("wait_event"):
            event._wait(self)

    def wait_stream(self, stream):
        if not self.gpu._is_left_out("wait_stream"):
            event = Event(self.gpu)
            event._record(stream)
            event._wait(self)

    def issue(self, function, spans=()):
        self.issued += 1
        self.waiting.append((self.issued, function, list(spans)))

    def run(self, until=None):
        """Run what is waiting, up to number `until`."""
        with _disable_current_modes():
            while self.waiting and (until is None or self.waiting[0][0] <= until):
                self.waiting.pop(0)[1]()


class Event:
    """A place in a stream."""

    def __init__(self, gpu):
        self.gpu = gpu
        self.stream, self.place, self.clock = None, 0, {}

    def record(self, stream=None):
        if not self.gpu._is_left_out("record"):
            self._record(stream or self.gpu.current_stream())

    def wait(self, stream=None):
        if not self.gpu._is_left_out("wait"):
            self._wait(stream or self.gpu.current_stream())

    def synchronize(self):
        if not self.gpu._is_left_out("synchronize"):
            _join(self.gpu.host, self.clock)
            if self.stream is not None:
                self.stream.run(self.place)

    def _record(self, stream):
        _join(stream.clock, self.gpu.host)
        self.stream, self.place, self.clock = stream, stream.issued, dict(stream.clock)

    def _wait(self, stream):
        _join(stream.clock, self.clock)
        place, source = self.place, self.stream
        if source is not None:
            stream.issue(lambda: source.run(place))


class SimulatedGpu:
    """The streams of a GPU; see the top of this file.

    Attributes:
        races: what was not ordered, in words.
        accesses: how many accesses were judged.
        ordered: how many pairs of accesses from different streams, or stream and host, met, and were ordered.
        delayed: how many copies ran late.
        sites: the calls in the staging that order something, each once, in words.
        are_blocking: of each event, whether who waits for it sleeps.

    """

    def __init__(self, *, is_late=True, left_out=None):
        self.races, self.accesses, self.ordered, self.delayed = [], 0, 0, 0
        self.sites = []
        self.host = {"host": 0}
        self.are_blocking = []
        self._is_late, self._left_out = is_late, left_out
        self._streams = [Stream(self, "the default stream")]
        self._current = self._streams[0]
        self._pinned = []  # (begin, end, tensor)
        self._accesses = {}  # memory: (the storage, so that it is not given to others, its accesses)
        self._modes = ExitStack()

    def __enter__(self):
        self._modes.enter_context(_Operations(self))
        self._modes.enter_context(_Functions(self))
        return self

    def __exit__(self, *exception):
        self._modes.close()

    # What `torch.cuda` has.

    def Stream(self, device=None):
        self._streams.append(Stream(self, f"side stream {len(self._streams)}"))
        return self._streams[-1]

    def Event(self, blocking=False):
        self.are_blocking.append(blocking)
        return Event(self)

    def current_stream(self, device=None):
        return self._current

    def stream(self, stream):
        return nullcontext() if self._is_left_out("stream") else self._within(stream)

    @contextmanager
    def _within(self, stream):
        outer, self._current = self._current, stream
        yield
        self._current = outer

    def synchronize(self):
        if not self._is_left_out("synchronize"):
            for stream in self._streams:
                self._synchronize(stream)

    # What the host does to memory without torch.

    def host_reads(self, array, what):
        self._host_accesses(array, False, what)

    def host_writes(self, array, what):
        self._host_accesses(array, True, what)

    def _host_accesses(self, array, is_write, what):
        tensor = torch.from_numpy(array)
        self._tick(self.host, "host")
        self._judge("host", self.host, [(tensor, is_write)], what)

    # Operations of torch.

    def operate(self, function, args, kwargs):
        """Do what torch is about to do, on the current stream or on the host."""
        if function is torch.ops.aten.empty.memory_format and kwargs.pop("pin_memory", False):
            out = function(*args, **kwargs)
            self._pinned.append((out.data_ptr(), out.data_ptr() + out.nbytes, out))
            return out
        if function.is_view:
            return function(*args, **kwargs)
        touched = [
            (tensor, argument.alias_info is not None and argument.alias_info.is_write)
            for argument, value in _named(function, args, kwargs)
            for tensor in tree_leaves(value)
            if isinstance(tensor, torch.Tensor)
        ]
        what = str(function.overloadpacket)
        is_copy = function is torch.ops.aten.copy_.default
        crosses_the_bus = is_copy and self._is_host(args[0]) != self._is_host(args[1])
        is_non_blocking = is_copy and (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        if touched and all(self._is_host(tensor) for tensor, _ in touched):
            self._tick(self.host, "host")
            self._judge("host", self.host, touched, what)
            return function(*args, **kwargs)
        stream = self._current
        self._begin(stream, touched, what)
        if is_non_blocking and self._is_late:
            target, source = args[:2]
            self._run_what_meets(stream, _spans([(target, True)]))
            target.view(torch.uint8).fill_(0xFF)
            self.delayed += 1
            stream.issue(lambda: target.copy_(source), _spans(touched))
            return target
        self._run_what_meets(stream, _spans(touched))
        out = function(*args, **kwargs)
        known = {id(tensor) for tensor, _ in touched}
        made = [(t, True) for t in tree_leaves(out) if isinstance(t, torch.Tensor) and id(t) not in known]
        self._judge(stream.name, stream.clock, made, what)
        if function in SYNCHRONIZING or (crosses_the_bus and not is_non_blocking):
            self._synchronize(stream)
        return out

    def touch(self, tensor, is_synchronizing):
        """Note that a kernel outside torch reads and writes `tensor`, or that the host waits for it and reads it."""
        if self._is_host(tensor):
            return
        touched = [(tensor, not is_synchronizing)]
        self._begin(self._current, touched, "numpy")
        self._run_what_meets(self._current, _spans(touched))
        if is_synchronizing:
            self._synchronize(self._current)

    def _begin(self, stream, touched, what):
        """Order an operation after what was issued."""
        _join(stream.clock, self.host)
        self._tick(stream.clock, stream.name)
        self._judge(stream.name, stream.clock, touched, what)

    def _run_what_meets(self, stream, spans):
        """Run what waits in `stream`, if an operation on the bytes of `spans` would meet a copy that has not run."""
        if any(
            begin < other_end and other < end and (is_write or other_is_write)
            for waiting in self._streams
            for _, _, others in waiting.waiting
            for other, other_end, other_is_write in others
            for begin, end, is_write in spans
        ):
            stream.run()

    def _synchronize(self, stream):
        _join(self.host, stream.clock)
        stream.run()

    def _is_host(self, tensor):
        return self._pinned_around(tensor.data_ptr()) is not None

    def _pinned_around(self, address):
        return next((begin for begin, end, _ in self._pinned if begin <= address < end), None)

    def _tick(self, clock, name):
        clock[name] = clock.get(name, 0) + 1

    def _judge(self, who, clock, touched, what):
        for tensor, is_write in touched:
            for begin, end, _ in _spans([(tensor, is_write)]):
                memory = self._pinned_around(begin) or tensor.untyped_storage().data_ptr()
                _, accesses = self._accesses.setdefault(memory, (tensor.untyped_storage(), []))
                access = Access(who, clock[who], begin, end, is_write, what)
                self.accesses += 1
                kept = []
                for earlier in accesses:
                    is_ordered = earlier.time <= clock.get(earlier.who, 0)
                    if earlier.conflicts(begin, end, is_write) and earlier.who != who:
                        self.ordered += is_ordered
                        if not is_ordered:
                            self.races.append(f"{earlier} and {access}")
                    is_covered = begin <= earlier.begin and earlier.end <= end and (is_write or earlier.who == who)
                    if not (is_ordered and is_covered and (is_write or not earlier.is_write)):
                        kept.append(earlier)
                accesses[:] = [*kept, access]

    def _is_left_out(self, kind):
        """Note a call of the staging, and return whether it is the one that is left out."""
        frame = sys._getframe(2)
        if frame.f_code.co_filename != staging.__file__:
            return False
        site = f"{frame.f_code.co_name}, line {frame.f_lineno - frame.f_code.co_firstlineno}: {kind}"
        if site not in self.sites:
            self.sites.append(site)
        return site == self._left_out


class _Operations(TorchDispatchMode):
    def __init__(self, gpu):
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return self.gpu.operate(function, args, dict(kwargs or {}))


class _Functions(TorchFunctionMode):
    """Sees what leaves torch without an operation: ``x.numpy()`` for kernels on the CPU, ``x.tolist()`` for Python.

    A kernel on the CPU stands for one on the GPU: it is one operation of the current stream.
    """

    def __init__(self, gpu):
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.tolist):
            self.gpu.touch(args[0], is_synchronizing=function is torch.Tensor.tolist)
        return function(*args, **(kwargs or {}))


class WatchedStaging(DeviceStaging):
    """The staging on a simulated GPU, and what MPI does with its buffers.

    MPI may read a message from the end of `pack` to the beginning of `unpack`, and write what is received from the end
    of `receive` to the beginning of `unpack`.
    """

    def __init__(self, gpu):
        super().__init__(CPU, gpu)
        self._gpu = gpu
        self._sending, self._receiving = [], []

    def pack_each(self, payloads, layout):
        self._sending = super().pack_each(payloads, layout)
        for wire in self._sending:
            self._gpu.host_reads(wire, "MPI begins to send")
        return self._sending

    def receive(self, count, layout):
        self._receiving = super().receive(count, layout)
        for buffer in self._receiving:
            self._gpu.host_writes(buffer, "MPI begins to receive")
            buffer[:] = 0xFF  # a message may arrive at once
        return self._receiving

    def unpack(self, layout, sizes):
        for buffer in self._receiving:
            self._gpu.host_writes(buffer, "MPI receives")
        for wire in self._sending:
            self._gpu.host_reads(wire, "MPI sends")
        self._sending = []
        return super().unpack(layout, sizes)


_here = threading.local()


@contextmanager
def on_simulated_gpu(**options):
    """Give this thread a simulated GPU; what exchanges and mailboxes it makes stage there, after `simulate_staging`."""
    with SimulatedGpu(**options) as gpu:
        _here.gpu = gpu
        try:
            yield gpu
        finally:
            del _here.gpu


def simulate_staging(monkeypatch, *modules):
    """Let exchanges and mailboxes made within `on_simulated_gpu` stage on that GPU."""

    def make(device):
        return WatchedStaging(_here.gpu) if hasattr(_here, "gpu") else staging.make_staging(device)

    for module in (slots, *modules):
        monkeypatch.setattr(module, "make_staging", make)


def _join(clock, other):
    for who, time in other.items():
        clock[who] = max(clock.get(who, 0), time)


def _named(function, args, kwargs):
    """Yield the arguments of the operation's schema with their values."""
    for i, argument in enumerate(function._schema.arguments):
        if i < len(args):
            yield argument, args[i]
        elif argument.name in kwargs:
            yield argument, kwargs[argument.name]


def _spans(touched):
    """Return the bytes of tensors, as (begin, end, whether they are written)."""
    spans = []
    for tensor, is_write in touched:
        if tensor.numel():
            last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
            begin = tensor.data_ptr()
            spans.append((begin, begin + (last + 1) * tensor.element_size(), is_write))
    return spans
