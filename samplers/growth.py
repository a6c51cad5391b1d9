"""Growing trees by legs: what tree sampling and tree search share, all but the choice of a child.

One rollout selects a way down, expands a node, and walks leg by leg from branch step to branch
step, planting a node at each, until its leaf is scored at T. As many rollouts as `parallel` are
under way per tree. Selection happens when answers are applied, in virtual-time order, so that the
same tree grows in any room.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from samplers import branching
from samplers.core import PRIOR, Plan, Purse, Rollouts, Walked
from search.arena import Arena
from search.arrivals import Arrivals
from search.backup import Backup
from search.tree import Tree
from search.widen import ONLY_ROOTS, Widening
from steering.noise import child_key, root_key, uniform

BLOCK = 256  # selection uniforms made at once
INDEPENDENT = 64  # leaves in flight, at least, of a pilot or a flat tree
SELECTION = -1  # the child number under which a condition's selection uniforms are kept apart

# (arena, node, draw of a uniform) -> (place of the child, log(n q))
Choose = Callable[[Arena, int, Callable[[], float]], tuple[int, float]]


@dataclass
class Rollout:
    """A rollout under way: its leg is the one from the last node of its path."""

    path: list[int]  # arena nodes, dummy root first
    log_w: float  # minus the log(n q) of its selections
    stop: int = 0  # where its leg ends
    key: int = 0  # the leg's noise key
    twin: tuple[float, float] | None = None  # (share of the way, reward) of its pilot sibling


@dataclass
class Grown:
    """One condition's tree and what steers its growth."""

    arena: Arena
    levels: tuple[int, ...]  # steps where nodes are planted
    widening: Widening
    walks: int  # pilot: independent walks still to set out; then siblings follow
    flying: int = 0
    asked: int = 0  # ids given out
    siblings: list[tuple[float, int]] | None = None  # pilot: (share, root's child) to come
    pairs: dict[float, list[tuple[float, float]]] = field(default_factory=dict)
    growing: bool = False  # the pilot is over
    uniforms: list[float] = field(default_factory=list)
    blocks: int = 0


@dataclass(frozen=True)
class Habit:
    """How a sampler grows its trees."""

    choose: Choose
    backup: Backup
    widening: Widening
    levels: tuple[int, ...]  # branch steps; those of the pilot while it runs
    parallel: int
    walks: int  # of the pilot; 0: none
    flat_if_common: bool  # may the pilot decide for independent walks?
    look: bool  # does a new node start from the reward of its clean guess?
    revisits: int  # selections in a row that may end in finished leaves before one must expand


