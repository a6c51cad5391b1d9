"""A small classifier of sequences, DNA or text: a judge, and a differentiable reward."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, max_pool1d, one_hot


class SequenceClassifier(nn.Module):
    """Convolutions that read motifs, blocks of dilated ones that see how they lie together.

    With two strands both are read: the logits are the mean of those of the sequence and of its
    reverse complement, so that they do not depend on which strand was written down.

    Args:
        classes: number of classes.
        motifs: filters of the first convolution.
        width: of a filter, bases, an odd number.
        channels: of the blocks.
        depth: number of blocks; the dilation doubles from each to the next.
        dropout: in training, of the features before the last layer.
        tokens: K.
        strands: 2 for DNA, whose tokens are A, C, G, T; 1 for what is read one way.
    """

    def __init__(
        self,
        classes: int = 4,
        motifs: int = 128,
        width: int = 15,
        channels: int = 96,
        depth: int = 3,
        dropout: float = 0.3,
        tokens: int = 4,
        strands: int = 2,
    ) -> None:
        super().__init__()
        self.config = {
            "classes": classes,
            "motifs": motifs,
            "width": width,
            "channels": channels,
            "depth": depth,
            "dropout": dropout,
            "tokens": tokens,
            "strands": strands,
        }
        self.read = nn.Conv1d(tokens, motifs, width, padding=width // 2)
        self.norm = nn.BatchNorm1d(motifs)
        self.narrow = nn.Conv1d(motifs, channels, 1)
        self.blocks = nn.ModuleList(_Block(channels, 2**k) for k in range(depth))
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(2 * channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, classes].

        Args:
            x: [N, L] tokens, or [N, L, K] their weights: one-hot, or probabilities.

        Raises:
            ValueError: another shape.
        """
        if not x.is_floating_point():
            if x.ndim != 2:
                raise ValueError(f"x has shape {list(x.shape)}: give tokens [N, L].")
            x = one_hot(x.long(), self.config["tokens"])
        if x.ndim != 3 or x.shape[2] != self.config["tokens"]:
            raise ValueError(
                f"x has shape {list(x.shape)}: give weights [N, L, {self.config['tokens']}]."
            )
        x = x.to(self.head.weight.dtype)
        if self.config["strands"] == 1:
            return self._strand(x)
        # A, C, G, T complement to T, G, C, A: flipping both axes turns the strand
        both = self._strand(torch.cat([x, x.flip(1, 2)]))
        return both.unflatten(0, (2, -1)).mean(0)

    def _strand(self, x: Tensor) -> Tensor:
        y = gelu(self.norm(self.read(x.mT)))
        y = self.narrow(max_pool1d(y, 4))
        for block in self.blocks:
            y = block(y)
        return self.head(self.drop(torch.cat([y.mean(2), y.amax(2)], 1)))


class _Block(nn.Module):
    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.mix = nn.Conv1d(channels, channels, 5, padding=2 * dilation, dilation=dilation)
        self.norm = nn.BatchNorm1d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + gelu(self.norm(self.mix(x)))


def log_odds(logits: Tensor, label: int) -> Tensor:
    """log p(label) - log(1 - p(label)), nats, [N], of logits [N, classes]."""
    rest = torch.cat([logits[:, :label], logits[:, label + 1 :]], 1)
    return logits[:, label] - rest.logsumexp(1)
