"""`GossipTrainer` against the real `transformers`, on MPI ranks; as a program, small trainings on each of them."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from support.runs import assert_same_checkpoint, is_code, run_program
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

from mpicomp.algorithms import Choco, DiLoCo
from mpicomp.checkpoint.export import mean_model
from mpicomp.checkpoint.folder import Checkpoints
from mpicomp.errors import ConfigError
from mpicomp.integrations.transformers import GossipTrainer, last_checkpoint, refuse
from mpicomp.topology import ring

PROGRAM = Path(__file__).parents[1] / "support" / "train_gpt.py"
RANKS = 3
LAST = 12


def train(folder, *options, ranks=RANKS, **environment):
    return run_program(PROGRAM, folder, *options, ranks=ranks, environment=environment)


def checkpoint(folder, step):
    return Checkpoints(folder / "output" / f"checkpoint-{step}" / "gossip").latest()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    done = train(folder)
    assert done.returncode == 0, done.stdout
    (folder / "stdout").write_text(done.stdout)
    return folder


def ranks(folder):
    return [torch.load(folder / f"rank_{rank}.pt") for rank in range(RANKS)]


def evaluated(folder, metrics="eval_loss"):
    """Return what rank 0 has logged, by step."""
    return {entry["step"]: entry[metrics] for entry in ranks(folder)[0]["log"] if metrics in entry}


def loss_of(path, tmp_path):
    """Return the loss of a saved model as a plain Trainer computes it."""
    sys.path.insert(0, str(PROGRAM.parent))
    from train_gpt import Windows

    args = TrainingArguments(output_dir=str(tmp_path), report_to="none", dataloader_pin_memory=False)
    return Trainer(LlamaForCausalLM.from_pretrained(path), args, eval_dataset=Windows(8)).evaluate()["eval_loss"]


def test_ranks_see_different_samples_and_together_all(whole):
    first_epoch = [rank["asked"][: 60 // RANKS] for rank in ranks(whole)]
    assert sorted(index for asked in first_epoch for index in asked) == list(range(60))


def test_ranks_train_models_of_their_own_and_end_with_the_best_averaged_one(whole):
    own = [checkpoint(whole, LAST).read(rank)["model/parameters"] for rank in range(RANKS)]
    assert not torch.equal(own[0], own[1])
    losses = evaluated(whole)
    best = min(losses, key=losses.get)
    expected = mean_model(checkpoint(whole, best))
    for found in ranks(whole):
        for name, tensor in expected.items():
            assert torch.equal(found["model"][name], tensor), name
    assert losses[LAST] < losses[4]


def test_evaluation_is_of_the_averaged_model_and_saved_models_load(whole, tmp_path):
    for step, loss in evaluated(whole).items():
        folder = whole / "output" / f"checkpoint-{step}"
        saved = LlamaForCausalLM.from_pretrained(folder)
        for name, tensor in mean_model(checkpoint(whole, step)).items():
            assert torch.equal(saved.state_dict()[name], tensor), name
        assert saved.lm_head.weight is saved.model.embed_tokens.weight
        assert loss_of(folder, tmp_path) == pytest.approx(loss, rel=1e-5)


def test_after_training_one_rank_alone_saves_and_evaluates(whole, tmp_path):
    assert ranks(whole)[0]["evaluated"] == pytest.approx(loss_of(whole / "final", tmp_path), rel=1e-5)


def test_only_rank_0_speaks(whole):
    assert (whole / "stdout").read_text().count("train_runtime") == 1


@pytest.mark.long
def test_a_killed_run_goes_on_bit_for_bit(whole, tmp_path):
    killed = train(tmp_path, "--die-in-save", 8)
    assert killed.returncode != 0
    assert (tmp_path / "output" / "checkpoint-8").exists()  # a part of it
    assert last_checkpoint(tmp_path / "output") == str(tmp_path / "output" / "checkpoint-4")
    resumed = train(tmp_path, "--resume")
    assert resumed.returncode == 0, resumed.stdout
    for step in (8, LAST):
        assert_same_checkpoint(checkpoint(whole, step), checkpoint(tmp_path, step))
    assert evaluated(whole) == evaluated(tmp_path)


def test_training_sets_of_unequal_length_are_refused(tmp_path):
    done = train(tmp_path, "--uneven", ranks=2)
    assert is_code(done.returncode, ConfigError.exit_code), done.stdout
    assert "unequal length ([15, 20] batches by rank)" in done.stdout
    assert "Traceback" not in done.stdout


def test_a_started_torch_distributed_is_refused(tmp_path):
    done = train(tmp_path, "--use-cpu", MASTER_ADDR="localhost", MASTER_PORT="29517")
    assert is_code(done.returncode, ConfigError.exit_code), done.stdout
    assert "torch.distributed has been started" in done.stdout
    assert "hidden_launcher()" in done.stdout


@pytest.mark.long
def test_muon_and_adamw_die_and_go_on_bit_for_bit(tmp_path):
    for options in (["whole"], ["killed", "--die-in-save", 8], ["killed", "--resume"]):
        done = train(tmp_path / options[0], "--muon", *options[1:])
        assert (done.returncode == 0) == ("--die-in-save" not in options), done.stdout
    assert_same_checkpoint(checkpoint(tmp_path / "whole", LAST), checkpoint(tmp_path / "killed", LAST))
    losses = evaluated(tmp_path / "killed")
    assert losses[LAST] < losses[8]


@pytest.mark.long
def test_bfloat16_on_the_cpu_with_an_exchange_behind_the_gradient(tmp_path):
    done = train(tmp_path, "--bfloat16")
    assert done.returncode == 0, done.stdout
    losses = evaluated(tmp_path)
    assert losses[LAST] < losses[4]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optim": "lomo"}, "within the backward pass"),
        ({"optim": "galore_adamw_layerwise"}, "within the backward pass"),
        ({"optim": "schedule_free_adamw"}, "other parameters than it trains"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size"),
        ({"enable_jit_checkpoint": True}, "enable_jit_checkpoint"),
    ],
)
def test_settings_with_which_ranks_cannot_train_together_are_refused(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        refuse(TrainingArguments(output_dir=str(tmp_path), report_to="none", **settings))


def test_several_gpus_and_sharded_models_are_refused(tmp_path, monkeypatch):
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none")
    refuse(args)
    args._n_gpu = 4
    with pytest.raises(ConfigError, match=r"sees 4 GPUs.*CUDA_VISIBLE_DEVICES"):
        refuse(args)
    args._n_gpu = 0
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="deepspeed and fsdp"):
        refuse(args)


def test_the_last_checkpoint_is_the_newest_complete_one(tmp_path):
    assert last_checkpoint(tmp_path / "absent") is None
    for step, text in ((9, json.dumps({})), (100, json.dumps({})), (200, '{"a": '), (300, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if text is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(text)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-100")


SAMPLES = 24
RANK = int(os.environ.get("PMI_RANK") or os.environ.get("OMPI_COMM_WORLD_RANK") or 0)


class Numbers(torch.utils.data.Dataset):
    """Each item is its index, several times: items have different lengths."""

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        if index >= SAMPLES:
            raise IndexError
        return {"input_ids": [index] * (1 + index % 7)}


class Noisy(torch.nn.Module):
    """Notes what it is trained with, and draws more random numbers on a higher rank."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(1, 1)
        self.seen = []

    def forward(self, x, labels):
        if self.training:
            self.seen += x.flatten().int().tolist()
        loss = ((self.linear(x / SAMPLES) - labels) ** 2).mean() * torch.rand(1 + RANK).sum()
        return {"loss": loss, "logits": x}

    def parameter(self):
        """Return the parameters as a vector."""
        return torch.nn.utils.parameters_to_vector(self.parameters()).detach().clone()


