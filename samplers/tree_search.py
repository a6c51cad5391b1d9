"""Diffusion Tree Search: the best items under p(x_0)·exp(λ reward), by upper confidence bounds.

Jain et al. 2025, "Diffusion Tree Sampling: Scalable inference-time alignment of diffusion models"
(DTS*), arXiv 2506.20701. Its c_uct is unpublished; ours scales with the spread of the rewards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch

from samplers.branching import check, leaves_in_flight, levels, pilot_walks
from samplers.core import Draws, Plan, Rollouts, Walked
from samplers.growth import Growth, Habit
from search import backup
from search.arena import Arena
from search.select import upper_confidence
from search.widen import Widening

WIDENING = Widening(1.0, 0.5)


@dataclass(frozen=True)
class TreeSearch:
    """Diffusion Tree Search (DTS*).

    A rollout goes down to the child with the largest v(c) + c_uct·s·sqrt(log N / N(c)), s the
    standard deviation of the rewards that the tree has seen, N counting rollouts in flight; it
    expands a node where the widening rule grants a child. Draws are ranked: distinct leaves, best
    first. The leaf that the paper returns, down the children of largest value, which need not be
    the best one seen, is `result.tree.greedy()`.

    With branch="auto" a pilot of independent walks and siblings measures where rewards begin to
    agree (see `TreeSampling`), and the tree branches there.

    Args:
        backup: "soft", (1/λ) log mean_c exp(λ v(c) + log_ratio(c)), the mean at λ = 0; or "max".
        value: "rollout", a new node starts from the reward of its first leaf; "clean", from that of
            its clean guess E[x_0 | x], at the cost of a look and a reward call per node.
        c_uct: exploration, in standard deviations of the reward.
        branch: "auto"; "even", the paper's steps {0, .2, .4, .6, .8}·T; or rising step indices, ()
            for a flat tree, which is best-of-N.
        widening: None is Widening(1, .5), which was never far from the best; Widening(1, .3) finds
            more where late steps decide all; the paper's is Widening(2, .8).
        parallel: leaves in flight per tree; None is a 24th of the rollouts, at most 64 (a sixth
            of few rollouts, up to 16). A pilot and a flat tree, where nothing is selected, keep 64.
        pilot: independent walks before the automatic choice; None is an eighth of the rollouts, at
            most 64, and none (the steps it usually chooses) below 48 rollouts.

    Raises:
        ValueError: here for options that fit no chain; from `init`, before the first network row,
            for branch steps that this chain cannot honour and for a budget below one walk.
    """

    backup: Literal["soft", "max"] = "soft"
    value: Literal["rollout", "clean"] = "rollout"
    c_uct: float = 1.0
    branch: Literal["auto", "even"] | tuple[int, ...] = "auto"
    widening: Widening | None = None
    parallel: int | None = None
    pilot: int | None = None

    def __post_init__(self) -> None:
        if self.backup not in ("soft", "max"):
            raise ValueError(f'backup={self.backup!r} is unknown: give "soft" or "max".')
        if self.value not in ("rollout", "clean"):
            raise ValueError(f'value={self.value!r} is unknown: give "rollout" or "clean".')
        if not isinstance(self.c_uct, (int, float)) or not 0 <= self.c_uct < float("inf"):
            raise ValueError(f"c_uct={self.c_uct!r}: give standard deviations, 0 or more.")
        check(self.branch, self.widening, self.parallel, self.pilot)

    def init(self, plan: Plan) -> Growth:
        soft = backup.log_mean_exp if plan.lam else backup.mean
        # a pilot plants the most nodes, and with value="clean" each of them takes a look
        looks = levels(self.branch, 1, plan) if self.value == "clean" else ()
        walks = pilot_walks(self.branch, self.pilot, plan, looks, share=1 / 8, least=6, most=64)

        def choose(arena: Arena, node: int, u: Callable[[], float]) -> tuple[int, float]:
            width = self.c_uct * arena.scale * arena.spread()
            return upper_confidence(arena.scores[node], arena.seen[node], width), 0.0

        return Growth(
            plan,
            Habit(
                choose=choose,
                backup=soft if self.backup == "soft" else backup.maximum,
                widening=self.widening or WIDENING,
                levels=levels(self.branch, walks, plan),
                parallel=leaves_in_flight(self.parallel, plan, looks),
                walks=walks,
                flat_if_common=False,
                look=self.value == "clean",
                revisits=8,  # 2 to 64 found the same, and each takes time
            ),
        )

    def ask(self, state: Growth, room: int) -> Rollouts:
        return state.ask(room)

    def tell(self, state: Growth, walked: Walked) -> None:
        state.tell(walked)

    def done(self, state: Growth) -> bool:
        return state.done()

    def result(self, state: Growth) -> Draws:
        tree = state.tree()
        leaf = tree.reward.isfinite().nonzero()[:, 0]
        leaf = leaf[tree.reward[leaf].argsort(descending=True, stable=True)]
        reward, row = tree.reward[leaf], tree.row[leaf]
        best = torch.full((state.plan.conditions,), -torch.inf, dtype=torch.float64)
        best.scatter_reduce_(0, row, reward, "amax")
        return Draws(
            id=tree.handle[leaf],
            row=row,
            log_weight=state.plan.lam * (reward - best[row]),
            finished=leaf >= 0,
            root=tree.top(leaf),
            log_z=torch.full_like(best, torch.nan),  # a search says nothing of the mean
            ranked=True,
            tree=tree,
        )

    def resolved(self, state: Growth) -> TreeSearch:
        """This sampler with what it took from the budget made explicit, so that a larger budget
        grows the same tree further."""
        return replace(self, parallel=state.habit.parallel, pilot=state.habit.walks)
