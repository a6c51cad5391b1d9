"""Beam search: at every level the best few of all proposals walk on."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

import torch

from samplers.core import Draws, Plan, Rollouts, Walked
from samplers.levels import check_levels, usable_levels
from samplers.proposals import Families, Family, as_columns
from samplers.walks import affordable, check_count


@dataclass(frozen=True)
class Beam:
    """Search over paths: B states, M walks on from each, and the B best of those B · M are kept.

    Proposals are compared by the reward of their clean guess E[x_0 | x]; the first B · M start from
    noises of their own. At the data all B · M are items, and draws are ranked: distinct items, best
    first. With B = 1 it is the greedy search `SVDD(selection="argmax")`, one particle at a time.
    Unlike a tree it never returns to what it left, and a guess that misleads is not found out:
    choose where guesses foretell the reward (`advise` measures it).

    A failed proposal is never kept; fewer than B survivors walk on as they are.

    Args:
        beams: B; None is one search with all that the budget affords. Of a given number as many
            searches are made as the budget affords, independent of each other.
        proposals: M.
        levels: step indices in 1..T-1 to choose at; None is every one after which noise is drawn.
            Fewer take fewer reward calls for the same network rows, and find less where guesses
            are good.

    Raises:
        ValueError: a bad argument; from `init`, before the first network row, for a budget below
            one search and for a chain with no noise after a level.

    Papers: Oshima et al., "Inference-time text-to-video alignment with diffusion latent beam
    search", arXiv 2501.19252; Ma et al., "Inference-time scaling for diffusion models beyond
    scaling denoising steps", arXiv 2501.09732, whose search over paths adds noise back to the kept
    states where we draw the model's own step.
    """

    beams: int | None = None
    proposals: int = 4
    levels: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_count("beams", self.beams)
        if self.proposals is None:
            raise ValueError("proposals=None: give a whole number of at least 2.")
        check_count("proposals", self.proposals, least=2)
        check_levels(self.levels)

    def init(self, plan: Plan) -> Families:
        levels = usable_levels(plan, self.levels, range(plan.steps), "Beam", apart=True)
        if self.beams is None and plan.budget.nfe is None and plan.budget.reward_calls is None:
            raise ValueError(
                "Beam: beams=None takes its number from the budget: give beams, nfe or "
                "reward_calls."
            )
        beams, m = self.beams, self.proposals
        if beams is None:
            rows, scores = Families.cost(plan, levels)
            beams = int(affordable(plan, m * rows, m * scores, f"beam of {m} proposals").min())
        what = f"search of {beams} beams and {m} proposals"
        return Families.start(plan, beams, m, levels, partial(_best, beams), what)

    def ask(self, state: Families, room: int) -> Rollouts:
        return state.ask(room)

    def tell(self, state: Families, walked: Walked) -> None:
        state.tell(walked)

    def done(self, state: Families) -> bool:
        return state.done()

    def result(self, state: Families) -> Draws:
        """Items at the data; for a condition that has none, its beams where they stand."""
        found: list[tuple[int, int, int, float, bool]] = []  # id, row, root, reward, finished
        for f in state.arrived():
            items = zip(f.there, f.there_root, f.reward, strict=True)
            found += [(id, f.row, x_T, r, True) for id, x_T, r in items if r > -math.inf]
        for f in state.standing():
            items = zip(f.here, f.here_root, f.here_reward, strict=True)
            found += [(id, f.row, x_T, r, False) for id, x_T, r in items]
        id, row, root, reward, finished = as_columns(found)
        best = torch.full((state.plan.conditions,), -torch.inf, dtype=torch.float64)
        best.scatter_reduce_(0, row, reward, "amax")
        order = reward.argsort(descending=True, stable=True)
        return Draws(
            id=id[order],
            row=row[order],
            log_weight=state.plan.lam * (reward - best[row])[order],
            finished=finished[order],
            root=root[order],
            log_z=torch.full_like(best, torch.nan),  # a search says nothing of the mean
            ranked=True,
        )

    def resolved(self, state: Families) -> Beam:
        """This sampler with the number of beams it settled on."""
        return replace(self, beams=state.width)


def _best(beams: int, family: Family, u: float) -> list[int]:
    """The places of the best proposals, first come first among equals; never a failed one."""
    alive = [k for k, reward in enumerate(family.reward) if reward > -math.inf]
    return sorted(alive, key=lambda k: -family.reward[k])[:beams]
