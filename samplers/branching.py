"""Where a tree branches: at steps that were given, or where a pilot finds that branching pays.

A pilot's walks are ordinary leaves of the tree, drawn independently, so nothing is spent on it. Two
things are read off. Is exp(λ reward) common under the model? Then independent walks are the best
sample there is, and the tree stays flat. If it is rare, a second leaf below the same state tells
where the reward is decided: siblings that part early differ like strangers, siblings that part late
agree, and branching pays in between, late, where it also costs few rows.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from samplers.core import Budget, Plan
from samplers.walks import affordable, check_count
from search.widen import Widening

Branch = Literal["auto", "even"] | tuple[int, ...]

LEVELS = (0.2, 0.4, 0.55, 0.7, 0.8, 0.88)  # share of the way where pilot walks plant a node
USUAL = {0.55: 0.5, 0.8: 0.93}  # where walks get a sibling, and how far those usually agree
PRIOR_PAIRS = 4  # what is usual counts as so many pairs
DECIDING = (0.3, 0.985)  # branching pays where siblings agree as far as this
COMMON = 0.04  # effective share of independent walks above which trees do not pay
PAIRS = 24  # siblings at each of those shares, at most


EVEN = (0.0, 0.2, 0.4, 0.6, 0.8)  # the paper's


def common(reward: Tensor, lam: float) -> bool:
    """Is the effective number of K walks, (Σ w)² / Σ w² with w = exp(λ r), above K / 25, and 2?

    Args:
        reward: [K] float64 rewards of independent walks, finite.
        lam: λ.
    """
    if not len(reward):
        return True
    log_w = lam * (reward - reward.max())
    effective = float((2 * log_w.logsumexp(0) - (2 * log_w).logsumexp(0)).exp())
    return effective > max(COMMON * len(reward), 2)


def agreement(walks: Sequence[float], pairs: Sequence[tuple[float, float]], usual: float) -> float:
    """Correlation of siblings' rewards, on ranks: 1 - mean (F - F')² / (2 var F).

    Ranks, because rewards have heavy tails; and `PRIOR_PAIRS` pairs of what is usual, because a
    pilot has few.

    Args:
        walks: rewards of independent walks, whose ranks F are.
        pairs: rewards of siblings.
        usual: correlation expected before any pair was seen.
    """
    ordered = sorted(walks)

    def rank(reward: float) -> float:
        return (bisect_left(ordered, reward) + bisect_right(ordered, reward)) / (2 * len(ordered))

    if not ordered or ordered[0] == ordered[-1]:
        return usual
    spread = float(torch.tensor([rank(r) for r in walks], dtype=torch.float64).var(correction=0))
    apart = sum((rank(a) - rank(b)) ** 2 for a, b in pairs) / (2 * spread)
    return 1 - (apart + PRIOR_PAIRS * (1 - usual)) / (len(pairs) + PRIOR_PAIRS)


def chosen(planted: Sequence[int], steps: int, agree: dict[float, float]) -> tuple[int, ...]:
    """Those of the planted steps where siblings begin to agree, `DECIDING`.

    Args:
        planted: step indices of the pilot's nodes.
        steps: T.
        agree: correlation of siblings by share of the way, interpolated from 0 at the noise over
            these to 1 at the data.
    """
    shares, values = [0.0], [0.0]
    for share, value in sorted(agree.items()):
        shares.append(share)
        values.append(min(max(value, values[-1]), 1.0))  # more of the way shared, never less alike
    shares.append(1.0)
    values.append(1.0)

    def at(share: float) -> float:
        k = bisect_right(shares, share) - 1
        inside = (share - shares[k]) / (shares[k + 1] - shares[k])
        return values[k] + inside * (values[k + 1] - values[k])

    return tuple(i for i in planted if DECIDING[0] < at(i / steps) < DECIDING[1])


def check(
    branch: Branch, widening: Widening | None, parallel: int | None, pilot: int | None
) -> None:
    """Refuse tree options that fit no chain.

    Raises:
        ValueError: naming the option, what was given and what to give.
    """
    if isinstance(branch, str):
        if branch not in ("auto", "even"):
            raise ValueError(f'branch={branch!r} is unknown: give "auto", "even" or step indices.')
    elif not isinstance(branch, tuple) or not all(type(i) is int for i in branch):
        raise ValueError(f'branch={branch!r}: give "auto", "even" or a tuple of step indices.')
    if widening is not None and not isinstance(widening, Widening):
        raise ValueError(f"widening={widening!r}: give search.widen.Widening(c, alpha), or None.")
    check_count("parallel", parallel)
    check_count("pilot", pilot, least=0)
    if pilot and branch != "auto":
        raise ValueError(f'pilot={pilot!r} serves branch="auto" alone: leave it out.')


def levels(branch: Branch, pilot: int, plan: Plan) -> tuple[int, ...]:
    """The steps where nodes are planted: explicit ones, the paper's, the pilot's, or, where there
    is no pilot, those that it usually chooses.

    Not step 0 where all walks start from one state: the root above its nodes is that state already.

    Raises:
        ValueError: explicit steps out of range, out of order, or with no stochastic step after one.
    """
    if not plan.stochastic.any() and (isinstance(branch, str) or branch in ((), (0,))):
        return ()  # an ODE branches only at its noise, and children of the dummy root do that
    if isinstance(branch, str):
        shares = LEVELS if branch == "auto" else EVEN
        steps = sorted({round(share * plan.steps) for share in shares} - {plan.steps})
        steps = tuple(i for i in steps if plan.stochastic[i:].any() and (i or plan.varied))
        return chosen(steps, plan.steps, USUAL) if branch == "auto" and not pilot else steps
    for before, i in zip((-1, *branch), branch, strict=False):
        if not before < i < plan.steps:
            raise ValueError(
                f"branch={branch!r}: give rising step indices from 0 (noise) to {plan.steps - 1}."
            )
        if not plan.stochastic[i:].any():
            raise ValueError(
                f"branch={branch!r}: no step from {i} on draws noise, so siblings would be equal. "
                "Branch earlier, or make the chain stochastic (eta > 0)."
            )
    return branch if plan.varied else tuple(i for i in branch if i)


def leaves_in_flight(parallel: int | None, plan: Plan, looks: tuple[int, ...]) -> int:
    """`parallel`, or a 24th of the rollouts that the budget affords, at most 64.

    That is as good as one at a time; a twelfth was a little worse. Small budgets take a sixth, up
    to the 16 that fill the smallest network call, which costs little.

    Raises:
        ValueError: no limit at all, or a budget below one rollout.
    """
    if plan.budget == Budget():
        raise ValueError(
            "a tree without a budget would never end: give nfe, reward_calls or seconds."
        )
    rollouts = _rollouts(plan, looks)
    if parallel is not None:
        return parallel
    return max(1, min(rollouts // 24, 64), min(rollouts // 6, 16))


def pilot_walks(
    branch: Branch,
    pilot: int | None,
    plan: Plan,
    looks: tuple[int, ...],
    share: float,
    least: int,
    most: int,
) -> int:
    """`pilot`, or a share of what the budget affords, at most `most`; none below `least`."""
    if branch != "auto" or not plan.stochastic.any():
        return 0
    if pilot is not None:
        return pilot
    walks = min(int(share * _rollouts(plan, looks)), most)
    return walks if walks >= least else 0


def _rollouts(plan: Plan, looks: tuple[int, ...]) -> int:
    """How many walks 0 -> T the budget affords, each looking at its state at steps `looks`."""
    rows = plan.cost.sum(1)
    if not plan.reuses:
        rows = rows + plan.look[:, list(looks)].sum(1)
    return int(affordable(plan, rows, 1 + len(looks), "walk").min())
