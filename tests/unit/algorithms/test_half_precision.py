"""Methods with a moment whose decay is near 1, for parameters in half precision."""

import copy

import pytest
import torch
from support.quadratic import DIM, Quadratic, centers, curvature
from torch import nn

from mpicomp.algorithms import DeMo, EfficientAdam, FedAdamSSM, OneBitAdam, SketchedAMSGrad
from mpicomp.compression import SignNorm, TopK
from mpicomp.exchange import loopback
from mpicomp.replica.distribute import distribute
from mpicomp.topology import ring, star

ADAMS = {
    "fedadam_ssm": FedAdamSSM(period=3),
    "efficient_adam": EfficientAdam(),
    "onebit_adam": OneBitAdam(freeze_step=1000),
    "sketched_amsgrad": SketchedAMSGrad(columns=DIM, k=DIM),
}
LOSSY = {
    "fedadam_ssm": FedAdamSSM(TopK(0.3), period=4),
    "efficient_adam": EfficientAdam(TopK(0.3), downlink=TopK(0.5)),
    "onebit_adam": OneBitAdam(SignNorm(), downlink=SignNorm(), freeze_step=3),
    "sketched_amsgrad": SketchedAMSGrad(columns=20, k=3, epsilon=0.1),
    "demo": DeMo(k=4),
}
HALF = [torch.float16, torch.bfloat16]
CENTER = torch.as_tensor(centers(1)[0])


def alone(method, dtype, steps, lr, offset, center=CENTER, change=lambda state: None):
    """Train one rank from its optimum plus `offset` (n,); return its model and its state."""

    def serve(world):
        local = Quadratic(center.to(dtype) + offset.to(dtype), center.to(dtype), lr)
        exchange = world.exchange(ring(1))
        state = method.init(local, exchange)
        change(state)
        for _ in range(steps):
            method.step(local, state, exchange)
        return local, state

    return loopback.run(1, serve)[0]


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("method", ADAMS.values(), ids=ADAMS)
def test_an_entry_without_a_gradient_stays_where_it_is(method, dtype):
    offset = torch.zeros(DIM)
    offset[DIM // 2 :] = 0.5
    local, _ = alone(method, dtype, 20, 0.01, offset)
    assert torch.equal(local.x[: DIM // 2], CENTER.to(dtype)[: DIM // 2])
    assert (local.x[DIM // 2 :].float() - CENTER[DIM // 2 :]).abs().max() < 0.4


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("method", ADAMS.values(), ids=ADAMS)
def test_a_second_moment_grows_with_small_gradients_and_decays(method, dtype):
    """The squares of 1e-4 are zero in float16; in bfloat16 what is added is soon rounded away."""
    _, state = alone(method, dtype, 600, 0.0, torch.full((DIM,), 1e-4), center=torch.zeros(DIM))
    g = torch.as_tensor(curvature(), dtype=dtype) * torch.full((DIM,), 1e-4, dtype=dtype)
    expected = (1 - 0.999**600) * g.double().square()
    assert state.v.dtype == torch.float32
    torch.testing.assert_close(state.v.double(), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_what_demo_has_not_sent_decays(dtype):
    before = torch.linspace(1, 2, DIM)

    def change(state):
        state.momentum.copy_(before)

    _, state = alone(DeMo(k=1, momentum=0.999), dtype, 1, 0.1, torch.zeros(DIM), change=change)
    is_left = state.momentum != 0
    assert int(is_left.sum()) == DIM - 2  # of two chunks
    torch.testing.assert_close(state.momentum[is_left], 0.999 * before[is_left], rtol=1e-5, atol=0)


@pytest.mark.parametrize("graph", [ring, star], ids=lambda g: g.__name__)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("method", LOSSY.values(), ids=LOSSY)
def test_training_and_an_exact_restart(method, dtype, graph):
    def make(world, seed=0):
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
        for p in model.parameters():
            p.data = (torch.randn(p.shape, generator=torch.Generator().manual_seed(seed + p.numel())) * 0.4).to(dtype)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, weight_decay=1e-3)
        return model, distribute(model, optimizer, method, graph, world=world)

    def train(world, stored=None):
        model, gossip = make(world, seed=0 if stored is None else 1)
        saved, losses, first = None, [], 0
        if stored is not None:
            gossip.load_state_dict(stored[world.rank])
            first = 6
        for step in range(first, 40):
            if step == 6:
                saved = copy.deepcopy(gossip.state_dict())
            draw = torch.Generator().manual_seed(3 * (step % 4) + world.rank)
            inputs = torch.randn(16, 6, generator=draw)
            labels = inputs[:, :3].argmax(dim=1)
            loss = gossip.step(lambda x=inputs, y=labels: nn.functional.cross_entropy(model(x.to(dtype)).float(), y))
            losses.append(float(loss))
        return gossip.local.x.clone(), losses, saved

    whole = loopback.run(3, train)
    again = loopback.run(3, train, [saved for _, _, saved in whole])
    for (x, losses, _), (x_again, losses_again, _) in zip(whole, again, strict=True):
        assert torch.equal(x, x_again) and losses[6:] == losses_again
        assert sum(losses[-4:]) < 0.95 * sum(losses[:4])
        assert torch.equal(x, whole[0][0])  # after 40 steps, a multiple of the period
