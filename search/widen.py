"""Progressive widening: when does a node get another child, rather than send its visitor down?

Couetoux et al. 2011, "Continuous upper confidence trees"; constants of Diffusion Tree Sampling,
arXiv 2506.20701.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Widening:
    """A node that was visited N times has up to c·N^alpha children.

    Args:
        c: children of a node at its first visit; math.inf never selects, it always expands.
        alpha: in (0, 1]; how fast nodes widen. Small is deep, 1 with c >= 1 never selects.
    """

    c: float = 1.0
    alpha: float = 0.3

    def __post_init__(self) -> None:
        for name in ("c", "alpha"):
            if type(getattr(self, name)) not in (int, float):
                raise TypeError(f"Widening({name}={getattr(self, name)!r}): give a number.")
        if not self.c > 0:
            raise ValueError(f"Widening(c={self.c!r}): give a positive number of children.")
        if not 0 < self.alpha <= 1:
            raise ValueError(f"Widening(alpha={self.alpha!r}): give an exponent in (0, 1].")

    def expands(self, children: int, visits: int) -> bool:
        """May a node with so many children, those under way included, have one more?

        Args:
            children: visible ones and those on their way.
            visits: rollouts through the node, those in flight included, plus one.
        """
        return children < self.c * visits**self.alpha


PUBLISHED = Widening(2.0, 0.8)  # the paper's; its first 36 rollouts are best-of-N
ONLY_ROOTS = Widening(math.inf, 1.0)  # every rollout is an independent draw
