"""What a replica gives away: the averaged model, and checkpoints with what is the caller's own."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from support import small, tied
from torch import nn

from mpicomp.algorithms import DPSGD, Choco, EfficientAdam
from mpicomp.checkpoint import export
from mpicomp.checkpoint.folder import MANIFEST, Checkpoints
from mpicomp.compression import TopK
from mpicomp.errors import CheckpointError, ConfigError, DivergenceError
from mpicomp.exchange import loopback
from mpicomp.replica.distribute import distribute
from mpicomp.replica.state import aliases, load_model_, model_leaves
from mpicomp.topology import ring, star

CHOCO = Choco(gamma=0.2, compressor=TopK(ratio=0.3))


def test_averaged_is_in_evaluation_mode_and_every_module_in_its_former_one_afterwards():
    def serve(world):
        gossip, _ = small.make(world, CHOCO)
        model = gossip.local.model
        model.train()
        model[1].eval()  # a norm that stays as it is in training
        before = [module.training for module in model.modules()]
        with gossip.averaged() as mean_model:
            inside = [module.training for module in mean_model.modules()]
            model.train()  # an evaluation that ends as most do
        after = [module.training for module in model.modules()]
        with pytest.raises(ZeroDivisionError), gossip.averaged():
            raise ZeroDivisionError
        return before, inside, after, [module.training for module in model.modules()]

    for before, inside, after, after_error in loopback.run(2, serve):
        assert before == [True, True, False, True, True]
        assert not any(inside)
        assert before == after == after_error


def test_an_error_in_the_block_leaves_the_own_parameters():
    def serve(world):
        gossip, closure = small.make(world, CHOCO)
        gossip.step(closure(0))
        own = gossip.local.x.clone()
        with pytest.raises(ZeroDivisionError), gossip.averaged():
            raise ZeroDivisionError
        return torch.equal(own, gossip.local.x)

    assert loopback.run(3, serve) == [True] * 3


def test_rank_0_alone_may_evaluate():
    def serve(world):
        gossip, closure = small.make(world, CHOCO)
        losses = []
        for step in range(4):
            gossip.step(closure(step))
            with gossip.averaged(), torch.no_grad():
                if world.rank == 0:
                    losses.append(float(closure(99)()))
        return losses

    first, *others = loopback.run(3, serve)
    assert len(first) == 4 and first[-1] < first[0]
    assert others == [[], []]


@pytest.mark.parametrize("look", ["averaged", "averaged_state_dict"])
def test_looking_at_the_averaged_model_leaves_training_as_it_is(look):
    def serve(world, looks):
        gossip, closure = small.make(world, CHOCO)
        for step in range(6):
            gossip.step(closure(step))
            if looks and look == "averaged":
                with gossip.averaged() as model:
                    model(torch.randn(5, 6, generator=torch.Generator().manual_seed(step)))
            elif looks:
                gossip.averaged_state_dict()
        return {path: leaf for path, leaf in gossip.state_dict().items() if not path.startswith("random/")}

    for ours, theirs in zip(
        loopback.run(3, lambda world: serve(world, True)),
        loopback.run(3, lambda world: serve(world, False)),
        strict=True,
    ):
        assert ours.keys() == theirs.keys()
        for path, leaf in ours.items():
            same = torch.equal(leaf, theirs[path]) if isinstance(leaf, torch.Tensor) else leaf == theirs[path]
            assert same, path


def test_averaged_state_dict_is_the_state_dict_of_the_averaged_model():
    def serve(world):
        gossip = tied.train(world)
        gossip.local.model.norm.num_batches_tracked.fill_(world.rank)
        found = gossip.averaged_state_dict()
        with gossip.averaged() as model:
            expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        own = gossip.local.model.state_dict()
        gossip.step(tied.closure(gossip.local.model, world.rank, 9))
        return found, expected, own

    results = loopback.run(3, serve)
    for rank, (found, expected, own) in enumerate(results):
        assert list(found) == list(expected) == list(own)
        for name, tensor in found.items():
            assert torch.equal(tensor, expected[name]), name
            assert (type(tensor), tensor.requires_grad, tensor.device.type) == (torch.Tensor, False, "cpu")
            assert tensor.data_ptr() != own[name].data_ptr()
        assert found["head.weight"] is found["embedding.weight"]
        assert found["again.bias"] is found["middle.bias"]
        assert found["norm.num_batches_tracked"] == rank
        assert torch.equal(found["norm.running_mean"], results[0][0]["norm.running_mean"])
        assert not torch.equal(found["head.weight"], own["head.weight"])
        tied.Tied().load_state_dict(found, strict=True)


class Odd(nn.Module):
    """A module with a buffer of two names, one that is not stored, and a state of its own."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.register_buffer("mean", torch.ones(2))
        self.register_buffer("same", self.mean)
        self.register_buffer("scratch", torch.ones(2), persistent=False)
        self.register_buffer("scratch_too", self.scratch, persistent=False)
        self.notes = ["a"]

    def get_extra_state(self):
        return self.notes

    def set_extra_state(self, state):
        self.notes = state


