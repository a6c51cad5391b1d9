"""A guided proposal with a density, for testing weights: every step is pushed by a constant."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from steering.core import Proposal
from steering.gaussian import NormalTransition


@dataclass(frozen=True)
class Push:
    """Moves the mean of a step by push · std², the form of the best bend for a linear reward."""

    push: float
    exact: bool = True
    differentiates: bool = False

    def propose(self, step) -> Proposal:
        clean = step.denoise(step.x, step.i, step.row)
        base = step.process.transition(step.x, step.i, clean)
        guided = NormalTransition(base.mean + self.push * base.std[:, None] ** 2, base.std)
        return Proposal(base, guided, clean, torch.zeros(len(step), dtype=torch.bool))

    def rows(self, i: torch.Tensor, steps: int) -> torch.Tensor:
        return torch.ones_like(i)
