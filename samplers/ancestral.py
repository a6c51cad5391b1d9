"""Ancestral sampling: plain draws of the model. No steering: the baseline of every comparison."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from samplers.core import Draws, Plan, Rollouts, Walked
from samplers.walks import Walks, check_count


@dataclass(frozen=True)
class Ancestral:
    """n independent draws of p(x_0), scored, all of equal weight.

    Under a guidance they are draws of the guided chain, unweighted; use Importance to weigh them.

    Args:
        n: walks per condition; all that the budget affords when None.

    Paper: Ho et al., "Denoising diffusion probabilistic models", arXiv 2006.11239.
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
        finished = torch.ones_like(id, dtype=torch.bool)
        equal = torch.zeros_like(log_w)
        return Draws(id, state.row(id), equal, finished, id, state.log_z(), ranked=False)
