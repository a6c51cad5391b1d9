"""One tree while it grows: a node is a kept state, and costs a few list entries.

Scores are u = scale·(reward - r_ref), where r_ref is the best reward of the tree so far and scale
is λ; they are rebased when r_ref rises, so that the best leaves keep all their digits whatever a
hostile reward returns. A node is visible, and can be selected, once a finished leaf (or a look at
its own clean guess) has given it a score; what is pending or failed is left out of every mean.
"""

from __future__ import annotations

import math
from array import array

from search.backup import Backup
from search.widen import Widening

FLOOR = -1e300  # scores and log ratios end here: sums of a few stay finite
_SQUARED = 1e140  # a reward beyond it has no square to speak of, and counts as it in the spread


class Arena:
    """A growing tree of one condition; node 0 is the dummy root, whose children are prior draws.

    Args:
        scale: λ; where λ = 0, 1 with the mean as backup, so that values stay in reward units.
        backup: a parent's score from those of its visible children.
    """

    def __init__(self, scale: float, backup: Backup) -> None:
        self.scale, self.backup = scale, backup
        self.r_ref = -math.inf
        self.ended = 0  # selections that ended in a leaf
        self.leaves: list[int] = []  # finished, in the order of their arrival
        self._mean, self._squares = 0.0, 0.0  # of the leaves' rewards
        # per node
        self.parent: list[int] = []
        self.step: list[int] = []
        self.handle: list[int] = []
        self.key: list[int] = []
        self.log_ratio: list[float] = []  # of the edge from the parent
        self.reward: list[float] = []
        self.failed: list[bool] = []
        self.log_w: list[float] = []
        self.u: list[float] = []
        self.visits: list[int] = []  # finished rollouts that passed through
        self.in_flight: list[int] = []  # rollouts passing through now
        self.started: list[int] = []  # children ever asked for: the next child's ordinal
        self.pending: list[int] = []  # children asked for, not yet visible and not yet failed
        self.place: list[int] = []  # position among the parent's visible children, -1 if invisible
        # per node, of its visible children
        self.shown: list[list[int]] = []
        self.scores: list[array] = []
        self.ratios: list[array] = []
        self.seen: list[array] = []  # visits and in flight, at least 1
        self.plant(-1, -1, -1, 0, 0.0)

    def plant(self, parent: int, step: int, handle: int, key: int, log_ratio: float) -> int:
        """Add a state that has arrived; it stays invisible until `score` reaches it."""
        self.parent.append(parent)
        self.step.append(step)
        self.handle.append(handle)
        self.key.append(key)
        self.log_ratio.append(max(log_ratio, FLOOR))
        self.reward.append(math.nan)
        self.failed.append(False)
        self.log_w.append(-math.inf)
        self.u.append(math.nan)
        self.visits.append(0)
        self.in_flight.append(0)
        self.started.append(0)
        self.pending.append(0)
        self.place.append(-1)
        self.shown.append([])
        self.scores.append(array("d"))
        self.ratios.append(array("d"))
        self.seen.append(array("d"))
        return len(self.parent) - 1

    def expands(self, node: int, widening: Widening) -> bool:
        """Shall the next visitor add a child? Always where there is none to go down to.

        Children and visits under way count: not counting them cost search up to 1.4 in reward.
        """
        shown = len(self.shown[node])
        visits = 1 + self.visits[node] + self.in_flight[node]
        return not shown or widening.expands(shown + self.pending[node], visits)

    def enter(self, path: list[int]) -> None:
        """A rollout sets out along `path`, root first."""
        for node in path:
            self._count(node, flying=1)

    def leave(self, path: list[int], finished: bool) -> None:
        """It has ended: in a leaf, or in a failure, which counts as no visit."""
        for node in path:
            self._count(node, flying=-1, visits=int(finished))
        self.ended += int(finished)

    def revisit(self, path: list[int]) -> None:
        """A selection has ended in a leaf that exists: a visit that costs nothing."""
        for node in path:
            self._count(node, visits=1)
        self.ended += 1

    def score(self, node: int, reward: float) -> None:
        """Give a node a reward, a leaf's or that of its clean guess, and back it up."""
        if reward > self.r_ref:
            self._rebase(reward)
        self.u[node] = max(self.scale * (reward - self.r_ref), FLOOR)
        while node:
            parent, place = self.parent[node], self.place[node]
            if place < 0:
                self.place[node] = len(self.shown[parent])
                self.shown[parent].append(node)
                self.scores[parent].append(self.u[node])
                self.ratios[parent].append(self.log_ratio[node])
                self.seen[parent].append(max(self.visits[node] + self.in_flight[node], 1))
                self.pending[parent] -= 1
            else:
                self.scores[parent][place] = self.u[node]
            self.u[parent] = max(self.backup(self.scores[parent], self.ratios[parent]), FLOOR)
            node = parent

    def finish(self, leaf: int, reward: float, log_w: float) -> None:
        """A leaf has its reward; `log_w` is the path weight of the selections that led to it."""
        self.reward[leaf] = reward
        self.leaves.append(leaf)
        self.log_w[leaf] = log_w
        held = min(max(reward, -_SQUARED), _SQUARED)
        apart = held - self._mean
        self._mean += apart / len(self.leaves)
        self._squares += apart * (held - self._mean)
        self.score(leaf, reward)

    def spread(self) -> float:
        """Standard deviation of the leaves' rewards."""
        return math.sqrt(min(self._squares / max(len(self.leaves), 1), -FLOOR))

    def fail(self, node: int) -> list[int]:
        """The walk to `node` has failed. Returns the nodes above that died with it."""
        dead = []
        self.failed[node] = True
        node = self.parent[node]
        self.pending[node] -= 1
        while node and self.place[node] < 0 and not self.pending[node]:
            dead.append(node)
            self.failed[node] = True
            node = self.parent[node]
            self.pending[node] -= 1
        return dead

    def weigh(self, leaf: int, log_w: float) -> None:
        """Add the weight of a selection that ended in `leaf`."""
        old = self.log_w[leaf]
        top = max(old, log_w)
        self.log_w[leaf] = top + math.log(math.exp(old - top) + math.exp(log_w - top))

    def _count(self, node: int, flying: int = 0, visits: int = 0) -> None:
        self.in_flight[node] += flying
        self.visits[node] += visits
        if self.place[node] >= 0:
            now = self.visits[node] + self.in_flight[node]
            self.seen[self.parent[node]][self.place[node]] = max(now, 1)

    def _rebase(self, reward: float) -> None:
        shift = self.scale * (reward - self.r_ref)
        self.r_ref = reward
        if not self.shown[0] or not shift:
            return
        self.u = [max(u - shift, FLOOR) for u in self.u]  # nan stays nan: max keeps its first
        for scores in self.scores:
            for place in range(len(scores)):
                scores[place] = max(scores[place] - shift, FLOOR)
