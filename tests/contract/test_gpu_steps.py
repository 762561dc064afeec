"""Training on tensors that say they are on a GPU: what it waits for and starts, and the bits of the CPU.

A step of every method, with given gradients; and scripts with a backward pass, over `distribute`.
"""

import itertools
from collections import Counter
from functools import partial

import pytest
import torch
from torch import nn

pytest.importorskip("triton")
pytest.importorskip("numba")
if torch.cuda.is_available():
    pytest.skip("the stand-in needs a torch that finds no GPU", allow_module_level=True)

from support import small
from support.interpreter import like_a_gpu  # noqa: F401
from support.methods import ALL_REDUCE, ASYNCHRONOUS, DETERMINISTIC, graph_for
from support.stand_in import Device, StandIn, StandInWorld, host, launch, make_staging, move_, synchronize
from support.steps import one_step

from mpicomp.algorithms import ALGORITHMS, AsynchronousAlgorithm, DCGossip, OneBitAdam
from mpicomp.algorithms.sums.adam import OwnAdam
from mpicomp.exchange import loopback
from mpicomp.exchange.loopback.network import Links
from mpicomp.exchange.mailbox import slots
from mpicomp.kernels import gpu
from mpicomp.replica.clipping import Clip
from mpicomp.replica.distribute import distribute
from mpicomp.replica.flat import FlatModel
from mpicomp.topology import ring, star

GRADIENTS = 3
"""Of each rank that computes any, in an asynchronous run."""

METHODS = {**DETERMINISTIC, "sgd": ALGORITHMS["sgd"](), **ALL_REDUCE, **ASYNCHRONOUS}

MOST = {
    # of a step on 2 ranks: waits for the GPU, launches of own kernels, operations of torch (19 are the optimizer's)
    "local_sgd": (1, 0, 23),
    "local_sgd_float16": (1, 0, 26),
    "local_sgd_choco": (1, 10, 33),
    "local_sgd_choco_random": (1, 8, 26),
    "local_sgd_adagossip": (1, 10, 33),
    "local_sgd_deep_squeeze": (1, 9, 34),
    "diloco": (1, 0, 26),
    "diloco_dpsgd": (1, 0, 30),
    "diloco_choco": (1, 10, 39),
    "streaming_diloco": (2, 0, 37),
    "streaming_diloco_waiting": (2, 0, 33),
    "noloco": (1, 0, 30),
    "noloco_topk": (3, 9, 57),
    "sparse_loco": (1, 9, 41),
    "sparse_loco_statistical": (1, 9, 147),
    "fedadam_ssm": (1, 18, 48),
    "fedadam_ssm_every_step": (1, 18, 48),
    "dpsgd": (1, 0, 23),
    "dpsgd_overlapped": (1, 0, 23),
    "dpsgd_float16": (1, 0, 26),
    "choco": (1, 10, 33),
    "choco_auto": (1, 10, 35),
    "adagossip_auto": (1, 10, 35),
    "choco_auto_overlapped": (1, 10, 35),
    "choco_overlapped": (1, 10, 33),
    "adagossip": (1, 10, 33),
    "adagossip_quasi_global": (1, 10, 25),
    "adagossip_overlapped": (1, 10, 25),
    "deep_squeeze": (1, 9, 34),
    "deep_squeeze_auto": (1, 9, 36),
    "def_atc": (1, 11, 37),
    "def_atc_damped": (1, 7, 31),
    "local_sgd_def_atc": (1, 11, 37),
    "power_gossip": (1, 0, 45),
    "power_gossip_rank_2": (2, 0, 66),
    "local_sgd_power_gossip": (2, 0, 66),
    "motef": (1, 20, 51),
    "motef_auto": (1, 20, 55),
    "beer": (1, 16, 37),
    "lead": (1, 1, 107),
    "lead_randk": (1, 7, 32),
    "sgp": (1, 0, 28),
    "sgp_overlapped": (1, 0, 29),
    "sgp_topk": (1, 9, 40),
    "sgp_topk_overlapped": (1, 9, 41),
    "ef_sgd": (1, 9, 37),
    "ef_sgd_momentum": (1, 9, 27),
    "ef_sgd_block": (2, 2, 32),
    "ef_sgd_sign": (1, 5, 30),
    "ef_sgd_loco": (1, 3, 74),
    "ef_sgd_loco_overlapped": (2, 12, 37),
    "ef_sgd_gravac": (2, 12, 53),
    "ef_sgd_gravac_overlapped": (4, 2, 61),
    "gmc": (1, 9, 29),
    "gmc_gravac": (2, 12, 65),
    "gmc_loco": (1, 9, 35),
    "gmc_block": (2, 2, 24),
    "gmc_block_per_tensor": (2, 0, 40),
    "gmc_plus": (1, 9, 33),
    "dgc": (1, 9, 48),
    "dgc_warmup": (3, 9, 48),
    "ef_sgd_overlapped": (4, 13, 46),
    "gmc_overlapped": (3, 2, 27),
    "gmc_plus_overlapped": (2, 12, 41),
    "dgc_overlapped": (2, 12, 39),
    "demo": (1, 12, 58),
    "efficient_adam": (1, 26, 101),
    "efficient_adam_decaying": (1, 14, 32),
    "efficient_adam_random": (1, 9, 29),
    "onebit_adam": (2, 54, 92),
    "sketched_amsgrad": (2, 11, 129),
    "powersgd": (4, 0, 66),
    "powersgd_momentum": (4, 0, 57),
    "choco_identity": (1, 1, 25),
    "choco_sign": (1, 6, 27),
    "choco_qsgd": (1, 6, 29),
    "choco_terngrad": (1, 2, 113),
    "choco_natural": (1, 2, 102),
    "choco_log_grid": (1, 5, 26),
    "choco_uniform_grid": (1, 4, 69),
    "choco_variable_length": (1, 26, 436),
    "choco_cast": (1, 1, 30),
    "choco_topk": (1, 10, 33),
    "choco_topk_int8": (1, 10, 50),
    "choco_topk_per_tensor": (1, 10, 33),
    "choco_topk_dense_1d": (1, 10, 51),
    "choco_block_topk": (1, 9, 26),
    "choco_block_topk_statistical": (1, 10, 138),
    "choco_sampled_topk": (3, 12, 39),
    "choco_randk_shared": (1, 8, 26),
    "choco_randk_private": (1, 8, 26),
    "choco_threshold": (2, 11, 40),
    "choco_block": (1, 4, 26),
    "choco_block_per_tensor": (1, 1, 46),
    "choco_sign_per_tensor": (1, 31, 62),
    "choco_log_grid_per_tensor": (1, 25, 56),
    "choco_float16": (1, 1, 30),
    "sgd": (0, 0, 19),
    "ssgd": (1, 0, 20),
    # of a gradient on 3 ranks, of the rank with the most: over a ring, or a hub and 2 workers
    "asgd": (1, 0, 25),
    "asgd_topk": (1, 4, 30),
    "dc_asgd": (1, 0, 39),
    "dc_asgd_topk": (1, 4, 44),
    "dc_asgd_downlink": (1, 3, 52),
    "dc_gossip": (1, 0, 48),
    "dc_gossip_topk": (1, 13, 61),
    "ad_psgd": (2, 0, 31),
    "dc_gossip_plain": (1, 0, 36),
}

