"""The contract between samplers, which decide, and the engine, which walks.

A sampler is pure bookkeeping on small CPU tensors. All that it can ask for is a partial rollout:
walk these particles from step i to step j, and maybe score where they land.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from search.tree import Tree

PRIOR = -1  # the `src` of a walk that starts from a fresh draw of the prior


def _ints(value: Tensor | int, n: int) -> Tensor:
    return torch.as_tensor(value, dtype=torch.int64).expand(n)


@dataclass(frozen=True)
class Rollouts:
    """A request, batched over N walks. CPU tensors; ids, keys, steps and rows are int64."""

    id: Tensor  # [N] handle under which the state at `stop` will be kept
    src: Tensor  # [N] handle of the state to start from; PRIOR = a prior draw made from `key`
    start: Tensor  # [N] step index, 0 = noise
    stop: Tensor  # [N] step index, start <= stop <= T; PRIOR with stop = 0 plants a draw: no row
    key: Tensor  # [N] noise key: a walk's noise at step i is child_key(key, i)
    row: Tensor  # [N] which condition
    score: Tensor  # [N] bool; with start = stop it scores a kept state
    angle: Tensor | None = None  # [N] rad; a src at step 0 is turned: cos·x + sin·prior(key)
    drop: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))  # [K] handles
    # that will never be used again

    def __len__(self) -> int:
        return len(self.id)

    @staticmethod
    def of(id, src, start, stop, key, row, score, angle=None, drop=()) -> Rollouts:
        """A request from tensors, lists or scalars; scalars are spread over all walks."""
        id = torch.as_tensor(id, dtype=torch.int64).reshape(-1)
        n = len(id)
        return Rollouts(
            id,
            _ints(src, n),
            _ints(start, n),
            _ints(stop, n),
            _ints(key, n),
            _ints(row, n),
            torch.as_tensor(score, dtype=torch.bool).expand(n),
            None if angle is None else torch.as_tensor(angle, dtype=torch.float64).expand(n),
            torch.as_tensor(drop, dtype=torch.int64).reshape(-1),
        )

    @staticmethod
    def from_prior(id, key, row, stop, score) -> Rollouts:
        """Walks from fresh prior draws to step `stop`."""
        return Rollouts.of(id, PRIOR, 0, stop, key, row, score)

    @staticmethod
    def none() -> Rollouts:
        """The empty request."""
        return Rollouts.of([], 0, 0, 0, 0, 0, False)


@dataclass(frozen=True)
class Walked:
    """An answer: any subset of what was asked, in any order; a repeated id is ignored."""

    id: Tensor  # [N] int64
    reward: Tensor  # [N] float64, nan where not asked for or failed
    log_ratio: Tensor  # [N] float64, sum of log p - log q along the walk; 0 when unguided
    failed: Tensor  # [N] bool

    def __len__(self) -> int:
        return len(self.id)


@dataclass(frozen=True)
class Budget:
    """Hard limits per condition; None is no limit.

    Args:
        nfe: network rows (a classifier-free-guidance pair is two).
        reward_calls: items scored.
        seconds: of wall clock, for the whole run; may overrun by one network or reward call.
    """

    nfe: int | None = None
    reward_calls: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        for name in ("nfe", "reward_calls", "seconds"):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                raise ValueError(f"{name}={value!r} is no budget: give a positive number or None.")
            if name != "seconds" and not isinstance(value, int):
                raise ValueError(f"{name}={value!r} is not a whole number: give an int.")


@dataclass(frozen=True)
class Plan:
    """What a sampler may know before it starts. R conditions, T steps."""

    cost: Tensor  # [R, T] int64, network rows of step i -> i + 1, guidance included (upper bound)
    look: Tensor  # [R, T] int64, network rows of a score at stop = i < T
    stochastic: Tensor  # [T] bool: does this step draw noise?
    lam: float  # inverse temperature λ
    seed: int
    budget: Budget
    reuses: bool = True  # is a look's row the first row of any walk from there? (not when guided)
    turns: bool = True  # are prior draws Gaussian, so that a turned one is another?
    varied: bool = True  # do prior draws differ? A masked chain starts from one state

    @property
    def steps(self) -> int:
        """T."""
        return self.cost.shape[1]

    @property
    def conditions(self) -> int:
        """R."""
        return self.cost.shape[0]


class Purse:
    """What each condition may still spend: a sampler reserves a whole way before it starts a walk.

    The first refused reservation of a condition ends its launching for good, so that everything a
    run recorded lies on the path of the same run under a larger budget.
    """

    def __init__(self, plan: Plan) -> None:
        unlimited = 2**62
        self._rows = [plan.budget.nfe or unlimited] * plan.conditions
        self._scores = [plan.budget.reward_calls or unlimited] * plan.conditions
        self._open = [True] * plan.conditions

    def reserve(self, row: int, rows: int, scores: int = 1) -> bool:
        """Take network rows and reward calls of condition `row`; False if refused."""
        fits = self._open[row] and rows <= self._rows[row] and scores <= self._scores[row]
        if fits:
            self._rows[row] -= rows
            self._scores[row] -= scores
        else:
            self._open[row] = False
        return fits

    def open(self, row: int) -> bool:
        """Has no reservation of this condition been refused yet?"""
        return self._open[row]


@dataclass(frozen=True)
class Draws:
    """What a sampler has found, at any time: K distinct items and their weights.

    A draw of condition r is item k with probability softmax over the items of r of `log_weight`.
    """

    id: Tensor  # [K] int64 handles
    row: Tensor  # [K] int64
    log_weight: Tensor  # [K] float64, unnormalised
    finished: (
        Tensor  # [K] bool: at step T (False: a state on its way, decoded from its clean guess)
    )
    root: Tensor  # [K] int64, equal for items that share their x_T
    log_z: Tensor  # [R] float64, estimate of log E_p[exp(λ reward)]; nan where there is none
    ranked: bool  # best first: drawing n means the n best, not n by weight
    tree: Tree | None = None
    biased: str = ""  # why these are not draws of the target even as the budget grows


S = TypeVar("S")


class Sampler(Protocol[S]):
    """An algorithm: a frozen configuration; the state is owned and mutable."""

    def init(self, plan: Plan) -> S:
        """Check the plan (ValueError before the first network row) and make the state."""
        ...

    def ask(self, state: S, room: int) -> Rollouts:
        """At most `room` walks off the queue; empty = waiting for `tell`, or done."""
        ...

    def tell(self, state: S, walked: Walked) -> None:
        """Take answers in, and decide: this is where selection happens."""
        ...

    def done(self, state: S) -> bool:
        """Is there nothing left to ask or to wait for?"""
        ...

    def result(self, state: S) -> Draws:
        """What has been found so far; valid at any time."""
        ...