def test_aliases_are_those_of_parameters_and_stored_buffers():
    assert aliases(Odd()) == {"same": "mean"}
    assert aliases(tied.Tied()) == {
        "again.weight": "middle.weight",
        "again.bias": "middle.bias",
        "head.weight": "embedding.weight",
    }


def test_a_modules_own_state_is_copied():
    def serve(world):
        model = Odd()
        gossip = distribute(model, torch.optim.SGD(model.parameters(), lr=0.1), CHOCO, ring, world=world)
        found = gossip.averaged_state_dict()
        model.notes.append("b")
        return found

    for found in loopback.run(2, serve):
        assert found["_extra_state"] == ["a"]
        assert found["same"] is found["mean"]
        Odd().load_state_dict(found, strict=True)


def test_a_model_of_the_time_before_aliases_is_loaded():
    def serve(world):
        gossip = tied.train(world)
        stored = {path: leaf for path, leaf in model_leaves(gossip.local).items() if path != "model/aliases"}
        stored = {path: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for path, leaf in stored.items()}
        gossip.step(tied.closure(gossip.local.model, world.rank, 9))
        load_model_(gossip.local, stored)
        return torch.equal(gossip.local.x, stored["model/parameters"])

    assert loopback.run(2, serve) == [True, True]


def test_extra_comes_back_to_each_rank_with_its_structure(tmp_path):
    def extra(world):
        return {"epoch": 3, "rank": world.rank, "sampler": {"order": torch.arange(world.rank), 7: (None, [True])}}

    def serve(world):
        gossip, closure = small.make(world, CHOCO)
        gossip.step(closure(0))
        gossip.save(tmp_path, extra=extra(world))
        back = small.make(world, CHOCO)[0].resume(tmp_path)
        order = back["sampler"].pop("order")
        return back, order

    for rank, (back, order) in enumerate(loopback.run(3, serve)):
        assert back == {"epoch": 3, "rank": rank, "sampler": {7: (None, [True])}}
        assert torch.equal(order, torch.arange(rank))


def test_extra_that_one_rank_cannot_store_is_refused_on_every_rank_and_nothing_is_written(tmp_path):
    def serve(world):
        gossip, closure = small.make(world, CHOCO)
        gossip.save(tmp_path)
        gossip.step(closure(0))
        with pytest.raises(CheckpointError) as caught:
            gossip.save(tmp_path, extra={"scheduler": {"lr_lambdas": [None if world.rank != 1 else print]}})
        gossip.step(closure(1))
        return str(caught.value), sorted(path.name for path in tmp_path.iterdir())

    for message, names in loopback.run(3, serve):
        assert message.startswith("extra['scheduler']['lr_lambdas'][0] is of type builtin_function_or_method, which ")
        assert message.endswith("(on rank 1)")
        assert names == ["latest", "step_00000000"]


