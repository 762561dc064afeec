"""A Trainer script as a user would write it, small; a program of its own, started on MPI ranks.

    train_gpt.py FOLDER [--resume] [--die-in-save STEP] [--uneven] [--use-cpu | --bfloat16] [--muon]

Trains in FOLDER, and leaves in it for each rank what it has seen and what it ended with (``rank_0.pt`` and so on).
"""

import argparse
import os
import signal
from contextlib import nullcontext
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments, set_seed

from mpicomp import SeveralOptimizers
from mpicomp.algorithms import Choco
from mpicomp.compression import TopK
from mpicomp.integrations.transformers import GossipTrainer, hidden_launcher
from mpicomp.topology import ring


class Windows(torch.utils.data.Dataset):
    """Numbers that count up, and a note of which were asked for."""

    def __init__(self, count):
        self.count = count
        self.asked = []

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        self.asked.append(index)
        ids = torch.arange(index, index + 12) % 19
        return {"input_ids": ids, "labels": ids}


def make_model():
    """Return a model with tied weights and with dropout."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=19,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=16,
            attention_dropout=0.2,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def make_arguments(options):
    """Return the settings of the Trainer."""
    return TrainingArguments(
        output_dir=str(options.folder / "output"),
        max_steps=12,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        weight_decay=0.1,
        eval_strategy="steps",
        eval_steps=4,
        save_steps=4,
        logging_steps=4,
        load_best_model_at_end=True,
        dataloader_pin_memory=False,
        report_to="none",
        use_cpu=options.use_cpu or options.bfloat16,
        bf16=options.bfloat16,
    )


def make_optimizers(model):
    """Return Muon for the matrices of the layers, and AdamW for the rest."""
    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "layers" not in name]
    return SeveralOptimizers([torch.optim.Muon(hidden, lr=0.02), torch.optim.AdamW(others, lr=1e-2)])


class Mortal(GossipTrainer):
    """Dies while it saves."""

    dies_at = None

    def _save_rng_state(self, output_dir):
        if self.state.global_step == self.dies_at and self.world.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        super()._save_rng_state(output_dir)


def main():
    """Train."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--die-in-save", type=int)
    parser.add_argument("--uneven", action="store_true")
    parser.add_argument("--use-cpu", action="store_true")
    parser.add_argument("--bfloat16", action="store_true")
    parser.add_argument("--muon", action="store_true")
    options = parser.parse_args()
    with hidden_launcher() if options.bfloat16 else nullcontext():
        args = make_arguments(options)
    rank = int(os.environ.get("PMI_RANK") or os.environ.get("OMPI_COMM_WORLD_RANK") or 0)
    set_seed(1)
    train = Windows(60 + 20 * rank if options.uneven else 60)
    model = make_model()
    trainer = Mortal(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=Windows(8),
        algorithm=Choco(gamma=0.3, overlap=options.bfloat16),
        topology=ring,
        compressor=TopK(ratio=0.1),
        optimizers=(make_optimizers(model) if options.muon else None, None),
    )
    trainer.dies_at = options.die_in_save
    trainer.train(resume_from_checkpoint=options.resume)
    found = {"asked": train.asked, "log": trainer.state.log_history, "model": trainer.model.state_dict()}
    if rank == 0:  # alone, as scripts do
        trainer.save_model(str(options.folder / "final"))
        found["evaluated"] = trainer.evaluate()["eval_loss"]
    torch.save(found, options.folder / f"rank_{rank}.pt")


if __name__ == "__main__":
    main()
