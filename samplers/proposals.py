"""Families of states walked on several times from level to level, of which some are kept.

What SVDD and beam search share. A family keeps up to `width` states. From each of them
`proposals` walks go to the next level, where their clean guesses are scored; the sampler chooses
which of them the family goes on from, and at the data every proposal is an item. Families know
nothing of each other, so that neither the order nor the number of answers at a time changes any.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from samplers.core import PRIOR, Plan, Rollouts, Walked
from samplers.walks import UNLIMITED, affordable
from steering.noise import child_key, root_key, uniform


@dataclass
class Family:
    """States of one condition that are chosen among together: P parents, n = P · M proposals."""

    row: int
    number: int  # among the families of all conditions
    key: int
    here: list[int]  # [P] handles walked from; PRIOR before the first level
    here_key: list[int]  # [P] noise keys of the walks that ended there
    here_root: list[int]  # [P] handle of the first state: equal for those that share an x_T
    here_reward: list[float] = field(default_factory=list)  # [P] of their clean guesses
    there: list[int] = field(default_factory=list)  # [n] handles of the proposals
    there_key: list[int] = field(default_factory=list)  # [n]
    there_root: list[int] = field(default_factory=list)  # [n]
    reward: list[float] = field(default_factory=list)  # [n] at `there`: nan until told, -inf failed
    log_ratio: list[float] = field(default_factory=list)  # [n] of the way to `there`
    leg: int = 0  # ends at stops[leg]
    waiting: int = 0  # proposals not yet told
    ended: bool = False  # at the data, or without a living proposal
    log_w: float = 0.0  # what the sampler makes of its choices


# (a family that stands complete at a level, a uniform) -> places of the proposals that it keeps
Choose = Callable[[Family, float], Sequence[int]]


@dataclass
class Families:
    """The state of a sampler that proposes and chooses."""

    plan: Plan
    width: int  # parents of a family, at most
    proposals: int  # M, walks from each
    stops: list[int]  # levels, then T
    choose: Choose
    limit: list[int]  # [R] families per condition
    started: list[int] = field(init=False)  # per condition
    families: list[Family] = field(default_factory=list)
    queue: deque[tuple[Family, int]] = field(
        default_factory=deque
    )  # (family, place), deepest first
    flight: dict[int, tuple[Family, int]] = field(default_factory=dict)  # id -> the same
    drop: list[int] = field(default_factory=list)  # handles to let go of at the next `ask`

    def __post_init__(self) -> None:
        self.started = [0] * self.plan.conditions

    @staticmethod
    def cost(plan: Plan, levels: list[int]) -> tuple[Tensor, int]:
        """Network rows [R] and reward calls of one proposal at every level and at the data."""
        rows = plan.cost.sum(1)  # a look is the first row of every walk from there
        if not plan.reuses:
            rows = rows + plan.look[:, levels].sum(1)
        return rows, len(levels) + 1

    @staticmethod
    def start(
        plan: Plan,
        width: int,
        proposals: int,
        levels: list[int],
        choose: Choose,
        what: str,
        most: int | None = None,
    ) -> Families:
        """As many families as the budget affords, at most `most`; one if there is no budget.

        Raises:
            ValueError: the budget affords none.
        """
        rows, scores = Families.cost(plan, levels)
        each = width * proposals
        limit = affordable(plan, each * rows, each * scores, what)
        if most is not None:
            limit = limit.clamp(max=most)
        elif plan.budget.seconds is None:
            limit = limit.where(limit < UNLIMITED, 1)
        return Families(plan, width, proposals, [*levels, plan.steps], choose, limit.tolist())

    def ask(self, room: int) -> Rollouts:
        """At most `room` walks; families on their way come first, so that few are in memory."""
        if len(self.queue) < room:
            each = self.width * self.proposals
            self._found(math.ceil((room - len(self.queue)) / each))
        walks = [self.queue.popleft() for _ in range(min(room, len(self.queue)))]
        drop, self.drop = self.drop, []
        columns: list[list[int]] = [
            [family.there[place] for family, place in walks],
            [family.here[place // self.proposals] for family, place in walks],
            [self.stops[family.leg - 1] if family.leg else 0 for family, _ in walks],
            [self.stops[family.leg] for family, _ in walks],
            [family.there_key[place] for family, place in walks],
            [family.row for family, _ in walks],
        ]
        return Rollouts.of(
            *(torch.tensor(c, dtype=torch.int64) for c in columns), score=True, drop=drop
        )

    def tell(self, walked: Walked) -> None:
        """Take answers in; families whose proposals were all told choose and go on."""
        complete: list[Family] = []
        answers = (walked.reward, walked.log_ratio, walked.failed)
        for id, *answer in zip(walked.id.tolist(), *(a.tolist() for a in answers), strict=True):
            if id not in self.flight:
                continue  # a repeated answer
            family, place = self.flight.pop(id)
            reward, log_ratio, failed = answer
            family.reward[place] = -math.inf if failed else reward
            family.log_ratio[place] = -math.inf if failed else log_ratio
            family.waiting -= 1
            complete += [] if family.waiting else [family]
        self._advance(complete)

    def done(self) -> bool:
        behind = any(n < most for n, most in zip(self.started, self.limit, strict=True))
        return not self.flight and not behind

    def arrived(self) -> list[Family]:
        """Families at the data with at least one item."""
        last = len(self.stops) - 1
        return [f for f in self.families if f.ended and f.leg == last and max(f.reward) > -math.inf]

    def standing(self) -> list[Family]:
        """Families between two levels, of conditions of which none has arrived."""
        there = {f.row for f in self.arrived()}
        return [f for f in self.families if f.leg and not f.ended and f.row not in there]

    def _found(self, count: int) -> None:
        """Start so many families, as far as there are any, conditions furthest behind first."""
        new: list[tuple[int, int]] = []  # (ordinal, row)
        while len(new) < count:
            behind = [r for r, n in enumerate(self.limit) if self.started[r] < n]
            if not behind:
                break
            row = min(behind, key=self.started.__getitem__)
            new.append((self.started[row], row))
            self.started[row] += 1
        if not new:
            return
        ordinal, row = torch.tensor(new).unbind(1)
        keys = child_key(root_key(self.plan.seed, row), ordinal)
        # children 0..width-1 of a family's key walk; those from `width` on choose, one per level
        places = torch.arange(self.width).repeat(len(new))
        walk_keys = child_key(keys.repeat_interleave(self.width), places).view(-1, self.width)
        here = [PRIOR] * self.width
        families = [
            Family(r, n * self.plan.conditions + r, key, here, walk_key, here)
            for (n, r), key, walk_key in zip(new, keys.tolist(), walk_keys.tolist(), strict=True)
        ]
        self.families += families
        self._launch(families)

    def _launch(self, families: list[Family]) -> None:
        """Send the proposals of these families' parents on their way to the next stop."""
        m = self.proposals
        parents = torch.tensor([key for f in families for key in f.here_key])
        keys = child_key(parents.repeat_interleave(m), torch.arange(m).repeat(len(parents)))
        left = iter(keys.tolist())
        for f in reversed(families):
            n = len(f.here) * m
            first = (f.number * len(self.stops) + f.leg) * self.width * m
            f.there = list(range(first, first + n))
            f.there_root = [root for root in f.here_root for _ in range(m)] if f.leg else f.there
            f.reward, f.log_ratio, f.waiting = [math.nan] * n, [0.0] * n, n
            self.flight |= {id: (f, place) for place, id in enumerate(f.there)}
            self.queue.extendleft((f, place) for place in reversed(range(n)))
        for f in families:
            f.there_key = [next(left) for _ in f.there]

    def _advance(self, complete: list[Family]) -> None:
        """Let families whose proposals are all told choose, and go on; or end."""
        going: list[Family] = []
        for f in complete:
            self.drop += [handle for handle in f.here if handle != PRIOR]
            f.ended = f.leg == len(self.stops) - 1 or max(f.reward) == -math.inf
            if f.ended:
                lost = zip(f.there, f.reward, strict=True)
                self.drop += [handle for handle, reward in lost if reward == -math.inf]
            else:
                going.append(f)
        if not going:
            return
        keys = torch.tensor([f.key for f in going])
        u = uniform(child_key(keys, torch.tensor([self.width + f.leg for f in going])))
        for f, chance in zip(going, u.tolist(), strict=True):
            kept = self.choose(f, chance)
            lost = set(f.there) - {f.there[k] for k in kept}
            self.drop += sorted(lost)
            f.here, f.here_key = [f.there[k] for k in kept], [f.there_key[k] for k in kept]
            f.here_root = [f.there_root[k] for k in kept]
            f.here_reward = [f.reward[k] for k in kept]
            f.leg += 1
        self._launch(going)


def as_columns(found: list[tuple[int, int, int, float, bool]]) -> list[Tensor]:
    """(id, row, root, value, finished) of K items as five tensors [K]."""
    kinds = (torch.int64, torch.int64, torch.int64, torch.float64, torch.bool)
    columns = list(zip(*found, strict=True)) or [()] * len(kinds)
    return [torch.tensor(c, dtype=kind) for c, kind in zip(columns, kinds, strict=True)]
