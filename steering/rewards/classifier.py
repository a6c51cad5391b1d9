"""Log-probability that a classifier gives to a set of classes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from steering.rewards.card import Card
from steering.rewards.compose import Composable


@dataclass(frozen=True)
class Classifier(Composable):
    """reward(x) = log sum_{c in classes} p(c | x), in nats; differentiable.

    Range (-inf, 0], 0 = certain: so λ = 1 draws from p(x | class in classes) under a classifier
    that is Bayes' for the model, and rejection sampling is exact.

    Args:
        net: images [N, C, H, W] in [0, 1] -> logits [N, classes of the net]; used as it is, in
            evaluation mode, on its own device.
        classes: those wanted; their probabilities are added.

    Raises:
        TypeError, ValueError: `net` is not callable, `classes` is empty, repeated or negative;
            on the first call, when a class is beyond the net's.
    """

    net: Any
    classes: Sequence[int]  # kept as a tuple
    differentiable: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        check_net(self.net, "images [N, C, H, W]")
        if isinstance(self.classes, (int, str)) or not isinstance(self.classes, Sequence):
            raise TypeError(f"classes={self.classes!r}: give a list of class numbers.")
        classes = tuple(self.classes)
        if not all(isinstance(c, int) and not isinstance(c, bool) and c >= 0 for c in classes):
            raise ValueError(f"classes={classes}: give whole numbers >= 0.")
        if not classes or len(set(classes)) < len(classes):
            raise ValueError(f"classes={classes}: give at least one class, each once.")
        object.__setattr__(self, "classes", classes)

    @property
    def name(self) -> str:
        """For tables."""
        return f"log p({','.join(map(str, self.classes))})"

    @property
    def card(self) -> Card:
        """Facts; of a network of the user's they are few."""
        return Card(
            higher="the classes are more probable, in nats",
            range=(-math.inf, 0.0),
            differentiable=True,
            memory=None,
            source=type(self.net).__name__,
            notes="does not read the prompt",
        )

    def __call__(self, items: Tensor, prompts: Sequence[Any]) -> Tensor:
        # images, even black and white ones of whole numbers, and not tokens
        logits = logits_of(self.net, items if items.is_floating_point() else items.float())
        if logits.ndim != 2 or logits.shape[1] <= max(self.classes):
            raise TypeError(
                f"net returned shape {tuple(logits.shape)} and classes={self.classes}: it must "
                "return [N, number of classes], and every class must be below that number."
            )
        log_p = logits.float().log_softmax(1)[:, list(self.classes)]
        return torch.logsumexp(log_p, 1).clamp(max=0)  # rounding must not make p > 1


def check_net(net: Any, takes: str) -> None:
    """TypeError unless `net` can be called; a module is in evaluation mode from now on."""
    if not callable(net):
        raise TypeError(f"net={net!r} is not callable: give {takes} -> logits.")
    if isinstance(net, nn.Module):
        net.eval()


def logits_of(net: Any, items: Tensor) -> Tensor:
    """What `net` says of items [N, ...], taken to its weights, and floats to their precision."""
    weights = next(net.parameters(), None) if isinstance(net, nn.Module) else None
    if weights is not None:
        items = items.to(weights.device)
        items = items.to(weights.dtype) if items.is_floating_point() else items
    return net(items)