def test_a_damaged_checkpoint_is_no_obstacle_to_the_next_one(tmp_path):
    def serve(world):
        gossip, closure = small.make(world, CHOCO)
        gossip.save(tmp_path)
        world.barrier()
        if world.rank == 0:
            (tmp_path / "step_00000000" / MANIFEST).write_text("{}")
        gossip.step(closure(0))
        gossip.save(tmp_path)
        gossip.resume(tmp_path)
        return gossip.steps

    assert loopback.run(2, serve) == [1, 1]


def test_a_training_does_not_replace_the_later_checkpoints_of_another(tmp_path):
    """A script that forgets `resume` would remove what it has trained."""

    def serve(world):
        gossip, closure = small.make(world, CHOCO)
        for step in range(3):
            gossip.step(closure(step))
        gossip.save(tmp_path)
        anew, closure = small.make(world, CHOCO)
        anew.step(closure(0))
        with pytest.raises(ConfigError, match=r"save\(\) at step 1 in .* would remove the checkpoint of step 3"):
            anew.save(tmp_path)
        anew.save(tmp_path, keep_last=0)  # keeps all
        kept = sorted(path.name for path in tmp_path.glob("step_*"))
        world.barrier()
        other, closure = small.make(world, CHOCO)
        other.step(closure(0))
        other.resume(tmp_path, step=3)
        other.resume(tmp_path, step=1)
        other.step(closure(1))
        other.save(tmp_path)  # has gone back
        return kept, sorted(path.name for path in tmp_path.glob("step_*"))

    for kept, after in loopback.run(2, serve):
        assert kept == ["step_00000001", "step_00000003"] and after == ["step_00000001", "step_00000002"]


def test_a_scheduler_that_is_made_after_resume_is_named(tmp_path):
    def serve(world):
        gossip, _ = small.make(world, CHOCO)
        torch.optim.lr_scheduler.StepLR(gossip.local.optimizer, 2)
        gossip.save(tmp_path)
        with pytest.raises(CheckpointError, match="those of a scheduler, make it before resume"):
            small.make(world, CHOCO)[0].resume(tmp_path)

    loopback.run(2, serve)


def test_a_layer_may_be_frozen_between_save_and_resume(tmp_path):
    def serve(world):
        gossip, closure = small.make(world, CHOCO)
        gossip.step(closure(0))
        gossip.save(tmp_path)
        own = gossip.local.x.clone()
        other, _ = small.make(world, CHOCO, seed=1)
        other.local.model[0].requires_grad_(False)
        other.resume(tmp_path)
        return torch.equal(own, other.local.x)

    assert loopback.run(2, serve) == [True, True]


def test_a_modules_own_state_is_restored(tmp_path):
    def serve(world):
        def make():
            model = Odd()
            return distribute(model, torch.optim.SGD(model.parameters(), lr=0.1), CHOCO, ring, world=world)

        gossip = make()
        gossip.local.model.notes += [world.rank, torch.ones(2)]
        gossip.save(tmp_path)
        other = make()
        other.resume(tmp_path)
        return other.local.model.notes

    for rank, (name, number, tensor) in enumerate(loopback.run(2, serve)):
        assert (name, number, tensor.tolist()) == ("a", rank, [1.0, 1.0])


def test_a_state_of_the_optimizer_that_belongs_to_no_parameter_is_refused(tmp_path):
    def serve(world):
        gossip, _ = small.make(world, CHOCO)
        gossip.local.optimizer.state["count"] = {"steps": 1}
        with pytest.raises(CheckpointError, match=r"keeps state\['count'\], which belongs to no parameter"):
            gossip.save(tmp_path)

    loopback.run(2, serve)


