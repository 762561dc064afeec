"""Nodes of several ranks that hold one model: the graph joins nodes, and each rank exchanges its shard."""

import pytest
import torch
from support.nodes import METHODS, train_nodes
from support.runs import assert_same_checkpoint
from torch import nn

import mpicomp
from mpicomp.algorithms import DGC, DPSGD, Choco
from mpicomp.checkpoint.folder import Checkpoints
from mpicomp.compression import PerTensor, TopK
from mpicomp.compression.message import Spec
from mpicomp.config.config import RunConfig
from mpicomp.errors import CheckpointError, ConfigError, TopologyError
from mpicomp.exchange.loopback import run
from mpicomp.exchange.node_groups import checked_groups, groups_of, groups_of_size
from mpicomp.replica.node_shard import cut, part_of
from mpicomp.run.folder import RunFolder
from mpicomp.run.loop import train
from mpicomp.topology import ring


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("groups", [[[0, 1], [2, 3], [4, 5]], [[0, 3], [1, 4], [5, 2]]])
def test_a_node_is_a_rank_with_all_of_its_samples(name, groups):
    flat = run(3, train_nodes, METHODS[name])
    ranks = run(6, train_nodes, METHODS[name], groups)
    for number, group in enumerate(groups):
        for rank in group:
            assert torch.allclose(ranks[rank][0], flat[number][0], rtol=1e-10, atol=1e-12)
            assert torch.equal(ranks[rank][0], ranks[group[0]][0])  # all ranks of a node hold the same bits
    sent = sum(nbytes for _, nbytes in ranks)
    assert sent == pytest.approx(
        sum(nbytes for _, nbytes in flat), rel=0.05
    )  # once for each node, and not for each rank


def test_dgc_clips_by_the_norm_of_the_whole_gradient():
    """Of the mean over the node, whose entries are in the shards of both ranks."""

    def serve(world, groups):
        model = nn.Linear(8, 1, bias=False).double()
        nn.init.zeros_(model.weight)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        gossip = mpicomp.distribute(model, optimizer, DGC(momentum=0.0, clip="rms"), ring, None, world, groups=groups)
        first = gossip.node.number if gossip.node else world.rank
        g = torch.tensor([3.0, 0, 0, 0, 0, 0, 0, 10], dtype=torch.float64) * (first == 0)
        gossip.step(lambda: (model.weight @ g).sum())
        return model.weight.detach()

    flat, nodes = run(2, serve, None), run(4, serve, [[0, 1], [2, 3]])
    assert flat[0][0, 7] == pytest.approx(-((109 / 2) ** 0.5) / 2)
    assert all(torch.allclose(x, flat[0], rtol=1e-14, atol=0) for x in nodes)


def test_shards_are_compressed_by_themselves():
    ranks = run(4, train_nodes, Choco(0.2), [[0, 1], [2, 3]], PerTensor(TopK(0.25)))
    models = [x for x, _ in ranks]
    assert torch.equal(models[0], models[1]) and torch.equal(models[2], models[3])
    assert not torch.equal(models[0], models[2])


def test_shards_are_cut_between_rows():
    spec = Spec(("a", "b", "c"), ((10, 100), (10,), (2, 3, 5)))
    shards = cut(spec, 2)
    assert shards == [slice(0, 520), slice(520, 1040)]  # a row is a tenth of a shard, so it may be cut
    shards = cut(Spec(("a", "b"), ((100, 10), (7,))), 2)
    assert shards == [slice(0, 500), slice(500, 1007)]
    assert part_of(Spec(("a", "b"), ((100, 10), (7,))), shards[1]) == Spec(("a", "b"), ((50, 10), (7,)))
    assert part_of(spec, slice(520, 1040)) == Spec(("a", "b", "c"), ((480,), (10,), (2, 3, 5)))
    for count in range(1, 9):
        parts = [part_of(spec, shard) for shard in cut(spec, count)]
        assert sum(part.numel for part in parts) == spec.numel
        assert all(part.numel for part in parts)


def test_groups_are_checked():
    assert groups_of(["a", "b", "a", "b"]) == ((0, 2), (1, 3))
    assert groups_of_size(4, 2) == ((0, 1), (2, 3))
    assert checked_groups([[1, 0], [3, 2]], 4) == ((0, 1), (2, 3))
    for groups, message in (
        ([[0, 1], [1, 2]], "rank 1 is in two groups"),
        ([[0, 1], [2]], "rank 3 is in no group"),
        ([[0, 1], [2], [3]], "ranks 2 form a node of 1, and others one of 2"),
        ([[0, 1], [2, 4]], "groups name rank 4, and there are ranks 0 to 3"),
    ):
        with pytest.raises(ConfigError, match=message):
            checked_groups(groups, 4)
    with pytest.raises(ConfigError, match=r"topology\.node_size = 3 must divide the 4 ranks"):
        groups_of_size(4, 3)


