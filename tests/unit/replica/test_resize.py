from dataclasses import replace

import networkx as nx
import pytest
import torch
from support import small
from torch import nn

from mpicomp.algorithms import (
    DEFATC,
    DGC,
    DPSGD,
    EFSGD,
    GMC,
    LEAD,
    SGP,
    AdaGossip,
    Choco,
    DeepSqueeze,
    DeMo,
    DiLoCo,
    EfficientAdam,
    LocalSGD,
    MoTEF,
    NoLoCo,
    PowerGossip,
    PowerSGD,
    SparseLoCo,
    StreamingDiLoCo,
)
from mpicomp.checkpoint.folder import Checkpoints
from mpicomp.compression import Natural, RandomK, TopK
from mpicomp.errors import CheckpointError
from mpicomp.exchange import loopback
from mpicomp.replica.distribute import distribute
from mpicomp.replica.resize import load_resized
from mpicomp.topology import directed_ring, from_graph, ring, star


def trained(world, folder, algorithm, topology=None, steps=6):
    gossip, closure = small.make(world, algorithm, topology)
    for step in range(steps):
        gossip.step(closure(step))
    gossip.save(folder)
    return copied(gossip.state_dict())


def resized(world, folder, algorithm, topology=None):
    gossip, closure = small.make(world, algorithm, topology, seed=1)
    fresh = copied(gossip.state_dict())
    load_resized(gossip, Checkpoints(folder).latest())
    state = copied(gossip.state_dict())
    losses = [float(gossip.step(closure(step))) for step in range(6, 30)]
    return fresh, state, losses


def copied(state):
    return {path: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for path, leaf in state.items()}


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize(
    "algorithm",
    [
        Choco(0.2, TopK(0.2)),
        AdaGossip(0.01, TopK(0.2)),
        DeepSqueeze(0.05, TopK(0.2)),
        DEFATC(0.2, TopK(0.2)),
        MoTEF(0.2, TopK(0.2)),
        LEAD(compressor=Natural()),
        SGP(0.2, TopK(0.2)),
        SGP(overlap=True),
        PowerGossip(),
        Choco(0.1, RandomK(0.2, shared=False)),
        LocalSGD(2, Choco(0.1, RandomK(0.2, shared=False))),
        LocalSGD(2, DeepSqueeze(0.05, TopK(0.2))),
        DiLoCo(2, outer_momentum=0.5),
        DiLoCo(2, outer_momentum=0.5, inner=Choco(0.2, TopK(0.2))),
        StreamingDiLoCo(4, fragments=2, delay=3, outer_momentum=0.5),
        NoLoCo(2),
        SparseLoCo(TopK(0.2), period=2),
        PowerSGD(),
        DeMo(chunk=4, k=2),
        NoLoCo(2, compressor=TopK(0.2)),
        EFSGD(TopK(0.2), error_average=0.5, smallest_ratio=0.1, ratio_period=4, gain_window=4, least_gain=0.1),
    ],
)
def test_what_becomes_of_the_state(tmp_path, algorithm, size):
    old = loopback.run(3, trained, tmp_path, algorithm)
    new = loopback.run(size, resized, tmp_path, algorithm)

    at = "algorithm/inner/" if hasattr(algorithm, "inner") else "algorithm/"
    messages = 3 if isinstance(algorithm, LocalSGD) else 6

    def mean(path):
        return sum(state[path].double() for state in old) / len(old)

    for fresh, state, losses in new:
        always = "model/parameters", "model/buffers/1.running_mean"
        for path in (*always, *(path for path in old[0] if path.startswith("optimizer/state/momentum_buffer/0"))):
            assert torch.allclose(state[path].double(), mean(path), atol=1e-6)
        assert state["model/buffers/1.num_batches_tracked"] == 6
        for copy in (f"{at}x_hat", f"{at}s", f"{at}copies/x_hat"):
            if copy in state:
                assert torch.equal(state[copy], state["model/parameters"])
        if f"{at}v" in state:
            assert torch.allclose(state[f"{at}v"].double(), mean(f"{at}v"), atol=1e-9)
        for slow in {"algorithm/phi", "algorithm/v", "algorithm/delta", "algorithm/d"} & state.keys():
            assert torch.allclose(state[slow], mean(slow).float(), atol=1e-6)
        if f"{at}feedback/ratio/level" in state:
            assert (state[f"{at}feedback/ratio/level"], state[f"{at}feedback/ratio/messages"]) == (1, 6)
            assert torch.equal(state[f"{at}feedback/ratio/norms"], old[0][f"{at}feedback/ratio/norms"])
        for fixed in {f"{at}dual", f"{at}ahead"} & state.keys():
            assert not state[fixed].any()  # their sum over the ranks must be 0, and is
        if f"{at}w" in state:
            assert state[f"{at}w"] == 1
        if f"{at}compressor/stream" in state:
            assert state[f"{at}compressor/stream"] == fresh[f"{at}compressor/stream"]
            assert state[f"{at}compressor/step"] == messages
        assert sum(losses[-5:]) < sum(losses[:5])
        for e in {f"{at}e", f"{at}error", f"{at}momentum", f"{at}feedback/residual"} & state.keys():
            assert mean(e).any() and torch.allclose(state[e].double(), mean(e), atol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 8])
