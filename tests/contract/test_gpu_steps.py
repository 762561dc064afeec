"""A step of every method on tensors that say they are on a GPU: what it waits for and starts, and the same bits."""

from collections import Counter

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("numba")
if torch.cuda.is_available():
    pytest.skip("the stand-in needs a torch that finds no GPU", allow_module_level=True)

from support import small
from support.interpreter import like_a_gpu  # noqa: F401
from support.methods import DETERMINISTIC
from support.stand_in import CUDA, Device, StandIn, host, launch

from mpicomp.algorithms import ALGORITHMS, SSGD, LocalSGD, OneBitAdam
from mpicomp.algorithms.sums.two_way import TwoWayAdam
from mpicomp.exchange import loopback
from mpicomp.kernels import gpu
from mpicomp.replica.flat import FlatModel
from mpicomp.topology import ring

METHODS = {**DETERMINISTIC, "sgd": ALGORITHMS["sgd"](), "ssgd": SSGD()}

MOST = {
    # of a step on 2 ranks: waits for the GPU, launches of own kernels, operations of torch (19 are the optimizer's)
    "local_sgd": (1, 0, 23),
    "local_sgd_float16": (1, 0, 26),
    "local_sgd_choco": (5, 26, 45),
    "local_sgd_choco_random": (1, 8, 26),
    "local_sgd_adagossip": (5, 26, 45),
    "local_sgd_deep_squeeze": (6, 18, 50),
    "dpsgd": (1, 0, 23),
    "dpsgd_overlapped": (1, 0, 23),
    "dpsgd_float16": (1, 0, 26),
    "choco": (5, 26, 45),
    "choco_overlapped": (5, 26, 45),
    "adagossip": (5, 26, 45),
    "adagossip_quasi_global": (5, 26, 37),
    "adagossip_overlapped": (5, 26, 37),
    "deep_squeeze": (6, 28, 52),
    "ef_sgd": (6, 28, 55),
    "ef_sgd_momentum": (6, 28, 45),
    "ef_sgd_block": (2, 2, 32),
    "ef_sgd_sign": (1, 5, 30),
    "gmc": (6, 28, 47),
    "gmc_block": (2, 2, 24),
    "gmc_plus": (6, 28, 51),
    "dgc": (6, 24, 65),
    "dgc_warmup": (9, 28, 65),
    "ef_sgd_overlapped": (8, 16, 54),
    "gmc_overlapped": (3, 2, 27),
    "gmc_plus_overlapped": (7, 28, 54),
    "dgc_overlapped": (7, 18, 50),
    "efficient_adam": (1, 26, 101),
    "efficient_adam_decaying": (10, 52, 67),
    "efficient_adam_random": (1, 9, 29),
    "onebit_adam": (2, 54, 89),
    "powersgd": (4, 0, 66),
    "powersgd_momentum": (4, 0, 57),
    "choco_identity": (1, 1, 25),
    "choco_sign": (1, 6, 27),
    "choco_qsgd": (1, 6, 29),
    "choco_terngrad": (1, 2, 105),
    "choco_natural": (1, 2, 100),
    "choco_log_grid": (1, 5, 26),
    "choco_uniform_grid": (1, 4, 69),
    "choco_cast": (1, 1, 30),
    "choco_topk": (5, 26, 45),
    "choco_topk_int8": (5, 26, 62),
    "choco_topk_per_tensor": (5, 22, 44),
    "choco_topk_dense_1d": (5, 22, 62),
    "choco_sampled_topk": (8, 31, 57),
    "choco_randk_shared": (1, 8, 26),
    "choco_randk_private": (1, 8, 26),
    "choco_threshold": (6, 17, 53),
    "choco_block": (1, 4, 26),
    "choco_sign_per_tensor": (1, 31, 62),
    "choco_log_grid_per_tensor": (1, 25, 56),
    "choco_float16": (1, 1, 30),
    "sgd": (0, 0, 19),
    "ssgd": (1, 0, 20),
}

SENT = "a message goes to the host"
WAITS = {
    "algorithms/gossip/choco:send_difference": SENT,
    "algorithms/gossip/deep_squeeze:DeepSqueeze.mix": SENT,
    "algorithms/gossip/dpsgd:DPSGD._start": SENT,
    "algorithms/sums/ssgd:SSGD.phases": SENT,
    "exchange/sums/aggregate:_RingAllReduce._pass_on": SENT,
    "exchange/sums/aggregate:_RingRelay._pass_on": SENT,
    "algorithms/sums/dgc:DGC._clipped": "the norm of the gradient",
    "compression/sampled_topk:SampledTopK._threshold": "the threshold",
    "compression/message:Layout.unpack": "counts in the message that was kept from the step before",
    "kernels/gpu/indices:encode": "the length of the code",
    "kernels/gpu/indices:decode": "whether the code is damaged",
    "kernels/gpu/select:_survey": "the number of candidates, and of NaNs",
    "kernels/gpu/select_parts:top_k_of_parts": "the number of NaNs",
}
"""Where the host waits for the GPU, and for what."""


