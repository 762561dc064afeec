"""Samplers whose random numbers are the same on all ranks, which then take different parts of what is drawn."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler

from mpicomp.replica.state import load_random, random_leaves


class SameDraws(Sampler[Any]):
    """The indices of another sampler, drawn with a seed: the same on all ranks, and again after a restart.

    Otherwise a sampler without a generator of its own draws from the global one, whose place differs between ranks:
    dropout and augmentation draw from it, too.
    """

    def __init__(self, sampler: Any, seed: int) -> None:
        self._sampler = sampler
        self._seed = seed
        self._epoch = 0

    def __len__(self) -> int:
        return len(self._sampler)

    def set_epoch(self, epoch: int) -> None:
        """Draw those of this epoch from now on."""
        self._epoch = epoch
        if hasattr(self._sampler, "set_epoch"):
            self._sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:
        with _seeded(self._seed + self._epoch, getattr(self._sampler, "generator", None)):
            indices = list(self._sampler)  # at once: dropout draws from the same generator meanwhile
        return iter(indices)


@contextmanager
def _seeded(seed: int, own: torch.Generator | None) -> Iterator[None]:
    """Seed the generators of the CPU, which come back after the block, and the sampler's `own`, if there is one."""
    cpu = torch.device("cpu")
    before = random_leaves(cpu)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    for generator in [torch.default_generator, *([own] if isinstance(own, torch.Generator) else [])]:
        generator.manual_seed(seed)
    try:
        yield
    finally:
        load_random(cpu, before)
