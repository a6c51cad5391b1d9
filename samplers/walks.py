"""Independent walks from noise to data: what ancestral, best-of-N and importance share."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from samplers.core import Plan, Rollouts, Walked
from search.resample import logsumexp_by
from steering.noise import child_key, root_key

UNLIMITED = 2**40


def check_count(name: str, value: int | None, least: int = 1) -> None:
    """Raise ValueError unless `value` is None or a whole number >= `least`."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r} is not a whole number >= {least}: give one, or None.")


def affordable(plan: Plan, rows: Tensor, scores: int, what: str) -> Tensor:
    """How many of something the budget affords per condition.

    Args:
        plan: the run.
        rows: [R] int64 network rows that one of them takes.
        scores: reward calls that one of them takes.
        what: its name, for the error.

    Returns:
        [R] int64; UNLIMITED where neither network rows nor reward calls are limited.

    Raises:
        ValueError: some condition cannot afford a single one.
    """
    count = torch.full((plan.conditions,), UNLIMITED)
    if plan.budget.nfe is not None:
        count = torch.minimum(count, plan.budget.nfe // rows)
    if plan.budget.reward_calls is not None:
        count = count.clamp(max=plan.budget.reward_calls // scores)
    if (count == 0).any():
        raise ValueError(
            f"nfe={plan.budget.nfe}, reward_calls={plan.budget.reward_calls} affords no {what}: "
            f"one takes {int(rows.max())} network rows and {scores} reward calls. "
            "Raise the budget or lower steps."
        )
    return count


@dataclass
class Walks:
    """What independent walks 0 -> T have brought so far.

    Walk number o of condition r has handle o·R + r, and a key made from (seed, r, o) alone, so that
    a larger budget asks for the same walks again before it asks for new ones.
    """

    plan: Plan
    limit: Tensor  # [R] int64 walks per condition
    next: int = 0  # the first handle not yet passed
    waiting: int = 0  # asked for and not yet told
    told: Tensor = field(default_factory=lambda: torch.zeros(64, dtype=torch.bool))  # [M]
    reward: Tensor = field(default_factory=lambda: _nans(64))  # [M] float64, -inf if failed
    log_ratio: Tensor = field(default_factory=lambda: _nans(64))  # [M] float64

    @staticmethod
    def start(plan: Plan, n: int | None) -> Walks:
        """As many walks as the budget affords, at most `n` per condition.

        Raises:
            ValueError: the budget affords none, or neither n nor any budget is given.
        """
        limit = affordable(plan, plan.cost.sum(1), 1, "walk")
        if n is not None:
            limit = limit.clamp(max=n)
        elif bool((limit == UNLIMITED).any()) and plan.budget.seconds is None:
            raise ValueError(
                "n=None without a budget would never end: give n, nfe, reward_calls or seconds."
            )
        return Walks(plan, limit)

    def ask(self, room: int) -> Rollouts:
        """The next walks, all conditions in turn."""
        id = torch.empty(0, dtype=torch.int64)
        while room > 0 and len(id) == 0 and self.next < self._end:
            id = torch.arange(self.next, min(self.next + room, self._end))
            self.next = int(id[-1]) + 1
            id = id[self._ordinal(id) < self.limit[self.row(id)]]
        while self.next > len(self.told):
            self.told = torch.cat([self.told, torch.zeros_like(self.told)])
            self.reward = torch.cat([self.reward, _nans(len(self.reward))])
            self.log_ratio = torch.cat([self.log_ratio, _nans(len(self.log_ratio))])
        self.waiting += len(id)
        return Rollouts.from_prior(id, self.key(id), self.row(id), self.plan.steps, score=True)

    def tell(self, walked: Walked) -> None:
        """Take answers in; a repeated id changes nothing."""
        fresh = ~self.told[walked.id]
        self.waiting -= len(walked.id[fresh].unique())
        id = walked.id[fresh]
        self.told[id] = True
        self.reward[id] = torch.where(walked.failed, -torch.inf, walked.reward)[fresh]
        self.log_ratio[id] = walked.log_ratio[fresh]

    @property
    def done(self) -> bool:
        return self.next >= self._end and self.waiting == 0

    def found(self) -> tuple[Tensor, Tensor]:
        """Handles [K] of the walks that were told and did not fail, and log w [K] float64.

        log w = λ · reward + log_ratio: weights of the walks as draws of p(x_0) exp(λ · reward).
        """
        id = (self.told & self.reward.isfinite()).nonzero().flatten()
        return id, self.plan.lam * self.reward[id] + self.log_ratio[id]

    def log_z(self) -> Tensor:
        """[R] float64, log of the mean weight: an unbiased estimate of Z; nan where none came."""
        id, log_w = self.found()
        count = torch.bincount(self.row(id), minlength=self.plan.conditions)
        total = logsumexp_by(log_w, self.row(id), self.plan.conditions)
        return torch.where(count > 0, total - count.log(), torch.nan)

    def row(self, id: Tensor) -> Tensor:
        """Conditions [N] of handles [N]."""
        return id % self.plan.conditions

    def group(self, id: Tensor, size: int) -> Tensor:
        """Groups [N] of handles [N]: `size` consecutive walks of a condition are one."""
        return self._ordinal(id) // size * self.plan.conditions + self.row(id)

    def key(self, id: Tensor) -> Tensor:
        """Noise keys [N] of handles [N]."""
        return child_key(root_key(self.plan.seed, self.row(id)), self._ordinal(id))

    def _ordinal(self, id: Tensor) -> Tensor:
        return id // self.plan.conditions

    @property
    def _end(self) -> int:
        return int(self.limit.max()) * self.plan.conditions


def _nans(n: int) -> Tensor:
    return torch.full((n,), torch.nan, dtype=torch.float64)
