"""Importance sampling and rejection: independent walks, weighed or thinned into exact draws."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from samplers.core import Draws, Plan, Rollouts, Walked
from samplers.walks import Walks, check_count
from steering.noise import child_key, uniform


@dataclass(frozen=True)
class Importance:
    """Independent walks, weighed by w = exp(λ · reward) · p(walk) / q(walk).

    Self-normalised, the weights turn draws of the (guided) chain q into draws of
    p(x_0) · exp(λ · reward), exactly as the number of walks grows; their mean estimates
    Z = E_p[exp(λ · reward)] without bias. The exact baseline, hard to beat while large rewards
    are not rare under p. With `rejection`, a walk is kept with probability w, which must be at
    most 1: what is kept are exact, independent draws at any number of walks, of equal weight.

    Args:
        n: walks per condition; all that the budget affords when None.
        rejection: keep with probability exp(λ · reward); needs λ · reward <= 0 and no guidance.

    Raises:
        ValueError: under rejection, at the first walk whose weight is above 1.

    Paper: Geweke, "Bayesian inference in econometric models using Monte Carlo integration",
    Econometrica 57 (1989); von Neumann (1951) for rejection.
    """

    n: int | None = None
    rejection: bool = False

    def __post_init__(self) -> None:
        check_count("n", self.n)

    def init(self, plan: Plan) -> Walks:
        return Walks.start(plan, self.n)

    def ask(self, state: Walks, room: int) -> Rollouts:
        return state.ask(room)

    def tell(self, state: Walks, walked: Walked) -> None:
        if self.rejection and not walked.failed.all():
            top = walked.reward.where(~walked.failed, -torch.inf).argmax()
            reward, log_ratio = float(walked.reward[top]), walked.log_ratio.nan_to_num()
            if state.plan.lam * reward > 0:
                raise ValueError(
                    f"Importance(rejection=True) needs rewards <= 0 and got {reward:g}: subtract "
                    "an upper bound from the reward, or use Importance(), which weighs instead."
                )
            if (log_ratio[~walked.failed] != 0).any():
                raise ValueError(
                    "Importance(rejection=True) cannot thin guided walks, whose weights p / q have "
                    "no bound: drop the guidance, or use Importance(), which weighs instead."
                )
        state.tell(walked)

    def done(self, state: Walks) -> bool:
        return state.done

    def result(self, state: Walks) -> Draws:
        id, log_w = state.found()
        if self.rejection:
            # steps take children 0..T-1 of a walk's key; child T decides whether it is kept
            kept = uniform(child_key(state.key(id), state.plan.steps)).log() < log_w
            id, log_w = id[kept], torch.zeros_like(log_w[kept])
        finished = torch.ones_like(id, dtype=torch.bool)
        return Draws(id, state.row(id), log_w, finished, id, state.log_z(), ranked=False)
