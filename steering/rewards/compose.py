"""Rewards made of rewards: weighted sums, products, the worst of several, standard scores."""

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
    """Gives a reward `+` and multiplication by a number, which make a `Sum`, and multiplication by
    another reward, which makes a `Product`."""

    @property
    def parts(self) -> Sequence[Any]:
        """Rewards that this one is made of."""
        return ()

    def load(self) -> None:
        """Load the networks that it needs: now, instead of at the first call."""
        for part in self.parts:
            if isinstance(part, Composable):
                part.load()

    def __add__(self, other: Any) -> Sum:
        return Sum(_terms(self) + _terms(other)) if callable(other) else NotImplemented

    def __radd__(self, other: Any) -> Sum:
        return Sum(_terms(other) + _terms(self)) if callable(other) else NotImplemented

    def __mul__(self, other: Any) -> Any:
        if callable(other):
            return Product(_factors(self) + _factors(other))
        if isinstance(other, bool) or not isinstance(other, Real):
            return NotImplemented
        return Sum(tuple((float(other) * own, reward) for own, reward in _terms(self)))

    def __rmul__(self, other: Any) -> Any:
        return Product(_factors(other) + _factors(self)) if callable(other) else self * other


class Composite(Composable):
    """A reward that is differentiable where all of its `parts` are."""

    @property
    def differentiable(self) -> bool:
        """Are all parts (almost everywhere)?"""
        return all(getattr(part, "differentiable", False) for part in self.parts)


@dataclass(frozen=True)
class Several(Composite):
    """A reward made of at least two, on equal terms."""

    rewards: Sequence[Reward]  # kept as a tuple

    def __post_init__(self) -> None:
        several = tuple(self.rewards)
        if len(several) < 2 or not all(callable(reward) for reward in several):
            raise ValueError(f"rewards={self.rewards!r}: give at least two rewards.")
        object.__setattr__(self, "rewards", several)

    @property
    def parts(self) -> Sequence[Any]:
        """Rewards that this one is made of."""
        return self.rewards


@dataclass(frozen=True)
class Sum(Composite):
    """Weighted sum: reward(x) = sum_k w_k r_k(x). `0.7 * a + 0.3 * b` makes one too.

    Direction and range follow from the parts. An item that fails in a part of weight other than 0
    fails in the sum.

    Args:
        terms: pairs (weight, reward); weights finite.
    """

    terms: Sequence[tuple[float, Reward]]  # kept as a tuple

    @property
    def parts(self) -> Sequence[Any]:
        """Rewards that this one is made of."""
        return [reward for _, reward in self.terms]

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
    def name(self) -> str:
        """The formula, with the parts' own names."""
        return " + ".join(f"{weight:g}*{name_of(reward)}" for weight, reward in self.terms)

    def __call__(self, items: Any, prompts: Sequence[Any]) -> Tensor:
        scores = [
            weight * scores_of(reward, items, prompts) for weight, reward in self.terms if weight
        ]
        zero = torch.zeros(len(prompts), device=getattr(items, "device", None))
        return sum(scores, zero)


@dataclass(frozen=True)
class Product(Several):
    """Product: reward(x) = prod_k r_k(x), for parts that are >= 0. `a * b` makes one too.

    An item has failed that a part finds below 0: two of them would make what is worse look better.

    Args:
        rewards: at least two.
    """

    @property
    def name(self) -> str:
        """The formula, with the parts' own names."""
        names = [name_of(reward) for reward in self.rewards]
        return " * ".join(f"({name})" if " + " in name else name for name in names)

    def __call__(self, items: Any, prompts: Sequence[Any]) -> Tensor:
        scores = torch.stack([scores_of(reward, items, prompts) for reward in self.rewards])
        # an infinite part has failed, whatever it is multiplied by
        return scores.prod(0).where((scores.isfinite() & (scores >= 0)).all(0), torch.nan)


