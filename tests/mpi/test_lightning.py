"""`GossipStrategy` with the real Lightning: a Trainer on every rank; on up to 3, with more there is nothing new."""

import importlib.util
import math
import warnings
from copy import deepcopy
from itertools import chain

import pytest
import torch
from support.libraries import LIGHTNING_LEFT_TO_OTHERS, skip_module_if_left
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler, TensorDataset

import mpicomp
from mpicomp.algorithms import GMC, Choco
from mpicomp.compression import TopK
from mpicomp.errors import CheckpointError, ConfigError
from mpicomp.exchange.mpi.library import MPI
from mpicomp.topology import ring, star

if importlib.util.find_spec("lightning") is None:
    pytest.skip("lightning is not installed", allow_module_level=True)
# before its import, which takes as long as torch's
if MPI.COMM_WORLD.size > 3:
    pytest.skip("is for up to 3 ranks", allow_module_level=True)
skip_module_if_left(LIGHTNING_LEFT_TO_OTHERS)
# Lightning and what it imports use deprecated functions of torch, and warn of small data; ours must not warn.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.filterwarnings("error:::mpicomp")]

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from lightning.pytorch import LightningModule, Trainer, callbacks, seed_everything
    from lightning.pytorch.callbacks import Callback, EarlyStopping, LearningRateFinder, ModelCheckpoint
    from lightning.pytorch.plugins import MixedPrecision
    from torchmetrics import Accuracy
    from torchmetrics.metric import jit_distributed_available

    from mpicomp.integrations.lightning import GossipStrategy, ranks_folder

BATCH, BATCHES = 4, 6


