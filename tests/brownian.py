"""A chain for engine tests: x_0 is a sum of T steps N(0, 1/T), the clean guess of x is x."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from steering.core import Model
from steering.gaussian import NormalTransition


@dataclass
class Walk:
    """A denoiser that counts its rows and can run out of memory."""

    price: int = 1  # network rows of one call
    limit: int = 10**9  # largest batch before memory runs out
    rows_seen: list[int] = field(default_factory=list)  # batch size of every call

    def __call__(self, x: Tensor, t: Tensor, row: Tensor) -> Tensor:
        if len(x) > self.limit:
            raise torch.OutOfMemoryError("out of memory")
        self.rows_seen.append(len(x))
        return x

    def rows(self, t: Tensor, row: Tensor) -> Tensor:
        return torch.full((len(t),), self.price)


@dataclass(frozen=True)
class Brownian:
    """x' = x + z / sqrt(T); `ode` draws no noise at all."""

    steps: int
    dim: int
    ode: bool = False

    @property
    def stochastic(self) -> Tensor:
        return torch.full((self.steps,), not self.ode)

    def prior(self, key: Tensor) -> Tensor:
        from steering.noise import normal

        return normal(key, (self.dim,)) * (1.0 if self.ode else 0.0)

    def time(self, i: Tensor) -> Tensor:
        return i.float()

    def transition(self, x: Tensor, i: Tensor, clean: Tensor) -> NormalTransition:
        std = torch.full((len(x),), 0.0 if self.ode else math.sqrt(1 / self.steps))
        return NormalTransition(clean, std)


def brownian(steps=10, dim=2, prompts=(None,), ode=False, **walk) -> Model:
    """The model; `model.denoiser.rows_seen` counts."""
    return Model(Walk(**walk), Brownian(steps, dim, ode), prompts=prompts, name="brownian")


def first(items: Tensor, prompts: list) -> Tensor:
    """The first coordinate: N(0, 1) under the chain, so tilted by exp(λ r) it is N(λ, 1)."""
    return items[:, 0]