@dataclass(frozen=True)
class Filtered(DPSGD):
    """A method of a user with a function and an object, whose texts have addresses."""

    of: Callable[[float], float] = abs
    by: object = None


def test_an_algorithm_whose_text_has_addresses_is_resumed(tmp_path):
    def make(world, of):
        return small.make(world, Filtered(of=of, by=object()), ring)[0]

    def halved(x):
        return x / 2

    def serve(world):
        gossip = make(world, lambda x: 2 * x)
        gossip.save(tmp_path)
        assert " at 0x" in repr(gossip.algorithm)
        assert make(world, lambda x: 2 * x).resume(tmp_path) == {}
        with pytest.raises(CheckpointError, match=r"is of the algorithm Filtered.*lambda.*this run has .*halved"):
            make(world, halved).resume(tmp_path)

    loopback.run(2, serve)


@pytest.mark.parametrize("of", [torch.tensor, lambda lr: torch.tensor(lr, dtype=torch.float64), np.float32])
def test_a_learning_rate_may_be_a_tensor_or_a_number_of_numpy(tmp_path, of):
    def serve(world):
        def make(lr):
            model = nn.Linear(2, 2)
            optimizer = torch.optim.Adam(model.parameters(), lr=of(lr), betas=(0.8, 0.9), foreach=False)
            return distribute(model, optimizer, CHOCO, ring, world=world)

        make(0.1).save(tmp_path)
        other = make(0.5)
        other.resume(tmp_path)
        (group,) = other.optimizer.param_groups
        return group["lr"], group["betas"]

    for lr, betas in loopback.run(2, serve):
        assert lr.dtype == of(0.1).dtype and lr.item() == of(0.1).item() and betas == (0.8, 0.9)


class MixedStates(torch.optim.Optimizer):
    """SGD with states of other types than the parameters, as optimizers for short types keep them."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.01})

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            if not self.state[p]:
                self.state[p] = {
                    "step": torch.tensor(0.0),
                    "long": torch.zeros(p.shape, dtype=torch.float64),
                    "short": torch.zeros(p.shape, dtype=torch.bfloat16),
                    "bytes": torch.zeros(p.shape, dtype=torch.uint8),
                    "count": torch.tensor(0),
                }
            kept = self.state[p]
            kept["step"] += 1
            kept["count"] += 1
            kept["long"].mul_(0.9).add_(p.grad.double())
            kept["short"].mul_(0.9).add_(p.grad.bfloat16())
            kept["bytes"] += (p.grad > 0).byte()
            p.sub_((self.param_groups[0]["lr"] * (kept["long"] + kept["short"])).to(p.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "optimizer",
    [MixedStates, torch.optim.NAdam, torch.optim.ASGD, torch.optim.AdamW, lambda ps: [torch.optim.NAdam(list(ps))]],
)
def test_the_optimizers_state_keeps_its_types(tmp_path, optimizer, dtype):
    """torch's `load_state_dict` converts all but ``step`` to the type of the parameter."""

    def serve(world):
        def make():
            model = nn.Linear(3, 2).to(dtype)
            return model, distribute(model, optimizer(model.parameters()), CHOCO, ring, world=world)

        def step(model, gossip, number):
            inputs = batch_of(number, world.rank).to(dtype)
            gossip.step(lambda: model(inputs).float().square().sum())

        model, gossip = make()
        for number in range(4):
            step(model, gossip, number)
        gossip.save(tmp_path)
        other, resumed = make()
        resumed.resume(tmp_path)
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            kept, loaded = gossip.local.optimizer.state[p], resumed.local.optimizer.state[q]
            assert {key: (t.dtype, t.device) for key, t in loaded.items()} == {
                key: (t.dtype, t.device) for key, t in kept.items()
            }
            assert all(torch.equal(loaded[key], value) for key, value in kept.items())
        for number in range(4, 8):
            step(model, gossip, number)
            step(other, resumed, number)
        return torch.equal(gossip.local.x, resumed.local.x)

    assert loopback.run(2, serve) == [True] * 2