def dataset(size, seed=0, batches=BATCHES):
    """Return the samples of all ranks, `batches` for each."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(BATCH * batches * size, 10, generator=generator)
    return TensorDataset(x, (x @ torch.randn(10, 3, generator=generator)).argmax(dim=1))


class Small(LightningModule):
    """With all that a restart could lose: dropout, batch-norm statistics, momentum, a scheduler, metrics."""

    def __init__(self, dropout=0.0, optimizer=None):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(10, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 3)
        )
        self.accuracy = Accuracy(task="multiclass", num_classes=3)
        self.make = optimizer or (lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        scores = self.net(batch[0])
        self.accuracy(scores, batch[1])
        self.log("val_loss", nn.functional.cross_entropy(scores, batch[1]), sync_dist=True)
        self.log("val_accuracy", self.accuracy)

    def configure_optimizers(self):
        optimizer = self.make(self.parameters())
        # Which starts the loader once more, and before a restart has read the checkpoint.
        total = self.trainer.estimated_stepping_batches // (1 if self.automatic_optimization else 2)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total, cycle_momentum=False)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class Observer(Callback):
    """Keeps what happens."""

    def __init__(self):
        self.metrics, self.state, self.own, self.validated, self.after = [], {}, [], [], []

    def on_validation_start(self, trainer, module):
        self.own.append(flat(module))  # before the strategy's own hook: callbacks come first

    def on_validation_batch_start(self, trainer, module, *_):
        self.validated.append(flat(module))

    def on_train_epoch_end(self, trainer, module):
        self.after.append(flat(module))
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    def on_train_end(self, trainer, module):
        leaves = trainer.strategy.gossip.state_dict()
        self.state = {name: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for name, leaf in leaves.items()}


def flat(module):
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()])


def strategy(algorithm=None, topology=ring, compressor=None):
    return GossipStrategy(algorithm or Choco(gamma=0.3), topology, compressor or TopK(ratio=0.2))


def trainer(folder, *callbacks, gossip=None, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(
        **{
            "strategy": gossip or strategy(),
            "accelerator": "cpu",
            "default_root_dir": folder,
            "callbacks": list(callbacks),
            "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
            **quiet,
            **options,
        }
    )


def fit(run, module, size, ckpt_path=None, validate=True):
    train = DataLoader(dataset(size), batch_size=BATCH, shuffle=True)
    run.fit(module, train, DataLoader(dataset(size, seed=0), BATCH) if validate else None, ckpt_path=ckpt_path)


def muon_and_adamw(parameters):
    held = list(parameters)
    muon = torch.optim.Muon([p for p in held if p.ndim == 2], lr=0.1)
    return mpicomp.SeveralOptimizers([muon, torch.optim.AdamW([p for p in held if p.ndim != 2], lr=0.1)])


@pytest.mark.parametrize("save_on_train_epoch_end", [True, False])  # False: while the model is the averaged one
@pytest.mark.parametrize(
    ("algorithm", "optimizer"),
    [
        (Choco(gamma=0.3, overlap=True), None),
        (GMC(detachment=0.3), lambda p: torch.optim.SGD(p, lr=0.1)),
        (Choco(gamma=0.3), muon_and_adamw),
    ],
    ids=["overlapping choco", "gmc plus", "muon and adamw"],
)
def test_a_restart_goes_on_bit_for_bit(world, shared_tmp_path, algorithm, optimizer, save_on_train_epoch_end):
    def run(ckpt_path=None):
        seed_everything(0)  # of the sampler, too
        if ckpt_path is not None:
            torch.manual_seed(7)
        observer = Observer()
        keep_all = ModelCheckpoint(
            shared_tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=save_on_train_epoch_end
        )
        is_choco = isinstance(algorithm, Choco)
        one = trainer(
            shared_tmp_path, observer, keep_all, gossip=strategy(algorithm, ring if is_choco else star), max_epochs=4
        )
        module = Small(dropout=0.3 if save_on_train_epoch_end else 0.0, optimizer=optimizer)
        fit(one, module, world.size, ckpt_path)
        return observer

    undisturbed, restarted = run(), run(shared_tmp_path / "epoch=1.ckpt")
    assert restarted.metrics[-2:] == undisturbed.metrics[-2:] != undisturbed.metrics[:2]
    assert restarted.state.keys() == undisturbed.state.keys()
    for name, leaf in undisturbed.state.items():
        other = restarted.state[name]
        assert torch.equal(leaf, other) if isinstance(leaf, torch.Tensor) else repr(leaf) == repr(other), name
    assert restarted.state["exchange/steps"] == 4 * BATCHES


def test_checkpoints_in_the_middle_of_an_accumulation_are_saved(world, shared_tmp_path):
    """As Lightning does it, without gradients; `gossip.save` in a script refuses that."""
    keep_all = ModelCheckpoint(shared_tmp_path, "{step}", save_top_k=-1, save_on_train_epoch_end=False)
    one = trainer(
        shared_tmp_path, keep_all, max_epochs=1, accumulate_grad_batches=2, val_check_interval=3, num_sanity_val_steps=0
    )
    fit(one, Small(), world.size)
    assert [ranks_folder(shared_tmp_path / f"step={step}.ckpt").is_dir() for step in (1, 3)] == [True, True]


def test_validation_checkpoints_and_the_trained_model_are_the_averaged_one(world, shared_tmp_path):
    observer, keep = Observer(), ModelCheckpoint(shared_tmp_path, "{epoch}", save_top_k=-1)
    one = trainer(shared_tmp_path, observer, keep, max_epochs=2, num_sanity_val_steps=0)
    module = Small()
    fit(one, module, world.size)
    for epoch in range(2):
        own = observer.own[epoch]
        mean = own.clone()
        world.mean_(mean)
        assert all(torch.equal(x, mean) for x in observer.validated[epoch * BATCHES : (epoch + 1) * BATCHES])
        assert torch.equal(observer.after[epoch], own)
        assert world.size == 1 or not torch.equal(own, mean)
        stored = torch.load(shared_tmp_path / f"epoch={epoch}.ckpt", weights_only=False)["state_dict"]
        assert torch.equal(torch.cat([stored[name].reshape(-1) for name, _ in module.named_parameters()]), mean)
        assert ranks_folder(shared_tmp_path / f"epoch={epoch}.ckpt").is_dir()
    assert torch.equal(flat(module), mean)


def test_metrics_are_those_of_all_samples_and_decisions_the_same_on_all_ranks(world, shared_tmp_path):
    observer, stop = Observer(), EarlyStopping("val_loss", mode="max", patience=1)  # "max": the loss falls, so it stops
    one = trainer(shared_tmp_path, observer, stop, max_epochs=20)
    module = Small()
    fit(one, module, world.size)
    assert world.all_gather(observer.metrics) == [observer.metrics] * world.size
    assert len(set(world.all_gather(one.current_epoch))) == 1 and one.current_epoch < 20
    assert not torch.distributed.is_initialized()

    (validated,) = one.validate(module, DataLoader(dataset(world.size), BATCH), verbose=False)
    x, y = dataset(world.size).tensors
    with torch.no_grad():
        scores = module.eval().net(x)
    assert validated["val_accuracy"] == pytest.approx(float((scores.argmax(dim=1) == y).float().mean()))
    assert validated["val_loss"] == pytest.approx(float(nn.functional.cross_entropy(scores, y)), rel=1e-5)


class Cloning(Small):
    """Whose validation uses a copy of its metric, as `torchmetrics.MetricTracker` does."""

    def on_validation_epoch_start(self):
        self.copied = self.accuracy.clone()

    def validation_step(self, batch, batch_idx):
        self.copied.update(self.net(batch[0]), batch[1])

    def on_validation_epoch_end(self):
        self.last = float(self.copied.compute())


def test_copies_of_metrics_synchronize_and_modules_can_be_copied_and_stored(world, shared_tmp_path):
    one, module = trainer(shared_tmp_path, max_epochs=1), Cloning()
    fit(one, module, world.size)
    one.validate(module, DataLoader(dataset(world.size), BATCH), verbose=False)
    x, y = dataset(world.size).tensors
    with torch.no_grad():
        assert module.last == pytest.approx(float((module.eval().net(x).argmax(dim=1) == y).float().mean()))

    assert torch.equal(flat(deepcopy(module)), flat(module))
    path = shared_tmp_path / f"{world.rank}.pt"
    torch.save(module.accuracy, path)
    stored = torch.load(path, weights_only=False)
    assert stored.distributed_available_fn is jit_distributed_available and stored.dist_sync_fn is None


def test_reductions(world):
    gossip = strategy()
    mine = torch.tensor([float(world.rank), 1.0])
    expected = {"mean": (world.size - 1) / 2, "sum": sum(range(world.size)), "max": world.size - 1, "min": 0}
    for kind, value in expected.items():
        assert gossip.reduce(mine, reduce_op=kind).tolist() == [value, world.size if kind == "sum" else 1.0]
    assert float(gossip.reduce(torch.tensor(world.rank))) == (world.size - 1) / 2  # not cut off, as by DDP
    assert gossip.broadcast(world.rank, src=world.size - 1) == world.size - 1
    assert gossip.reduce_boolean_decision(world.rank == 0) is (world.size == 1)
    assert gossip.reduce_boolean_decision(world.rank == 0, all=False) is True
    if world.size > 1:
        assert gossip.all_gather(mine)[:, 0].tolist() == list(range(world.size))


class Manual(Small):
    """`Small` in manual optimization: two micro-batches a step, clipped."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        if batch_idx % 2 == 0:
            optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx) / 2)
        if batch_idx % 2 == 1:
            self.clip_gradients(optimizer, 0.5, "norm")
            optimizer.step()
            self.lr_schedulers().step()


