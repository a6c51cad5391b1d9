"""A reward that adds up what was measured of each site, carried over to relaxed sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from steering.digest import digest
from steering.rewards.card import Card
from steering.rewards.compose import Composable


@dataclass(frozen=True, eq=False)
class Additive(Composable):
    """Sum of one value a site; of weights over tokens, its multilinear extension.

        reward(x) = Σ_l Σ_v x[l, v] · effects[l, v]

    Exact at one-hot items, linear in all, and for a guess of independent sites the mean of the
    value under it. A site without weights, such as a mask, adds nothing.

    Args:
        effects: [L, K] what token v is worth at site l.

    Raises:
        TypeError: `effects` is no tensor of floats [L, K]; on a call, items of another shape.
        ValueError: effects that are not finite.
    """

    effects: Tensor
    differentiable: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        given = self.effects
        if not isinstance(given, Tensor) or not given.is_floating_point() or given.ndim != 2:
            raise TypeError("effects: give a tensor of floats [L, K], one value a site and token.")
        if not given.isfinite().all():
            raise ValueError("effects has nan or inf: give finite numbers.")

    @cached_property
    def name(self) -> str:
        """For tables, and for records: other effects have another name."""
        return f"additive #{digest(self.effects)}"

    @property
    def card(self) -> Card:
        """Facts."""
        return Card(
            higher="the sum of the sites' effects is",
            range=(float(self.effects.amin(1).sum()), float(self.effects.amax(1).sum())),
            differentiable=True,
            source="a table of every site and token",
            notes="does not read the prompt; a site that has no token adds 0",
        )

    def __call__(self, items: Tensor, prompts: Sequence[Any]) -> Tensor:
        """[N] sums, in the precision of items [N, L, K]."""
        if items.shape[1:] != self.effects.shape:
            raise TypeError(
                f"items have shape {list(items.shape)}: these effects are of "
                f"[N, {', '.join(map(str, self.effects.shape))}], weights of tokens at each site."
            )
        return torch.einsum("nlk,lk->n", items, self.effects.to(items))
