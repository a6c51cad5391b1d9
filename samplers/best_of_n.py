"""Best-of-N: walk N particles from noise to data, independently, and rank them by reward."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from samplers.core import Draws, Plan, Rollouts, Walked
from samplers.walks import Walks, affordable, check_count


@dataclass(frozen=True)
class BestOfN:
    """The N walks that the budget affords (or `n`, if smaller), best first.

    Their weights are those of importance sampling, exp(λ · reward), times the ratio p / q of a
    guided walk: what differs from Importance is only that drawing n means the n best.

    With `of`, the best of every `of` walks: independent draws, all of equal weight, whose law has
    the density of · p(x_0) · F(reward(x_0))^(of - 1), F the share of p below a reward. Its KL to
    the model is at most log(of) - (of - 1) / of nats, whatever the reward.

    Args:
        n: walks per condition; all that the budget affords when None.
        of: size of a group of which the best is a draw; None ranks all walks.

    Papers: Stiennon et al., "Learning to summarize from human feedback", arXiv 2009.01325; Beirami
    et al., "Theoretical guarantees on the best-of-n alignment policy", arXiv 2401.01879.
    """

    n: int | None = None
    of: int | None = None

    def __post_init__(self) -> None:
        check_count("n", self.n)
        check_count("of", self.of, least=2)
        if self.n is not None and self.of is not None and self.n < self.of:
            raise ValueError(f"n={self.n} walks hold no group of={self.of}: raise n or lower of.")

    def init(self, plan: Plan) -> Walks:
        if self.of is not None:
            affordable(plan, self.of * plan.cost.sum(1), self.of, f"group of {self.of} walks")
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
        id, log_w, law = id[best], log_w[best], ""
        if self.of is not None:
            id = id[self._winners(state, id)]
            log_w, law = torch.zeros(len(id), dtype=torch.float64), f"the law of best of {self.of}"
        finished = torch.ones_like(id, dtype=torch.bool)
        return Draws(
            id, state.row(id), log_w, finished, id, state.log_z(), ranked=not law, biased=law
        )

    def _winners(self, state: Walks, best_first: Tensor) -> Tensor:
        """Places [K] of those that are the first of their group, in groups that are complete."""
        assert self.of is not None
        told = torch.bincount(state.group(state.told.nonzero()[:, 0], self.of))
        groups, seen = state.group(best_first, self.of), set[int]()
        first = [not (g in seen or seen.add(g)) for g in groups.tolist()]
        return (torch.tensor(first, dtype=torch.bool) & (told[groups] == self.of)).nonzero()[:, 0]