@dataclass(frozen=True)
class Minimum(Several):
    """The worst of several rewards: reward(x) = min_k r_k(x), so that all are wanted at once.

    `2 * Minimum([Classifier(net, [4]), Classifier(net, [9])])` asks for what might be both.

    Args:
        rewards: at least two.
    """

    @property
    def name(self) -> str:
        """The formula, with the parts' own names."""
        return f"min({', '.join(name_of(reward) for reward in self.rewards)})"

    def __call__(self, items: Any, prompts: Sequence[Any]) -> Tensor:
        scores = torch.stack([scores_of(reward, items, prompts) for reward in self.rewards])
        # an infinite part has failed, and must not hide behind a finite one
        return scores.amin(0).where(scores.isfinite().all(0), torch.nan)


@dataclass(frozen=True)
class Standardized(Composite):
    """Standard score: reward(x) = (r(x) - mean) / std, mean and std fixed beforehand.

    Sums of rewards of unlike scales: `Standardized.fit(a, images, prompts) + Standardized.fit(b,
    images, prompts)`. Never by the batch that is scored: an item's reward would depend on others.

    Args:
        reward: what is standardized.
        mean, std: of its values over plain samples of the model; std > 0.
        count: number of items they were fitted on, 0 if they were given.
    """

    reward: Reward
    mean: float
    std: float
    count: int = 0

    @property
    def parts(self) -> Sequence[Any]:
        """Rewards that this one is made of."""
        return [self.reward]

    def __post_init__(self) -> None:
        if not callable(self.reward):
            raise TypeError(f"reward={self.reward!r} is no reward: give (items, prompts) -> [N].")
        if not (isinstance(self.mean, Real) and math.isfinite(self.mean)):
            raise ValueError(f"mean={self.mean!r}: give a finite number.")
        if not (isinstance(self.std, Real) and math.isfinite(self.std) and self.std > 0):
            raise ValueError(f"std={self.std!r}: give a finite number above 0.")

    @classmethod
    def fit(cls, reward: Reward, items: Any, prompts: Sequence[Any]) -> Standardized:
        """With the mean and standard deviation of a reward over items; failed ones are left out.

        Raises:
            ValueError: fewer than two items have a reward, or all the same one.
        """
        with torch.no_grad():
            scores = scores_of(reward, items, prompts).double()
        scores = scores[scores.isfinite()]
        spread = float(scores.std()) if len(scores) > 1 else 0.0
        if spread == 0:
            raise ValueError(
                f"items: reward {name_of(reward)} has {len(scores.unique())} finite values over "
                f"{len(prompts)} of them; give more items, that differ."
            )
        return cls(reward, float(scores.mean()), spread, len(scores))

    @property
    def name(self) -> str:
        """For tables."""
        return f"z({name_of(self.reward)})"

    def __call__(self, items: Any, prompts: Sequence[Any]) -> Tensor:
        return (scores_of(self.reward, items, prompts) - self.mean) / self.std


def _factors(reward: Any) -> tuple[Reward, ...]:
    return tuple(reward.rewards) if isinstance(reward, Product) else (reward,)


def _terms(reward: Any) -> tuple[tuple[float, Reward], ...]:
    return tuple(reward.terms) if isinstance(reward, Sum) else ((1.0, reward),)


def name_of(reward: Any) -> str:
    """How a reward is called in tables: its `name`, its function's name, or its class."""
    own = getattr(reward, "name", None) or getattr(reward, "__name__", None)
    return own if isinstance(own, str) else type(reward).__name__


def scores_of(reward: Reward, items: Any, prompts: Sequence[Any]) -> Tensor:
    """[N] on the items' device; None counts as failed (nan)."""
    value = reward(items, prompts)
    if not isinstance(value, Tensor):
        numbers = [math.nan if v is None else float(v) for v in value]
        value = torch.tensor(numbers, dtype=torch.float64)
    if tuple(value.shape) != (len(prompts),):
        raise TypeError(
            f"reward {name_of(reward)} returned shape {tuple(value.shape)} for {len(prompts)} "
            f"items: return one number per item, shape ({len(prompts)},)."
        )
    return value.to(getattr(items, "device", value.device))