class StagedExchange:
    """An exchange of tensors on a GPU over one of the host, through pinned buffers: a wait for each message sent."""

    def __init__(self, exchange):
        self._exchange = exchange
        self.rank, self.size, self.schedule = exchange.rank, exchange.size, exchange.schedule

    @property
    def bytes_sent(self):
        return self._exchange.bytes_sent

    def start(self, payload, layout, topology):
        wire = torch.zeros(layout.nbytes, dtype=torch.uint8, device=CUDA)
        nbytes = layout.pack(payload, wire)
        host = wire.cpu()[:nbytes]
        layout.check(host)
        self.pending = self._exchange.start(layout.unpack(host), layout, topology)
        return self

    def test(self):
        return self.pending.test()

    def wait(self):
        return {
            source: {name: StandIn(tensor.clone()) for name, tensor in message.items()}
            for source, message in self.pending.wait().items()
        }

    def mean_(self, x):
        copy = x.cpu().clone()
        self._exchange.mean_(copy)
        x.copy_(copy, non_blocking=True)


def train(world, algorithm, device):
    """Train with gradients that need no backward pass; return the parameters and the most that a step took of each."""
    model = small.network()
    if device is not None:
        for module in model.modules():
            for name, p in module._parameters.items():
                module._parameters[name] = torch.nn.Parameter(StandIn(p.detach()))
    has_own = getattr(algorithm, "quasi_global_momentum", 0) or getattr(algorithm, "momentum", 0)
    momentum = 0.0 if has_own or isinstance(algorithm, TwoWayAdam) else 0.9
    local = FlatModel(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=momentum, foreach=False))
    exchange = world.exchange(ring(world.size))
    exchange = exchange if device is None else StagedExchange(exchange)
    state = algorithm.init(local, exchange)
    most = Counter(), 0, 0
    for step in range(steps_of(algorithm)):
        generator = torch.Generator().manual_seed(10 * step + world.rank)
        gradient = torch.randn(local.spec.numel, generator=generator)
        gradient = gradient if device is None else StandIn(gradient)
        local.gradient = lambda meanwhile=None, gradient=gradient: local.g.copy_(gradient)
        if device is not None:
            device.reset()
        algorithm.step(local, state, exchange)
        if device is not None and step:  # the first one makes tables
            waits = max(most[0], device.waits, key=Counter.total)
            most = waits, max(most[1], device.launches), max(most[2], device.operations)
    return local.x, most


def steps_of(algorithm):
    """As many as it takes until it has sent what it sends."""
    if isinstance(algorithm, OneBitAdam):
        return algorithm.freeze_step + 2
    return 3 if isinstance(algorithm, LocalSGD) else 2


@pytest.fixture
def on_a_gpu(monkeypatch, like_a_gpu):  # noqa: F811
    for module in (gpu, gpu.codes, gpu.quantizer, gpu.select, gpu.select_parts):
        monkeypatch.setattr(module, "launch", launch)


def serve(world, algorithm):
    with torch.no_grad(), Device() as device:
        x, most = train(world, algorithm, device)
        return host(x), most


@pytest.mark.parametrize("name", METHODS)
def test_a_step_on_a_gpu(name, on_a_gpu):
    """It mixes no devices, waits where it is known to and no more often, and trains to the bits of the CPU."""
    found = loopback.run(2, serve, METHODS[name])
    expected = loopback.run(2, train, METHODS[name], None)
    for (x, (waits, launches, operations)), (y, _) in zip(found, expected, strict=True):
        assert torch.equal(x, y)
        assert set(waits) <= set(WAITS)
        assert waits.total() <= MOST[name][0] and launches <= MOST[name][1] and operations <= MOST[name][2], waits


def test_the_table_is_of_all_methods():
    assert MOST.keys() == METHODS.keys()


@pytest.mark.parametrize(
    ("waits", "use"),
    [
        (0, lambda x: x + 1),
        (0, lambda x: x.add_(torch.full((3,), 1.0, device=x.device))),
        (0, lambda x: x[1:].copy_(torch.ones(2), non_blocking=True)),
        (0, lambda x: x[(x > 1).int()]),
        (1, lambda x: x.add_(torch.tensor([1.0, 2.0, 3.0], device=x.device))),
        (1, lambda x: x[1:].copy_(torch.ones(2))),
        (1, lambda x: x[x > 1]),
        (1, lambda x: x.masked_select(x > 1)),
        (1, lambda x: (x > 1).nonzero()),
        (1, lambda x: x.sum().item()),
        (1, lambda x: float(x[0])),
        (1, lambda x: bool((x > 1).any())),
        (1, lambda x: x.cpu()),
        (1, lambda x: x.to("cpu")),
        (1, lambda x: x.tolist()),
        (1, lambda x: torch.equal(x, x)),
    ],
)
def test_the_stand_in_counts_waits(waits, use):
    with Device() as device:
        use(StandIn(torch.arange(3.0)))
    assert device.waits.total() == waits


@pytest.mark.parametrize(
    "use",
    [
        lambda x: x + torch.ones(3),
        lambda x: torch.cat([x, torch.ones(3)]),
        lambda x: x[torch.tensor([0, 1])],
        lambda x: x.index_add_(0, torch.tensor([0]), x[:1]),
    ],
)
def test_the_stand_in_refuses_a_tensor_of_the_host(use):
    with Device(), pytest.raises(RuntimeError, match="of the host"):
        use(StandIn(torch.arange(3.0)))