SENT = "a message goes to the host"
WAITS = {
    "algorithms/gossip/choco:send_difference": SENT,
    "algorithms/gossip/deep_squeeze:DeepSqueeze.mix": SENT,
    "algorithms/gossip/def_atc:DEFATC.mix": SENT,
    "algorithms/gossip/diloco:DiLoCo._outer_step": SENT,
    "algorithms/gossip/dpsgd:DPSGD._start": SENT,
    "algorithms/gossip/lead:LEAD._exchange": SENT,
    "algorithms/gossip/motef:MoTEF._exchange": SENT,
    "algorithms/gossip/noloco:NoLoCo._meet": SENT,
    "algorithms/gossip/noloco:NoLoCo._meet_compressed": "messages go to the host, and how many coordinates have moved",
    "algorithms/gossip/sgp:SGP._start": SENT,
    "algorithms/gossip/power_gossip:_iterate_": SENT,
    "algorithms/sums/ratio_control:RatioControl.hear": "the gain, at the end of a window",
    "algorithms/sums/ssgd:SSGD.phases": SENT,
    "exchange/staging:DeviceStaging.pack_each": SENT,
    "exchange/sums/aggregate:_RingAllReduce._pass_on": SENT,
    "exchange/sums/aggregate:_RingRelay._pass_on": SENT,
    "compression/sampled_topk:SampledTopK._threshold": "the threshold",
    "compression/message:Layout.unpack": "counts in the message that was kept from the step before",
    "kernels/gpu/select:_survey": "the number of candidates, and of NaNs",
}
"""Where the host waits for the GPU, and for what."""

STEPS = ("first step", "step", "micro-batches", "loop", "scaled", "skipped")

