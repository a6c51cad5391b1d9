"""Are leaves drawn by the law that a tree claims? Both laws, on random trees, in long decimals.

Trees grow as in a run (selection, widening, chains of inner nodes) with log ratios on their edges,
walks that fail and walks that never answer. Beside each grows a shadow in 60-digit decimals that
shares no code with it: values by the recursion, the path weight of every selection from q(c) at the
scores it was made with, and the published law by walking down the finished tree with softmaxes.
`max_value_error` compares the values themselves, relative to max(1, |λ(v - r_ref)|).

    python -m benchmarks.leaf_law [--quick]
"""

from __future__ import annotations

import argparse
import random
from array import array
from dataclasses import dataclass, field
from decimal import Decimal, localcontext

import torch

from benchmarks.report import finish, header
from search import backup
from search.arena import Arena
from search.select import boltzmann
from search.tree import Tree
from search.widen import Widening

LAMBDAS = (0.0, 1.0, 1e3)
SCALES = (1.0, 30.0, 1e6, 1e38)
T = 8


@dataclass
class Shadow:
    """The tree again, in decimals: nodes by their number in the arena."""

    lam: Decimal
    children: dict[int, list[int]] = field(default_factory=dict)
    parent: dict[int, int] = field(default_factory=dict)
    ratio: dict[int, Decimal] = field(default_factory=dict)
    reward: dict[int, Decimal] = field(default_factory=dict)  # finished leaves
    weight: dict[int, Decimal] = field(default_factory=dict)  # Σ over selections of Π 1 / (n q)
    value: dict[int, Decimal] = field(default_factory=dict)  # log mean exp(λ r + log_ratio)

    def finish(self, leaf: int, reward: float, weight: Decimal) -> None:
        self.reward[leaf], self.weight[leaf] = Decimal(reward), weight
        node = leaf
        while node >= 0:
            kids = self.visible(node)
            if kids:
                score = [self.value[c] + self.ratio[c] for c in kids]
                self.value[node] = _log_sum_exp(score) - Decimal(len(kids)).ln()
            elif node in self.reward:
                self.value[node] = self.lam * self.reward[node]
            node = self.parent[node]

    def visible(self, node: int) -> list[int]:
        return [c for c in self.children.get(node, []) if c in self.value]

    def path_law(self) -> dict[int, Decimal]:
        log_weight = {}
        for leaf, reward in self.reward.items():
            node, total = leaf, self.lam * reward + self.weight[leaf].ln()
            while node:
                total, node = total + self.ratio[node], self.parent[node]
            log_weight[leaf] = total
        log_sum = _log_sum_exp(list(log_weight.values()))
        return {leaf: (w - log_sum).exp() for leaf, w in log_weight.items()}

    def published_law(self) -> dict[int, Decimal]:
        law, todo = {}, [(0, Decimal(1))]
        while todo:
            node, mass = todo.pop()
            kids = self.visible(node)
            if not kids:
                law[node] = mass
            score = [self.value[c] + self.ratio[c] for c in kids]
            log_sum = _log_sum_exp(score) if kids else Decimal(0)
            todo += [(c, mass * (s - log_sum).exp()) for c, s in zip(kids, score, strict=True)]
        return law


def _probability(score: array, ratio: array, place: int, eps: float, beta: float) -> Decimal:
    # what was drawn from: a score may be too large for its log ratio to show
    both = [Decimal(beta) * Decimal(s + r) for s, r in zip(score, ratio, strict=True)]
    soft = (both[place] - _log_sum_exp(both)).exp()
    return (1 - Decimal(eps)) * soft + Decimal(eps) / len(both)


def _log_sum_exp(values: list[Decimal]) -> Decimal:
    top = max(values)
    return top + sum(((v - top).exp() for v in values), Decimal(0)).ln()