def batch_of(step, rank):
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(10 * step + rank))


def test_a_refused_model_may_be_distributed_otherwise():
    def serve(world):
        model = nn.Linear(2, 2)
        with pytest.raises(ConfigError, match="Adam"):
            distribute(model, torch.optim.RMSprop(model.parameters()), EfficientAdam(), star, world=world)
        distribute(model, torch.optim.SGD(model.parameters()), CHOCO, ring, world=world)

    loopback.run(2, serve)


def test_buffers_are_restored_after_the_block_whatever_it_has_done_to_them():
    def serve(world):
        model = nn.Linear(2, 2)
        model.register_buffer("table", torch.tensor([0.1, 0.3]))
        gossip = distribute(model, torch.optim.SGD(model.parameters(), lr=0.1), CHOCO, ring, world=world)
        with gossip.averaged():
            if world.rank == 0:
                model.half()
        assert model.table.dtype == torch.float32
        with gossip.averaged():
            model.table = torch.ones(5)
        assert torch.equal(model.table, torch.tensor([0.1, 0.3]))

    loopback.run(2, serve)


def test_buffers_that_differ_between_ranks_are_refused_by_name_unless_they_are_not_stored():
    def serve(world, persistent):
        model = nn.Linear(2, 2)
        model.register_buffer("table", torch.ones(2), persistent=persistent)
        gossip = distribute(model, torch.optim.SGD(model.parameters(), lr=0.1), CHOCO, ring, world=world)
        if world.rank == 1:
            model.table = torch.ones(5)
        with gossip.averaged():
            return len(model.table)

    assert loopback.run(2, lambda world: serve(world, False)) == [2, 5]
    with pytest.raises(ConfigError, match=r"rank 1 has another model than rank 0: table is .*\(5,\).*persistent=False"):
        loopback.run(2, lambda world: serve(world, True))


def test_a_sparse_buffer_is_refused_by_name():
    def serve(world):
        model = nn.Linear(2, 2)
        model.register_buffer("adjacency", torch.eye(2).to_sparse())
        distribute(model, torch.optim.SGD(model.parameters()), CHOCO, ring, world=world)

    with pytest.raises(ConfigError, match=r"buffers must be dense, not: adjacency"):
        loopback.run(2, serve)


def test_parameters_that_the_optimizer_does_not_hold_are_stored(tmp_path):
    def make(world, value):
        model = tied.Tied()
        model.middle.requires_grad_(False).weight.fill_(value)
        trained = [p for p in model.parameters() if p.requires_grad]
        return distribute(model, torch.optim.SGD(trained, lr=0.1), CHOCO, ring, world=world)

    def serve(world):
        make(world, 3.0).save(tmp_path)
        gossip = make(world, 0.0)
        gossip.resume(tmp_path)
        return gossip.local.model.middle.weight.eq(3).all(), gossip.averaged_state_dict()

    results = loopback.run(2, serve)
    for is_back, found in results:
        assert is_back
        assert found["again.weight"].eq(3).all()
    exported, expected = export.mean_model(Checkpoints(tmp_path).latest()), results[0][1]
    assert exported.keys() == expected.keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in expected.items())


def test_a_compiled_model_is_exported_by_its_plain_names(tmp_path):
    def serve(world):
        model = torch.compile(tied.Tied(), backend="eager")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        gossip = distribute(model, optimizer, CHOCO, ring, world=world)
        gossip.save(tmp_path)
        assert gossip.averaged_state_dict().keys() == model.state_dict().keys()

    loopback.run(2, serve)
    tied.Tied().load_state_dict(export.mean_model(Checkpoints(tmp_path).latest()), strict=True)


