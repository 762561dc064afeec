"""Store, restore into new objects, go on: bit for bit what an undisturbed run does, for every method and optimizer."""

import random

import numpy as np
import pytest
import torch
from support import small
from support.libraries import restarted_at_these_ranks
from support.methods import ALL_REDUCE, DETERMINISTIC

from mpicomp.algorithms import DPSGD
from mpicomp.checkpoint.saver import Saver, find_checkpoint
from mpicomp.errors import CheckpointError
from mpicomp.exchange.node_groups import nodes_of

METHODS = {**DETERMINISTIC, **ALL_REDUCE}
OPTIMIZERS = {
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-2, amsgrad=True),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=1e-2, momentum=0.9, centered=True),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=1e-2),
    "adadelta": lambda parameters: torch.optim.Adadelta(parameters),
    "nadam": lambda parameters: torch.optim.NAdam(parameters, lr=1e-2),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-2),
}


def make(world, method, optimizer=None, seed=0):
    gossip, closure = small.make(world, method, seed=seed)
    if optimizer is not None:
        gossip.local.optimizer = OPTIMIZERS[optimizer](list(gossip.local.model.parameters()))
    return gossip, closure


def check_resumes(world, folder, method, optimizer=None):
    gossip, closure = make(world, method, optimizer)
    for step in range(6):
        gossip.step(closure(step))
    gossip.save(folder, {"note": "for the caller"})
    for step in range(6, 12):
        gossip.step(closure(step))
    undisturbed = gossip.local.x, gossip.bytes_sent, gossip.local.model.state_dict()

    gossip, closure = make(world, method, optimizer, seed=1)
    assert gossip.resume(folder) == {"note": "for the caller"}
    assert gossip.steps == 6
    for step in range(6, 12):
        gossip.step(closure(step))
    assert torch.equal(gossip.local.x, undisturbed[0])
    assert gossip.bytes_sent == undisturbed[1]
    for name, tensor in gossip.local.model.state_dict().items():
        assert torch.equal(tensor, undisturbed[2][name]), name


@pytest.mark.parametrize("name", restarted_at_these_ranks(METHODS))
def test_every_method_goes_on_bit_for_bit(world, shared_tmp_path, name):
    check_resumes(world, shared_tmp_path, METHODS[name])


def test_the_processes_of_a_host_take_turns_to_write_one_file(world, shared_tmp_path):
    gossip, closure = make(world, DPSGD())
    gossip.step(closure(0))
    saver = Saver(world, shared_tmp_path, gossip.identity(), 1, None, pytest.fail, nodes_of(world, 0))
    saver.start(1, gossip.state_dict())
    gossip.step(closure(1))
    assert saver.finish()
    saver.close()
    after = gossip.local.x.clone()
    checkpoint = find_checkpoint(world, shared_tmp_path)
    assert checkpoint.manifest.nodes == (tuple(range(world.size)),)
    assert list(checkpoint.manifest.files) == ["node_00000.h5"]
    assert gossip.resume(shared_tmp_path) == {}
    gossip.step(closure(1))
    assert torch.equal(gossip.local.x, after)


@pytest.mark.parametrize("optimizer", restarted_at_these_ranks(OPTIMIZERS))
def test_every_kind_of_optimizer_goes_on_bit_for_bit(world, shared_tmp_path, optimizer):
    check_resumes(world, shared_tmp_path, DPSGD(), optimizer)


def with_schedulers(gossip):
    """Return a scheduler whose state has None, nested schedulers and a Counter with integer keys."""
    optimizer, kinds = gossip.local.optimizer, torch.optim.lr_scheduler
    parts = [
        kinds.LambdaLR(optimizer, lambda epoch: (epoch + 1) / 4),
        kinds.MultiStepLR(optimizer, [4, 4, 6], gamma=0.5),
    ]
    return kinds.SequentialLR(optimizer, parts, milestones=[4])


def test_a_scheduler_goes_on_bit_for_bit(world, shared_tmp_path):
    def steps(gossip, closure, scheduler, first, last):
        lrs = []
        for step in range(first, last):
            gossip.step(closure(step))
            scheduler.step()
            lrs.append(gossip.local.lr)
        return lrs

    gossip, closure = make(world, METHODS["choco"])
    scheduler = with_schedulers(gossip)
    steps(gossip, closure, scheduler, 0, 6)
    gossip.save(shared_tmp_path, extra={"scheduler": scheduler.state_dict(), "epoch": 6, "rank": (world.rank, None)})
    undisturbed_lrs = steps(gossip, closure, scheduler, 6, 12)
    undisturbed = gossip.local.x

    gossip, closure = make(world, METHODS["choco"], seed=1)
    scheduler = with_schedulers(gossip)
    extra = gossip.resume(shared_tmp_path)
    assert extra["epoch"] == 6
    assert extra["rank"] == (world.rank, None)
    scheduler.load_state_dict(extra["scheduler"])
    assert steps(gossip, closure, scheduler, 6, 12) == undisturbed_lrs
    assert len(set(undisturbed_lrs)) == 3
    assert torch.equal(gossip.local.x, undisturbed)