def grow(chance: random.Random, lam: float, scale: float, published: bool, rollouts: int):
    """A random tree and its shadow."""
    arena = Arena(lam or 1.0, backup.log_mean_exp if lam else backup.mean)
    shadow = Shadow(Decimal(lam), {}, {0: -1})
    # at λ = 0 selection is uniform under both laws
    eps, beta = (0.0, 1.0) if published else (0.5, 0.5)
    beta *= lam > 0
    widening = Widening(chance.choice((0.7, 1.0, 2.0)), chance.choice((0.3, 0.5, 0.8)))
    wide = chance.random() < 0.2  # some trees leave the nodes that plain Python serves

    def plant(path: list[int], step: int) -> int:
        parent = path[-1]
        ratio = chance.choice((0.0, chance.gauss(0, 1), chance.gauss(0, 5)))
        node = arena.plant(parent, step, len(arena.parent), 0, ratio)
        shadow.children.setdefault(parent, []).append(node)
        shadow.parent[node], shadow.ratio[node] = parent, Decimal(ratio)
        return node

    for _ in range(rollouts):
        path, log_w, weight = [0], 0.0, Decimal(1)
        while arena.shown[path[-1]] and not arena.expands(path[-1], widening):
            node = path[-1]
            if wide and not node and chance.random() < 0.9:
                break
            place, log_nq = boltzmann(
                arena.scores[node], arena.ratios[node], chance.random(), eps, beta
            )
            q = _probability(arena.scores[node], arena.ratios[node], place, eps, beta)
            weight /= len(arena.shown[node]) * q
            log_w -= log_nq
            path.append(arena.shown[node][place])
        if arena.step[path[-1]] == T:
            arena.revisit(path)
            arena.weigh(path[-1], log_w)
            shadow.weight[path[-1]] += weight
            continue
        arena.enter(path)
        fate = chance.choices(("finishes", "fails", "never answers"), (0.8, 0.1, 0.1))[0]
        step = max(arena.step[path[-1]], 0)
        while True:
            arena.pending[path[-1]] += 1
            step = chance.randint(step + 1, T)
            if fate == "never answers" and chance.random() < 0.5:
                break
            node = plant(path, step)
            if fate == "fails" and (step == T or chance.random() < 0.3):
                arena.fail(node)
                arena.leave(path, finished=False)
                break
            arena.enter([node])
            path.append(node)
            if step == T:
                if fate == "never answers":
                    break
                reward = chance.choice(
                    (scale * chance.gauss(0, 1), chance.gauss(0, 1), scale, -scale, 0.0)
                )
                arena.leave(path, finished=True)
                arena.finish(node, reward, log_w)
                shadow.finish(node, reward, weight)
                break
    return arena, shadow


def check(chance: random.Random, lam: float, scale: float, published: bool, rollouts: int):
    """Largest errors of a probability under either law and of a value, and the number of leaves."""
    arena, shadow = grow(chance, lam, scale, published, rollouts)
    if not arena.leaves:
        return 0.0, 0.0, 0
    tree, worst = Tree.of([arena], lam), 0.0
    laws = {"published": shadow.published_law()}
    if not published:  # an unflattened selection has weights without a bound
        laws["path"] = shadow.path_law()
    for law, exact in laws.items():
        index, log_weight, _ = tree.law(law)
        assert set(index.tolist()) == set(exact)
        drawn = log_weight.softmax(0)
        worst = max(
            worst,
            *(
                abs(Decimal(p) - exact[i])
                for i, p in zip(index.tolist(), drawn.tolist(), strict=True)
            ),
        )
    off = [
        abs(Decimal(arena.u[node]) - exact) / max(1, abs(exact))
        for node, value in shadow.value.items()
        if lam  # at λ = 0 the tree carries means, the shadow the logs of mean ratios
        for exact in [value - shadow.lam * Decimal(arena.r_ref)]
    ]
    return float(worst), float(max(off, default=0)), len(arena.leaves)


def main(quick: bool) -> dict[str, float]:
    chance = random.Random(0)
    trees, leaves, worst, off = 0, 0, 0.0, 0.0
    with localcontext() as context:
        context.prec = 60
        for lam in LAMBDAS:
            for scale in SCALES:
                cell = 0.0
                for trial in range(10 if quick else 60):
                    rollouts = chance.choice((1, 5, 40, 150))
                    error, value, count = check(chance, lam, scale, trial % 2 == 1, rollouts)
                    cell, off = max(cell, error), max(off, value)
                    trees, leaves = trees + 1, leaves + count
                print(f"lambda {lam:6g}  rewards to {scale:6g}  max error {cell:.1e}")
                worst = max(worst, cell)
    return {"max_error": worst, "max_value_error": off, "trees": trees, "leaves": leaves}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a sixth of the trees")
    torch.set_num_threads(1)
    header()
    finish(main(parser.parse_args().quick))