@pytest.mark.parametrize(
    "algorithm",
    [
        EFSGD(TopK(0.05)),
        EFSGD(TopK(0.05), weights="volume", volumes=(500, 30, 10)),
        DGC(TopK(0.05), momentum=0.5, weights="volume", volumes=(500, 30, 10)),
        GMC(TopK(0.05), momentum=0.5, weights="volume", volumes=(500, 30, 10)),
        SparseLoCo(TopK(0.05), period=2, weights="volume", volumes=(500, 30, 10)),
        EfficientAdam(TopK(0.05), weights="volume", volumes=(500, 30, 10)),
    ],
    ids=lambda a: f"{a.name}-{a.weights}",
)
def test_what_errors_will_add_to_the_model_stays_on_any_number_of_ranks(tmp_path, algorithm, size):
    """It is the sum of ``w_k e_k`` over the ranks k, each with what it counts in the sum of the messages."""

    def effect(states, weights):
        path = "algorithm/v" if isinstance(algorithm, DGC) else next(name for name in states[0] if "residual" in name)
        return sum(w * state[path].double() for w, state in zip(weights, states, strict=True))

    old = loopback.run(3, trained, tmp_path, algorithm)
    other = replace(algorithm, volumes=tuple(range(1, size + 1)) if algorithm.volumes else ())
    new = [state for _, state, _ in loopback.run(size, resized, tmp_path, other)]
    before = effect(old, algorithm.rank_weights(3) or [1 / 3] * 3)
    assert before.any()
    assert torch.allclose(effect(new, other.rank_weights(size) or [1 / size] * size), before, atol=1e-7)


def test_push_sum_weights_count_in_the_mean_model(tmp_path):
    """SGP keeps the sum of the numerators ``w z``, so their mean is the model that the ranks would come to."""
    graph = from_graph(nx.DiGraph([(0, 1), (1, 2), (2, 3), (3, 0), (0, 2), (0, 3)]), weights="push")
    old = loopback.run(4, trained, tmp_path, SGP(), graph)
    weights = [float(state["algorithm/w"]) for state in old]
    assert max(weights) > 1.1
    path = "model/parameters"
    kept = sum(w * state[path].double() for w, state in zip(weights, old, strict=True)) / 4
    for _, state, _ in loopback.run(2, resized, tmp_path, SGP(), directed_ring):
        assert torch.allclose(state[path].double(), kept, atol=1e-7)
        assert state["algorithm/w"] == 1


class TwoBranches(nn.Module):
    def __init__(self):
        super().__init__()
        self.always, self.rarely = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x, both):
        return self.always(x) + (self.rarely(x) if both else 0)


@pytest.mark.parametrize("users", [(0,), (1, 2), (2,)])
def test_momentum_that_only_some_ranks_have_is_the_mean_over_these(tmp_path, users):
    def make(world):
        torch.manual_seed(0)
        model = TwoBranches()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return model, distribute(model, optimizer, DPSGD(), ring, world=world)

    def first(world):
        model, gossip = make(world)
        for step in range(3):
            inputs = torch.full((3, 4), 1.0 + world.rank + step)
            gossip.step(lambda x=inputs: model(x, world.rank in users).square().mean())
        gossip.save(tmp_path)
        return copied(gossip.state_dict())

    def go_on(world):
        _, gossip = make(world)
        load_resized(gossip, Checkpoints(tmp_path).latest())
        return copied(gossip.state_dict())

    old = loopback.run(3, first)
    for path, holders in {"always.weight": (0, 1, 2), "rarely.weight": users, "rarely.bias": users}.items():
        name = f"optimizer/state/momentum_buffer/{path}"
        assert [rank for rank in range(3) if name in old[rank]] == list(holders)
        mean = sum(old[rank][name].double() for rank in holders) / len(holders)
        for state in loopback.run(2, go_on):
            assert torch.allclose(state[name].double(), mean, atol=1e-6)


