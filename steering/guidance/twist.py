"""The twist: what bends a step towards a reward without knowing more than its gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steering.core import Proposal, Step
from steering.discrete import TokenProcess
from steering.gaussian import over_data
from steering.guidance.bend import (
    Jacobian,
    Window,
    at_guess,
    bent_within,
    check_jacobian,
    check_window,
    gaussian,
    through_network,
)
from steering.guidance.rules import check_step
from steering.guidance.tokens import gains_at_guess, gains_through_network, tilted_within


@dataclass(frozen=True)
class Twist:
    """The locally optimal proposal: the model's kernel times exp(λ β r(c(x'))), to first order.

        x' ~ model's kernel with its mean moved by  step · std² · λ · β' · ∇_x r(c(x))

    β' is the share of λ that counts at the next state, 1 without `tempering`. Samplers TDS and DAS
    bring it with them; under any weighted sampler its draws are exact. Where std = 0 nothing moves.

    jacobian="skip" takes ∇_x r(c(x)) ≈ alpha / (alpha² + sigma²) · ∇_c r(c), which is right for
    data of unit variance, and bounded at every level: the weights correct for the rest.

    Steps of tokens are tilted, site by site, by what each token is worth to first order:

        p(x'_l = v) · exp(step · λ · β' · G[l, v]), normalised

    jacobian="skip" takes G[l, v] = Σ_c ∂r/∂p[l, c] · (P(c | x, x'_l = v) - p[l, c]): what the guess
    p gains when the site's next token is known, by Bayes' rule. That is exact where one site is
    left and the reward is linear in it; in a masked chain a token v gains ∂r/∂p[l, v] less its
    mean, and the mask nothing. jacobian="full" takes G[l, v] = ∂r/∂x[l, v] - ∂r/∂x[l, x_l] of
    relaxed states x (arXiv 2406.01572): it knows what a token says of other sites, but extends to a
    whole token what holds for a part of it.

    One network row a step, differentiated unless the Jacobian is skipped.

    Args:
        reward: what to follow; None is the run's.
        step: share of the locally optimal shift.
        window: (start, stop), shares of the steps, counted from the noise.
        jacobian: "full", through the network, or "skip".
        tempering: γ of `tempered`; None is β = 1.

    Raises:
        ValueError: an argument that cannot be.

    Papers: Wu et al., "Practical and asymptotically exact conditional sampling in diffusion
    models", arXiv 2306.17775; Kim et al., "Test-time alignment of diffusion models without reward
    over-optimization", arXiv 2501.05803; Nisonoff et al., "Unlocking guidance for discrete
    state-space diffusion and flow models", arXiv 2406.01572.
    """

    reward: Any = None
    step: float = 1.0
    window: Window = (0.0, 1.0)
    jacobian: Jacobian = "full"
    tempering: float | None = None

    exact = True
    needs_noise = True

    def __post_init__(self) -> None:
        check_step(self.step)
        check_window(self.window)
        check_jacobian(self.jacobian)
        check_tempering(self.tempering)

    @property
    def differentiates(self) -> bool:
        """Does it need the network's gradient?"""
        return self.jacobian == "full"

    def rows(self, i: Tensor, steps: int) -> Tensor:
        return torch.ones_like(i)

    def propose(self, step: Step) -> Proposal:
        if isinstance(step.process, TokenProcess):
            return tilted_within(self.window, step, self._tilt, differentiates=self.differentiates)
        return bent_within(self.window, step, self._act, differentiates=self.differentiates)

    def _strength(self, step: Step) -> Tensor:
        """[N] float64: how much the reward counts, step · λ · β'."""
        share = tempered(self.tempering, step.i + 1, step.process.steps)
        return self.step * step.lam * share

    def _tilt(self, step: Step, clean: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        at = gains_through_network(step) if clean is None else gains_at_guess(step, clean)
        return at.clean, self._strength(step).float()[:, None, None] * at.gradient, at.failed

    def _act(self, step: Step, clean: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        process = gaussian(step)
        length = self._strength(step) * process.kernel.std[step.i].square()
        if clean is None:
            at = through_network(step)
        else:
            at = at_guess(step, clean)
            alpha, sigma = process.alpha[step.i], process.sigma[step.i]
            length = length * alpha / (alpha.square() + sigma.square())
        return at.clean, over_data(length.float(), at.gradient) * at.gradient, at.failed


def tempered(tempering: float | None, i: Tensor, steps: int) -> Tensor:
    """The share β of λ that counts at steps i [N] out of `steps`: [N] float64, on i's device.

        β_i = min(1, (1 + γ)^(100 i / steps) - 1)

    The paper's schedule, whose exponent counts steps out of 100. γ = 0.008 reaches 1 at 87 of them,
    γ = 0.03 at 24. None is β = 1.
    """
    if tempering is None:
        return torch.ones_like(i, dtype=torch.float64)
    # a power of a large base is more than floats hold, and is cut at 1 all the same
    grown = (i.double() * (100 / steps * math.log1p(tempering))).clamp(max=1.0)
    return torch.expm1(grown).clamp(max=1.0)


def check_tempering(tempering: float | None) -> None:
    """ValueError unless `tempering` is None or a finite number above 0."""
    if tempering is None:
        return
    good = isinstance(tempering, (int, float)) and not isinstance(tempering, bool)
    if not good or not 0 < tempering < math.inf:
        raise ValueError(
            f"tempering={tempering!r}: give a number > 0 (0.008 is the paper's), or None for none."
        )