def collate(items):
    x = torch.tensor([[float(item["input_ids"][0])] for item in items])
    return {"x": x, "labels": x / 2}


def settings(folder, **changed):
    unchanged = {"per_device_train_batch_size": 2, "learning_rate": 0.1, "num_train_epochs": 1, "save_strategy": "no"}
    quiet = {"report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False, "remove_unused_columns": False}
    return TrainingArguments(output_dir=str(folder), **(unchanged | quiet | changed))


def make(folder, *callbacks, kind=GossipTrainer, algorithm=None, **changed):
    set_seed(0)
    return kind(
        model=Noisy(),
        args=settings(folder, **changed),
        train_dataset=Numbers(),
        eval_dataset=Numbers(),
        data_collator=collate,
        callbacks=list(callbacks),
        algorithm=algorithm or Choco(gamma=0.3),
        topology=ring,
        hang_timeout_s=20,
    )


def seen_by(trainer):
    trainer.train()
    return trainer.model.seen


def arguments_made_later(folder):
    trainer = make(folder)
    settings(folder / "other")
    seen = seen_by(trainer)
    return seen, trainer.args.should_save


def plain_trainer_made_later(folder):
    trainer = make(folder)
    Trainer(Noisy(), settings(folder / "other"), data_collator=collate, eval_dataset=Numbers()).evaluate()
    seen = seen_by(trainer)
    should_save = trainer.args.should_save
    settings(folder / "other")
    return seen, should_save and trainer.is_world_process_zero()


class MakesArguments(GossipTrainer):
    def _get_train_sampler(self, *args):
        Trainer(Noisy(), settings(Path(self.args.output_dir) / "other"))
        return super()._get_train_sampler(*args)


def arguments_made_within(folder):
    make(folder, kind=MakesArguments).train()


class Subset(GossipTrainer):
    def _get_train_sampler(self, *args):
        return torch.utils.data.SubsetRandomSampler(range(SAMPLES))


def sampling(folder, **how):
    """Train for two epochs, and again for the last four of twelve steps; return what each has seen and ended with."""
    found = []
    for start in (None, str(folder / "checkpoint-8")):
        trainer = make(folder, num_train_epochs=2, save_strategy="steps", save_steps=8, **how)
        trainer.train(resume_from_checkpoint=start)
        found.append((trainer.model.seen, trainer.model.parameter()))
    return found


def grouped_by_length(folder):
    return sampling(folder, train_sampling_strategy="group_by_length")


def batches_rebalanced(folder):
    return sampling(folder, train_sampling_strategy="batch_rebalance")


def subset_sampler(folder):
    return sampling(folder, kind=Subset)


def own_generator(folder):
    return sampling(folder, accelerator_config={"use_seedable_sampler": False})


def seeds(folder):
    trainer = make(folder)
    set_seed(100 + RANK)
    found = [seen_by(trainer), seen_by(make(folder, seed=100 + RANK))]
    return found + [seen_by(make(folder, seed=seed, data_seed=7)) for seed in (1, 2)]


class AtEnd(TrainerCallback):
    def on_train_end(self, args, state, control, model, **kwargs):
        self.found = model.parameter()
        if RANK == 0:
            self.trainer.save_model(Path(args.output_dir) / "final")  # alone


def callback_at_the_end(folder):
    callback = AtEnd()
    callback.trainer = trainer = make(folder, callback)
    trainer.train()
    return callback.found, trainer.model.parameter()


class MakesOptimizer(GossipTrainer):
    def create_optimizer(self, *args):
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        return self.optimizer


def optimizer_of_a_subclass(folder):
    make(folder, kind=MakesOptimizer).train()


def second_training(folder):
    trainer = make(folder, algorithm=DiLoCo(period=2), save_strategy="steps", save_steps=4)
    trainer.train()
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4"))  # this one is allowed
    resumed = len(trainer.model.seen)
    try:
        trainer.train()
    except ConfigError as error:
        return resumed, str(error)
    return resumed, ""


class StopsWithin(TrainerCallback):
    def on_substep_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 1


def stop_within_a_step(folder):
    accumulation = {"gradient_accumulation_steps": 2, "eval_strategy": "epoch"}
    make(folder, StopsWithin(), algorithm=Choco(gamma=0.3, overlap=True), **accumulation).train()


def scale_of_float16(folder):
    for start in (None, str(folder / "checkpoint-2")):
        trainer = make(folder, max_steps=3, max_grad_norm=0, save_strategy="steps", save_steps=2)
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1.0 if start else 2.0 ** (3 + RANK))
        trainer.train(resume_from_checkpoint=start)
    return trainer.accelerator.scaler.get_scale()