@pytest.mark.parametrize("call", ["averaged", "averaged_state_dict", "save", "resume"])
def test_the_middle_of_a_step_on_one_rank_is_refused_on_every_rank(call, tmp_path):
    def serve(world):
        gossip, closure = small.make(world, Choco(gamma=0.2, compressor=TopK(ratio=0.3), overlap=True))
        gossip.save(tmp_path)
        if world.rank == 1:
            closure(0)()
        arguments = [tmp_path] if call in ("save", "resume") else []
        with pytest.raises(ConfigError, match=rf"(?s)^{call.split('_')[0]}\(\) in the middle of a step: .*on rank 1"):
            with_(getattr(gossip, call)(*arguments))

    loopback.run(2, serve)


def with_(context):
    """Enter and leave `context`."""
    with context:
        pass


@pytest.mark.parametrize("call", ["save", "resume", "step"])
def test_what_needs_the_own_model_is_refused_inside_averaged(call, tmp_path):
    def serve(world):
        gossip, closure = small.make(world, CHOCO)
        calls = {
            "save": lambda: gossip.save(tmp_path),
            "resume": lambda: gossip.resume(tmp_path),
            "step": lambda: gossip.step(closure(1)),
        }
        gossip.step(closure(0))
        gossip.save(tmp_path)
        with gossip.averaged():
            gossip.averaged_state_dict()
            with pytest.raises(ConfigError, match=r"inside averaged\(\)"):
                calls[call]()
        calls[call]()

    loopback.run(2, serve)


def test_a_model_that_is_not_finite_is_not_saved(tmp_path):
    def serve(world):
        gossip, closure = small.make(world, CHOCO)
        gossip.step(closure(0))
        gossip.save(tmp_path)
        if world.rank == 1:
            gossip.local.model[3].bias.data[1] = float("nan")
        with pytest.raises(DivergenceError, match=r"save\(\) has written nothing.*3.bias\) at step 1 on rank 1"):
            gossip.save(tmp_path)

    loopback.run(2, serve)
    assert len(list(tmp_path.glob("step*"))) == 1


@pytest.mark.parametrize("clear", ["step", "zero_grad", "model.zero_grad", "closure"])
def test_a_checkpoint_without_the_gradients_of_an_accumulation_is_refused(tmp_path, clear):
    def serve(world):
        gossip, closure = small.make(world, CHOCO, ring)
        gossip.save(tmp_path)
        clears = {
            "step": gossip.optimizer.step,
            "zero_grad": gossip.optimizer.zero_grad,
            "model.zero_grad": gossip.local.model.zero_grad,
            "closure": lambda: gossip.step(closure(3)),
        }
        for step in range(2):
            closure(step)().backward()
            if world.rank == 0:
                gossip.optimizer.zero_grad()  # one rank with gradients is enough
            with pytest.raises(ConfigError, match=r"save\(\) in the middle of an accumulation: .*after zero_grad\(\)"):
                gossip.save(tmp_path)
        clears[clear]()
        gossip.save(tmp_path)
        gossip.save(tmp_path)

    loopback.run(2, serve)


def test_weights_swapped_in_are_saved_and_those_swapped_out_stay(tmp_path):
    def serve(world):
        gossip, _ = small.make(world, CHOCO)
        weight = gossip.local.model[0].weight
        own, before = weight.data, weight.detach().clone()
        weight.data = torch.full_like(own, 7.0)
        gossip.save(tmp_path)
        weight.data = own
        assert torch.equal(weight, before)
        gossip.resume(tmp_path)
        assert weight.eq(7).all()

    loopback.run(2, serve)


def test_the_folder_is_that_of_rank_0(tmp_path):
    def serve(world):
        gossip, closure = small.make(world, CHOCO)
        gossip.step(closure(0))
        folder = tmp_path / f"12:00:0{world.rank}"
        gossip.save(folder)
        gossip.step(closure(1))
        assert gossip.resume(folder) == {}
        assert gossip.steps == 1

    loopback.run(2, serve)
    assert [path.name for path in tmp_path.iterdir()] == ["12:00:00"]