def test_messages_under_way_cannot_be_dealt_to_other_ranks(tmp_path):
    algorithm = EFSGD(TopK(0.2), overlap=True)
    loopback.run(3, trained, tmp_path, algorithm)
    with pytest.raises(CheckpointError, match=r"each of 3 ranks that is under way \(algorithm\.overlap = true\)"):
        loopback.run(2, resized, tmp_path, algorithm)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_what_is_particular_to_a_rank_begins_anew_whatever_its_shape(tmp_path, size):
    loopback.run(3, trained, tmp_path, PowerGossip(), star)
    for fresh, state, losses in loopback.run(size, resized, tmp_path, PowerGossip(), star):
        for path in ("algorithm/left", "algorithm/right"):
            assert torch.equal(state[path], fresh[path])
        assert state["algorithm/step"] == 6
        assert sum(losses[-5:]) < sum(losses[:5])


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("algorithm", [Choco("auto", TopK(0.2)), MoTEF("auto", TopK(0.2))], ids=lambda a: a.name)
def test_an_automatic_step_stays_until_the_new_ranks_have_measured_their_own(tmp_path, algorithm, size):
    def go_on(world, folder):
        gossip, closure = small.make(world, algorithm, ring, seed=1)
        load_resized(gossip, Checkpoints(folder).latest())
        found = []
        for step in range(44, 61):
            gossip.step(closure(step))
            found.append(gossip.state.automatic.gamma)
        return found

    (old, *_) = loopback.run(3, trained, tmp_path, algorithm, ring, 44)  # a window has 8 steps
    gamma = old["algorithm/automatic/gamma"]
    assert old["algorithm/automatic/means"][2] > 0  # it was found
    for found in (ranks := loopback.run(size, go_on, tmp_path)):
        assert found[: 55 - 44] == [gamma] * 11
        assert found[55 - 44 :] == [found[-1]] * 6
        assert (found[-1] != gamma) == (size > 1)  # a rank alone differs from nobody
        assert found == ranks[0]


SERVED = EfficientAdam(TopK(0.2), downlink=TopK(0.2))


def served(world, folder, topology):
    gossip, closure = small.make(world, SERVED, topology)
    for step in range(6):
        gossip.step(closure(step))
    gossip.save(folder)
    return copied(gossip.state_dict())


def served_again(world, folder, topology):
    gossip, closure = small.make(world, SERVED, topology, seed=1)
    load_resized(gossip, Checkpoints(folder).latest())
    state = copied(gossip.state_dict())
    for step in range(6, 9):
        gossip.step(closure(step))
    return state, gossip.local.x


def star_of_2(size):
    """A star whose hub is rank 2."""
    return from_graph(nx.Graph((2, rank) for rank in range(size) if rank != 2))


@pytest.mark.parametrize("before", [ring, star, star_of_2], ids=lambda t: t.__name__)
@pytest.mark.parametrize("after", [ring, star, star_of_2], ids=lambda t: t.__name__)
@pytest.mark.parametrize("size", [3, 5])
def test_new_servers_get_the_error_of_the_old_ones(tmp_path, before, after, size):
    path = "algorithm/messages/server_error"
    old = loopback.run(4, served, tmp_path, before)
    (error, *others) = [state[path] for state in old if state[path].numel()]
    assert error.any() and all(torch.equal(error, other) for other in others)
    new = loopback.run(size, served_again, tmp_path, after)
    for rank, (state, x) in enumerate(new):
        is_server = after is ring or rank == (2 if after is star_of_2 else 0)
        assert torch.equal(state[path], error) if is_server else state[path].numel() == 0
        assert torch.equal(x, new[0][1])


def test_the_momentum_of_gmc_is_kept(tmp_path):
    loopback.run(3, lambda world: trained(world, tmp_path, GMC(TopK(0.5), momentum=0.9)))

    def serve(world):
        gossip, _ = small.make(world, GMC(TopK(0.5), momentum=0.9), seed=1)
        load_resized(gossip, Checkpoints(tmp_path).latest())
        return float((gossip.local.x - gossip.state.previous).norm())

    old = Checkpoints(tmp_path).latest().read(0)
    assert loopback.run(2, serve) == pytest.approx(
        [float((old["model/parameters"] - old["algorithm/previous"]).norm())] * 2, rel=1e-5
    )
