"""Classifier guidance: follow a classifier that reads noisy states."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from steering.core import Proposal, Step
from steering.gaussian import over_data
from steering.guidance.bend import Window, bent_within, check_window, gaussian, slope_of


@dataclass(frozen=True)
class ClassifierGuidance:
    """Moves every noise prediction along the gradient of log p(y | x) at the noisy state.

        eps~ = eps - sigma · scale · ∇_x log p(y | x),    clean~ = (x - sigma · eps~) / alpha

    and the step is the model's own from there, on any chain. With the true classifier and scale 1
    that is the chain of the conditional model, at any number of steps. On a stochastic step it is,
    to first order in its size, the paper's other form, a mean moved by scale · std² · ∇. At a level
    without signal (alpha = 0) the state tells nothing of y, and nothing moves.

    One network row a step, like plain sampling; the classifier alone is differentiated.

    Args:
        classifier: (x, t, row) -> [N] log p(y | x), differentiable in x: states x [N, *D], t [N]
            network times, both on the model's device, row [N] int64 conditions, on the CPU, whose
            classes y it knows: what a denoiser is given. Inside `steer` the items of the call, in
            order, whatever it asks for: there the classifier holds a class for each.
        scale: 1 is the conditional law, more sharpens it.
        window: (start, stop), shares of the steps, counted from the noise.

    Raises:
        TypeError: no classifier; on a step, one whose answer is not [N] or has no gradient.
        ValueError: another argument that cannot be.

    Paper: Dhariwal & Nichol, "Diffusion models beat GANs on image synthesis", arXiv 2105.05233,
    algorithms 2 and 1.
    """

    classifier: Callable[[Tensor, Tensor, Tensor], Tensor]
    scale: float = 1.0
    window: Window = (0.0, 1.0)

    exact = True
    differentiates = False

    def __post_init__(self) -> None:
        if not callable(self.classifier):
            raise TypeError(
                f"classifier={self.classifier!r} is not callable: give (x, t, row) -> [N] log p."
            )
        if type(self.scale) not in (int, float) or not 0 <= self.scale < math.inf:
            raise ValueError(f"scale={self.scale!r}: give a finite number >= 0; 0 is no guidance.")
        check_window(self.window)

    def rows(self, i: Tensor, steps: int) -> Tensor:
        return torch.ones_like(i)

    def propose(self, step: Step) -> Proposal:
        return bent_within(self.window, step, self._act, differentiates=False)

    def _act(self, step: Step, clean: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        assert clean is not None
        process, k = gaussian(step), gaussian(step).kernel
        with torch.enable_grad():
            x = step.x.detach().requires_grad_(True)
            value = self.classifier(x, process.time(step.i), step.row)
            if not isinstance(value, Tensor) or value.shape != (len(x),) or not value.requires_grad:
                what = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(
                    f"classifier returned {what} for {len(x)} states: give a tensor [{len(x)}] of "
                    "log p(y | x) that is differentiable in x."
                )
            (gradient,) = torch.autograd.grad(value.sum(), x)
        at = slope_of(clean, value, gradient)
        alpha, sigma = process.alpha[step.i], process.sigma[step.i]
        # how far the mean goes when eps goes by -sigma, the state held
        per_score = sigma * (k.on_clean[step.i] * sigma / alpha - k.on_eps[step.i])
        length = torch.where(alpha > 0, self.scale * per_score, 0.0).float()
        return clean, over_data(length, clean) * at.gradient, at.failed
