import pytest
import torch
from torch import nn

from mpicomp.algorithms import ADPSGD, DPSGD
from mpicomp.errors import ConfigError
from mpicomp.exchange.loopback import run
from mpicomp.exchange.loopback.network import Links
from mpicomp.replica.distribute import distribute
from mpicomp.replica.flat import FlatModel
from mpicomp.topology import ring


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
    assert local.spec.names == ("unused", "0.weight", "0.bias", "1.weight", "1.bias", "2.bias")
    assert local.spec.numel == len(local.x) == 2 + 9 + 3 + 3 + 3 + 3
    local.closure = lambda: model(torch.randn(4, 3)).square().mean()
    g = local.gradient()
    assert g is local.g and g[:2].eq(0).all() and g[2:-3].ne(0).any() and g[-3:].eq(0).all()
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


def test_parameters_of_several_types_share_a_vector_of_the_widest():
    def train(flat):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5).bfloat16(), nn.LayerNorm(5), nn.Linear(5, 1).bfloat16())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        local = FlatModel(model, optimizer) if flat else None
        for _ in range(10):
            x = torch.randn(8, 4).bfloat16()

            def closure(x=x):
                optimizer.zero_grad()
                return model[2](model[1](model[0](x).float()).bfloat16()).float().square().mean()

            if local:
                local.closure = closure
                local.gradient()
                local.update()
                local.end_step()
            else:
                closure().backward()
                optimizer.step()
        if local:
            assert (
                local.x.dtype == torch.float32 and model[1].weight.data_ptr() == local.spec.split(local.x)[2].data_ptr()
            )
            assert torch.equal(local.x, nn.utils.parameters_to_vector([p.float() for p in model.parameters()]))
        return nn.utils.parameters_to_vector([p.float() for p in model.parameters()])

    assert torch.equal(train(True), train(False))


def two(*, frozen=()):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    for i in frozen:
        model[i].requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("model", "parameters", "message"),
    [
        (two(), lambda _: two().parameters(), "parameters that are not the model's: number 0 of group 0, shape"),
        (two(), lambda m: m[0].parameters(), "trainable parameters that the optimizer does not hold: 1.weight, 1.bias"),
        (two(frozen=(0, 1)), lambda m: m.parameters(), "no trainable parameters"),
        (nn.LazyLinear(2), lambda m: m.parameters(), "no shape yet: weight, bias"),
        (nn.DataParallel(two()), lambda m: m.parameters(), "wrapped in DataParallel"),
    ],
)
def test_model_and_optimizer_must_fit(model, parameters, message):
    with pytest.raises(ConfigError, match=message):
        FlatModel(model, torch.optim.SGD(parameters(model), lr=0.1))


@pytest.mark.parametrize("kind", [torch.optim.LBFGS, torch.optim.SparseAdam])
def test_optimizers_whose_step_cannot_be_made_are_refused(kind):
    model = two()
    with pytest.raises(ConfigError, match=kind.__name__):
        FlatModel(model, kind(model.parameters()))


def test_groups_are_parts_of_the_vector():
    model = two()
    groups = [{"params": [model[1].bias, model[0].weight], "lr": 0.5}, {"params": [model[1].weight, model[0].bias]}]
    local = FlatModel(model, torch.optim.SGD(groups, lr=0.1))
    assert [(part, group["lr"]) for part, group in local.groups] == [
        (slice(0, 4), 0.5),
        (slice(4, 8), 0.1),
        (slice(8, 9), 0.5),
    ]


def test_parameters_given_other_memory_are_taken_back():
    model = two()
    local = FlatModel(model, torch.optim.SGD(model.parameters(), lr=0.1))
    model[0].weight.data = torch.ones(2, 2)
    local.check()
    assert local.x[:4].eq(1).all()
    local.x.zero_()
    assert model[0].weight.eq(0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model, _: model.double(), r"parameter '0.weight' is torch.float64 .* and was torch.float32"),
        (lambda model, _: setattr(model, "more", nn.Linear(1, 1)), "trainable parameters since .*: more.weight"),
        (lambda model, _: model.__setitem__(1, nn.Linear(2, 3)), "trainable parameters since .*: 1.weight, 1.bias"),
        (lambda model, _: model.__delitem__(1), "lost parameters since .*: 1.weight, 1.bias"),
        (lambda _, o: o.add_param_group({"params": [nn.Parameter(torch.ones(3))]}), r"parameters of shapes \[\(3,\)\]"),
        (lambda _, o: o.param_groups[0]["params"].pop(), "optimizer has lost parameters .*: 1.bias"),
    ],
)
def test_what_has_changed_since_is_refused_by_name(change, message):
    model = two()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    local = FlatModel(model, optimizer)
    change(model, optimizer)
    with pytest.raises(ConfigError, match=message):
        local.check()


def test_something_may_be_done_between_the_layers():
    model = tied()
    local = FlatModel(model, torch.optim.SGD(model.parameters(), lr=0.1))
    local.closure = lambda: model(torch.ones(4, 3)).square().mean()
    plain, looks = local.gradient().clone(), []
    forward, backward = 3, len(local.spec.names) - 2  # layers, and parameters that are used and not frozen
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


def test_parameters_that_share_memory_without_being_one_are_refused():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight.data = model[0].weight.data
    with pytest.raises(ConfigError, match=r"0.weight and 1.weight share memory .* the same nn.Parameter"):
        FlatModel(model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_values_loaded_into_parameters_of_another_type_count():
    model = nn.Sequential(nn.Linear(2, 2).bfloat16(), nn.LayerNorm(2))
    local = FlatModel(model, torch.optim.SGD(model.parameters(), lr=0.1))
    model.load_state_dict({name: torch.full_like(p, 3.0) for name, p in model.state_dict().items()})
    local.check()
    assert local.x.eq(3).all()


def average_of_two_types(world, algorithm):
    """Train two ranks whose gradients are 0 and 1 for 8 steps; return the values of both types."""
    model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False).bfloat16())
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    gossip = distribute(model, optimizer, algorithm, ring(2), world=world)

    def loss():
        world.sleep(1.0)
        return sum(parameter.float().sum() for parameter in model.parameters()) * float(world.rank)

    for _ in range(8):
        gossip.step(loss)
    if isinstance(algorithm, ADPSGD):
        gossip.finish()
    return [parameter.detach().float() for parameter in model.parameters()]


@pytest.mark.parametrize("algorithm", [DPSGD(order="combine_then_adapt"), ADPSGD()])
def test_models_that_are_averaged_before_the_update_are_averaged_in_every_type(algorithm):
    for rank, (wide, narrow) in enumerate(run(2, average_of_two_types, algorithm, simulated=Links(0.01))):
        assert torch.equal(wide, narrow)
        assert torch.equal(wide, torch.full_like(wide, (-3.5, -4.5)[rank]))