CALLS = {
    # of a script, on each rank: waits of `mpicomp.replica` and below it, beside those of the algorithm
    **{step: {} for step in STEPS},
    "averaged": {"replica/replica:Replica._average_": 3},  # the parameters, and two statistics of a batch norm
    "metrics": {
        "replica/replica:Replica.check_finite": 1,
        "replica/meter:Meter.take": 1,
        "replica/meter:sampled_consensus_distance": 2,
    },
    "save": {"replica/replica:Replica.save": 1, "checkpoint/writer:Writer._copy": 1},  # whether the model is finite
    "resume": {"replica/state:_overwrite_": 4, "replica/state:load_optimizer_": 6},  # a tensor each
}

ONCE = {"kernels/gpu/select_parts:_table.<locals>.<genexpr>"}
"""In the first call for these parts, of this test or of one before."""

COMPARED = {"replica/consistency:_sums": 2}
"""Every 50 steps, of methods whose ranks hold the same model."""

OF_STATE = {"algorithms/gossip/choco:compression_error", "state:restore_"}
"""Of the algorithm's state, in metrics and resume."""


def flat_model(algorithm, device):
    model = small.network()
    if device is not None:
        move_(model)
    has_own = getattr(algorithm, "quasi_global_momentum", 0) or getattr(algorithm, "momentum", 0)
    momentum = 0.0 if has_own or isinstance(algorithm, OwnAdam) else 0.9
    return FlatModel(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=momentum, foreach=False))


def gradient_of(local, world, number, device):
    """Return a gradient that needs no backward pass."""
    generator = torch.Generator().manual_seed(10 * number + world.rank)
    gradient = torch.randn(local.spec.numel, generator=generator)
    return gradient if device is None else StandIn(gradient)


class Most:
    """The largest counts of a step, of all but the first ones, which make tables."""

    def __init__(self, device, first=1):
        self.device, self.counts, self.steps = device, (Counter(), 0, 0), -first

    def end_step(self):
        if self.device is not None:
            counts = self.device.waits, self.device.launches, self.device.operations
            if self.steps >= 0:
                waits = max(self.counts[0], counts[0], key=Counter.total)
                self.counts = waits, max(self.counts[1], counts[1]), max(self.counts[2], counts[2])
            self.steps += 1
            self.device.reset()


def train(world, algorithm, device):
    """Return the parameters and the counts of a step."""
    local = flat_model(algorithm, device)
    exchange = world.exchange(graph_for(algorithm)(world.size))
    state = algorithm.init(local, exchange)
    most = Most(device, getattr(algorithm, "period", 1))
    for step in range(steps_of(algorithm)):
        gradient = gradient_of(local, world, step, device)
        local.gradient = lambda meanwhile=None, gradient=gradient: local.g.copy_(gradient)
        if device is not None:
            device.reset()
        one_step(algorithm, local, state, exchange)
        most.end_step()
    return local.x, exchange.bytes_sent, most.counts


def train_asynchronously(world, algorithm, device):
    """As `train`, each rank at its own pace; a hub's step is to apply a gradient and to answer."""
    local = flat_model(algorithm, device)
    topology = ring(world.size) if isinstance(algorithm, DCGossip) else star(world.size)
    mailbox = world.mailbox(topology, algorithm.message_nbytes(local.spec, world.size), algorithm.depth)
    state = algorithm.init(local, mailbox)
    most = Most(device)
    computed, steps = 0, 0

    def gradient(meanwhile=None):
        nonlocal computed
        local.g.copy_(gradient_of(local, world, computed, device))
        computed += 1
        world.sleep(1 + 0.3 * world.rank)

    local.gradient = gradient
    trainers = algorithm.trainers(world.size)
    trains = world.rank in trainers
    if device is not None:
        device.reset()
    while computed < GRADIENTS or algorithm.is_unfinished(state) if trains else steps < GRADIENTS * len(trainers):
        if (algorithm.step if trains else algorithm.serve)(local, state, mailbox):
            steps += 1
            most.end_step()
        else:
            mailbox.pause()
    mailbox.announce(computed, is_done=True)
    while not all(peer.is_done for peer in mailbox.peers().values()):  # to whom it may have to answer
        if not algorithm.serve(local, state, mailbox):
            mailbox.pause()
    for _ in range(2):
        mailbox.settle()
        algorithm.drain(local, state, mailbox)
    return local.x, 0, most.counts


def steps_of(algorithm):
    """As many as it takes until it has sent what it sends."""
    if isinstance(algorithm, OneBitAdam):
        return algorithm.freeze_step + 2
    return 2 * getattr(algorithm, "period", 1)