class Growth:
    """The state of a tree sampler: R trees, their legs, their budget."""

    def __init__(self, plan: Plan, habit: Habit) -> None:
        self.plan, self.habit = plan, habit
        self.purse = Purse(plan)
        self.arrivals = Arrivals(plan.conditions)
        self.rollouts: dict[int, Rollout] = {}  # by the id of the leg under way
        self.queue: deque[int] = deque()  # ids not yet asked for
        self.drop: list[int] = []
        self.root_keys = root_key(plan.seed, torch.arange(plan.conditions)).tolist()
        # [R][T + 1] network rows from a step to the end
        self.way = plan.cost.flip(1).cumsum(1).flip(1).tolist()
        self.trees = [
            Grown(
                Arena(plan.lam or 1.0, habit.backup),
                habit.levels,
                habit.widening if habit.levels else ONLY_ROOTS,
                habit.walks,
                growing=not habit.walks,
            )
            for _ in range(plan.conditions)
        ]
        for row in range(plan.conditions):
            self._fill(row)

    def ask(self, room: int) -> Rollouts:
        """At most `room` legs off the queue."""
        ids = [self.queue.popleft() for _ in range(min(room, len(self.queue)))]
        drop, self.drop = self.drop, []
        if not ids:
            return Rollouts.of([], 0, 0, 0, 0, 0, False, drop=drop)
        src, start, above, ordinal, row, stop = [], [], [], [], [], []
        for id in ids:
            rollout, r = self.rollouts[id], id % self.plan.conditions
            arena, node = self.trees[r].arena, rollout.path[-1]
            src.append(arena.handle[node] if node else PRIOR)
            start.append(max(arena.step[node], 0))
            above.append(arena.key[node] if node else self.root_keys[r])
            ordinal.append(rollout.key)
            row.append(r)
            stop.append(rollout.stop)
        key = child_key(torch.tensor(above), torch.tensor(ordinal))
        for id, k in zip(ids, key.tolist(), strict=True):
            self.rollouts[id].key = k
        score = [self.habit.look or s == self.plan.steps for s in stop]
        return Rollouts.of(ids, src, start, stop, key, row, score, drop=drop)

    def tell(self, walked: Walked) -> None:
        """Apply answers as far as virtual time allows, and let new rollouts set out."""
        for id, *answer in zip(
            walked.id.tolist(),
            walked.reward.tolist(),
            walked.log_ratio.tolist(),
            walked.failed.tolist(),
            strict=True,
        ):
            self.arrivals.arrived(id, answer)
        for row, id, (reward, log_ratio, failed) in self.arrivals.ready():
            self._land(row, id, reward, log_ratio, failed)
            self._fill(row)

    def done(self) -> bool:
        """Nothing under way, and nothing more to launch."""
        return not self.rollouts

    def tree(self) -> Tree:
        """The trees as they stand."""
        return Tree.of([grown.arena for grown in self.trees], self.plan.lam)

    def _fill(self, row: int) -> None:
        grown = self.trees[row]
        while grown.flying < self._most(grown) and self.purse.open(row):
            if not self._launch(row, grown):
                return

    def _most(self, grown: Grown) -> int:
        """Leaves in flight: where nothing is selected, none has to wait for what others bring."""
        selects = grown.growing and grown.levels
        return self.habit.parallel if selects else max(self.habit.parallel, INDEPENDENT)

    def _launch(self, row: int, grown: Grown) -> bool:
        """Let one rollout set out; False if it must wait for others, or was refused."""
        if not grown.growing:
            if grown.walks:
                grown.walks -= 1
                return self._expand(row, grown, Rollout([0], 0.0))
            if grown.siblings is None:
                if grown.flying:
                    return False
                self._read_walks(grown)
            elif grown.siblings:
                return self._sibling(row, grown)
            elif grown.flying:
                return False
            else:
                self._read_siblings(grown)
            return True
        arena = grown.arena
        for _ in range(self.habit.revisits):
            rollout = self._descend(row, grown)
            leaf = rollout.path[-1]
            if arena.step[leaf] != self.plan.steps:
                return self._expand(row, grown, rollout)
            arena.revisit(rollout.path)
            arena.weigh(leaf, rollout.log_w)
        return self._expand(row, grown, self._descend(row, grown, forced=True))

    def _descend(self, row: int, grown: Grown, forced: bool = False) -> Rollout:
        """Select from the root to a node that expands or a leaf; forced: to the last that can."""
        arena, node, path, log_w = grown.arena, 0, [0], 0.0
        last = (1, 0.0)
        while arena.shown[node]:
            branches = node == 0 or arena.step[node] in grown.levels
            if branches and arena.expands(node, grown.widening):
                return Rollout(path, log_w)
            if branches:
                last = (len(path), log_w)
            place, log_nq = self.habit.choose(arena, node, lambda: self._uniform(row, grown))
            log_w -= log_nq
            node = arena.shown[node][place]
            path.append(node)
        if forced and arena.step[node] == self.plan.steps:
            return Rollout(path[: last[0]], last[1])
        return Rollout(path, log_w)

    def _expand(self, row: int, grown: Grown, rollout: Rollout) -> bool:
        """Reserve the whole way to the leaf, and queue the first leg."""
        step = grown.arena.step[rollout.path[-1]]
        rows, scores = self.way[row][max(step, 0)], 1
        if self.habit.look:
            ahead = grown.levels[bisect_right(grown.levels, step) :]
            if not self.plan.reuses:
                rows += int(self.plan.look[row, list(ahead)].sum())
            elif step >= 0:  # the look at this node was the first row of every walk from it
                rows -= int(self.plan.look[row, step])
            scores += len(ahead)
        if not self.purse.reserve(row, rows, scores):
            return False
        grown.flying += 1
        grown.arena.enter(rollout.path)
        self._leg(row, grown, rollout)
        return True

    def _leg(self, row: int, grown: Grown, rollout: Rollout) -> None:
        arena, node = grown.arena, rollout.path[-1]
        step = arena.step[node]
        k = bisect_right(grown.levels, step)
        rollout.stop = grown.levels[k] if k < len(grown.levels) else self.plan.steps
        rollout.key = arena.started[node]  # the child's ordinal, until `ask` makes the key of it
        arena.started[node] += 1
        arena.pending[node] += 1
        # ids that depend on this tree alone, and rise with it
        id = grown.asked * self.plan.conditions + row
        grown.asked += 1
        self.rollouts[id] = rollout
        self.arrivals.queue(row, id, rollout.stop - max(step, 0))
        self.queue.append(id)

    def _land(self, row: int, id: int, reward: float, log_ratio: float, failed: bool) -> None:
        grown, rollout = self.trees[row], self.rollouts.pop(id)
        arena, leaf = grown.arena, rollout.stop == self.plan.steps
        scored = leaf or self.habit.look
        failed = failed or not log_ratio < math.inf or (scored and not math.isfinite(reward))
        ratio = 0.0 if failed else log_ratio
        node = arena.plant(rollout.path[-1], rollout.stop, id, rollout.key, ratio)
        if failed:
            self.drop.append(id)
            self.drop.extend(arena.handle[n] for n in arena.fail(node))
            arena.leave(rollout.path, finished=False)
            grown.flying -= 1
            return
        arena.enter([node])
        rollout.path.append(node)
        if not leaf:
            if scored:
                arena.score(node, reward)
            return self._leg(row, grown, rollout)
        arena.leave(rollout.path, finished=True)
        arena.finish(node, reward, rollout.log_w)
        grown.flying -= 1
        if rollout.twin:
            share, other = rollout.twin
            grown.pairs.setdefault(share, []).append((other, reward))

    def _read_walks(self, grown: Grown) -> None:
        """The pilot's walks have landed: stay flat, or ask for siblings."""
        arena, steps = grown.arena, self.plan.steps
        rewards = torch.tensor([arena.reward[leaf] for leaf in arena.leaves], dtype=torch.float64)
        if self.habit.flat_if_common and branching.common(rewards, self.plan.lam):
            self._settle(grown, ())
            return
        # a look may have shown the beginning of a walk that failed later: it has no leaf to compare
        whole = [
            node for node in arena.shown[0] if math.isfinite(arena.reward[self._end(arena, node)])
        ]
        each = min(-(-len(whole) // 2), branching.PAIRS)
        grown.siblings = [
            (share, whole[(k * len(whole)) // each]) for share in branching.USUAL
            for k in range(each) if round(share * steps) in grown.levels
        ]  # fmt: skip

    @staticmethod
    def _end(arena: Arena, node: int) -> int:
        """Where a pilot walk from the root's child `node` has got to."""
        while arena.shown[node]:
            node = arena.shown[node][0]
        return node

    def _sibling(self, row: int, grown: Grown) -> bool:
        """A second leaf below a node of a pilot walk, evenly over the walks: path weight 1."""
        assert grown.siblings
        arena = grown.arena
        share, node = grown.siblings.pop(0)
        leaf, level = self._end(arena, node), round(share * self.plan.steps)
        path = [0, node]
        while arena.step[node] < level:
            node = arena.shown[node][0]
            path.append(node)
        return self._expand(row, grown, Rollout(path, 0.0, twin=(share, arena.reward[leaf])))

    def _read_siblings(self, grown: Grown) -> None:
        arena = grown.arena
        walks = [arena.reward[leaf] for leaf in arena.leaves]
        agree = {
            share: branching.agreement(walks, grown.pairs.get(share, ()), usual)
            for share, usual in branching.USUAL.items()
        }
        self._settle(grown, branching.chosen(grown.levels, self.plan.steps, agree))

    def _settle(self, grown: Grown, levels: tuple[int, ...]) -> None:
        """The pilot is over: branch at `levels`, and let go of states where nothing branches."""
        arena = grown.arena
        self.drop.extend(
            arena.handle[node]
            for node in range(1, len(arena.step))
            if arena.step[node] not in (*levels, self.plan.steps) and arena.shown[node]
        )
        grown.levels, grown.growing = levels, True
        if not levels:
            grown.widening = ONLY_ROOTS

    def _uniform(self, row: int, grown: Grown) -> float:
        if not grown.uniforms:
            key = torch.tensor([self.root_keys[row]])
            key = child_key(child_key(key, SELECTION), grown.blocks)
            grown.uniforms = uniform(key, (BLOCK,))[0].tolist()
            grown.blocks += 1
        return grown.uniforms.pop()