def test_extra_that_one_rank_cannot_store_is_an_error_on_every_rank(world, shared_tmp_path):
    gossip, _ = make(world, DPSGD())
    bad = world.size - 1
    extra = {"loader": {"workers": [3, open if world.rank == bad else None]}}
    where = f".*rank {bad}" if world.size > 1 else ""  # one rank is not named
    with pytest.raises(CheckpointError, match=rf"^extra\['loader'\]\['workers'\]\[1\] is of type {where}"):
        gossip.save(shared_tmp_path, extra=extra)
    world.barrier()
    assert list(shared_tmp_path.iterdir()) == []


def test_averaged_is_entered_together_and_left_to_each_rank(world):
    gossip, closure = make(world, DPSGD())
    gossip.step(closure(0))
    losses = []
    for _ in range(3):
        with gossip.averaged() as model, torch.no_grad():
            if world.rank == 0:
                assert not model.training
                losses.append(float(closure(5)()))
        assert gossip.local.model.training
    assert len(losses) == (3 if world.rank == 0 else 0)
    assert len(set(losses)) <= 1
    states = world.all_gather(gossip.averaged_state_dict())
    for name, tensor in states[0].items():
        assert all(torch.equal(tensor, state[name]) for state in states), name


def test_random_generators_go_on(world, shared_tmp_path):
    def draw():
        return random.random(), random.gauss(0, 1), np.random.normal(), torch.rand(3).tolist()

    gossip, _ = make(world, DPSGD())
    draw()
    gossip.save(shared_tmp_path)
    expected = draw(), draw()
    assert gossip.resume(shared_tmp_path) == {}
    assert (draw(), draw()) == expected


def test_after_going_back_the_abandoned_checkpoints_give_way(world, shared_tmp_path):
    gossip, closure = make(world, DPSGD())
    for step in range(4):
        gossip.step(closure(step))
        gossip.save(shared_tmp_path, keep_last=4)
    gossip, closure = make(world, DPSGD())
    gossip.resume(shared_tmp_path, step=1)
    gossip.step(closure(1))
    gossip.save(shared_tmp_path, keep_last=2)
    assert sorted(path.name for path in shared_tmp_path.glob("step_*")) == ["step_00000001", "step_00000002"]
    assert gossip.resume(shared_tmp_path) == {} and gossip.steps == 2


def test_nothing_to_resume(world, shared_tmp_path):
    assert make(world, DPSGD())[0].resume(shared_tmp_path / "none") is None


def test_a_damaged_file_is_an_error_on_every_rank(world, shared_tmp_path):
    gossip, closure = make(world, DPSGD())
    gossip.step(closure(0))
    gossip.save(shared_tmp_path)
    if world.rank == 0:
        file = shared_tmp_path / "step_00000001" / f"rank_{world.size - 1:05d}.h5"
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    world.barrier()
    with pytest.raises(CheckpointError, match=rf"rank_{world.size - 1:05d}.h5: is damaged \(SHA-256\)"):
        gossip.resume(shared_tmp_path)


def test_a_failed_write_is_an_error_on_every_rank_and_leaves_the_last_checkpoint(world, shared_tmp_path):
    gossip, closure = make(world, DPSGD())
    gossip.save(shared_tmp_path)
    gossip.step(closure(0))
    if world.rank == 0:
        (shared_tmp_path / ".step_00000001.tmp").touch()  # where the folder should be
    world.barrier()
    with pytest.raises(CheckpointError, match="the checkpoint of step 1 could not be written"):
        gossip.save(shared_tmp_path)
    assert gossip.resume(shared_tmp_path) == {}
    assert gossip.steps == 0


def test_numbers_travel_while_others_are_gathered(world):
    pending = world.start_gather([world.rank, -0.5])
    assert world.all_gather(world.rank) == list(range(world.size))
    assert pending.wait().tolist() == [[rank, -0.5] for rank in range(world.size)]
    assert pending.test()


def test_every_value_of_a_counter_is_taken_once(world):
    counter = world.counter(start=5)
    mine = []
    for _ in range(200):
        counter.prefetch()
        mine.append(counter.take())
    assert mine == sorted(mine)
    taken = [value for values in world.all_gather(mine) for value in values]
    assert sorted(taken) == list(range(5, 5 + 200 * world.size))
    counter.prefetch()  # one that is never taken
    counter.free()