@pytest.mark.parametrize("overlap", [False, True])
def test_accumulation_and_clipping_are_those_of_a_loop_of_ones_own(world, shared_tmp_path, overlap):
    algorithm = Choco(gamma=0.3, overlap=overlap)

    def model():
        seed_everything(3)
        return Small()

    automatic, manual = model(), Manual()
    manual.load_state_dict(automatic.state_dict())
    options = {"max_epochs": 2, "num_sanity_val_steps": 0}
    once = trainer(
        shared_tmp_path,
        gossip=strategy(algorithm),
        accumulate_grad_batches=2,
        gradient_clip_val=0.5,
        **options,
    )
    fit(once, automatic, world.size, validate=False)
    fit(trainer(shared_tmp_path, gossip=strategy(algorithm), **options), manual, world.size, validate=False)

    own = model()
    optimizer = own.make(own.parameters())
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, BATCHES, cycle_momentum=False)
    gossip = mpicomp.distribute(own, optimizer, algorithm, ring, TopK(ratio=0.2))
    sampler = torch.utils.data.DistributedSampler(dataset(world.size), world.size, world.rank, seed=3)
    norms = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        for i, batch in enumerate(DataLoader(dataset(world.size), BATCH, sampler=sampler)):
            (own.training_step(batch, i) / 2).backward()
            if i % 2 == 1:
                norms.append(float(nn.utils.clip_grad_norm_(own.parameters(), 0.5)))
                gossip.optimizer.step()
                gossip.optimizer.zero_grad()
                scheduler.step()
    assert max(norms) > 0.5
    assert once.global_step == gossip.steps == once.strategy.gossip.steps == BATCHES
    gossip.average_()
    assert torch.equal(flat(automatic), flat(own))
    assert torch.equal(flat(manual), flat(own))


