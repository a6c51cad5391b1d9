"""SVDD: of every few proposals for a particle's next state, one is kept by its soft value."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from samplers.core import Draws, Plan, Rollouts, Walked
from samplers.levels import check_levels, usable_levels
from samplers.proposals import Families, Family, as_columns
from samplers.walks import check_count
from search.resample import logsumexp_by, multinomial

_HUGE = 1e300  # no log weight counts as more: inf - inf is none


@dataclass(frozen=True)
class SVDD:
    """Independent particles, each of which chooses among M proposals at every level (SVDD-PM).

    At level k, M walks go on from the particle's state. Their values are v = λ · reward of the
    clean guess E[x_0 | x] (the paper's α is 1/λ), and one of them is kept with probability
    softmax(v + log p - log q), the last term that of a guided walk. At the data nothing has to be
    chosen: all M are items. The first M proposals start from noises of their own, so that the noise
    is chosen, too; the paper draws a single one.

    Its own law is biased at finite M, since one of M proposals is a draw of p(x' | x) exp(v(x'))
    only as M grows, and by the guess, which is no soft value. Both are undone by a weight,

        W = Π_k [mean_m exp(v_k^m + log p - log q)] / exp(v_{k-1}),    v_0 = 0,

    v_{k-1} that of the proposal kept: E[W f(x_0)] = E_p[exp(λ · reward(x_0)) f(x_0)] for every M,
    every f and every value, so that weighted draws follow p(x_0) · exp(λ · reward) as particles
    grow in number, and the mean of W estimates Z without bias. For given the past, a mean weight
    times h of the proposal kept has the expectation of exp(v) h under p, and h begins with dividing
    by exp(v), until at the data exp(v) = exp(λ · reward) is left. W varies the more, the worse the
    guess foretells the reward: the effective sample size tells. A failed proposal is left out of
    the means.

    Args:
        particles: per condition; all that the budget affords when None.
        proposals: M, at least 2.
        levels: step indices in 1..T-1 to choose at; None is every one, as in the paper. Steps that
            draw no noise get no proposals, as there would be nothing to choose between.
        selection: "sample", as above; "argmax", the best of M, the paper's α -> 0: a greedy search,
            whose draws, the best item of each particle, have equal weights and are labelled biased.

    Raises:
        ValueError: a bad argument; from `init`, before the first network row, for a budget below
            one particle and for a chain with no noise after a level.

    Papers: Li et al., "Derivative-free guidance in continuous and discrete diffusion models with
    soft value-based decoding", arXiv 2408.08252; for the weights, Naesseth et al., "Nested
    sequential Monte Carlo methods", arXiv 1502.02536.
    """

    particles: int | None = None
    proposals: int = 8
    levels: tuple[int, ...] | None = None
    selection: Literal["sample", "argmax"] = "sample"

    def __post_init__(self) -> None:
        check_count("particles", self.particles)
        if self.proposals is None:
            raise ValueError("proposals=None: give a whole number of at least 2.")
        check_count("proposals", self.proposals, least=2)
        check_levels(self.levels)
        if self.selection not in ("sample", "argmax"):
            raise ValueError(f'selection={self.selection!r} is unknown: give "sample" or "argmax".')

    def init(self, plan: Plan) -> Families:
        levels = usable_levels(plan, self.levels, range(plan.steps), "SVDD", apart=True)
        limits = (self.particles, plan.budget.nfe, plan.budget.reward_calls, plan.budget.seconds)
        if all(limit is None for limit in limits):
            raise ValueError(
                "particles=None without a budget would never end: give particles, nfe, "
                "reward_calls or seconds."
            )
        what = f"particle of {self.proposals} proposals at {len(levels)} levels"
        choose = _greedy if self.selection == "argmax" else partial(_by_value, plan.lam)
        return Families.start(plan, 1, self.proposals, levels, choose, what, self.particles)

    def ask(self, state: Families, room: int) -> Rollouts:
        return state.ask(room)

    def tell(self, state: Families, walked: Walked) -> None:
        state.tell(walked)

    def done(self, state: Families) -> bool:
        return state.done()

    def result(self, state: Families) -> Draws:
        """Items at the data; for a condition that has none, its particles where they stand."""
        lam, greedy = state.plan.lam, self.selection == "argmax"
        found: list[tuple[int, int, int, float, bool]] = []  # id, row, root, log_w, finished
        arrived = state.arrived()
        for f in arrived:
            log_w = _weights(lam, f)
            alive = [k for k, w in enumerate(log_w) if w > -math.inf]
            for k in [_greedy(f)[0]] if greedy else alive:
                w = f.log_w + log_w[k] - math.log(len(alive))
                found.append((f.there[k], f.row, f.there_root[k], w, True))
        for f in state.standing():
            w = f.log_w + _clamped(lam * f.here_reward[0])
            found.append((f.here[0], f.row, f.here_root[0], w, False))
        id, row, root, log_w, finished = as_columns(found)
        conditions = state.plan.conditions
        count = torch.bincount(torch.tensor([f.row for f in arrived]).long(), minlength=conditions)
        total = logsumexp_by(log_w[finished], row[finished], conditions)
        log_z = torch.where(count > 0, total - count.log(), torch.nan)
        if not greedy:
            return Draws(id, row, log_w, finished, root, log_z, ranked=False)
        law = f"the best of {self.proposals} proposals at every level"
        equal, unknown = torch.zeros_like(log_w), torch.full_like(log_z, torch.nan)
        return Draws(id, row, equal, finished, root, unknown, ranked=False, biased=law)


def _weights(lam: float, family: Family) -> list[float]:
    """[n] v + log p - log q of the proposals; -inf where they failed."""
    return [
        -math.inf if reward == -math.inf else _clamped(lam * reward) + log_ratio
        for reward, log_ratio in zip(family.reward, family.log_ratio, strict=True)
    ]


def _clamped(log_w: float) -> float:
    return min(max(log_w, -_HUGE), _HUGE)


def _by_value(lam: float, family: Family, u: float) -> list[int]:
    """One proposal by softmax of its weight; the family's W grows by what that leaves over."""
    log_w = torch.tensor(_weights(lam, family), dtype=torch.float64)
    kept = int(multinomial(log_w, torch.tensor([u], dtype=torch.float64)))
    alive = int((log_w > -torch.inf).sum())
    mean = float(log_w.logsumexp(0)) - math.log(alive)
    family.log_w += mean - _clamped(lam * family.reward[kept])
    return [kept]


def _greedy(family: Family, u: float = 0.0) -> list[int]:
    return [max(range(len(family.reward)), key=family.reward.__getitem__)]
