"""Random numbers that depend on a key alone, so that both ends of a message agree and a restart stores no generator."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from mpicomp import kernels
from mpicomp.state import OWN

_MASK = 2**64 - 1


@dataclass
class Draws:
    """The state of a compressor that draws random numbers: its place in the stream.

    Attributes:
        stream: tells apart the ranks, and the tensors of a rank.
        step: messages made so far.

    """

    stream: int = field(metadata=OWN)
    step: int = 0


def mix64(*key: int) -> int:
    """Return a 64-bit hash of integers: splitmix64 (Steele et al. 2014, doi 10.1145/2660193.2660195) over each of them.

    The result is in ``[0, 2**64)``; keys of different length or order give unrelated values.
    """
    state = len(key)
    for word in key:
        state = (state ^ (word & _MASK)) + 0x9E3779B97F4A7C15 & _MASK
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state


def next_seed(seed: int, draws: Draws) -> int:
    """Return the 64 bits that key the noise of one message, and move `draws` on by one message."""
    key = mix64(seed, draws.step, draws.stream)
    draws.step += 1
    return key


def uniform(like: Tensor, seed: int, draws: Draws) -> Tensor:
    """Return noise in ``[0, 1)`` of the length and device of `like`, float32; `draws` moves on by one message."""
    return kernels.noise(like, next_seed(seed, draws))