@pytest.fixture
def on_a_gpu(monkeypatch, like_a_gpu):  # noqa: F811
    monkeypatch.setattr(slots, "make_staging", make_staging)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.zeros(16, dtype=torch.uint8))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: None)
    for module in (gpu, gpu.blocks, gpu.codes, gpu.quantizer, gpu.select, gpu.select_parts):
        monkeypatch.setattr(module, "launch", launch)


def serve(world, function, algorithm):
    with torch.no_grad(), Device() as device:
        x, nbytes, most = function(StandInWorld(world), algorithm, device)
        return host(x), nbytes, most


@pytest.mark.parametrize("name", METHODS)
def test_a_step_on_a_gpu(name, on_a_gpu):
    """It mixes no devices, waits where it is known to and no more often, and has the bits and messages of the CPU."""
    is_asynchronous = name in ASYNCHRONOUS
    function = train_asynchronously if is_asynchronous else train
    run = partial(loopback.run, 3, simulated=Links(0.01)) if is_asynchronous else partial(loopback.run, 2)
    found, expected = run(serve, function, METHODS[name]), run(function, METHODS[name], None)
    for (x, nbytes, (waits, launches, operations)), (y, expected_nbytes, _) in zip(found, expected, strict=True):
        assert torch.equal(x, y) and nbytes == expected_nbytes
        assert set(waits) <= set(WAITS)
        assert waits.total() <= MOST[name][0] and launches <= MOST[name][1] and operations <= MOST[name][2], waits


def test_the_table_is_of_all_methods():
    assert MOST.keys() == METHODS.keys()


def script(world, algorithm, device, folder):
    """Train a model through `distribute`; return the parameters and, by call, what it waited for."""
    model = small.network()
    if device is not None:
        move_(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, foreach=False)
    gossip = distribute(model, optimizer, algorithm, ring, world=world, clip=Clip(norm=1.0, value=0.5))
    waits, batches = {}, itertools.count()

    def loss():
        inputs, labels = (t if device is None else StandIn(t) for t in small.batch(next(batches), world.rank))
        return nn.functional.cross_entropy(model(inputs), labels)

    def do(name, call):
        if device is not None:
            device.reset()
        found = call()
        if device is not None:
            waits[name] = dict(device.waits)
        return found

    def loop(scale=None):
        (loss() if scale is None else loss() * scale).backward()
        gossip.optimizer.grad_scale = scale  # as a GradScaler does
        gossip.optimizer.step()
        gossip.optimizer.zero_grad()

    def evaluate():
        with gossip.averaged() as averaged, torch.no_grad():
            averaged(torch.ones(2, 6, device=world.device))

    do("first step", lambda: gossip.step(loss))
    do("step", lambda: gossip.step(loss))
    do("micro-batches", lambda: gossip.step(loss, micro_batches=2))
    do("loop", loop)
    do("scaled", lambda: loop(torch.full((), 8.0, device=world.device)))
    do("skipped", lambda: gossip.step_with_gradients(is_skipped=True))
    do("averaged", evaluate)
    do("metrics", gossip.metrics)
    do("save", lambda: gossip.save(folder))
    stored = gossip.local.x.clone()
    gossip.step(loss)
    do("resume", lambda: gossip.resume(folder))
    assert (stored == gossip.local.x).all()
    gossip.step(loss)
    if isinstance(algorithm, AsynchronousAlgorithm):
        gossip.finish()
    return gossip.local.x, waits


def serve_script(world, algorithm, folder):
    with Device() as device:
        x, waits = script(StandInWorld(world), algorithm, device, folder)
        return host(x), waits


@pytest.mark.parametrize("name", ["ssgd", "dpsgd", "choco_overlapped", "dc_gossip"])
def test_a_script_on_a_gpu(name, on_a_gpu, tmp_path):
    """`distribute` itself mixes no devices and adds no wait to a step, and trains to the bits of the CPU."""
    run = partial(loopback.run, 2, simulated=Links(0.01)) if name in ASYNCHRONOUS else partial(loopback.run, 2)
    found = run(serve_script, METHODS[name], tmp_path / "gpu")
    expected = run(script, METHODS[name], None, tmp_path / "cpu")
    for (x, waits), (y, _) in zip(found, expected, strict=True):
        assert torch.equal(x, y)
        for call, all_waits in waits.items():
            found_waits = {where: count for where, count in all_waits.items() if where not in ONCE}
            own = {where: count for where, count in found_waits.items() if where not in {*WAITS, *OF_STATE}}
            is_compared = METHODS[name].ranks_stay_equal and call == "first step"
            assert own == (COMPARED if is_compared else CALLS[call]), call
            if call in STEPS:
                assert sum(found_waits.values()) - sum(own.values()) <= MOST[name][0], call


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
