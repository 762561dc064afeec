"""Where there is no GPU, Triton's interpreter: it must be chosen before anything imports triton, as torch does."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
