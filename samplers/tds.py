"""Twisted diffusion sampling: SMC at every step, its particles bent by the twist."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from samplers.smc import SMC
from steering.guidance import Twist
from steering.guidance.bend import Jacobian, check_jacobian


@dataclass(frozen=True)
class TDS(SMC):
    """SMC whose potentials and proposals come from one twisting function, ψ = exp(λ r(c(x))).

        proposals  q(x' | x) = model's kernel with its mean moved by std² · λ · ∇_x r(c(x))
        weights    w = ψ(x') / ψ(x) · p(x' | x) / q(x' | x)

    at every step that noise is drawn after: `SMC` with potential "difference" and the guidance
    `steering.Twist`, which it brings with it. Exact like SMC, whatever the twist is worth; and with
    another guidance, given to `sample`, in the twist's place. The reward must be differentiable.

    A step costs two network rows, one to bend it and one to look at where it ended, and a backward
    pass; with jacobian="skip" one row, since the look is the next step's first row.

    Args:
        particles, potential, levels, ess, scheme, tempering: as in `SMC`; levels=None is all steps
            with noise after them.
        jacobian: "full", through the network, or "skip".

    Raises:
        ValueError: as `SMC` does.

    Paper: Wu et al., "Practical and asymptotically exact conditional sampling in diffusion
    models", arXiv 2306.17775.
    """

    jacobian: Jacobian = "full"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_jacobian(self.jacobian)

    @property
    def guidance(self) -> Twist:
        """What `sample` bends steps by if it is given no other guidance."""
        return Twist(jacobian=self.jacobian, tempering=self.tempering)

    def usual_levels(self, steps: int) -> Iterable[int]:
        return range(1, steps)
