"""DPS: follow a reward's true gradient, through the network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steering.core import Proposal, Step
from steering.guidance.bend import Window, bent_within, check_window, gaussian, through_network
from steering.guidance.rules import RuleName, check_rule, check_step, rule_for


@dataclass(frozen=True)
class DPS:
    """Moves the next state along the gradient of the reward of the clean guess, ∇_x r(c(x)).

        x' ~ model's kernel with its mean moved by  step · ∇_x r(c(x)) / sqrt(-r(c(x)))

    which for r = -|A c - y|² is the paper's ζ / |A c - y| · ∇_x |A c - y|², downhill. The norm is
    that of one item; public codes take it over the batch, where an item's step depends on its
    neighbours. Their scale multiplies the gradient of the norm of images in [-1, 1]; for images in
    [0, 1], as here, it is the same number. The move has the same size on every chain.

    One network row a step, differentiated: two to three times the time of plain sampling, and the
    memory of one backward pass.

    Args:
        reward: what to follow; None is the run's.
        step: how far, in units of the rule; published are 0.4 to 1 for the default rule.
        window: (start, stop), shares of the steps, counted from the noise.
        rule: "norm", "polyak", "normalised", "plain" or "adam" (`steering.guidance.rules`); None is
            norm, the paper's, for `measure`, else normalised: in units of sigma · sqrt(dim).

    Raises:
        ValueError: an argument that cannot be.

    Paper: Chung et al., "Diffusion posterior sampling for general noisy inverse problems",
    arXiv 2209.14687.
    """

    reward: Any = None
    step: float = 1.0
    window: Window = (0.0, 1.0)
    rule: RuleName | None = None

    exact = True
    differentiates = True

    def __post_init__(self) -> None:
        check_step(self.step)
        check_window(self.window)
        check_rule(self.rule)

    def rows(self, i: Tensor, steps: int) -> Tensor:
        return torch.ones_like(i)

    def propose(self, step: Step) -> Proposal:
        return bent_within(self.window, step, self._act, differentiates=True)

    def _act(self, step: Step, clean: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        move = rule_for(self.rule, step.reward, self.step, squares="norm")
        at = through_network(step)
        sigma = gaussian(step).sigma[step.i].float()
        return at.clean, move(at.value, at.gradient, sigma), at.failed
