"""Zero-order search over starting noises: turn the best one so far a little, walk, keep the best.

Ma et al. 2025, "Inference-time scaling for diffusion models beyond scaling denoising steps", arXiv
2501.09732. Only x_T is searched, so that it works for chains that draw no noise on their way (ODEs,
one-step students) as for all others.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

import torch

from samplers.core import PRIOR, Draws, Plan, Rollouts, Walked
from samplers.walks import Walks, check_count
from steering.noise import child_key, root_key


@dataclass(frozen=True)
class ZeroOrder:
    """Hill climbing in x_T, by as many pivots side by side as `pivots`.

    Around a pivot x of a condition, N neighbours cos(angle) · x + sin(angle) · z are walked from
    noise to data; the best of them is the next pivot, unless the pivot itself was better. Turned
    noise is Gaussian as the prior is, and at any dimension |x' - x| is about 2 sin(angle / 2) |x|.
    Where the chain draws noise on its way every walk draws its own, which is not searched: made for
    eta = 0 and for students of one step. Draws are ranked: all walks, best first.

    Args:
        n: walks per condition; all that the budget affords when None.
        neighbours: N of a round.
        angle: radians, above 0 and at most π/2, where a neighbour is a fresh draw.
        pivots: searches per condition, side by side and independent of each other: a single one
            finds no more, and its few walks at a time leave network calls half empty.

    Raises:
        ValueError: a bad argument; from `init`, before the first network row, for a budget below
            one walk, none at all with n=None, and a chain whose prior is not Gaussian.
    """

    n: int | None = None
    neighbours: int = 8
    angle: float = 0.5
    pivots: int = 4

    def __post_init__(self) -> None:
        check_count("n", self.n)
        for name in ("neighbours", "pivots"):
            if getattr(self, name) is None:
                raise ValueError(f"{name}=None: give a whole number of at least 1.")
            check_count(name, getattr(self, name))
        if type(self.angle) not in (int, float) or not 0 < self.angle <= math.pi / 2:
            raise ValueError(f"angle={self.angle!r}: give radians above 0 and at most pi / 2.")

    def init(self, plan: Plan) -> Climb:
        if not plan.turns:
            raise ValueError(
                "ZeroOrder turns Gaussian noise, and this chain starts from tokens: use BestOfN, "
                "Beam or a tree."
            )
        return Climb(plan, self, Walks.start(plan, self.n).limit.tolist())

    def ask(self, state: Climb, room: int) -> Rollouts:
        return state.ask(room)

    def tell(self, state: Climb, walked: Walked) -> None:
        state.tell(walked)

    def done(self, state: Climb) -> bool:
        return not state.queue and not state.flight

    def result(self, state: Climb) -> Draws:
        found = sorted(state.found, key=lambda item: (-item[2], item[0]))
        columns = list(zip(*found, strict=True)) or [(), (), (), ()]
        id, row, root = (torch.tensor(columns[k], dtype=torch.int64) for k in (0, 1, 3))
        reward = torch.tensor(columns[2], dtype=torch.float64)
        best = torch.full((state.plan.conditions,), -torch.inf, dtype=torch.float64)
        best.scatter_reduce_(0, row, reward, "amax")
        return Draws(
            id=id,
            row=row,
            log_weight=state.plan.lam * (reward - best[row]),
            finished=torch.ones_like(id, dtype=torch.bool),
            root=root,
            log_z=torch.full_like(best, torch.nan),  # a search says nothing of the mean
            ranked=True,
        )


@dataclass
class Pivot:
    """The best starting noise of one search so far, and the round around it."""

    row: int
    number: int  # among the pivots of its condition
    key: int
    noise: int = PRIOR  # handle of x_T
    best: int = -1  # the walk that began there
    reward: float = -math.inf  # of that walk
    round: int = 0  # 0: the first noise itself is walked
    tried: dict[int, float] = field(default_factory=dict)  # walks of this round -> reward
    waiting: int = 0  # of those


@dataclass
class Climb:
    """What zero-order search remembers.

    Walks of a condition are numbered before any is made: the first noises, then N neighbours for
    each pivot in turn, round after round. So a budget of n walks is those below n, whoever answers
    first, and a larger one begins with the same. Walk number o of condition r has handle
    2 (o R + r) + 1; the handle before is its x_T, planted again if it becomes a pivot.
    """

    plan: Plan
    search: ZeroOrder
    limit: list[int]  # [R] walks per condition
    queue: deque[tuple[Pivot, int]] = field(default_factory=deque)  # (search, id) to ask for
    flight: dict[int, Pivot] = field(default_factory=dict)
    drop: list[int] = field(default_factory=list)
    found: list[tuple[int, int, float, int]] = field(default_factory=list)  # id, row, reward, root

    def __post_init__(self) -> None:
        conditions = self.plan.conditions
        rows = torch.arange(conditions).repeat(self.search.pivots)
        numbers = torch.arange(self.search.pivots).repeat_interleave(conditions)
        keys = child_key(root_key(self.plan.seed, rows), numbers)
        for row, number, key in zip(*(c.tolist() for c in (rows, numbers, keys)), strict=True):
            self._launch(Pivot(row, number, key))

    def ask(self, room: int) -> Rollouts:
        """At most `room` walks, and noises of new pivots."""
        asked = [self.queue.popleft() for _ in range(min(room, len(self.queue)))]
        drop, self.drop = self.drop, []
        if not asked:
            return Rollouts.of([], 0, 0, 0, 0, 0, False, drop=drop)
        self.flight |= {id: pivot for pivot, id in asked}
        walks = torch.tensor([id % 2 == 1 for _, id in asked])
        src = torch.tensor([pivot.noise for pivot, _ in asked])
        # a noise has the key of the walk that began with it
        child = torch.tensor([(id // 2) // self.plan.conditions for _, id in asked])
        return Rollouts.of(
            id=[id for _, id in asked],
            src=src,
            start=0,
            stop=torch.where(walks, self.plan.steps, 0),
            key=child_key(torch.tensor([pivot.key for pivot, _ in asked]), child),
            row=torch.tensor([pivot.row for pivot, _ in asked]),
            score=walks,
            angle=[math.nan if p.noise == PRIOR else self.search.angle for p, _ in asked],
            drop=drop,
        )

    def tell(self, walked: Walked) -> None:
        """Move a pivot whose round is complete to the best of it, and ask for the next round."""
        for id, reward, failed in zip(
            walked.id.tolist(), walked.reward.tolist(), walked.failed.tolist(), strict=True
        ):
            pivot = self.flight.pop(id, None)
            if pivot is None:
                continue  # a repeated answer
            if id % 2 == 0:  # the noise of the new pivot is there
                self.drop += [] if pivot.noise == PRIOR else [pivot.noise]
                pivot.noise = id
                self._launch(pivot)
                continue
            pivot.tried[id] = -math.inf if failed else reward
            if not failed:
                root = 2 * (pivot.number * self.plan.conditions + pivot.row) + 1
                self.found.append((id, pivot.row, reward, root))
            pivot.waiting -= 1
            if pivot.waiting == 0:
                self._move(pivot)

    def _move(self, pivot: Pivot) -> None:
        """The best walk of a complete round, if better than the pivot's, gives the next pivot."""
        best = min(pivot.tried, key=lambda id: (-pivot.tried[id], id))
        moves = pivot.round == 0 or pivot.tried[best] > pivot.reward
        if moves:
            pivot.best, pivot.reward = best, pivot.tried[best]
        pivot.round += 1
        if not self._ordinals(pivot):
            return  # a larger budget goes on from here
        if moves:
            self.queue.append((pivot, pivot.best - 1))
        else:
            self._launch(pivot)

    def _launch(self, pivot: Pivot) -> None:
        """Ask for the walks of a round, as far as the budget goes."""
        ids = [2 * (o * self.plan.conditions + pivot.row) + 1 for o in self._ordinals(pivot)]
        pivot.tried, pivot.waiting = {}, len(ids)
        self.queue.extend((pivot, id) for id in ids)

    def _ordinals(self, pivot: Pivot) -> range:
        """Numbers of the walks of a pivot's round."""
        n, limit = self.search.neighbours, self.limit[pivot.row]
        if pivot.round == 0:
            return range(pivot.number, min(pivot.number + 1, limit))
        pivots = self.search.pivots
        first = pivots + ((pivot.round - 1) * pivots + pivot.number) * n
        return range(first, min(first + n, limit))
