"""MPGD: move the clean guess and keep the noise prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steering.core import Proposal, Step
from steering.guidance.bend import Window, bent_within, carried, check_window, move_guess
from steering.guidance.rules import RuleName, check_rule, check_step, rule_for


@dataclass(frozen=True)
class MPGD:
    """Moves the clean guess c along ∇_c r(c), and takes the step with the noise as it was.

        c~ = c + move(r(c), ∇_c r(c)),    x' = alpha' · c~ + the rest of the model's kernel

    so that the next state goes alpha' · move. On a variance-preserving chain this is FlowChef; on
    a flow it goes (1 - sigma') as far, little at first, where FlowChef goes as far as the guess.
    Without the paper's optional projection by an autoencoder; on latent models, where the guess is
    a latent already, that is the paper's own variant.

    One network row a step, like plain sampling; the network is not differentiated.

    Args:
        reward: what to follow; None is the run's.
        step: how far, in units of the rule. For rewards of `measure`, the share of the residual
            to remove from the guess in each step.
        window: (start, stop), shares of the steps, counted from the noise.
        rule: "polyak", "normalised", "norm", "plain" or "adam" (`steering.guidance.rules`); None is
            polyak for `measure`, else normalised: in units of sigma · sqrt(dim).

    Raises:
        ValueError: an argument that cannot be.

    Paper: He et al., "Manifold preserving guided diffusion", arXiv 2311.16424.
    """

    reward: Any = None
    step: float = 0.5
    window: Window = (0.0, 1.0)
    rule: RuleName | None = None

    exact = True
    differentiates = False

    def __post_init__(self) -> None:
        check_step(self.step)
        check_window(self.window)
        check_rule(self.rule)

    def rows(self, i: Tensor, steps: int) -> Tensor:
        return torch.ones_like(i)

    def propose(self, step: Step) -> Proposal:
        return bent_within(self.window, step, self._act, differentiates=False)

    def _act(self, step: Step, clean: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        assert clean is not None
        moved, failed = move_guess(step, clean, rule_for(self.rule, step.reward, self.step), 1)
        return clean, carried(step, clean, moved - clean, noise_held=True), failed
