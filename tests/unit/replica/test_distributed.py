import pytest
import torch
from support import small
from torch import nn

from mpicomp.algorithms import DEFATC, DPSGD, SGP, SSGD, Choco, DCGossip, DiLoCo, LocalSGD
from mpicomp.compression import ByRank, TopK, allocate
from mpicomp.errors import CheckpointError, ConfigError, DivergenceError, TopologyError
from mpicomp.exchange import loopback
from mpicomp.replica.distribute import distribute
from mpicomp.topology import exponential, ring


def linear(world, algorithm=None, topology=ring, **options):
    model = nn.Linear(2, 1)
    nn.init.constant_(model.weight, world.rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return distribute(model, optimizer, algorithm or DPSGD(), topology, world=world, **options)


def test_all_ranks_start_from_rank_0():
    for x in loopback.run(3, lambda world: linear(world).local.x):
        assert x[:2].eq(0).all()


def test_what_is_not_trained_is_rank_0s_too():
    def serve(world):
        model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        model[0].requires_grad_(False)
        nn.init.constant_(model[0].weight, world.rank)
        model[1].num_batches_tracked.fill_(world.rank)
        distribute(model, torch.optim.SGD(model[1].parameters(), lr=0.1), DPSGD(), ring, world=world)
        return model.state_dict()

    first, *others = loopback.run(3, serve)
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)


def test_a_topology_may_be_a_function_or_a_graph():
    for topology in (ring, ring(3)):
        assert loopback.run(3, lambda world, t=topology: linear(world, topology=t).schedule.name) == ["ring"] * 3


@pytest.mark.parametrize("around", [lambda inner: inner, lambda inner: LocalSGD(4, inner), lambda c: DiLoCo(inner=c)])
def test_a_compressor_takes_the_place_of_the_algorithms(around):
    def serve(world):
        return linear(world, around(Choco(gamma=0.2)), compressor=TopK(ratio=0.5)).algorithm

    assert loopback.run(2, serve) == [around(Choco(0.2, TopK(0.5)))] * 2


def test_a_script_of_ones_own_shares_out_by_its_volumes():
    def serve(world):
        dataset = range([8, 1, 27, 1][world.rank])
        compressor = allocate(TopK(ratio=0.2), world.all_gather(len(dataset)))
        return linear(world, Choco(gamma=0.1), compressor=compressor).algorithm.compressor

    (first, *others) = loopback.run(4, serve)
    assert isinstance(first, ByRank) and others == [first] * 3
    assert first.compressors[2].ratio == pytest.approx(0.8 * 9 / 15)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"algorithm": SSGD(), "compressor": TopK(0.5)}, ConfigError, "SSGD sends uncompressed messages"),
        ({"algorithm": DiLoCo(), "compressor": TopK(0.5)}, ConfigError, "DiLoCo sends uncompressed messages"),
        ({"topology": ring(7)}, TopologyError, "'ring' has 7 ranks, but there are 5"),
        ({"algorithm": Choco(0.1), "topology": exponential}, TopologyError, "directed graph"),
    ],
)
def test_what_does_not_fit_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        loopback.run(5, lambda world: linear(world, **options))


def test_averaged_gives_the_mean_and_then_the_own_model_again():
    def serve(world):
        gossip = linear(world)
        gossip.local.x.fill_(world.rank)
        with gossip.averaged() as model:
            inside = model.weight.detach().clone()
        return inside, gossip.local.x.clone(), gossip.consensus_distance(), gossip.bytes_sent

    for rank, (inside, own, distance, sent) in enumerate(loopback.run(3, serve)):
        assert inside.eq(1).all()
        assert own.eq(rank).all()
        assert distance == pytest.approx((2 / 3 * 3) ** 0.5)  # 3 parameters, variance 2/3
        assert sent == 0


def test_nan_names_step_and_rank():
    def serve(world):
        gossip, closure = small.make(world, DPSGD())
        for step in range(5):
            scale = float("nan") if (step, world.rank) == (3, 1) else 1.0
            loss = closure(step)
            gossip.step(lambda s=scale, loss=loss: s * loss())

    with pytest.raises(
        DivergenceError, match=r"the loss is nan \(first in .+\) at step 3 on rank 1: lower optimizer.lr"
    ):
        loopback.run(3, serve)


def test_nan_in_a_message_names_tensor_step_and_rank():
    def serve(world):
        gossip, closure = small.make(world, Choco(0.1, TopK(0.5)))
        gossip.local.optimizer.param_groups[0]["lr"] = float("nan")
        gossip.step(closure(0))

    with pytest.raises(DivergenceError, match=r"NaN among the values to be compressed \(first in .+\) at step 0 on"):
        loopback.run(3, serve)


@pytest.mark.parametrize("method", [Choco, DEFATC, SGP, DCGossip], ids=lambda method: method.__name__)
def test_public_copies_that_run_away_end_training_in_a_loop_without_metrics(method):
    """By a consensus step that is too large for what is sent; a small one trains."""

    def serve(world, gamma):
        torch.manual_seed(0)
        model, generator = nn.Linear(40, 10), torch.Generator().manual_seed(world.rank)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        gossip = distribute(model, optimizer, method(gamma, TopK(0.02)), ring, world=world)
        for _ in range(200):
            inputs = torch.randn(16, 40, generator=generator)
            gossip.step(lambda x=inputs: nn.functional.cross_entropy(model(x), x[:, :10].argmax(dim=1)))
        if method is DCGossip:
            gossip.finish()

    loopback.run(4, serve, 0.05)
    message = (
        r"the public copies have left .* at step \d+0 on rank \d\): algorithm.gamma is too large .* with DEF-ATC, "
    )
    with pytest.raises(DivergenceError, match=message):
        loopback.run(4, serve, 0.9)


def test_public_copies_that_follow_a_loaded_model_do_not_run_away():
    """They are far from it for more than 80 steps: one entry of 410 is sent in a step."""

    def serve(world):
        torch.manual_seed(0)
        model = nn.Linear(40, 10)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        gossip = distribute(model, optimizer, Choco(0.01, TopK(0.0025)), ring, world=world)
        torch.manual_seed(1)
        model.load_state_dict({name: 0.03 * torch.randn_like(p) for name, p in model.state_dict().items()})
        errors = []
        for _ in range(100):
            gossip.step(lambda: model(torch.ones(1, 40)).sum())
            errors.append(gossip.algorithm.diagnostics(gossip.part, gossip.state)["compression_error"])
        return errors

    for errors in loopback.run(4, serve):
        assert errors[0] > 2 and errors[79] > 1  # at four looks


def test_the_state_of_another_algorithm_is_refused():
    def serve(world):
        linear(world, Choco(0.1)).load_state_dict(linear(world, DPSGD()).state_dict())

    with pytest.raises(CheckpointError, match=r"the stored state is another one"):
        loopback.run(2, serve)


@pytest.mark.parametrize("algorithm", [DPSGD, "dpsgd"])
def test_an_algorithm_is_an_object(algorithm):
    with pytest.raises(ConfigError, match=r"algorithm = .* must be an object of mpicomp.algorithms"):
        loopback.run(2, lambda world: linear(world, algorithm))


def test_a_step_takes_a_function():
    def serve(world):
        gossip = linear(world)
        gossip.step(gossip.local.model(torch.ones(1, 2)).sum())

    with pytest.raises(ConfigError, match=r"gossip.step\(\) takes a function that computes the loss, not a Tensor"):
        loopback.run(2, serve)
