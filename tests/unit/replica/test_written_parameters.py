"""What a model, an optimizer or a script writes into parameters during a step is trained with, and mixed."""

import copy

import pytest
import torch
from torch import nn

from mpicomp.algorithms import ADPSGD, DPSGD, SSGD, Choco, DeMo, DiLoCo
from mpicomp.exchange.loopback import run
from mpicomp.replica.distribute import distribute
from mpicomp.topology import ring

METHODS = {
    "dpsgd": DPSGD(),
    "ssgd": SSGD(),
    "choco": Choco(0.5),
    "choco_overlapped": Choco(0.5, overlap=True),
    "diloco": DiLoCo(2),
}
FORMS = ["closure", "loop"]


def train(build, method, form, kind=torch.optim.SGD, steps=12, dtype=torch.float32, lr=0.1):
    """Return the parameters of 3 ranks (3, n) after steps towards another target on each rank."""

    def serve(world):
        model = build().to(dtype)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))
        gossip = distribute(model, kind(model.parameters(), lr=lr), METHODS[method], ring, world=world)
        for step in range(steps):
            inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(10 * step + world.rank)).to(dtype)
            loss = lambda inputs=inputs: ((model(inputs) - world.rank) ** 2).mean()  # noqa: E731
            if form == "closure":
                gossip.step(loss)
            else:
                loss().backward()
                gossip.optimizer.step()
                gossip.optimizer.zero_grad()
        return torch.cat([p.detach().flatten().clone() for p in model.parameters()])

    return torch.stack(run(3, serve))


class InPlace(torch.optim.Optimizer):
    """SGD that writes into the memory of parameters."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.move(p, p - group["lr"] * p.grad)

    def move(self, p, value):
        p.copy_(value)


class OtherMemory(InPlace):
    """The same SGD, which gives parameters other memory."""

    def move(self, p, value):
        p.data = value


class NormInPlace(nn.Linear):
    """A layer that limits the norm of its weight in its forward pass."""

    def forward(self, inputs):
        self.keep(torch.renorm(self.weight.data, 2, 0, 1.0))
        return super().forward(inputs)

    def keep(self, weight):
        self.weight.data.copy_(weight)


class NormInOtherMemory(NormInPlace):
    """The same layer, which gives its weight other memory."""

    def keep(self, weight):
        self.weight.data = weight


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", METHODS)
def test_other_memory_from_the_optimizer_is_as_writing_in_place(method, form):
    ours = train(lambda: nn.Linear(4, 4), method, form, OtherMemory)
    assert torch.equal(ours, train(lambda: nn.Linear(4, 4), method, form, InPlace))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", METHODS)
def test_other_memory_from_the_forward_pass_is_as_writing_in_place(method, form):
    ours = train(lambda: NormInOtherMemory(4, 4), method, form)
    assert torch.equal(ours, train(lambda: NormInPlace(4, 4), method, form))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", ["dpsgd", "ssgd", "choco_overlapped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_write_in_the_forward_pass_holds_in_every_type(dtype, method, form):
    class Clamped(nn.Linear):
        def forward(self, inputs):
            with torch.no_grad():
                self.weight.clamp_(-0.125, 0.125)
            return super().forward(inputs)

    build = lambda: Clamped(4, 4, bias=False)  # noqa: E731
    assert train(build, method, form, steps=1, dtype=dtype, lr=0.0).abs().max() == 0.125


class Momentum(nn.Module):
    """A query encoder, and a frozen key encoder that follows it in the forward pass, as of MoCo."""

    def __init__(self):
        super().__init__()
        self.query = nn.Linear(4, 4)
        self.key = copy.deepcopy(self.query).requires_grad_(False)

    def forward(self, inputs):
        with torch.no_grad():
            for key, query in zip(self.key.parameters(), self.query.parameters(), strict=True):
                key.mul_(0.5).add_(query, alpha=0.5)
        return self.query(inputs)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_encoder_follows_in_the_forward_pass(dtype, method, form):
    query, key = train(Momentum, method, form, lr=0.0, dtype=dtype).chunk(2, dim=1)
    assert (key - query).abs().max() < 0.02  # far apart at first


def test_a_frozen_part_is_not_mixed_while_a_rank_waits_for_others():
    def serve(world):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        gossip = distribute(model, torch.optim.SGD(model.parameters(), lr=0.1), ADPSGD(), ring, world=world)
        inputs = torch.randn(8, 4)

        def train(steps):
            for _ in range(steps):
                gossip.step(lambda: ((model(inputs) - world.rank) ** 2).mean())

        train(5)
        model[0].requires_grad_(False)
        frozen = model[0].weight.clone()
        train(2 if world.rank % 2 else 20)  # those of odd rank are averaged with in `finish`
        gossip.finish()
        assert torch.equal(model[0].weight, frozen)

    run(4, serve)


def test_methods_compute_in_their_own_precision_where_the_script_autocasts():
    def serve(world, is_on):
        model = nn.Linear(16, 16, bias=False)
        nn.init.ones_(model.weight)
        gossip = distribute(model, torch.optim.SGD(model.parameters(), lr=0.05), DeMo(), ring, world=world)
        for step in range(4):
            inputs = torch.randn(8, 16, generator=torch.Generator().manual_seed(10 * step + world.rank))
            (model(inputs) ** 2).mean().backward()
            with torch.autocast("cpu", torch.bfloat16, enabled=is_on):
                gossip.optimizer.step()
            gossip.optimizer.zero_grad()
        return model.weight.detach().clone()

    for ours, theirs in zip(run(2, lambda w: serve(w, True)), run(2, lambda w: serve(w, False)), strict=True):
        assert torch.equal(ours, theirs)