CASES = [
    arguments_made_later,
    plain_trainer_made_later,
    arguments_made_within,
    grouped_by_length,
    batches_rebalanced,
    subset_sampler,
    own_generator,
    seeds,
    optimizer_of_a_subclass,
    second_training,
    stop_within_a_step,
    scale_of_float16,
    callback_at_the_end,
]


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """Run all cases on two ranks, and return what a case has found on each."""
    folder = tmp_path_factory.mktemp("cases")
    path = os.pathsep.join(filter(None, [str(PROGRAM.parents[1]), os.environ.get("PYTHONPATH")]))
    done = run_program(Path(__file__), folder, ranks=2, environment={"PYTHONPATH": path})

    def found(case):
        files = [folder / f"{case.__name__}_{rank}.pt" for rank in range(2)]
        assert all(file.exists() for file in files), done.stdout
        return [torch.load(file, weights_only=False) for file in files]

    return found


def together_all(*seen, epochs=1):
    return sorted(index for some in seen for index in some) == sorted([*range(SAMPLES)] * epochs)


@pytest.mark.parametrize("case", [arguments_made_later, plain_trainer_made_later])
def test_a_rank_stays_itself_when_accelerate_is_reset(cases, case):
    (first, first_saves), (second, second_saves) = cases(case)
    assert together_all(first, second)
    assert (first_saves, second_saves) == (True, False)


