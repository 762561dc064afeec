"""A character LSTM: embedding, recurrent layers, logits (Hochreiter and Schmidhuber 1997)."""

from __future__ import annotations

from torch import Tensor, nn

from mpicomp.data.arguments import require_positive
from mpicomp.models.base import Problem


class CharacterLSTM(nn.Module):
    """Predicts the next character at every position; its state is zero at the start of each window.

    Shape:
        (b, context) int64 -> (b, context, classes)

    """

    def __init__(self, classes: int, width: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(classes, width)
        self.recurrent = nn.LSTM(width, width, num_layers=layers, batch_first=True)
        self.head = nn.Linear(width, classes)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits (b, context, classes)."""
        hidden, _ = self.recurrent(self.embedding(ids))
        logits: Tensor = self.head(hidden)
        return logits


def lstm(problem: Problem, width: int = 128, layers: int = 1) -> nn.Module:
    """Build a character LSTM.

    Args:
        problem: sequences of tokens.
        width: of the embedding and of each layer's state.
        layers: recurrent layers, one upon the other.

    Raises:
        ConfigError: other data, or a size below 1.

    """
    problem.require_language("lstm")
    require_positive("model", width=width, layers=layers)
    return CharacterLSTM(problem.classes, width, layers)
