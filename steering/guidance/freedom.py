"""FreeDoM: the true gradient, and travel back in time where the image takes shape."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from steering.core import Proposal, Step
from steering.gaussian import GaussianProcess, over_data
from steering.guidance.bend import (
    Window,
    bent_within,
    check_window,
    gaussian,
    inside,
    part,
    through_network,
)
from steering.guidance.rules import RuleName, check_rule, check_step, rule_for
from steering.noise import child_key, normal


@dataclass(frozen=True)
class FreeDoM:
    """Moves the next state along ∇_x r(c(x)), and in a window of steps takes each several times.

        x' ~ model's kernel with its mean moved by  alpha · move(r(c(x)), ∇_x r(c(x)))
        back:  x = alpha / alpha' · x' + sqrt(sigma² - (alpha · sigma' / alpha')²) · z,  and again

    alpha is the level's, as the paper's learning rate ρ_t = sqrt(ᾱ_t) · scale has it; z is new
    noise, by the forward kernel. The paper travels in the middle of the way only, where content is
    decided: early steps have none yet, late ones only refine it. It takes a step 10 times between
    .2 and .5 of the way for ImageNet, and once for faces.

    A step costs one network row for each time it is taken, all differentiated. A kernel that
    travels has no density, so that it cannot be weighed (`exact` is False); with travel=1 it has.

    Args:
        reward: what to follow; None is the run's.
        step: how far, in units of the rule.
        window: (start, stop), shares of the steps, counted from the noise: where to guide.
        travel: how many times a step in `travel_window` is taken, 1 or more.
        travel_window: likewise, where to travel, as far as it lies in `window`.
        rule: "norm", "polyak", "normalised", "plain" or "adam" (`steering.guidance.rules`); None is
            norm for `measure`, else normalised: in units of sigma · sqrt(dim).

    Raises:
        ValueError: an argument that cannot be.

    Paper: Yu et al., "FreeDoM: Training-free energy-guided conditional diffusion model",
    arXiv 2303.09833.
    """

    reward: Any = None
    step: float = 1.0
    window: Window = (0.0, 1.0)
    travel: int = 2
    travel_window: Window = (0.3, 0.7)
    rule: RuleName | None = None

    differentiates = True

    def __post_init__(self) -> None:
        check_step(self.step)
        check_window(self.window)
        check_window(self.travel_window, "travel_window")
        check_rule(self.rule)
        if isinstance(self.travel, bool) or not isinstance(self.travel, int) or self.travel < 1:
            raise ValueError(
                f"travel={self.travel!r}: give how many times a step is taken, a whole number >= 1."
            )

    @property
    def exact(self) -> bool:
        """Has the guided kernel a density?"""
        return self.travel == 1

    def repeats(self, i: Tensor, steps: int) -> Tensor:
        """How many times steps i [N] are taken: [N] int64, on i's device."""
        travels = inside(self.travel_window, i, steps) & inside(self.window, i, steps)
        return torch.where(travels, self.travel, 1)

    def rows(self, i: Tensor, steps: int) -> Tensor:
        return self.repeats(i, steps)

    def once(self, step: Step) -> Proposal:
        """The step taken one time, without travel."""
        return bent_within(self.window, step, self._act, differentiates=True)

    def propose(self, step: Step) -> Proposal:
        process = gaussian(step)
        repeats = self.repeats(step.i, process.steps)
        travels = (repeats > 1).nonzero().flatten()
        failed = torch.zeros_like(step.i, dtype=torch.bool)
        if len(travels):
            x, back = step.x.clone(), part(step, travels)
            for time in range(self.travel - 1):
                down = self.once(back)
                reached = down.guided.sample(child_key(back.key, 2 * time))
                noise = normal(child_key(back.key, 2 * time + 1), reached.shape[1:])
                back = replace(back, x=up_again(process, back.i, reached.detach(), noise))
                failed[travels] |= down.failed
            x[travels] = back.x
            step = replace(step, x=x)
        last = self.once(step)
        return replace(last, failed=last.failed | failed)

    def _act(self, step: Step, clean: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        process = gaussian(step)
        move = rule_for(self.rule, step.reward, self.step, squares="norm")
        at = through_network(step)
        alpha, sigma = (level[step.i].float() for level in (process.alpha, process.sigma))
        along = move(at.value, at.gradient, sigma)
        return at.clean, over_data(alpha, along) * along, at.failed


def up_again(process: GaussianProcess, i: Tensor, x: Tensor, noise: Tensor) -> Tensor:
    """States [N, *D] at steps i [N] by the forward kernel from states x [N, *D] at i + 1:

        alpha / alpha' · x + sqrt(sigma² - (alpha · sigma' / alpha')²) · noise

    Args:
        noise: [N, *D], standard normal.
    """
    kept = process.alpha[i] / process.alpha[i + 1]
    added = (process.sigma[i].square() - (kept * process.sigma[i + 1]).square()).clamp(min=0).sqrt()
    return over_data(kept.float(), x) * x + over_data(added.float(), x) * noise