def test_a_graph_of_ranks_is_refused_for_nodes():
    with pytest.raises(TopologyError, match="has 4 ranks, but there are 2 nodes"):
        run(4, lambda world: _distribute(world, topology=ring(4)))


def test_ranks_of_one_host_are_one_node():
    with pytest.raises(ConfigError, match="all 4 ranks are one node"):
        run(4, lambda world: _distribute(world, groups="host"))


def test_asynchronous_methods_are_refused():
    with pytest.raises(ConfigError, match="has no common steps"):
        run(4, lambda world: _distribute(world, mpicomp.algorithms.DCGossip(0.2)))


def test_ranks_of_a_node_that_differ_are_named():
    def serve(world):
        gossip = _distribute(world, Choco(0.2))
        for group in gossip.optimizer.param_groups:
            group["lr"] = 0.1 if world.rank < 3 else 0.2
        gossip.step(lambda: gossip.local.model(torch.ones(1, 3)).sum())

    with pytest.raises(ConfigError, match=r"rank 3 has the learning rates 0\.2, rank 2 0\.1: both need the same"):
        run(4, serve)


def _distribute(world, algorithm=None, topology=ring, groups=((0, 1), (2, 3))):
    model = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return mpicomp.distribute(model, optimizer, algorithm or DPSGD(), topology, None, world, groups=groups)


NODES = ["topology.level=node", "topology.node_size=2", "training.steps=20", "schedule.warmup=0", "run.log_every=5"]


def configured(name, *overrides):
    return RunConfig.load(f"configs/methods/{name}.toml", [*NODES, *overrides])


def test_sums_between_nodes_send_what_the_result_compares_with():
    result = run(6, lambda world: train(configured("ssgd"), world))[0]
    assert result.nodes == 3
    assert sum(result.bytes_sent) / 6 == pytest.approx(result.all_reduce_nbytes, rel=1e-3)


@pytest.mark.parametrize("name", ["choco", "adagossip", "gmc_plus", "local_sgd_choco", "powersgd", "motef", "lead"])
def test_a_run_continues_bit_for_bit(name, tmp_path):
    stops = ["checkpoint.every_steps=10", "checkpoint.every_minutes=", "schedule.kind=constant", "schedule.warmup="]
    folders = [RunFolder(tmp_path / part) for part in ("whole", "half")]
    for folder, steps in zip(folders, (20, 10), strict=True):
        config = configured(name, *stops, f"training.steps={steps}")
        RunFolder.create(folder.path).save_config(config)
        run(6, lambda world, c=config, f=folder: train(c, world, f))
    checkpoint = Checkpoints(folders[1].path / "checkpoints").latest()
    config = configured(name, *stops)
    run(6, lambda world: train(config, world, folders[1], checkpoint=checkpoint))
    whole, half = (Checkpoints(folder.path / "checkpoints").latest() for folder in folders)
    assert whole.manifest.step == half.manifest.step == 20
    assert_same_checkpoint(whole, half)


def test_shards_are_not_dealt_to_other_ranks(tmp_path):
    folder = RunFolder.create(tmp_path / "run")
    config = configured("choco")
    folder.save_config(config)
    run(6, lambda world: train(config, world, folder))
    checkpoint = Checkpoints(folder.path / "checkpoints").latest()
    longer = configured("choco", "training.steps=30")
    with pytest.raises(CheckpointError, match="--resize cannot deal"):
        run(4, lambda world: train(longer, world, folder, checkpoint=checkpoint, resize=True))


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("dc_gossip", [], "topology.level = 'node' does not go with algorithm.kind = 'dc_gossip'"),
        ("gmc", ["algorithm.weights=volume"], "topology.level = 'node': ratios and weights of a rank"),
        ("choco", ["topology.node_size=4"], "topology.node_size = 4 must divide the 6 ranks"),
        ("choco", ["topology.node_size=6"], "all 6 ranks are one node"),
        ("choco", ["topology.node_size="], "all 6 ranks are one node"),
    ],
)
def test_what_nodes_cannot_do_is_refused(name, overrides, message):
    config = configured(name, *overrides)
    with pytest.raises(ConfigError, match=message):
        run(6, lambda world: train(config, world))


def test_a_node_has_one_port():
    times = ["simulation.bytes_per_s=1e6", "simulation.gradient_s=0.001", "simulation.node_size=2"]
    config = configured("dpsgd", *times)
    result = run(6, lambda world: train(config, world), simulated=config.simulation.links())[0]
    of_a_node = sum(result.bytes_sent) / 3 / result.steps
    assert of_a_node == pytest.approx(2 * 4 * result.parameters, rel=0.01)  # a model to each of the two neighbor nodes
    assert result.seconds / result.steps == pytest.approx(0.001 + of_a_node / 1e6, rel=1e-3)
