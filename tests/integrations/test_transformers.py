"""`GossipTrainer` against the real `transformers`, on MPI ranks."""

import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from support.runs import assert_same_checkpoint, is_code, run_program
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from mpicomp.checkpoint.export import mean_model
from mpicomp.checkpoint.folder import Checkpoints
from mpicomp.errors import ConfigError
from mpicomp.integrations.transformers import last_checkpoint, refuse

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