class Seeing(Small):
    """Which keeps the numbers of its samples, and draws a number of random numbers that differs between ranks."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen += batch[2].tolist()
        torch.rand(1 + self.trainer.global_rank)
        return super().training_step(batch, batch_idx)


def numbered(size):
    """Return `dataset` with the number of each sample."""
    x, y = dataset(size).tensors
    return TensorDataset(x, y, torch.arange(len(x)))


def test_a_sampler_that_draws_from_the_global_generator_gives_each_sample_to_one_rank(world, shared_tmp_path):
    data, module = numbered(world.size), Seeing()
    loader = DataLoader(data, BATCH, sampler=SubsetRandomSampler(range(len(data))))
    trainer(shared_tmp_path, max_epochs=3).fit(module, loader)
    epochs = [module.seen[i : i + BATCH * BATCHES] for i in range(0, len(module.seen), BATCH * BATCHES)]
    assert len(epochs) == 3 and epochs[0] != epochs[1] != epochs[2]
    for seen in epochs:
        assert sorted(chain(*world.all_gather(seen))) == list(range(len(data)))


class Stream(IterableDataset):
    """The samples of all ranks, or of one."""

    def __init__(self, data, rank=0, size=1):
        self.data, self.rank, self.size = data, rank, size

    def __iter__(self):
        return (self.data[i] for i in range(self.rank, len(self.data), self.size))


@pytest.mark.parametrize("collate", [None, lambda samples: {"batch": samples, "texts": ("a", 1)}])
def test_a_stream_that_is_the_same_on_all_ranks_is_refused(world, shared_tmp_path, collate):
    class Streaming(Seeing):
        def training_step(self, batch, batch_idx):
            if collate is not None:
                batch = [torch.stack([torch.as_tensor(x) for x in column]) for column in zip(*batch["batch"])]  # noqa: B905
            return super().training_step(batch, batch_idx)

    def run(module, *part):
        one = trainer(shared_tmp_path, max_steps=BATCHES)
        part = (one.global_rank, one.world_size) if part == ("own",) else ()
        one.fit(module, DataLoader(Stream(numbered(world.size), *part), BATCH, collate_fn=collate))

    module = Streaming()
    run(module, "own")
    assert sorted(chain(*world.all_gather(module.seen))) == list(range(BATCH * BATCHES * world.size))
    if world.size > 1:
        with pytest.raises(ConfigError, match=r"same on all ranks.*IterableDataset.*trainer\.global_rank"):
            run(Streaming())


class Overflowing(Small):
    """Whose loss overflows float16 on one rank at one step."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        is_bad = self.trainer.global_rank == self.trainer.world_size - 1 and self.trainer.global_step == 2
        return loss * math.inf if is_bad else loss


