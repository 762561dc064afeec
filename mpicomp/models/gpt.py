"""A small GPT: a causal transformer with layer normalization before each part.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners" (GPT-2), without dropout; the output layer
has weights of its own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpicomp.data.arguments import require_positive
from mpicomp.errors import ConfigError
from mpicomp.models.base import Problem


class Attention(nn.Module):
    """Causal self-attention with `heads` heads.

    Shape:
        (b, context, width) -> (b, context, width)

    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.inward = nn.Linear(width, 3 * width)
        self.outward = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the attention output (b, context, width)."""
        batch, context, width = x.shape
        query, key, value = self.inward(x).view(batch, context, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        projected: Tensor = self.outward(mixed.transpose(1, 2).reshape(batch, context, width))
        return projected


class Layer(nn.Module):
    """``x += attention(norm(x))``, then ``x += mlp(norm(x))``.

    Shape:
        (b, context, width) -> (b, context, width)

    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attend = nn.Sequential(nn.LayerNorm(width), Attention(width, heads))
        self.think = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the residual stream (b, context, width) after this layer."""
        x = x + self.attend(x)
        transformed: Tensor = x + self.think(x)
        return transformed


class GPT(nn.Module):
    """Predicts the next character at every position from those up to it.

    Shape:
        (b, t) int64 with t <= context -> (b, t, classes)

    """

    def __init__(self, classes: int, context: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.characters = nn.Embedding(classes, width)
        self.positions = nn.Embedding(context, width)
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes, bias=False)
        self._initialize(layers)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits (b, t, classes)."""
        x = self.characters(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        logits: Tensor = self.head(self.norm(self.layers(x)))
        return logits

    def _initialize(self, layers: int) -> None:
        """GPT-2: normal(0, 0.02), less by sqrt(2 * layers) where a layer adds to the residual stream; biases zero."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                adds = name.endswith(("outward.weight", "think.3.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * layers) ** 0.5 if adds else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)


def gpt(problem: Problem, width: int = 128, layers: int = 4, heads: int = 4) -> nn.Module:
    """Build a small GPT for the context of the data.

    Args:
        problem: sequences of characters.
        width: of the residual stream.
        layers: of attention and perceptron.
        heads: of attention; must divide `width`.

    Raises:
        ConfigError: other data, a size below 1, or heads that do not divide the width.

    """
    context = problem.require_language("gpt")
    require_positive("model", width=width, layers=layers, heads=heads)
    if width % heads:
        raise ConfigError(f"model.heads = {heads}: must divide model.width = {width}.")
    return GPT(problem.classes, context, width, layers, heads)
