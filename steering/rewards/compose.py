"""Rewards made of rewards: weighted sums and the worst of several."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from steering.core import Reward


class Composable:
    """Gives a reward `+` and multiplication by a number; both make a `Sum`."""

    def __add__(self, other: Any) -> Sum:
        return Sum(_terms(self) + _terms(other)) if callable(other) else NotImplemented

    def __radd__(self, other: Any) -> Sum:
        return Sum(_terms(other) + _terms(self)) if callable(other) else NotImplemented

    def __mul__(self, weight: Any) -> Sum:
        if isinstance(weight, bool) or not isinstance(weight, Real):
            return NotImplemented
        return Sum(tuple((float(weight) * own, reward) for own, reward in _terms(self)))

    __rmul__ = __mul__


@dataclass(frozen=True)
class Sum(Composable):
    """Weighted sum: reward(x) = sum_k w_k r_k(x). `0.7 * a + 0.3 * b` makes one too.

    Direction and range follow from the parts. An item that fails in a part of weight other than 0
    fails in the sum.

    Args:
        terms: pairs (weight, reward); weights finite.
    """

    terms: Sequence[tuple[float, Reward]]  # kept as a tuple

    def __post_init__(self) -> None:
        terms = tuple(self.terms)
        if not terms:
            raise ValueError("terms is empty: give at least one pair (weight, reward).")
        for term in terms:
            if not (isinstance(term, tuple) and len(term) == 2 and callable(term[1])):
                raise TypeError(f"terms holds {term!r}: give pairs (weight, reward).")
            if not (isinstance(term[0], Real) and math.isfinite(term[0])):
                raise ValueError(f"terms holds the weight {term[0]!r}: give a finite number.")
        object.__setattr__(self, "terms", terms)

    @property
    def differentiable(self) -> bool:
        """Are all parts?"""
        return all(getattr(reward, "differentiable", False) for _, reward in self.terms)

    @property
    def name(self) -> str:
        """The formula, with the parts' own names."""
        return " + ".join(f"{weight:g}*{_name(reward)}" for weight, reward in self.terms)

    def __call__(self, items: Any, prompts: Sequence[Any]) -> Tensor:
        scores = [
            weight * _scores(reward, items, prompts) for weight, reward in self.terms if weight
        ]
        zero = torch.zeros(len(prompts), device=getattr(items, "device", None))
        return sum(scores, zero)


@dataclass(frozen=True)
class Minimum(Composable):
    """The worst of several rewards: reward(x) = min_k r_k(x), so that all are wanted at once.

    `2 * Minimum([Classifier(net, [4]), Classifier(net, [9])])` asks for what might be both.

    Args:
        rewards: at least two.
    """

    rewards: Sequence[Reward]  # kept as a tuple

    def __post_init__(self) -> None:
        rewards = tuple(self.rewards)
        if len(rewards) < 2 or not all(callable(reward) for reward in rewards):
            raise ValueError(f"rewards={self.rewards!r}: give at least two rewards.")
        object.__setattr__(self, "rewards", rewards)

    @property
    def differentiable(self) -> bool:
        """Are all parts (almost everywhere)?"""
        return all(getattr(reward, "differentiable", False) for reward in self.rewards)

    @property
    def name(self) -> str:
        """The formula, with the parts' own names."""
        return f"min({', '.join(_name(reward) for reward in self.rewards)})"

    def __call__(self, items: Any, prompts: Sequence[Any]) -> Tensor:
        scores = torch.stack([_scores(reward, items, prompts) for reward in self.rewards])
        # an infinite part has failed, and must not hide behind a finite one
        return scores.amin(0).where(scores.isfinite().all(0), torch.nan)


def _terms(reward: Any) -> tuple[tuple[float, Reward], ...]:
    return tuple(reward.terms) if isinstance(reward, Sum) else ((1.0, reward),)


def _name(reward: Any) -> str:
    own = getattr(reward, "name", None) or getattr(reward, "__name__", None)
    return own if isinstance(own, str) else type(reward).__name__


def _scores(reward: Reward, items: Any, prompts: Sequence[Any]) -> Tensor:
    """[N] on the items' device; None counts as failed (nan)."""
    value = reward(items, prompts)
    if not isinstance(value, Tensor):
        numbers = [math.nan if v is None else float(v) for v in value]
        value = torch.tensor(numbers, dtype=torch.float64)
    if tuple(value.shape) != (len(prompts),):
        raise TypeError(
            f"reward {_name(reward)} returned shape {tuple(value.shape)} for {len(prompts)} items: "
            f"return one number per item, shape ({len(prompts)},)."
        )
    return value.to(getattr(items, "device", value.device))
