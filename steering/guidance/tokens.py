"""What a reward's gradient says of tokens: how much each would gain, and the tilted kernel."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from steering.core import Proposal, Step
from steering.discrete import MaskedProcess, TokenProcess
from steering.guidance.bend import Act, Slope, Window, acted, at_guess, through_network

_LEAST = -40.0  # log-probabilities are held above: a token that is never guessed has a slope too


def gains_at_guess(step: Step, clean: Tensor) -> Slope:
    """Gains [N, L, V] of next tokens, the network not differentiated; `gradient` of a `Slope`.

        G[l, v] = Σ_c g[l, c] · (P(c | x, x'_l = v) - p[l, c]),    g = ∂r/∂p

    The gradient is that with respect to probabilities p = exp(clean) [N, L, K], what rewards are
    asked about: one of log-probabilities would be p times smaller.
    """
    process = _tokens(step)
    log_p = clean.clamp(min=_LEAST)
    at = at_guess(step, log_p)
    g = at.gradient / log_p.exp()
    mean = (clean.exp() * g).sum(-1, keepdim=True)
    return replace(at, clean=clean, gradient=process.expected(step.x, step.i, clean, g) - mean)


def gains_through_network(step: Step) -> Slope:
    """Gains [N, L, V] of next tokens to first order in relaxed states x; `gradient` of a `Slope`.

        G[l, v] = D[l, v] - D[l, x_l],    D = ∂ r(c(x)) / ∂x

    Sites of a masked chain that hold a token gain nothing: they can only be masked again, and what
    the network would guess there is hidden by the token.

    Paper: Nisonoff et al., "Unlocking guidance for discrete state-space diffusion and flow models",
    arXiv 2406.01572.
    """
    process = _tokens(step)
    at = through_network(replace(step, x=process.weights(step.x)))
    gains = at.gradient - at.gradient.gather(-1, step.x[..., None])
    if isinstance(process, MaskedProcess):
        gains = torch.where((step.x == process.tokens)[..., None], gains, 0.0)
    return replace(at, gradient=gains)


def tilted_within(window: Window, step: Step, act: Act, *, differentiates: bool) -> Proposal:
    """The kernel tilted by `act` for particles inside a window, and the model's own elsewhere: what
    `bend.bent_within` is for Gaussian chains."""
    clean, shift, failed = acted(window, step, act, differentiates=differentiates)
    base = _tokens(step).transition(step.x, step.i, clean)
    return Proposal(base, base.tilted(shift), clean, failed)


def _tokens(step: Step) -> TokenProcess:
    assert isinstance(step.process, TokenProcess)
    return step.process
