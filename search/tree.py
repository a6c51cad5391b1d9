"""Trees of kept states: the finished picture, and the two laws by which leaves are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from search.arena import Arena

LAWS = ("path", "published")


@dataclass(frozen=True)
class Tree:
    """M nodes of R trees, one tree per condition; a parent stands before its children."""

    parent: Tensor  # [M] int64 index of the parent; -1 at the R dummy roots
    step: Tensor  # [M] int64 step index of the state; -1 at dummy roots, T at leaves
    handle: Tensor  # [M] int64 id under which the state is kept; -1 at dummy roots
    row: Tensor  # [M] int64 condition
    value: Tensor  # [M] float64 in units of the reward; nan where nothing below has a reward
    visits: Tensor  # [M] int64 finished rollouts that passed through
    reward: Tensor  # [M] float64; nan at inner nodes and failures
    failed: Tensor  # [M] bool
    log_ratio: Tensor  # [M] float64, log p - log q of the walk from the parent
    log_w: Tensor  # [M] float64, path weight of a leaf; -inf elsewhere
    ended: Tensor  # [R] int64, selections that ended in a leaf
    lam: float  # inverse temperature λ

    @property
    def flat(self) -> bool:
        """Do walks share no beginning: is each node a leaf, right below a dummy root?"""
        return bool((self.parent[self.parent[self.parent >= 0]] < 0).all())

    @staticmethod
    def of(arenas: Sequence[Arena], lam: float) -> Tree:
        """The picture of growing trees, one per condition, as they stand."""
        size = torch.tensor([len(a.parent) for a in arenas])  # [R]
        first = (size.cumsum(0) - size).repeat_interleave(size)  # [M] index of the tree's root

        def column(name: str, dtype: torch.dtype) -> Tensor:
            return torch.tensor([x for a in arenas for x in getattr(a, name)], dtype=dtype)

        parent = column("parent", torch.int64)
        best = torch.tensor([a.r_ref for a in arenas], dtype=torch.float64).repeat_interleave(size)
        scale = torch.tensor([a.scale for a in arenas], dtype=torch.float64)
        return Tree(
            parent=torch.where(parent < 0, parent, parent + first),
            step=column("step", torch.int64),
            handle=column("handle", torch.int64),
            row=torch.arange(len(arenas)).repeat_interleave(size),
            value=best + column("u", torch.float64) / scale.repeat_interleave(size),
            visits=column("visits", torch.int64),
            reward=column("reward", torch.float64),
            failed=column("failed", torch.bool),
            log_ratio=column("log_ratio", torch.float64),
            log_w=column("log_w", torch.float64),
            ended=torch.tensor([a.ended for a in arenas]),
            lam=lam,
        )

    def law(self, law: str) -> tuple[Tensor, Tensor, Tensor]:
        """The law by which leaves are drawn, in closed form.

        "path":      P(leaf) ∝ exp(λ r + log w + Σ log_ratio); unbiased up to what widening adds.
        "published": P(leaf) ∝ exp(λ r + Σ log_ratio) · Π over ancestors 1 / n, n the number of
        their visible children: what a walk from the root by softmax(λ v + log_ratio) draws. Biased
        low, because lucky children are revisited and unlucky ones never (Diffusion Tree Sampling,
        arXiv 2506.20701, as its pseudo-code stands).

        Returns:
            index [K] int64 of the finished leaves, in the order of arrival within each tree;
            log_weight [K] float64, relative to the best reward of the condition;
            log_z [R] float64, the estimate of log E_p[exp(λ r)], nan where there is no leaf.
        """
        if law not in LAWS:
            raise ValueError(f"law={law!r} is unknown: give one of {', '.join(LAWS)}.")
        index = self.reward.isfinite().nonzero()[:, 0]  # [K]
        row, reward = self.row[index], self.reward[index]
        best = torch.full((len(self.ended),), -torch.inf, dtype=torch.float64)
        best.scatter_reduce_(0, row, reward, "amax")
        log_weight = self.lam * (reward - best[row]) + self._to_root(index, self.log_ratio)
        if law == "path":
            log_weight += self.log_w[index]
            trials = self.ended.double().log()
        else:
            log_weight -= self._to_root(index, self._log_siblings(index))
            trials = torch.zeros(len(self.ended), dtype=torch.float64)
        log_z = torch.stack([log_weight[row == r].logsumexp(0) for r in range(len(self.ended))])
        log_z = torch.where(best.isfinite(), log_z + self.lam * best - trials, torch.nan)
        return index, log_weight, log_z

    def greedy(self) -> Tensor:
        """Index [R] of the leaf that the largest value leads to from each root; -1 without one.

        What Diffusion Tree Search (arXiv 2506.20701) returns. With means as values it prefers a
        neighbourhood that is good throughout to a single lucky leaf.
        """
        finished = self.reward.isfinite()
        held = finished.clone()  # is there a leaf at or below? Children stand after their parents
        for node in range(len(self.parent) - 1, -1, -1):
            if held[node] and self.parent[node] >= 0:
                held[self.parent[node]] = True
        at = (self.parent < 0).nonzero()[:, 0]  # [R]
        for r, root in enumerate(at.tolist()):
            node = root
            while not finished[node]:
                children = ((self.parent == node) & held).nonzero()[:, 0]
                if not len(children):
                    break
                node = int(children[self.value[children].argmax()])
            at[r] = node if finished[node] else -1
        return at

    def top(self, index: Tensor) -> Tensor:
        """Handles [K] of the root's children above nodes [K]: equal for nodes that share x_T."""
        while (inner := self.parent[self.parent[index]] >= 0).any():
            index = torch.where(inner, self.parent[index], index)
        return self.handle[index]

    def _to_root(self, index: Tensor, edge: Tensor) -> Tensor:
        """Sum of `edge` [M] over the way from nodes [K] to the root: [K] float64."""
        total = torch.zeros(len(index), dtype=torch.float64)
        at = index
        while (below := self.parent[at] >= 0).any():
            total += torch.where(below, edge[at], 0.0)
            at = torch.where(below, self.parent[at], at)
        return total

    def _log_siblings(self, leaves: Tensor) -> Tensor:
        """log of the number of visible children of each node's parent: [M] float64."""
        visible = torch.zeros(len(self.parent), dtype=torch.bool)
        at = leaves
        while len(at):
            visible[at] = True
            at = self.parent[at]
            at = at[at >= 0].unique()
        visible &= self.parent >= 0
        count = torch.bincount(self.parent[visible], minlength=len(self.parent))
        return count.double().log()[self.parent.clamp(min=0)]
