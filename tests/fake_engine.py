"""An engine without a network: a Gaussian random walk, walked exactly as it was asked for.

State at step i is the sum of the prior draw and i increments, all keyed; the reward is a function
of the final state. Answers may be cut and shuffled, and the rules of the contract are checked.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from samplers.core import PRIOR, Budget, Plan, Rollouts, Walked
from steering.noise import child_key, normal


def make_plan(
    steps: int = 5,
    conditions: int = 1,
    lam: float = 1.0,
    seed: int = 0,
    cost: int = 1,
    stochastic: Tensor | None = None,
    reuses: bool = True,
    **budget,
) -> Plan:
    """A plan of equal steps."""
    rows = torch.full((conditions, steps), cost)
    noisy = torch.ones(steps, dtype=torch.bool) if stochastic is None else stochastic
    return Plan(rows, rows.clone(), noisy, lam, seed, Budget(**budget), reuses)


@dataclass
class FakeEngine:
    """Walks N particles of a random walk whose increment i has standard deviation sd[i + 1].

    Args:
        plan: what the sampler was told.
        sd: [T + 1] standard deviations of the prior draw and of each increment.
        reward: final states [N] -> rewards [N] float64; nan fails.
        room: walks asked for at most per call.
        shuffle: seed of a random order of answers, told in random parts; None answers in order.
        fails: id -> does the leg fail?
        drift: added to log p - log q at every step, to play a guided proposal.
        push: a guided proposal indeed: the mean of every step, with its log p - log q.
    """

    plan: Plan
    sd: Tensor
    reward: Callable[[Tensor], Tensor] = lambda x: x
    room: int = 64
    shuffle: int | None = None
    fails: Callable[[int], bool] = lambda id: False
    drift: float = 0.0
    push: float = 0.0
    state: dict[int, tuple[int, float]] = field(default_factory=dict)  # handle -> (step, x)
    cost: list[list[int]] = field(init=False)  # [R][T + 1] rows from the noise to a step
    spent: Tensor = field(init=False)  # [R] rows
    scored: Tensor = field(init=False)  # [R] reward calls
    looked: set[int] = field(default_factory=set)
    answered: int = 0

    def __post_init__(self) -> None:
        before = torch.zeros(self.plan.conditions, 1, dtype=torch.int64)
        self.cost = torch.cat([before, self.plan.cost.cumsum(1)], 1).tolist()
        self.spent = torch.zeros(self.plan.conditions, dtype=torch.int64)
        self.scored = torch.zeros(self.plan.conditions, dtype=torch.int64)

    def run(self, sampler, stop_after: int | None = None):
        """Run a sampler to its end, or until so many answers were told: its state."""
        state = sampler.init(self.plan)
        shuffler = random.Random(self.shuffle)
        waiting: list[tuple[int, float, float, bool]] = []
        while not sampler.done(state):
            asked = sampler.ask(state, self.room)
            assert len(asked) <= self.room
            waiting += self.walk(asked)
            assert waiting, "nothing asked for, and nothing to wait for"
            told, waiting = waiting, []
            if self.shuffle is not None:
                shuffler.shuffle(told)
                part = shuffler.randint(1, len(told))
                told, waiting = told[:part], told[part:]
                told += told[: shuffler.randint(0, 1)]  # a repeated id is ignored
            self.answered += len(told)
            columns = list(zip(*told, strict=True))
            sampler.tell(
                state,
                Walked(
                    torch.tensor(columns[0]),
                    torch.tensor(columns[1], dtype=torch.float64),
                    torch.tensor(columns[2], dtype=torch.float64),
                    torch.tensor(columns[3]),
                ),
            )
            if stop_after is not None and self.answered >= stop_after:
                break
        return state

    def walk(self, asked: Rollouts) -> list[tuple[int, float, float, bool]]:
        """(id, reward, log_ratio, failed) of each leg, in the order of asking."""
        answers = []
        n, steps = len(asked), self.plan.steps
        keys = child_key(asked.key.repeat_interleave(steps), torch.arange(steps).repeat(n))
        move = self.sd[1:] * normal(keys, ()).double().view(n, steps) + self.push
        # N(s z + m; 0, s²) against N(s z; 0, s²)
        ratio = torch.full_like(move, self.drift)
        if self.push:
            ratio -= self.push * (move - self.push / 2) / self.sd[1:] ** 2
        zero = torch.zeros(n, 1, dtype=torch.float64)
        moved = torch.cat([zero, move.cumsum(1)], 1).tolist()
        ratios = torch.cat([zero, ratio.cumsum(1)], 1).tolist()
        prior = (self.sd[0] * normal(asked.key, ()).double()).tolist()
        columns = (asked.src, asked.start, asked.stop, asked.row, asked.score)
        src, start_, stop_, row_, score = (column.tolist() for column in columns)
        turned = [math.nan] * n if asked.angle is None else asked.angle.tolist()
        for n, id in enumerate(asked.id.tolist()):
            assert id not in self.state, f"handle {id} was used twice"
            start, stop, row = start_[n], stop_[n], row_[n]
            assert 0 <= start <= stop <= steps
            if src[n] == PRIOR:
                assert start == 0
                x = prior[n]
            else:
                at, x = self.state[src[n]]
                assert at == start, "a walk starts where its source was kept"
                if turned[n] == turned[n]:  # not nan
                    assert start == 0, "only noise is turned"
                    x = math.cos(turned[n]) * x + math.sin(turned[n]) * prior[n]
            x += moved[n][stop] - moved[n][start]
            cost = self.cost[row][stop] - self.cost[row][start]
            if src[n] in self.looked and self.plan.reuses and stop > start:
                cost -= int(self.plan.look[row, start])
            failed, reward = self.fails(id), torch.nan
            if score[n]:
                self.scored[row] += 1
                reward = float(self.reward(torch.tensor([x], dtype=torch.float64))[0])
                failed = failed or not abs(reward) < torch.inf
                if stop < steps:
                    cost += int(self.plan.look[row, stop])
                    self.looked.add(id)
            self.spent[row] += cost
            self.state[id] = (stop, x)
            answers.append((id, reward, ratios[n][stop] - ratios[n][start], failed))
        for handle in asked.drop.tolist():
            self.state.pop(handle, None)
        return answers


class Recorder(FakeEngine):
    """Remembers every walk it was asked for, and what each was scored."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.asked: list[Rollouts] = []
        self.rewards: list[float] = []

    def walk(self, asked):
        answers = super().walk(asked)
        self.asked.append(asked)
        self.rewards += [reward for _, reward, *_ in answers]
        return answers

    def column(self, name: str) -> Tensor:
        return torch.cat([getattr(asked, name) for asked in self.asked])
