"""Steps for guidances to bend, made by hand: no engine, no budget."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from steering.core import Model, Step


@dataclass(frozen=True)
class Squares:
    """-|mask · (x - y)|², with the attributes of a measurement."""

    y: Tensor
    mask: Tensor | float = 1.0
    floor: float = 0.0
    differentiable = True
    least_squares = True

    def __call__(self, x, prompts):
        return -(self.mask * (x - self.y)).square().flatten(1).sum(1)


def step_of(model: Model, reward, x: Tensor, i: Tensor | int, lam: float = 1.0) -> Step:
    """Particles at x [N, *D] and steps i, about to take a step each; keys 0 .. N - 1."""
    n = len(x)
    i = torch.as_tensor(i).expand(n)

    def denoise(x, i, row):
        return model.denoiser(x, model.process.time(i), row)

    def score(clean, row):
        return reward(model.decode(clean), [model.prompts[r] for r in row.tolist()])

    row = torch.zeros(n, dtype=torch.int64)
    return Step(x, i, row, torch.arange(n), lam, model.process, reward, denoise, score)


def part_of(step: Step, k: int) -> Step:
    """Particle k alone."""
    one = {name: getattr(step, name)[[k]] for name in ("x", "i", "row", "key")}
    kept = {name: value for name, value in vars(step).items() if name not in one}
    return Step(**one, **kept)


def drawn(seed: int, *shape: int) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
