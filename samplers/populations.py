"""Populations of particles on their way from level to level: what SMC remembers."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor

from samplers.core import PRIOR, Plan, Rollouts
from search.resample import logsumexp_by
from steering.noise import child_key, root_key


@dataclass
class Population:
    """K particles that walk from level to level together. A slot whose particle failed stays empty
    until the next resampling."""

    row: int
    key: Tensor  # [1] int64
    here: Tensor  # [K] int64 handle of the state a slot stands at; PRIOR before the first level
    there: Tensor  # [K] int64 handle of the state it is on its way to
    root: Tensor  # [K] int64 handle of its first state: equal for those that share an x_T
    walk_key: Tensor  # [K] int64
    log_w: Tensor  # [K] float64 at `here`, since the last resampling
    seen: Tensor  # [K] float64, see the sampler's potentials
    spent: Tensor  # [K] float64, Σ log G along a particle's own line of descent
    reward: list[float]  # [K] at `there`: nan until told, -inf if failed
    log_ratio: list[float]  # [K] of the way to `there`
    log_z: float = 0.0  # Σ of the log mean weights at the resamplings so far
    leg: int = 0  # the leg it walks ends at stops[leg]
    waiting: int = 0  # walks not yet told

    def arrived(self, state: Populations) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Id, row, log weight, root [n] of what is at the data; the weights sum to this Ẑ."""
        reward, log_ratio = self.told()
        at = reward.isfinite() & (self.leg == len(state.stops) - 1)
        log_w = self.log_w + state.plan.lam * reward - self.spent + log_ratio
        return self._shared(self.there[at], log_w[at], self.root[at], int(at.sum()))

    def standing(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The same of the level it stands at while a leg is walked; copies are one item."""
        at = (self.here != PRIOR) & (self.waiting > 0)
        id, copy = self.here[at].unique(return_inverse=True)
        log_w = logsumexp_by(self.log_w[at], copy, len(id))
        root = torch.empty_like(id).index_copy(0, copy, self.root[at])
        return self._shared(id, log_w, root, int(at.sum()))

    def told(self) -> tuple[Tensor, Tensor]:
        """`reward` and `log_ratio` as [K] float64 tensors."""
        reward, log_ratio = (
            torch.tensor(v, dtype=torch.float64) for v in (self.reward, self.log_ratio)
        )
        return reward, log_ratio

    def _shared(self, id: Tensor, log_w: Tensor, root: Tensor, particles: int):
        log_w = log_w + self.log_z - math.log(max(particles, 1))
        return id, torch.full_like(id, self.row), log_w, root


@dataclass
class Populations:
    """What SMC remembers."""

    plan: Plan
    k: int  # particles of a population
    stops: list[int]  # levels, then T
    limit: Tensor  # [R] int64 populations per condition
    first: float  # what `seen` begins with
    started: list[int] = field(default_factory=list)  # per condition
    populations: list[Population] = field(default_factory=list)
    queue: deque[Rollouts] = field(default_factory=deque)  # to ask for, deepest first
    flight: dict[int, tuple[Population, int]] = field(default_factory=dict)  # id -> its slot
    drop: list[int] = field(default_factory=list)  # handles to let go of at the next `ask`
    handles: int = 0  # given out so far

    def __post_init__(self) -> None:
        self.started = [0] * self.plan.conditions

    def left(self) -> list[int]:
        """Conditions with populations still to start, those furthest behind first."""
        rows = [r for r, n in enumerate(self.limit.tolist()) if self.started[r] < n]
        return sorted(rows, key=self.started.__getitem__)

    def start_next(self) -> bool:
        """Put the next population's first leg on the queue; False if none is left."""
        left = self.left()
        if not left:
            return False
        row, k = left[0], self.k
        key = child_key(root_key(self.plan.seed, torch.tensor([row])), self.started[row])
        self.started[row] += 1
        slots, zeros = torch.arange(k), torch.zeros(k, dtype=torch.float64)
        here = torch.full((k,), PRIOR)
        walk_key = child_key(key.expand(k), slots)
        seen = torch.full_like(zeros, self.first)
        p = Population(
            row, key, here, here, here, walk_key, zeros, seen, zeros, [], []
        )  # fmt: skip
        self.populations.append(p)
        self.launch(p, slots)
        p.root = p.there
        return True

    def launch(self, p: Population, slot: Tensor) -> None:
        """Send the particles in these slots on their way to the next stop."""
        n, k = len(slot), self.k
        id = torch.arange(self.handles, self.handles + n)
        self.handles += n
        p.there = torch.full((k,), PRIOR).index_copy(0, slot, id)
        walks = set(slot.tolist())
        p.reward = [math.nan if s in walks else -math.inf for s in range(k)]
        p.log_ratio = [0.0] * k
        p.waiting = n
        self.flight |= {i: (p, s) for i, s in zip(id.tolist(), slot.tolist(), strict=True)}
        start = self.stops[p.leg - 1] if p.leg else 0
        walk = Rollouts.of(
            id, p.here[slot], start, self.stops[p.leg], p.walk_key[slot], p.row, True
        )  # fmt: skip
        self.queue.appendleft(walk)


def part(block: Rollouts, which: slice) -> Rollouts:
    """Some of the walks of a request."""
    columns = (block.id, block.src, block.start, block.stop, block.key, block.row, block.score)
    return Rollouts(*(column[which] for column in columns))
