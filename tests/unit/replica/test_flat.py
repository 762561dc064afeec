import copy

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


def test_parameters_and_statistics_are_unchanged_after_the_block():
    model = tied()
    local = FlatModel(model, torch.optim.SGD(model.parameters(), lr=0.1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with local.unchanged():
        model(torch.randn(4, 3))
        local.x.add_(1)
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
    with pytest.raises(ConfigError, match=r"0.weight and 1.weight are two parameters in the same memory"):
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_swapped_in_and_the_memory_that_they_have_replaced_both_stay(dtype):
    model = nn.Sequential(nn.Linear(3, 3, dtype=dtype), nn.LayerNorm(3))
    local = FlatModel(model, torch.optim.SGD(model.parameters(), lr=0.1))
    own, values = model[0].weight.data, model[0].weight.detach().clone()
    other = torch.full_like(own, 7.0)
    model[0].weight.data = other
    with local.unchanged():
        local.refresh()
        assert local.x[:9].eq(7).all()
        local.x.add_(1)
        local.show_parameters()
        assert model[0].weight.eq(8).all()
    assert model[0].weight.eq(7).all() and other.eq(7).all()
    model[0].weight.data = own
    assert torch.equal(own, values)
    local.check()
    assert torch.equal(local.x[:9].view(3, 3), values.float())


@pytest.mark.parametrize("zeroes", ["model", "optimizer", "local"])
def test_parameters_without_a_gradient_are_left_alone_as_by_torch(zeroes):
    def train(flat):
        torch.manual_seed(0)
        model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4, dtype=torch.bfloat16)])
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        local = FlatModel(model, optimizer) if flat else None
        if local:
            local.skips_absent = True
        for step in range(6):
            x = torch.randn(8, 4)
            outputs = model[0](x)
            if step % 3 == 0:
                outputs = outputs + model[1](x) + model[2](x.bfloat16())
            outputs.square().mean().backward()
            if local:
                local.take_gradients()
                local.update()
                local.end_step()
                {"model": model, "optimizer": optimizer, "local": local}[zeroes].zero_grad()
            else:
                optimizer.step()
                optimizer.zero_grad()
        return [p.detach() for p in model.parameters()]

    for ours, theirs in zip(train(True), train(False), strict=True):
        assert torch.equal(ours, theirs)


def test_buffers_in_unusual_memory_are_averaged():
    def serve(world):
        model = nn.Linear(4, 4)
        model.register_buffer("expanded", torch.full((1, 4), float(world.rank)).expand(3, 4))
        model.register_buffer("transposed", torch.arange(6.0).view(2, 3).t() + world.rank)
        model.register_buffer("sliced", torch.arange(6.0)[::2])
        model.same = model.sliced
        gossip = distribute(model, torch.optim.SGD(model.parameters(), lr=0.1), DPSGD(), ring, buffers=1, world=world)
        assert model.expanded.eq(0).all() and model.transposed[0, 1] == 3  # of rank 0
        model.expanded += world.rank
        gossip.step(lambda: model(torch.ones(2, 4)).sum())
        assert model.expanded.eq(0.5).all()
        model.sliced = torch.stack([model.sliced, model.sliced])[0:1].T.reshape(3)
        model.transposed = (model.transposed.t().contiguous() + 2 * world.rank).t()  # given later
        with gossip.averaged():
            assert model.transposed[0].tolist() == [1.0, 4.0]
        assert model.transposed[0].tolist() == [2.0 * world.rank, 3.0 + 2 * world.rank]

    run(2, serve)


@pytest.mark.parametrize("read", ["averaged", "average_", "averaged_state_dict"])
def test_values_loaded_into_parameters_of_several_types_are_averaged(read):
    def serve(world):
        model = nn.Sequential(nn.Linear(4, 4).bfloat16(), nn.LayerNorm(4))
        gossip = distribute(model, torch.optim.SGD(model.parameters(), lr=0.1), DPSGD(), ring, world=world)
        model.load_state_dict({name: torch.full_like(v, 2.0 * world.rank) for name, v in model.state_dict().items()})
        if read == "averaged":
            with gossip.averaged():
                found = copy.deepcopy(model.state_dict())
            assert all(v.eq(2.0 * world.rank).all() for v in model.state_dict().values())
        elif read == "average_":
            gossip.average_()
            found = model.state_dict()
        else:
            found = gossip.averaged_state_dict()
        assert all(v.eq(1).all() for v in found.values())

    run(2, serve)


def test_parameters_replaced_by_loading_are_refused_by_averaged():
    def serve(world):
        model = nn.Linear(4, 4)
        gossip = distribute(model, torch.optim.SGD(model.parameters(), lr=0.1), DPSGD(), ring, world=world)
        model.load_state_dict({name: torch.ones_like(v) for name, v in model.state_dict().items()}, assign=True)
        with pytest.raises(ConfigError, match=r"trainable parameters since mpicomp\.distribute"):
            gossip.averaged_state_dict()

    run(2, serve)
