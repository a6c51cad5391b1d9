"""A reward that was measured of every sequence there is, carried over to relaxed sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from steering.digest import digest
from steering.rewards.card import Card
from steering.rewards.compose import Composable


@dataclass(frozen=True, eq=False)
class Table(Composable):
    """Value of a sequence in a table of all; of weights over tokens, their multilinear extension.

        reward(x) = Σ_s values[s] · Π_i x_i[s_i]

    Exact at one-hot items, differentiable in all, and for a guess of independent sites the mean
    of the value under it. A site without weights, such as a mask, makes it 0.

    Args:
        values: [K] * L, the value of every sequence of L of K tokens.

    Raises:
        TypeError: `values` is no tensor of floats; on a call, items of another shape.
        ValueError: dimensions of unlike size, fewer than one, or values that are not finite.
    """

    values: Tensor
    differentiable: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        if not isinstance(self.values, Tensor) or not self.values.is_floating_point():
            raise TypeError("values: give a tensor of floats, one dimension of tokens a site.")
        if self.values.ndim == 0 or len(set(self.values.shape)) > 1:
            raise ValueError(
                f"values has shape {list(self.values.shape)}: give [K] * L, as many tokens at "
                "every site."
            )
        if not self.values.isfinite().all():
            raise ValueError("values has nan or inf: give finite numbers.")

    @property
    def length(self) -> int:
        """L, sites of a sequence."""
        return self.values.ndim

    @property
    def tokens(self) -> int:
        """K."""
        return len(self.values)

    @cached_property
    def name(self) -> str:
        """For tables, and for records: other values have another name."""
        return f"table #{digest(self.values)}"

    @property
    def card(self) -> Card:
        """Facts."""
        return Card(
            higher="the value in the table is",
            range=(float(self.values.min()), float(self.values.max())),
            differentiable=True,
            source="a table of every sequence",
            notes="does not read the prompt; 0 counts where a site has no token",
        )

    def __call__(self, items: Tensor, prompts: Sequence[Any]) -> Tensor:
        """[N] values, in the precision of items [N, L, K]."""
        if items.shape[1:] != (self.length, self.tokens):
            raise TypeError(
                f"items have shape {list(items.shape)}: this table is of [N, {self.length}, "
                f"{self.tokens}], weights of {self.tokens} tokens at {self.length} sites."
            )
        # two halves of the sites, each multiplied out: one product of matrices, and [N, K^(L/2)]
        # is all that is in memory
        half = self.length // 2
        first, last = _joint(items[:, :half]), _joint(items[:, half:])
        values = self.values.to(items).reshape(first.shape[1], last.shape[1])
        return ((first @ values) * last).sum(1)


def _joint(x: Tensor) -> Tensor:
    """[N, K^l] products of weights [N, l, K], last site fastest."""
    joint = x.new_ones(len(x), 1)
    for site in x.unbind(1):
        joint = (joint[:, :, None] * site[:, None]).flatten(1)
    return joint