def test_float16_is_clipped_and_an_overflow_on_one_rank_hangs_nobody(world, shared_tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    precision = MixedPrecision("16-mixed", "cpu", scaler)
    one = trainer(shared_tmp_path, plugins=[precision], max_epochs=2, gradient_clip_val=0.5)
    module = Overflowing()
    fit(one, module, world.size)
    assert one.strategy.gossip.steps == 2 * BATCHES
    assert flat(module).isfinite().all()
    assert world.all_gather(scaler.get_scale()) == [64.0] * (world.size - 1) + [32.0]


class Two(Small):
    """With two optimizers."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (self.net[0], self.net[4])]


class Empty(Small):
    """With none."""

    def configure_optimizers(self):
        return None


def test_what_cannot_be_right_is_refused(world, shared_tmp_path):
    def refuses(message, *used, error=ConfigError, module=None, loader=None, ckpt_path=None, **options):
        one = trainer(shared_tmp_path, *used, max_epochs=1, **options)
        train = loader or DataLoader(dataset(world.size), BATCH)
        with pytest.raises(error, match=message):
            one.fit(module or Small(), train, DataLoader(dataset(world.size), BATCH), ckpt_path=ckpt_path)

    refuses(r"Trainer\(devices=2\).*mpiexec -n 2", devices=2)
    refuses("sync_batchnorm", sync_batchnorm=True)
    refuses("ModelCheckpoint would save after an error", ModelCheckpoint(shared_tmp_path, save_on_exception=True))
    refuses("LearningRateFinder.*without GossipStrategy", LearningRateFinder())
    if hasattr(callbacks, "EMAWeightAveraging"):
        refuses("EMAWeightAveraging averages the models of one rank", callbacks.EMAWeightAveraging())
    refuses(
        "val_check_interval=3.*multiple of accumulate_grad_batches=2",
        gossip=strategy(Choco(gamma=0.3, overlap=True)),
        val_check_interval=3,
        accumulate_grad_batches=2,
    )
    refuses("SGD, SGD.*one optimizer", module=Two())
    refuses("the optimizer does not hold: net.0.weight", module=Empty())
    if world.size > 1:
        own = DataLoader(dataset(1, batches=3 + (world.rank == 0)), BATCH)
        refuses(r"training batches.*limit_train_batches=3", loader=own, use_distributed_sampler=False)

    other = shared_tmp_path / "other.ckpt"
    alone = Trainer(
        accelerator="cpu", logger=False, max_epochs=1, enable_checkpointing=False, enable_progress_bar=False,
        default_root_dir=shared_tmp_path, enable_model_summary=False, strategy="auto", devices=1,
    )  # fmt: skip
    if world.rank == 0:
        alone.fit(Small(), DataLoader(dataset(1), BATCH))
        alone.save_checkpoint(other)
    world.barrier()
    refuses("other.ckpt: has no states of ranks to go on from", error=CheckpointError, ckpt_path=other)

    one, module = trainer(shared_tmp_path, max_epochs=1), Small()
    fit(one, module, world.size)
    with pytest.raises(ConfigError, match="earlier fit"):
        fit(one, module, world.size)


def test_a_checkpoint_that_was_half_replaced_goes_on_from_the_old_one(world, shared_tmp_path):
    path = shared_tmp_path / "last.ckpt"

    class Save(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if trainer.global_step in (2, 4):
                if trainer.global_step == 4 and trainer.is_global_zero:  # killed before the file is written
                    trainer.strategy.checkpoint_io.save_checkpoint = lambda *_, **__: None
                trainer.save_checkpoint(path)

    observer = Observer()
    fit(trainer(shared_tmp_path, Save(), observer, max_epochs=1), Small(), world.size)

    class Look(Callback):
        def on_train_start(self, trainer, module):
            assert trainer.strategy.gossip.steps == trainer.global_step == 2

    fit(trainer(shared_tmp_path, Look(), max_epochs=1), Small(), world.size, path)


def test_after_fit_the_trainers_module_is_saved(world, shared_tmp_path):
    def stored():
        one.save_checkpoint(shared_tmp_path / "x.ckpt", weights_only=True)
        return torch.load(shared_tmp_path / "x.ckpt", weights_only=False)["state_dict"]["net.0.weight"]

    seed_everything(0)
    one, module, other = trainer(shared_tmp_path, max_epochs=1), Small(), Small()
    fit(one, module, world.size)
    module.bfloat16()  # as Lightning moves it from a GPU
    assert torch.equal(stored(), module.net[0].weight)
    one.validate(other, DataLoader(dataset(world.size), BATCH), verbose=False)
    assert torch.equal(stored(), other.net[0].weight)
    one.save_checkpoint(shared_tmp_path / "other.ckpt")
    assert not ranks_folder(shared_tmp_path / "other.ckpt").exists()


def test_of_names_that_differ_between_ranks_that_of_rank_0_holds(world, shared_tmp_path):
    class OwnMetric(Small):
        def validation_step(self, batch, batch_idx):
            self.log("own", world.rank + self.current_epoch / 10)

        def configure_optimizers(self):
            return self.make(self.parameters())

    saver = ModelCheckpoint(shared_tmp_path, filename="{own:.1f}", monitor="own", mode="max")
    fit(trainer(shared_tmp_path, saver, max_epochs=2), OwnMetric(), world.size)
    assert saver.best_model_path.endswith(f"own={world.rank}.1.ckpt")
    assert sorted(path.name for path in shared_tmp_path.iterdir()) == ["own=0.1.ckpt", "own=0.1.ckpt.ranks"]
    run = trainer(shared_tmp_path, max_epochs=3)
    fit(run, OwnMetric(), world.size, saver.best_model_path)
    assert run.strategy.gossip.steps == 3 * BATCHES
