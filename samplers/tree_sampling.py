"""Diffusion Tree Sampling: draws from p(x_0)·exp(λ reward), by a tree that shares what it walked.

Jain et al. 2025, "Diffusion Tree Sampling: Scalable inference-time alignment of diffusion models",
arXiv 2506.20701; here with path weights, which take out the bias of its adaptive selection.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from samplers.branching import check, leaves_in_flight, levels, pilot_walks
from samplers.core import Draws, Plan, Rollouts, Walked
from samplers.growth import Choose, Growth, Habit
from search import backup
from search.arena import Arena
from search.select import boltzmann
from search.tree import LAWS
from search.widen import PUBLISHED, Widening

EPS, BETA = 0.5, 0.5  # bound a weight by 2 per level; other settings measured no better
WIDENING = Widening(1.0, 0.4)


@dataclass(frozen=True)
class TreeSampling:
    """Diffusion Tree Sampling (DTS).

    At a node with n visible children of values v, a rollout goes down to child c with probability
    q(c) = (1 - ε)·softmax(β(λ v + log_ratio))(c) + ε/n, ε = β = 1/2, and its weight is multiplied
    by 1 / (n q(c)); it expands a node where the widening rule grants a child, and walks to a leaf.
    v(parent) = (1/λ) log mean_c exp(λ v(c) + log_ratio(c)). Leaves are drawn by
    exp(λ reward + log weight + Σ log_ratio). At λ = 0 selection is uniform.

    With branch="auto" the first rollouts are a pilot, whose leaves count like all others: `pilot`
    independent walks. If exp(λ reward) is common among them (their effective number is above a
    25th of them, and above 2) the tree stays flat: nothing beats independent walks there. If it is
    rare, up to 24 siblings each at .55 and .8 of the way measure how far rewards agree from there
    on, and the tree branches at those of six late steps where they begin to.

    Args:
        law: "path", the law above; "published", the paper's: ε = 0, β = 1, no path weights. Biased
            low, and the bias does not shrink in 1e4..1e6 network rows.
        branch: "auto"; "even", the paper's steps {0, .2, .4, .6, .8}·T; or rising step indices, ()
            for a flat tree. With law="published", "auto" means "even".
        widening: None is Widening(1, .4), and the paper's Widening(2, .8) for law="published".
        parallel: leaves in flight per tree; None is a 24th of the rollouts, at most 64 (a sixth
            of few rollouts, up to 16). A pilot and a flat tree, where nothing is selected, keep 64.
        pilot: independent walks before the automatic choice; None is a quarter of the rollouts, at
            most 96, and none (a flat tree) below 40: fewer cannot tell rare from common.

    Raises:
        ValueError: here for options that fit no chain; from `init`, before the first network row,
            for branch steps that this chain cannot honour and for a budget below one walk.
    """

    law: Literal["path", "published"] = "path"
    branch: Literal["auto", "even"] | tuple[int, ...] = "auto"
    widening: Widening | None = None
    parallel: int | None = None
    pilot: int | None = None

    def __post_init__(self) -> None:
        if self.law not in LAWS:
            raise ValueError(f"law={self.law!r} is unknown: give one of {', '.join(LAWS)}.")
        check(self.branch, self.widening, self.parallel, self.pilot)
        if self.pilot and self.law == "published":
            raise ValueError(f'pilot={self.pilot!r} serves law="path" alone: leave it out.')

    def init(self, plan: Plan) -> Growth:
        published = self.law == "published"
        branch = "even" if published and self.branch == "auto" else self.branch
        walks = pilot_walks(branch, self.pilot, plan, (), share=1 / 4, least=40, most=96)
        hot = float(plan.lam > 0)  # at λ = 0 nothing is preferred
        return Growth(
            plan,
            Habit(
                choose=_chooser(0.0, hot) if published else _chooser(EPS, BETA * hot),
                backup=backup.log_mean_exp if plan.lam else backup.mean,
                widening=self.widening or (PUBLISHED if published else WIDENING),
                levels=() if branch == "auto" and not walks else levels(branch, walks, plan),
                parallel=leaves_in_flight(self.parallel, plan, ()),
                walks=walks,
                flat_if_common=True,
                look=False,
                revisits=64,
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
        leaf, log_weight, log_z = tree.law(self.law)
        return Draws(
            id=tree.handle[leaf],
            row=tree.row[leaf],
            log_weight=log_weight,
            finished=leaf >= 0,
            root=tree.top(leaf),
            log_z=log_z,
            ranked=False,
            tree=tree,
            biased="drawn by the published law" if self.law == "published" else "",
        )

    def resolved(self, state: Growth) -> TreeSampling:
        """This sampler with what it took from the budget made explicit, so that a larger budget
        grows the same tree further."""
        return replace(self, parallel=state.habit.parallel, pilot=state.habit.walks)


def _chooser(eps: float, beta: float) -> Choose:
    def choose(arena: Arena, node: int, u: Callable[[], float]) -> tuple[int, float]:
        scores = arena.scores[node]
        if len(scores) == 1:
            return 0, 0.0
        return boltzmann(scores, arena.ratios[node], u(), eps, beta)

    return choose
