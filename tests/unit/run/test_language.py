"""Runs of language models: loss in nats and perplexity, and no accuracy."""

import json
import math

import pytest
import torch
from click.testing import CliRunner
from support.runs import assert_same_checkpoint

from mpicomp.checkpoint.folder import Checkpoints
from mpicomp.cli import main
from mpicomp.config.config import RunConfig
from mpicomp.data.datasets import load
from mpicomp.exchange.loopback import run
from mpicomp.run.evaluation import evaluate
from mpicomp.run.folder import RunFolder
from mpicomp.run.loop import train

TOML = """
run.evaluate_every_epochs = 100
data = {{ kind = "text", path = '''{path}''', context = 16, tokenizer = "bpe", vocabulary = 280 }}
model = {{ kind = "gpt", width = 8, layers = 1, heads = 2, tied = true }}
optimizer = {{ kind = "adamw", lr = 0.02, decay_1d = false }}
schedule = {{ kind = "cosine", warmup = 0.2, floor = 0.1 }}
training = {{ epochs = 2, batch_size = 8, clip_norm = 1.0 }}
algorithm.kind = "{algorithm}"
"""


@pytest.mark.parametrize("algorithm", ["dpsgd", "ad_psgd"])
def test_a_run_has_a_perplexity(tmp_path, algorithm):
    pytest.importorskip("tokenizers")
    (tmp_path / "text.md").write_text("To be, or not to be, that is the question.\n" * 200)
    config = RunConfig.from_toml(TOML.format(path=tmp_path, algorithm=algorithm))
    folder = RunFolder.create(tmp_path / "run")
    folder.save_config(config)
    result, _ = run(2, lambda world: train(config, world, folder))
    assert result.test_accuracy is None and result.test_accuracy_local == [None, None]
    assert result.test_loss < 0.8 * math.log(280)
    assert result.test_perplexity == math.exp(result.test_loss)
    stored = json.loads((folder.path / "result.json").read_text())
    *_, last = folder.records()
    for report in (stored, last):
        assert (report["test_loss"], report["test_perplexity"]) == (result.test_loss, result.test_perplexity)
    shown = CliRunner().invoke(main, ["evaluate", str(folder.path)]).stdout
    assert f"test loss {result.test_loss:.4f}, test perplexity {result.test_perplexity:.4g}\n" in shown


@pytest.mark.parametrize("tokenizer", ["bpe", "characters"])
def test_other_texts_are_evaluated_with_the_tokens_of_the_run(tmp_path, tokenizer):
    pytest.importorskip("tokenizers")
    (tmp_path / "text.md").write_text("To be, or not to be, that is the question.\n" * 200)
    folder = RunFolder.create(tmp_path / "run")
    config = RunConfig.from_toml(TOML.format(path=tmp_path, algorithm="dpsgd").replace('"bpe"', f'"{tokenizer}"'))
    folder.save_config(config)
    run(2, lambda world: train(config, world, folder))
    other = tmp_path / "other.txt"
    other.write_text("the best is not to be shot at\n" * 200)  # fewer characters, and other pairs of them
    shown = CliRunner().invoke(main, ["evaluate", str(folder.path), "--data-path", str(other)]).stdout
    data = load("text", other, tokenizer=str(folder.tokenizer_path), context=16)
    model = config.model.build(data, 0)
    folder.load_model(model)
    score = evaluate(model, data, torch.device("cpu"))
    assert f"test loss {score.loss_sum / score.total:.4f}" in shown
    assert data.tokenizer != load("text", other, tokenizer=tokenizer, context=16, vocabulary=280).tokenizer


def test_muon_and_adamw_follow_one_schedule_and_go_on_bit_for_bit(tmp_path):
    (tmp_path / "text.md").write_text("To be, or not to be, that is the question.\n" * 200)
    text = TOML.format(path=tmp_path, algorithm="dpsgd").replace(', tokenizer = "bpe", vocabulary = 280', "")
    text = text.replace('kind = "adamw", lr', 'kind = "muon", lr = 0.1, adamw_lr') + "checkpoint.every_steps = 10\n"
    text += "checkpoint.keep_last = 0\n"
    whole, again = RunFolder.create(tmp_path / "whole"), RunFolder.create(tmp_path / "again")

    def train_in(folder, checkpoint=None):
        config = RunConfig.from_toml(text)
        return run(2, lambda world: train(config, world, folder, checkpoint=checkpoint))[0]

    assert train_in(whole).test_loss < 2
    first, *_, last = Checkpoints(whole.checkpoints_path).all()
    for checkpoint in (first, last):
        groups = json.loads(checkpoint.read(0)["optimizer/groups"])
        assert [group["lr"] for group in groups] == pytest.approx([5 * groups[1]["lr"], *2 * [groups[1]["lr"]]])
    train_in(again, first)
    assert_same_checkpoint(last, Checkpoints(again.checkpoints_path).latest())