def test_a_loader_made_with_another_rank_is_refused(cases):
    for found in cases(arguments_made_within):
        assert "the parts [(0, 1), (0, 1)] of the samples" in found


@pytest.mark.parametrize("case", [grouped_by_length, batches_rebalanced, subset_sampler, own_generator])
def test_samplers_draw_the_same_on_all_ranks_and_after_a_restart(cases, case):
    ranks = cases(case)
    assert together_all(*[whole for (whole, _), _ in ranks], epochs=2)
    for (whole, model), (resumed, same_model) in ranks:
        assert whole[-len(resumed) :] == resumed
        assert torch.equal(model, same_model)


def test_samples_do_not_overlap_when_seeds_differ(cases):
    first, second = cases(seeds)
    assert all(map(together_all, first, second))
    assert first[2] == first[3]


def test_callbacks_see_the_averaged_model_at_the_end(cases):
    models = [model for found in cases(callback_at_the_end) for model in found]
    assert all(torch.equal(models[0], model) for model in models)


def test_an_optimizer_that_is_not_distributed_is_refused_before_the_first_step(cases):
    for found in cases(optimizer_of_a_subclass):
        assert "MakesOptimizer.create_optimizer() has not distributed the model" in found


def test_a_second_training_is_refused_where_the_method_would_go_back(cases):
    for seen, error in cases(second_training):
        assert seen == 6 * 2 + 2 * 2
        assert "a second train() would not continue from the averaged model: DiLoCo" in error


def test_an_evaluation_within_a_step_is_refused(cases):
    for found in cases(stop_within_a_step):
        assert "in the middle of step 1" in found
        assert "on_step_end, not in on_substep_end" in found


def test_the_scale_of_float16_is_each_ranks_own_after_a_restart(cases):
    assert cases(scale_of_float16) == [8.0, 16.0]


def run_cases(folder):
    """Write to `folder` what each case returns on this rank, or the text of its error."""
    for case in CASES:
        try:
            found = case(folder / case.__name__)
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
        torch.save(found, folder / f"{case.__name__}_{RANK}.pt")


if __name__ == "__main__":
    run_cases(Path(sys.argv[1]))
