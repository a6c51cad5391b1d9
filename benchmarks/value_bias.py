"""How wrong is the value of a state on its way? Tweedie's guess, one rollout, and the tree's own.

The soft value V(x_t) = (1/λ) log E[exp(λ reward(x_0)) | x_t] is what steering needs. At nodes of a
grown tree, picked in proportion to their visits (as a rollout meets them), three estimates are held
against it: the reward of the clean guess E[x_0 | x_t], the reward of one rollout from x_t, and the
value that the tree itself carries, by path weights and by the published rule, over all nodes and
over those visited often, where a tree has had the chance to learn. The truth is the log-mean-exp
over many independent rollouts from the same state. Claim of Diffusion Tree Sampling (arXiv
2506.20701, section 5.1): trees have next to no bias at any step.

    python -m benchmarks.value_bias [--quick]
"""

from __future__ import annotations

import argparse
import math
import time
from collections import defaultdict
from typing import Literal

import torch
from torch import Tensor

from benchmarks.report import finish, header
from samplers import TreeSampling, sample
from search.resample import systematic
from steering.core import Model
from steering.noise import child_key, root_key
from tests.exact import Checkerboard, Modes, planar_chain
from tests.exact.estimates import average

STEPS = 50
WELL = 20  # visits
Density = Modes | Checkerboard
Law = Literal["path", "published"]
LAWS: tuple[Law, ...] = ("path", "published")


def walk(model: Model, x: Tensor, start: int, key: Tensor) -> Tensor:
    """States [N, *D] at step `start` walked to the data."""
    row = torch.zeros(len(x), dtype=torch.int64)
    for step in range(start, STEPS):
        i = torch.full((len(x),), step)
        clean = model.denoiser(x, model.process.time(i), row)
        x = model.process.transition(x, i, clean).sample(child_key(key, i))
    return x


def compare(
    density: Density, law: Law, nfe: int, trees: int, nodes: int, rollouts: int
) -> list[dict]:
    """Errors per step: one row per step and estimate."""
    model = planar_chain(density, STEPS, conditions=trees)
    sampler = TreeSampling(branch="even", law=law)
    result = sample(model, density.reward, sampler, nfe=nfe, batch=4096, progress=False)
    tree = result.tree
    assert tree is not None
    rows = []
    for step in sorted({int(s) for s in tree.step.unique() if 0 <= s < STEPS}):
        # name -> per tree: how often each node was picked, its error, its variance within
        found: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = defaultdict(list)
        for r in range(trees):
            here = ((tree.row == r) & (tree.step == step) & tree.value.isfinite()).nonzero()[:, 0]
            for least in (1, WELL):
                among = here[tree.visits[here] >= least]
                if not len(among):
                    continue
                u = torch.full((min(nodes, len(among)),), 0.5, dtype=torch.float64)
                picked = among[systematic(tree.visits[among].double().log(), u)]
                picked, times = picked.unique(return_counts=True)
                times = times.double()
                x = result.states(tree.handle[picked])
                key = child_key(root_key(1, picked), step).repeat_interleave(rollouts)
                key = child_key(key, torch.arange(rollouts).repeat(len(picked)))
                end = walk(model, x.repeat_interleave(rollouts, 0), step, key)
                reward = density.reward(end).view(len(picked), rollouts)
                truth = reward.logsumexp(1) - math.log(rollouts)
                error, none = tree.value[picked] - truth, torch.zeros_like(truth)
                if least == WELL:
                    found[f"tree, {law}, {WELL}+ visits"].append((times, error, none))
                    continue
                found[f"tree, {law}"].append((times, error, none))
                i = torch.full((len(x),), step)
                clean = model.denoiser(x, model.process.time(i), torch.zeros_like(i))
                found["Tweedie"].append((times, density.reward(clean) - truth, none))
                found["one rollout"].append((times, reward.mean(1) - truth, reward.var(1)))
        for name, parts in sorted(found.items()):
            times, error, within = (torch.cat(column) for column in zip(*parts, strict=True))
            weight = times / times.sum()
            bias = float(weight @ error)
            variance = float(weight @ ((error - bias) ** 2 + within))
            # nodes of one tree hang together: the standard error is over trees
            by_tree = torch.stack([t @ e / t.sum() for t, e, _ in parts])
            rows.append({"step": step, "name": name, "bias": bias, "variance": variance})
            print(
                f"  step {step:3} of {STEPS}  {name:27} bias {bias:+.3f} ± "
                f"{average(by_tree)[1]:.3f}  variance {variance:.3f}  "
                f"({len(error)} nodes of {len(parts)} trees)",
                flush=True,
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small numbers, under a minute")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    header()
    nfe, trees, nodes, rollouts = (4_000, 3, 6, 100) if quick else (100_000, 6, 16, 200)
    print(
        f"T = {STEPS}, lam = 1, {nfe} network rows per tree, {trees} trees, up to {nodes} nodes a "
        f"step and tree, truth from {rollouts} rollouts each; noise seeds 0 (trees), 1 (truth)"
    )
    figures = {}
    densities = {"modes": Modes(), "checkerboard": Checkerboard()}
    for name, density in densities.items():
        for law in LAWS:
            began = time.process_time()
            print(f"\n{name}, tree grown by the {law} rule")
            rows = compare(density, law, nfe, trees, nodes, rollouts)
            print(f"  ({time.process_time() - began:.0f} s)")
            for kind in ("Tweedie", "one rollout", f"tree, {law}", f"tree, {law}, {WELL}+ visits"):
                if law == "published" and not kind.startswith("tree"):
                    continue
                worst = max((abs(r["bias"]) for r in rows if r["name"] == kind), default=None)
                if worst is not None:
                    figures[f"{name}, {kind}"] = worst
    print("\nlargest |bias| over steps:")
    for name, worst in figures.items():
        print(f"  {name:42} {worst:.3f}")
    finish({"largest_bias": figures})


if __name__ == "__main__":
    main()
