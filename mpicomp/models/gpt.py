"""A GPT: a causal transformer with root mean square normalization before each part, and rotary positions.

    x = embedding[ids];   x += attention(norm(x)),  x += mlp(norm(x)) in each layer;   logits = head(norm(x))

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners" (GPT-2: layers, initialization); Su et al.
2021, arXiv 2104.09864 (rotary positions); Zhang and Sennrich 2019, arXiv 1910.07467 (the normalization). No dropout, no
biases.
"""

from __future__ import annotations

import contextlib
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpicomp.data.arguments import require_positive
from mpicomp.errors import ConfigError
from mpicomp.models.base import Problem

Precision = Literal["float32", "bfloat16"]

ROTARY_BASE = 10_000.0


def rotary_angles(positions: Tensor, dimensions: int) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of ``position * 10000 ** (-2 i / dimensions)``, each (t, dimensions / 2) float32."""
    frequencies = ROTARY_BASE ** (-torch.arange(0, dimensions, 2, device=positions.device) / dimensions)
    angles = torch.outer(positions.float(), frequencies)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair (x_i, x_{i + d/2}) of (..., t, d) by the angle of its position, in float32.

    The product of a query and a key then depends on the distance of their positions alone.
    """
    cosine, sine = angles
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1).type_as(x)


class Attention(nn.Module):
    """Causal self-attention with `heads` heads.

    Shape:
        (b, t, width) -> (b, t, width)

    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.inward = nn.Linear(width, 3 * width, bias=False)
        self.outward = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """Return the attention output (b, t, width); FlashAttention where torch has it, as on GPUs in bfloat16."""
        batch, length, width = x.shape
        query, key, value = self.inward(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(rotate(query, angles), rotate(key, angles), value, is_causal=True)
        projected: Tensor = self.outward(mixed.transpose(1, 2).reshape(batch, length, width))
        return projected


class Layer(nn.Module):
    """``x += attention(norm(x))``, then ``x += mlp(norm(x))``.

    Shape:
        (b, t, width) -> (b, t, width)

    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(width)
        self.attention = Attention(width, heads)
        self.mlp_norm = nn.RMSNorm(width)
        self.inward = nn.Linear(width, 4 * width, bias=False)
        self.outward = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """Return the residual stream (b, t, width) after this layer."""
        x = x + self.attention(self.attention_norm(x), angles)
        transformed: Tensor = x + self.outward(F.gelu(self.inward(self.mlp_norm(x))))
        return transformed


class GPT(nn.Module):
    """Predicts the next token at every position from those up to it.

    Shape:
        (b, t) int64 -> (b, t, classes) float32

    """

    def __init__(
        self, classes: int, width: int, layers: int, heads: int, tied: bool = False, dtype: Precision = "float32"
    ) -> None:
        super().__init__()
        self.dimensions = width // heads
        self.dtype = dtype
        self.embedding = nn.Embedding(classes, width)
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, classes, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        self._initialize(layers)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits (b, t, classes)."""
        angles = rotary_angles(torch.arange(ids.shape[1], device=ids.device), self.dimensions)
        is_half = self.dtype == "bfloat16"
        with torch.autocast(ids.device.type, torch.bfloat16) if is_half else contextlib.nullcontext():
            x = self.embedding(ids)
            for layer in self.layers:
                x = layer(x, angles)
            logits: Tensor = self.head(self.norm(x))
        return logits.float()

    def _initialize(self, layers: int) -> None:
        """GPT-2: normal(0, 0.02), less by sqrt(2 * layers) where a layer adds to the residual stream."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                adds = name.endswith("outward.weight")
                nn.init.normal_(parameter, std=0.02 / (2 * layers) ** 0.5 if adds else 0.02)


def gpt(
    problem: Problem,
    width: int = 128,
    layers: int = 4,
    heads: int = 4,
    tied: bool = False,
    dtype: Precision = "float32",
) -> nn.Module:
    """Build a GPT.

    Args:
        problem: sequences of tokens.
        width: of the residual stream.
        layers: of attention and perceptron.
        heads: of attention; must divide `width` into even parts.
        tied: whether the output layer has the weights of the embedding (Press and Wolf 2017, arXiv 1608.05859).
        dtype: ``"bfloat16"``: matrix products and attention are in bfloat16 by `torch.autocast`. Parameters, their
            gradients, the residual stream, normalization and loss are float32 in any case.

    Raises:
        ConfigError: other data, a size below 1, or heads that do not divide the width.

    """
    problem.require_language("gpt")
    require_positive("model", width=width, layers=layers, heads=heads)
    if width % (2 * heads):
        raise ConfigError(
            f"model.heads = {heads}: must divide model.width = {width} into even parts: rotary positions turn pairs."
        )
    if dtype not in get_args(Precision):
        raise ConfigError(f"model.dtype = {dtype!r} must be one of {', '.join(map(repr, get_args(Precision)))}")
    return GPT(problem.classes, width, layers, heads, tied, dtype)
