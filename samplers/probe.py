"""A pilot that looks at a model and a reward: how rare, decided when, foreseen how well.

Two things are walked. Independent walks from noise to data, whose clean guess is scored at six
steps on the way: their rewards tell how rare high ones are, and the guesses' rewards what could
have been known when. Then second walks from those steps on: siblings of a walk agree with it as far
as the reward was decided where they part.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor

from samplers.branching import levels
from samplers.core import PRIOR, Draws, Plan, Rollouts, Walked
from samplers.walks import affordable
from steering.noise import child_key, root_key

_PROBE = -4  # child of a condition's root key that these walks descend from: they share no other's
_WALKS_PER_PAIR = 4  # independent walks for every sibling at each step


@dataclass(frozen=True)
class Probe:
    """Independent walks with looks, and siblings at every step looked at.

    Spends the budget of network rows or reward calls that it is given. A condition is a prompt.

    Raises:
        ValueError: from `init`, for a budget below eight walks or without any limit.
    """

    def init(self, plan: Plan) -> Probing:
        steps = levels("auto", 1, plan)
        rows = _WALKS_PER_PAIR * plan.cost.sum(1)
        if not plan.reuses:
            rows = rows + _WALKS_PER_PAIR * plan.look[:, list(steps)].sum(1)
        for step in steps:
            rows = rows + plan.cost[:, step:].sum(1)
        scores = _WALKS_PER_PAIR * (1 + len(steps)) + len(steps)
        groups = int(affordable(plan, rows, scores, f"group of {_WALKS_PER_PAIR} walks").min())
        if plan.budget.nfe is None and plan.budget.reward_calls is None:
            raise ValueError("Probe without a budget would never end: give nfe or reward_calls.")
        if groups < 2:
            raise ValueError(
                f"nfe={plan.budget.nfe}, reward_calls={plan.budget.reward_calls} affords fewer "
                f"than {2 * _WALKS_PER_PAIR} walks of {int(plan.cost.sum(1).max())} rows: raise it."
            )
        return Probing(plan, (*steps, plan.steps), groups)

    def ask(self, state: Probing, room: int) -> Rollouts:
        return state.ask(room)

    def tell(self, state: Probing, walked: Walked) -> None:
        state.tell(walked)

    def done(self, state: Probing) -> bool:
        return not state.queue and not state.flight

    def result(self, state: Probing) -> Draws:
        """The independent walks, weighed: what importance sampling would give."""
        id = torch.tensor([i for i in state.ends if math.isfinite(state.reward[i])]).long()
        reward = torch.tensor([state.reward[i] for i in id.tolist()], dtype=torch.float64)
        row = id % state.plan.conditions
        none = torch.full((state.plan.conditions,), torch.nan, dtype=torch.float64)
        finished = torch.ones_like(id, dtype=torch.bool)
        return Draws(id, row, state.plan.lam * reward, finished, id, none, ranked=False)


@dataclass
class Probing:
    """Handles count as (walk · stops + stop) · R + condition; a sibling is one more walk."""

    plan: Plan
    stops: tuple[int, ...]  # the steps looked at, and T
    groups: int
    queue: deque[tuple[int, int, int]] = field(default_factory=deque)  # (id, source, key)
    flight: dict[int, int] = field(default_factory=dict)  # id -> key
    reward: dict[int, float] = field(default_factory=dict)  # by id; nan where failed
    ends: list[int] = field(default_factory=list)  # ids of independent walks at the data
    sibling: dict[int, int] = field(default_factory=dict)  # id of a sibling's end -> its twin's end

    def __post_init__(self) -> None:
        walks = self.groups * _WALKS_PER_PAIR
        roots = child_key(root_key(self.plan.seed, torch.arange(self.plan.conditions)), _PROBE)
        for walk in range(walks):
            keys = child_key(roots, walk).tolist()
            for row, key in enumerate(keys):
                self.queue.append((self._id(walk, 0, row), PRIOR, key))

    def ask(self, room: int) -> Rollouts:
        """At most `room` legs off the queue."""
        legs = [self.queue.popleft() for _ in range(min(room, len(self.queue)))]
        if not legs:
            return Rollouts.none()
        id, src, key = zip(*legs, strict=True)
        self.flight |= dict(zip(id, key, strict=True))
        stop = [self._stop(i) for i in id]
        start = [0 if s == PRIOR else self.stops[self._stop(s)] for s in src]
        row = [i % self.plan.conditions for i in id]
        ends = [self.stops[k] for k in stop]
        # a sibling walks on to the end without a look: its handle is that of the last stop
        return Rollouts.of(id, src, start, ends, key, row, True)

    def tell(self, walked: Walked) -> None:
        """Queue what follows: the next leg of a walk, or the sibling that its group is due."""
        for id, reward, failed in zip(
            walked.id.tolist(), walked.reward.tolist(), walked.failed.tolist(), strict=True
        ):
            if id not in self.flight:
                continue  # a repeated answer
            key = self.flight.pop(id)
            self.reward[id] = math.nan if failed else reward
            walk, stop, row = self._walk(id), self._stop(id), id % self.plan.conditions
            if id in self.sibling:
                continue
            if stop < len(self.stops) - 1:
                below = int(child_key(torch.tensor([key]), 0))
                self.queue.append((self._id(walk, stop + 1, row), id, below))
                continue
            self.ends.append(id)
            if walk % _WALKS_PER_PAIR == 0:
                self._ask_for_siblings(walk, row, id)

    def _ask_for_siblings(self, walk: int, row: int, twin: int) -> None:
        last = len(self.stops) - 1
        for stop in range(last):
            source = self._id(walk, stop, row)
            number = self.groups * _WALKS_PER_PAIR + walk // _WALKS_PER_PAIR * last + stop
            id = self._id(number, last, row)
            self.sibling[id] = twin
            root = child_key(root_key(self.plan.seed, torch.tensor([row])), _PROBE)
            self.queue.append((id, source, int(child_key(root, number))))

    def pairs(self, stop: int, row: int) -> list[tuple[float, float]]:
        """Rewards of walks of a condition and of their siblings from stop number `stop` on."""
        found = []
        for id, twin in self.sibling.items():
            number = self._walk(id) - self.groups * _WALKS_PER_PAIR
            if number % (len(self.stops) - 1) == stop and id % self.plan.conditions == row:
                pair = (self.reward[twin], self.reward.get(id, math.nan))
                found += [pair] if all(map(math.isfinite, pair)) else []
        return found

    def looks(self, stop: int, row: int) -> list[tuple[float, float]]:
        """Rewards of clean guesses at stop number `stop`, and of the same walks at the data."""
        found = []
        for end in self.ends:
            if end % self.plan.conditions != row:
                continue
            pair = (self.reward[self._id(self._walk(end), stop, row)], self.reward[end])
            found += [pair] if all(map(math.isfinite, pair)) else []
        return found

    def rewards(self, row: int) -> Tensor:
        """[K] float64 rewards of the independent walks of a condition that did not fail."""
        mine = [self.reward[end] for end in self.ends if end % self.plan.conditions == row]
        found = torch.tensor(mine, dtype=torch.float64)
        return found[found.isfinite()]

    def _id(self, walk: int, stop: int, row: int) -> int:
        return (walk * len(self.stops) + stop) * self.plan.conditions + row

    def _stop(self, id: int) -> int:
        return id // self.plan.conditions % len(self.stops)

    def _walk(self, id: int) -> int:
        return id // self.plan.conditions // len(self.stops)
