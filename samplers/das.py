"""Diffusion alignment as sampling: twisted SMC whose reward counts more from step to step."""

from __future__ import annotations

from dataclasses import dataclass

from samplers.tds import TDS


@dataclass(frozen=True)
class DAS(TDS):
    """TDS with a tempered reward: early guesses, which are poor, count for little.

        at level k   λ_k = λ · min(1, (1 + γ)^(100 k / T) - 1)
        proposals    model's kernel with its mean moved by std² · λ_{k+1} · ∇_x r(c(x))
        weights      exp(λ_{k+1} r(c(x')) - λ_k r(c(x))) · p(x' | x) / q(x' | x)

    The last weight counts λ · reward in full, so that the target is that of every SMC. The paper's
    exponent is the number of steps taken, of 100; γ = 0.008 then reaches 1 at 87 of them.

    Args:
        particles, potential, levels, ess, scheme, jacobian: as in `TDS`, at the same cost.
        tempering: γ; None is TDS.

    Raises:
        ValueError: as `SMC` does.

    Paper: Kim et al., "Test-time alignment of diffusion models without reward over-optimization",
    arXiv 2501.05803.
    """

    tempering: float | None = 0.008
