"""FlowChef: follow a reward's gradient at the clean guess, without differentiating the network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steering.core import Proposal, Step
from steering.guidance.bend import (
    Jacobian,
    Window,
    bent_within,
    carried,
    check_inner,
    check_jacobian,
    check_window,
    gaussian,
    move_guess,
    through_network,
)
from steering.guidance.rules import RuleName, check_rule, check_step, rule_for

# The published settings, by task. Published steps multiply the gradient of a *mean* square times a
# loss weight; here rewards are sums, so step = rate · weight / numbers at the published size, which
# removes the published share of a masked residual, 2 · step, at any size. "pixel" is published for
# states in [-1, 1]; images in [0, 1], of which measurements are here, have a quarter of the slope.
PUBLISHED: dict[str, dict[str, Any]] = {
    "pixel": {"rule": "plain", "step": 4 * 500 / (3 * 64 * 64), "window": (0.0, 0.99)},
    "instaflow-super-resolution": {"rule": "adam", "step": 0.02},
    "instaflow-deblur": {"rule": "adam", "step": 0.02},
    "instaflow-inpaint": {"rule": "adam", "step": 0.02},
    "rectified-diffusion": {"rule": "plain", "step": 0.5 * 100 / (4 * 64 * 64), "inner": 10},
    "flux-inpaint": {
        "rule": "plain",
        "step": 0.8 * 1000 / (4096 * 64),
        "inner": 3,
        "window": (0.0, 5 / 28),
    },
}


@dataclass(frozen=True)
class FlowChef:
    """Moves every state along ∇_c r(c) at its clean guess c, the network's velocity held.

        c_1 = clean(x);  c_{n+1} = c_n + move(r(c_n), ∇_c r(c_n))        n = 1 .. inner
        x' ~ model's kernel with its mean moved by carry · (c_{inner+1} - c_1)

    The true gradient is (∂c/∂x)^T ∇_c r. Its first factor is skipped, which is right where paths
    are straight and do not cross: rectified flows. `jacobian_cosine` tells how far that holds for a
    model. On a flow a step moves the next state as far as its guess (carry = 1); on a diffusion
    model the noise is held and it goes alpha' as far, where the same move of the state, taken
    over by 1/alpha, would diverge. With jacobian="full" the state moves along the true gradient.

    One network row a step, like plain sampling. The reward is differentiated, through the decoder
    if it looks at images.

    Args:
        reward: what to follow; None is the run's.
        step: how far, in units of the rule. For rewards of `measure`, the share of the residual
            to remove in each step: 1 solves a mask at once. For others begin with .02, and look at
            the images: the default, in their units, is far too much for a classifier.
        window: (start, stop), shares of the steps, counted from the noise.
        inner: moves in each step, the network's output held.
        rule: "polyak", "normalised", "norm", "plain" or "adam" (`steering.guidance.rules`); None is
            polyak for `measure`, else normalised: in units of sigma · sqrt(dim).
        jacobian: "skip", or "full", through the network.

    Raises:
        ValueError: an argument that cannot be; inner > 1 with the full gradient, which holds at one
            state only.

    Paper: Patel et al., "FlowChef: Steering of rectified flow models for controlled generations",
    arXiv 2412.00100.
    """

    reward: Any = None
    step: float = 0.5
    window: Window = (0.0, 1.0)
    inner: int = 1
    rule: RuleName | None = None
    jacobian: Jacobian = "skip"

    exact = True

    def __post_init__(self) -> None:
        check_step(self.step)
        check_window(self.window)
        check_rule(self.rule)
        check_jacobian(self.jacobian)
        check_inner(self.inner)
        if self.inner > 1 and self.jacobian == "full":
            raise ValueError(
                f"inner={self.inner} with jacobian='full': the network's gradient holds at one "
                "state only. Give inner=1, or jacobian='skip'."
            )

    @classmethod
    def published(cls, task: str, reward: Any = None) -> FlowChef:
        """The paper's settings for a task: "pixel" for a measurement of images of a pixel model,
        "rectified-diffusion" and "flux-inpaint" for one of latents (`space="states"`).

        Raises:
            ValueError: no task has this name.
        """
        if task not in PUBLISHED:
            raise ValueError(f"task={task!r} is not published: there are {', '.join(PUBLISHED)}.")
        return cls(reward, **PUBLISHED[task])

    @property
    def differentiates(self) -> bool:
        """Does it need the network's gradient?"""
        return self.jacobian == "full"

    def rows(self, i: Tensor, steps: int) -> Tensor:
        return torch.ones_like(i)

    def propose(self, step: Step) -> Proposal:
        return bent_within(self.window, step, self._act, differentiates=self.differentiates)

    def _act(self, step: Step, clean: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        move = rule_for(self.rule, step.reward, self.step)
        if clean is None:
            at = through_network(step)
            sigma = gaussian(step).sigma[step.i].float()
            return at.clean, move(at.value, at.gradient, sigma), at.failed
        moved, failed = move_guess(step, clean, move, self.inner)
        return clean, carried(step, clean, moved - clean), failed
