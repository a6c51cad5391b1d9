"""FlowDPS: posterior sampling on a flow, by its two ends."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from steering.core import Proposal, Step
from steering.gaussian import GaussianProcess, NormalTransition, over_data
from steering.guidance.bend import (
    Window,
    bent_within,
    check_inner,
    check_window,
    gaussian,
    inside,
    move_guess,
)
from steering.guidance.rules import RuleName, check_rule, check_step, rule_for


@dataclass(frozen=True)
class FlowDPS:
    """Moves the clean end of a flow towards the reward, and renews part of the noise at the other.

        c = x - sigma · v,    n = x + (1 - sigma) · v                 the ends of the line through x
        c~ = (1 - sigma) · c + sigma · c_y                            c_y: c after `inner` moves
        n~ = sqrt(sigma') · n + sqrt(1 - sigma') · z                  z new noise
        x' = (1 - sigma') · c~ + sigma' · n~

    The reward counts for less as the noise goes, and new noise for more. The step draws noise of
    its own, also on a chain that has none (eta = 0): there it cannot be weighed. Where it can, on
    the Gaussian bridge (eta > 0), its noise sigma' · sqrt(1 - sigma') is not the bridge's, and
    weights have no variance where the bridge's is more than sqrt(2) times as wide: in the first
    steps, sigma' near 1. Leave those out of `window` for weights.

    One network row a step, like plain sampling; the network is not differentiated.

    Args:
        reward: what to follow; None is the run's.
        step: how far each move goes, in units of the rule. For rewards of `measure`, the share of
            the residual to remove from c.
        window: (start, stop), shares of the steps, counted from the noise.
        inner: moves in each step; the paper makes 3.
        rule: "polyak", "normalised", "norm", "plain" or "adam" (`steering.guidance.rules`); None is
            polyak for `measure`, else normalised: in units of sigma · sqrt(dim).

    Raises:
        ValueError: an argument that cannot be; on a step, a chain that is no flow.

    Paper: Kim et al., "FlowDPS: Flow-driven posterior sampling for inverse problems",
    arXiv 2503.08136.
    """

    reward: Any = None
    step: float = 0.5
    window: Window = (0.0, 1.0)
    inner: int = 3
    rule: RuleName | None = None

    exact = True
    differentiates = False

    def __post_init__(self) -> None:
        check_step(self.step)
        check_window(self.window)
        check_inner(self.inner)
        check_rule(self.rule)

    def rows(self, i: Tensor, steps: int) -> Tensor:
        return torch.ones_like(i)

    def propose(self, step: Step) -> Proposal:
        process = _flow(step)
        bent = bent_within(self.window, step, self._act, differentiates=False)
        assert isinstance(bent.guided, NormalTransition)
        to = process.sigma[step.i + 1]
        own = (to * (1 - to).sqrt()).float()
        std = torch.where(inside(self.window, step.i, process.steps), own, bent.guided.std)
        return replace(bent, guided=NormalTransition(bent.guided.mean, std))

    def _act(self, step: Step, clean: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The shift from the model's own mean to this method's."""
        assert clean is not None
        process = _flow(step)
        moved, failed = move_guess(
            step, clean, rule_for(self.rule, step.reward, self.step), self.inner
        )
        levels = (process.sigma[step.i], process.sigma[step.i + 1])
        sigma, to = (over_data(level.float(), clean) for level in levels)
        noise = (step.x - (1 - sigma) * clean) / sigma
        mean = (1 - to) * (clean + sigma * (moved - clean)) + to * to.sqrt() * noise
        return clean, mean - process.transition(step.x, step.i, clean).mean, failed


def _flow(step: Step) -> GaussianProcess:
    process = gaussian(step)
    if not process.straight:
        raise ValueError(
            "FlowDPS is for flows (alpha + sigma = 1), and this chain is none: use DPS or MPGD."
        )
    return process
