import pytest
import torch
from torch import nn

from mpicomp.errors import ConfigError
from mpicomp.training.flat import FlatModel


def tied():
    """A model with a shared, a frozen and an unused parameter, and with a buffer."""
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    model[2].bias.requires_grad_(False)
    model.register_parameter("unused", nn.Parameter(torch.ones(2)))
    return model


def test_parameters_and_gradients_are_views():
    model = tied()
    local = FlatModel(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert local.spec.names == ("unused", "0.weight", "0.bias", "1.weight", "1.bias")
    assert local.spec.numel == len(local.x) == 2 + 9 + 3 + 3 + 3
    local.closure = lambda: model(torch.randn(4, 3)).square().mean()
    g = local.gradient()
    assert g is local.g and g[:2].eq(0).all() and g[2:].ne(0).any()
    assert torch.equal(model[0].weight.grad.flatten(), g[2:11])
    before = local.x.clone()
    local.update()
    torch.testing.assert_close(local.x, before - 0.1 * g)
    local.x.zero_()
    assert model[2].weight.eq(0).all()


def test_gradients_are_views_again_after_zero_grad():
    model = nn.Linear(2, 1)
    local = FlatModel(model, torch.optim.SGD(model.parameters(), lr=0.1))
    local.closure = lambda: model(torch.ones(1, 2)).sum()
    local.gradient()
    local.optimizer.zero_grad()
    assert local.gradient().tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "NAdam"])
def test_same_as_training_without_it_bit_for_bit(name):
    def train(flat):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
        optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.01, weight_decay=1e-2)
        local = FlatModel(model, optimizer) if flat else None
        for _ in range(10):
            x = torch.randn(8, 4)
            if local:
                local.closure = lambda x=x: model(x).square().mean()
                local.gradient()
                local.update()
            else:
                optimizer.zero_grad()
                model(x).square().mean().backward()
                optimizer.step()
        return nn.utils.parameters_to_vector(model.parameters())

    assert torch.equal(train(True), train(False))


def test_snapshot_restores_parameters_and_statistics():
    model = tied()
    local = FlatModel(model, torch.optim.SGD(model.parameters(), lr=0.1))
    snapshot = local.snapshot()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model(torch.randn(4, 3))
    local.x.add_(1)
    local.restore_(snapshot)
    after = model.state_dict()
    assert after.pop("1.num_batches_tracked") == 1  # a counter is not averaged, so it is not restored either
    assert all(torch.equal(after[name], before[name]) for name in after)


@pytest.mark.parametrize("dtypes", [(), (torch.float32, torch.float64)])
def test_one_type_of_parameters(dtypes):
    model = nn.ParameterList(nn.Parameter(torch.zeros(2, dtype=dtype)) for dtype in dtypes)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(ConfigError, match=r"must be of one type on one device, not: (none|torch.float32)"):
        FlatModel(model, optimizer)


def test_something_may_be_done_between_the_layers():
    model = tied()
    local = FlatModel(model, torch.optim.SGD(model.parameters(), lr=0.1))
    local.closure = lambda: model(torch.ones(4, 3)).square().mean()
    plain, looks = local.gradient().clone(), []
    forward, backward = 3, len(local.spec.names) - 1  # layers, and parameters that are used
    assert torch.equal(local.gradient(lambda: bool(looks.append(None))), plain)
    assert len(looks) == forward + backward
    looks.clear()
    local.gradient(lambda: looks.append(None) or len(looks) == 2)  # over and done with
    assert len(looks) == 2
    looks.clear()
    local.gradient()
    assert not looks


def test_an_error_between_the_layers_is_that_of_the_gradient():
    def fail():
        raise KeyError("lost")

    model = nn.Linear(2, 1)
    local = FlatModel(model, torch.optim.SGD(model.parameters(), lr=0.1))
    local.closure = lambda: model.weight.sum()  # no layer: in the backward pass
    with pytest.raises(KeyError, match="lost"):
        local.gradient(fail)
    local.gradient()
