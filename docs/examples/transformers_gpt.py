"""A small GPT, from scratch, on the characters of Tiny Shakespeare: a Trainer script with one changed line.

mpiexec -n 4 python transformers_gpt.py --data tinyshakespeare.txt     # again after a crash or a kill: it goes on
"""

import argparse
import os
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments, set_seed

from mpicomp.algorithms import AdaGossip
from mpicomp.compression import TopK
from mpicomp.integrations.transformers import GossipTrainer, last_checkpoint
from mpicomp.topology import ring

CONTEXT = 64


class Windows(torch.utils.data.Dataset):
    """A text, (n,) character ids, cut into windows."""

    def __init__(self, ids):
        self.windows = ids[: len(ids) // CONTEXT * CONTEXT].view(-1, CONTEXT)

    def __len__(self):
        return len(self.windows)

    def __getitem__(self, index):
        return {"input_ids": self.windows[index], "labels": self.windows[index]}


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--data", type=Path, default=Path(os.environ.get("MPICOMP_DATA") or "data", "tinyshakespeare.txt"))
parser.add_argument("--output-dir", default="gpt")
parser.add_argument("--steps", type=int, default=400)
options = parser.parse_args()

text = options.data.read_text(encoding="utf-8")
characters = sorted(set(text))
ids = torch.tensor([characters.index(c) for c in text])
cut = len(ids) * 9 // 10

set_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=len(characters),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        initializer_range=0.1,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
)
args = TrainingArguments(
    output_dir=options.output_dir,
    max_steps=options.steps,
    per_device_train_batch_size=16,
    learning_rate=1e-2,
    warmup_steps=20,
    weight_decay=0.1,
    lr_scheduler_type="cosine",
    eval_strategy="steps",
    eval_steps=100,
    save_steps=100,
    save_total_limit=2,
    load_best_model_at_end=True,
    logging_steps=25,
    dataloader_pin_memory=False,
    report_to="none",
)
trainer = GossipTrainer(  # was: Trainer(
    model=model,
    args=args,
    train_dataset=Windows(ids[:cut]),
    eval_dataset=Windows(ids[cut:][: 512 * CONTEXT]),
    algorithm=AdaGossip(gamma=3e-3),
    topology=ring,
    compressor=TopK(ratio=0.05),
)
trainer.train(resume_from_checkpoint=last_checkpoint(args.output_dir))

trainer.save_model(args.output_dir)  # the averaged model, for from_pretrained
if trainer.is_world_process_zero():
    print(trainer.evaluate())
    start = torch.tensor([[characters.index(c) for c in "ROMEO:"]], device=model.device)
    written = model.generate(start, attention_mask=torch.ones_like(start), max_length=CONTEXT, do_sample=True)
    print("".join(characters[i] for i in written[0]))
