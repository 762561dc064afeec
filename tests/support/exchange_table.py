"""What every exchange must do: one function per line of the contract, called on every rank.

`test_exchanges.py` runs the table over the loopback, `tests/mpi/test_neighbor.py` over MPI.
"""

import time
from itertools import product

import numpy as np
import pytest
import torch

from mpicomp.compression import QSGD, HardThreshold, Identity, PerTensor, RandomBlock, SignNorm, TopK
from mpicomp.compression.message import Field, Layout, Spec
from mpicomp.errors import ExchangeError, TopologyError
from mpicomp.exchange.sums.aggregate import Aggregator
from mpicomp.topology import OnePeerExponential, RandomMatching, Topology, chain, complete, ring, star, torus

SUMMED = [
    TopK(0.05),
    PerTensor(TopK(0.05), dense_1d=True),
    HardThreshold(2.0),
    SignNorm(),
    QSGD(bits=4),
    RandomBlock(0.3),
    Identity(),
]

VARIABLE = Layout(
    (Field("index", torch.int16, 97, True), Field("sign", torch.uint8, 13), Field("value", torch.float32, 97, True))
)


def message(rank, step, numel=97):
    """Return a payload that says where and when it was made, with a length that varies with both."""
    count = (7 * rank + 3 * step) % (numel + 1)
    return {
        "index": torch.arange(count, dtype=torch.int16) + rank,
        "sign": torch.full((13,), (rank + step) % 256, dtype=torch.uint8),
        "value": torch.linspace(rank, step, count) if count else torch.empty(0),
    }


def assert_same(received, expected):
    assert received.keys() == expected.keys()
    for name, tensor in expected.items():
        assert received[name].dtype == tensor.dtype
        assert torch.equal(received[name].cpu(), tensor), name


def exchange_messages(world, schedule, steps=8):
    exchange = world.exchange(schedule)
    sent = 0
    for step in range(steps):
        topology = schedule(step)
        mine = message(world.rank, step)
        pending = exchange.start(mine, VARIABLE, topology)
        mine["value"].fill_(-1)  # a payload may be changed as soon as start has returned
        received = pending.wait()
        assert list(received) == topology.sources(world.rank)
        for source, payload in received.items():
            assert_same(payload, message(source, step))
        sent += VARIABLE.nbytes_of(mine) * len(topology.targets(world.rank))
        assert exchange.bytes_sent == sent


def sending_each_neighbor_a_message_of_its_own(world):
    directed = (np.eye(world.size) + np.roll(np.eye(world.size), 1, 0)) / 2
    for schedule in (chain(world.size), complete(world.size), Topology("cycle", directed), RandomMatching(world.size)):
        exchange = world.exchange(schedule)
        sent = 0
        for step in range(8):
            topology = schedule(step)
            mine = {target: message(3 * world.rank + target, step) for target in topology.targets(world.rank)}
            pending = exchange.start_each(mine, VARIABLE, topology)
            for payload in mine.values():
                payload["value"].fill_(-1)
            received = pending.wait()
            assert list(received) == topology.sources(world.rank)
            for source, payload in received.items():
                assert_same(payload, message(3 * source + world.rank, step))
            sent += sum(VARIABLE.nbytes_of(payload) for payload in mine.values())
            assert exchange.bytes_sent == sent
            # the same edges, with one message for all
            received = exchange.start(message(world.rank, step), VARIABLE, topology).wait()
            for source, payload in received.items():
                assert_same(payload, message(source, step))
            sent = exchange.bytes_sent


def until_there(world, pending):
    """Look for messages on all ranks until they are there."""
    deadline = time.monotonic() + 30
    while not all(world.all_gather(pending.test())):
        assert time.monotonic() < deadline


def looking_for_messages(world):
    topology = chain(world.size)
    exchange = world.exchange(topology)
    for step in range(5):
        pending = exchange.start(message(world.rank, step), VARIABLE, topology)
        until_there(world, pending)
        assert pending.test()
        received = pending.wait()
        assert list(received) == topology.sources(world.rank)
        for source, payload in received.items():
            assert_same(payload, message(source, step))


def on_a_ring(world):
    exchange_messages(world, ring(world.size), steps=40)


def on_a_chain(world):
    exchange_messages(world, chain(world.size))


def on_a_star(world):
    exchange_messages(world, star(world.size))


def on_a_complete_graph(world):
    exchange_messages(world, complete(world.size))


