"""Best-of-N: walk N particles from noise to data, independently, and rank them by reward."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from samplers.core import Draws, Plan, Rollouts, Walked
from samplers.walks import Walks, check_count


@dataclass(frozen=True)
class BestOfN:
    """The N walks that the budget affords (or `n`, if smaller), best first.

    Their weights are those of importance sampling, exp(λ · reward), times the ratio p / q of a
    guided walk: what differs from Importance is only that drawing n means the n best.

    Args:
        n: walks per condition; all that the budget affords when None.

    Paper: Stiennon et al., "Learning to summarize from human feedback", arXiv 2009.01325.
    """

    n: int | None = None

    def __post_init__(self) -> None:
        check_count("n", self.n)

    def init(self, plan: Plan) -> Walks:
        return Walks.start(plan, self.n)

    def ask(self, state: Walks, room: int) -> Rollouts:
        return state.ask(room)

    def tell(self, state: Walks, walked: Walked) -> None:
        state.tell(walked)

    def done(self, state: Walks) -> bool:
        return state.done

    def result(self, state: Walks) -> Draws:
        id, log_w = state.found()
        best = state.reward[id].argsort(descending=True, stable=True)
        id, log_w = id[best], log_w[best]
        finished = torch.ones_like(id, dtype=torch.bool)
        return Draws(id, state.row(id), log_w, finished, id, state.log_z(), ranked=True)
