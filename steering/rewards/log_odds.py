"""Log-odds that a classifier gives to one class."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from steering.models.sequence_classifier import log_odds
from steering.rewards.card import Card
from steering.rewards.classifier import check_net, logits_of
from steering.rewards.compose import Composable


@dataclass(frozen=True)
class LogOdds(Composable):
    """reward(x) = log p(label | x) - log(1 - p(label | x)), in nats; differentiable.

    It does not flatten where the classifier is sure, as log p does.

    Args:
        net: items -> logits [N, classes of the net], as `SequenceClassifier` does for weights over
            tokens [N, L, K]; used as it is, in evaluation mode, on its own device.
        label: the class that is wanted.

    Raises:
        TypeError, ValueError: `net` is not callable, `label` is no class number; on the first call,
            when it is beyond the net's classes.
    """

    net: Any
    label: int
    differentiable: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        check_net(self.net, "items")
        if type(self.label) is not int or self.label < 0:
            raise ValueError(f"label={self.label!r}: give a class number, 0 or more.")

    @property
    def name(self) -> str:
        """For tables."""
        return f"log-odds({self.label})"

    @property
    def card(self) -> Card:
        """Facts; of a network of the user's they are few."""
        return Card(
            higher="the class is more probable, in nats",
            range=(-math.inf, math.inf),
            differentiable=True,
            memory=None,
            source=type(self.net).__name__,
            notes="does not read the prompt",
        )

    def __call__(self, items: Tensor, prompts: Sequence[Any]) -> Tensor:
        logits = logits_of(self.net, items)
        if logits.ndim != 2 or logits.shape[1] <= max(self.label, 1):
            raise TypeError(
                f"net returned shape {tuple(logits.shape)} and label={self.label}: it must return "
                "[N, number of classes], two or more, and the label must be below that number."
            )
        return log_odds(logits.float(), self.label)