def on_a_torus_with_an_extent_of_one_or_two(world):
    rows = 2 if world.size % 2 == 0 else 1
    exchange_messages(world, torus(world.size, dims=(rows, world.size // rows)))


def on_a_directed_cycle(world):
    mixing = (torch.eye(world.size) + torch.eye(world.size).roll(1, 0)).div(2).double().numpy()
    exchange_messages(world, Topology("cycle", mixing))


def with_ranks_that_have_no_neighbor(world):
    mixing = torch.eye(world.size, dtype=torch.float64)
    if world.size > 1:
        mixing[:2, :2] = 0.5
    exchange_messages(world, Topology("pair", mixing.numpy()))


def on_one_peer_exponential(world):
    exchange_messages(world, OnePeerExponential(world.size))


def on_random_matchings_where_some_sit_out(world):
    exchange_messages(world, RandomMatching(world.size, seed=3), steps=20)


def with_ranks_of_different_speed(world):
    topology = ring(world.size)
    exchange = world.exchange(topology)
    for step in range(6):
        _ = torch.randn(200 * world.rank, 200).sum()
        pending = exchange.start(message(world.rank, step), VARIABLE, topology)
        _ = torch.randn(200, 200 * (world.size - world.rank)).sum()
        for source, payload in pending.wait().items():
            assert_same(payload, message(source, step))


def with_a_message_of_megabytes(world):
    layout = Layout((Field("x", torch.float32, 700_001),))
    topology = ring(world.size)
    exchange = world.exchange(topology)
    for step in range(3):
        received = exchange.start({"x": torch.full((700_001,), world.rank + step / 8)}, layout, topology).wait()
        for source, payload in received.items():
            assert torch.equal(payload["x"], torch.full((700_001,), source + step / 8))
    assert exchange.bytes_sent == 3 * 4 * 700_001 * len(topology.targets(world.rank))


def with_layouts_that_grow_and_shrink(world):
    topology = ring(world.size)
    exchange = world.exchange(topology)
    for numel in (1, 5000, 3, 0, 80_000, 17):
        layout = Layout((Field("x", torch.float64, numel),))
        received = exchange.start({"x": torch.full((numel,), float(world.rank)).double()}, layout, topology).wait()
        for source, payload in received.items():
            assert torch.equal(payload["x"], torch.full((numel,), float(source)).double())


def keeping_the_last_messages_until_the_next_start(world):
    topology = complete(world.size)
    exchange = world.exchange(topology)
    for step in range(10):
        received = exchange.start(message(world.rank, step), VARIABLE, topology).wait()
        world.barrier()  # all others have finished the step, and may be ahead
        for source, payload in received.items():
            assert_same(payload, message(source, step))


def with_two_exchanges_at_a_time(world):
    first, second = world.exchange(ring(world.size)), world.exchange(complete(world.size))
    one = first.start(message(world.rank, 1), VARIABLE, ring(world.size))
    two = second.start(message(world.rank, 2), VARIABLE, complete(world.size))
    for source, payload in two.wait().items():
        assert_same(payload, message(source, 2))
    for source, payload in one.wait().items():
        assert_same(payload, message(source, 1))


def refusing_a_second_start(world):
    topology = ring(world.size)
    exchange = world.exchange(topology)
    pending = exchange.start(message(world.rank, 0), VARIABLE, topology)
    with pytest.raises(ExchangeError, match="pending"):
        exchange.start(message(world.rank, 1), VARIABLE, topology)
    pending.wait()
    exchange.start(message(world.rank, 1), VARIABLE, topology).wait()


def refusing_a_topology_of_another_size(world):
    with pytest.raises(TopologyError, match=f"made for {world.size + 1} ranks"):
        world.exchange(ring(world.size + 1))


def refusing_a_message_of_another_layout(world):
    topology = complete(world.size)
    exchange = world.exchange(topology)
    numel = 1000 if world.rank == 0 else 10
    pending = exchange.start({"x": torch.zeros(numel)}, Layout((Field("x", torch.float32, numel),)), topology)
    if world.size == 1:
        pending.wait()
    else:
        with pytest.raises(ExchangeError, match="message from rank"):
            pending.wait()


def summing_over_a_star_and_round_a_ring(world):
    """The sum that a server would form: the same bits on all ranks, and those of the messages added up by rank."""
    spec = Spec(("a", "b"), ((40, 20), (203,)))
    vectors = [
        torch.randn(spec.numel, generator=torch.Generator().manual_seed(rank)) * (rank + 1)
        for rank in range(world.size)
    ]
    weights = [(rank + 1) / 10 for rank in range(world.size)]
    shapes = (ring, star, lambda size: ring(size) if size < 4 else _crossed_ring(size))
    for topology, compressor in product(shapes, SUMMED):
        exchange = world.exchange(topology(world.size))
        aggregator = Aggregator(exchange)
        states = [compressor.init(spec, world.device, rank) for rank in range(world.size)]
        for _ in range(3):
            payloads = [compressor.compress(x, spec, state) for x, state in zip(vectors, states, strict=True)]
            expected = torch.zeros(spec.numel)
            for payload, weight in zip(payloads, weights, strict=True):
                compressor.accumulate(payload, spec, expected, weight)
            out = torch.full((spec.numel,), torch.nan)
            aggregator.average_(payloads[world.rank], compressor, spec, out, weights)
            assert torch.allclose(out, expected, rtol=1e-5, atol=1e-5)
            assert torch.equal(out, expected) or compressor.has_common_support
            assert len({digest.tobytes() for digest in world.all_gather((out + 0.0).numpy())}) == 1
            pending = aggregator.start(payloads[world.rank], compressor, spec, weights)
            at_servers = torch.full((spec.numel,), torch.nan)
            pending.wait_on_servers(at_servers)
            assert not aggregator.is_server or torch.allclose(at_servers, expected, rtol=1e-5, atol=1e-5)
            pending = aggregator.start(payloads[world.rank], compressor, spec, weights)
            if world.rank % 2 == 0:  # moved on meanwhile by some, the last exchanges left to `wait`
                for _ in range(world.size):
                    pending.test()
            looked = torch.full((spec.numel,), torch.nan)
            pending.wait(looked)
            assert torch.equal(looked, out)
            pending = aggregator.start(payloads[world.rank], compressor, spec, weights)
            until_there(world, pending)
            pending.wait(looked.fill_(torch.nan))
            assert torch.equal(looked, out)
        assert any(world.all_gather(aggregator.is_server))


def _crossed_ring(size):
    """A ring whose ranks are not in order."""
    order = [*range(0, size, 2), *range(1, size, 2)]
    mixing = np.eye(size) / 3
    for i, rank in enumerate(order):
        mixing[rank, order[i - 1]] = mixing[order[i - 1], rank] = 1 / 3
    return Topology("crossed", mixing)


def answering_from_the_servers(world):
    for topology in (ring, star):
        aggregator = Aggregator(world.exchange(topology(world.size)))
        layout = Layout((Field("x", torch.float32, 5),))
        mine = torch.arange(5.0) if aggregator.is_server else torch.full((5,), torch.nan)
        assert torch.equal(aggregator.answer({"x": mine}, layout)["x"], torch.arange(5.0))


def averaging_over_neighbors_alone(world):
    for topology in (ring, star):
        x = torch.arange(7.0) + 3 * world.rank
        Aggregator(world.exchange(topology(world.size))).mean_(x)
        assert torch.allclose(x, torch.arange(7.0) + 1.5 * (world.size - 1))


def averaging_over_all_ranks(world):
    exchange = world.exchange(ring(world.size))
    sent = 0
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for numel in (1, 1003):
            x = torch.arange(numel).to(dtype) % 50 + 2 * world.rank
            expected = (torch.arange(numel).to(dtype) % 50).double() + world.size - 1
            exchange.mean_(x)
            assert x.dtype == dtype
            assert torch.allclose(x.double(), expected, rtol=0.01 if dtype == torch.bfloat16 else 1e-6)
            sent += 2 * (world.size - 1) * numel * dtype.itemsize // world.size
    assert exchange.bytes_sent == sent


def averaging_in_the_order_of_ranks(world):
    # 1 + 2**-60 - 1 is lost in float64 in this order and kept in another.
    big = {0: 2.0**60, world.size - 1: -(2.0**60)}.get(world.rank, 1.0)
    x = torch.full((10,), big, dtype=torch.float64)
    world.mean_(x)
    total = 0.0
    for rank in range(world.size):
        total += {0: 2.0**60, world.size - 1: -(2.0**60)}.get(rank, 1.0)
    assert torch.equal(x, torch.full((10,), total / world.size, dtype=torch.float64))


def averaging_parameters_in_place(world):
    x = torch.nn.Parameter(torch.full((4, 3), float(world.rank)))
    world.mean_(x)
    assert torch.equal(x.detach(), torch.full((4, 3), (world.size - 1) / 2))


def sharing_objects(world):
    assert world.all_gather((world.rank, "x" * world.rank)) == [(rank, "x" * rank) for rank in range(world.size)]
    assert world.broadcast({"from": world.rank}) == {"from": 0}
    assert world.broadcast(None) is None
    assert world.all_gather(None) == [None] * world.size


def sharing_vectors(world):
    for x in (
        torch.full((5,), float(world.rank)),
        torch.arange(3) + world.rank,
        torch.ones(2, 2).bool() & (world.rank == 0),
    ):
        mine = x.clone()
        world.broadcast_(mine)
        assert torch.equal(mine, x - world.rank if x.dtype != torch.bool else torch.ones(2, 2).bool())


def knowing_ones_place(world):
    assert world.all_gather(world.rank) == list(range(world.size))
    assert 0 <= world.local_rank < world.local_size <= world.size
    assert world.host and world.device.type == "cpu"


TABLE = [
    sending_each_neighbor_a_message_of_its_own,
    looking_for_messages,
    on_a_ring,
    on_a_chain,
    on_a_star,
    on_a_complete_graph,
    on_a_torus_with_an_extent_of_one_or_two,
    on_a_directed_cycle,
    with_ranks_that_have_no_neighbor,
    on_one_peer_exponential,
    on_random_matchings_where_some_sit_out,
    with_ranks_of_different_speed,
    with_a_message_of_megabytes,
    with_layouts_that_grow_and_shrink,
    keeping_the_last_messages_until_the_next_start,
    with_two_exchanges_at_a_time,
    refusing_a_second_start,
    refusing_a_topology_of_another_size,
    refusing_a_message_of_another_layout,
    summing_over_a_star_and_round_a_ring,
    answering_from_the_servers,
    averaging_over_neighbors_alone,
    averaging_over_all_ranks,
    averaging_in_the_order_of_ranks,
    averaging_parameters_in_place,
    sharing_objects,
    sharing_vectors,
    knowing_ones_place,
]
