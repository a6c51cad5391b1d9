"""Does it hurt to have many leaves in flight? Quality of trees at equal network calls.

A tree that waits for nobody selects with fewer answers seen. Tree sampling: MMD to the eight tilted
modes (see `mixture_2d`) and the error of log Z, with even branches, so that there is something to
select. Tree search: the best reward on four independent copies, where the optimum is rare. One
condition is one independent tree; every number of leaves has the same seeds.

    python -m benchmarks.parallel [--quick]
"""

from __future__ import annotations

import argparse
import math
import time

import torch
from torch import Tensor

from benchmarks.mixture_2d import STEPS, distances
from benchmarks.report import finish, header
from samplers import TreeSampling, TreeSearch, sample
from tests.exact import Modes, planar_chain
from tests.exact.estimates import average

LEAVES = (1, 4, 16, 64, None)


def qualities(nfe: int, trees: int, leaves: int | None) -> dict[str, Tensor]:
    """What is to be small, one number per tree."""
    density = Modes()
    budget = {"nfe": nfe, "batch": 4096, "progress": False}
    sampler = TreeSampling(branch="even", parallel=leaves)
    model = planar_chain(density, STEPS, conditions=trees)
    drawn = sample(model, density.reward, sampler, **budget)
    copies = 4
    model = planar_chain(density, STEPS, copies=copies, conditions=trees)
    search = TreeSearch(parallel=leaves)
    best = sample(model, density.reward, search, draws=1, **budget)
    top = copies * density.slope * (density.modes - 1)
    return {
        "DTS: MMD": distances(density, drawn),
        "DTS: |error of log Z|": (drawn.log_z - density.log_z).abs(),
        "DTS*: best reward below the optimum": top - best.rewards,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small numbers, under a minute")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    header()
    ladder = ((2_500, 5),) if quick else ((10_000, 48), (40_000, 24))
    behind, tables = {}, {}
    for nfe, trees in ladder:
        worst, tables[nfe] = at(nfe, trees)
        behind |= {f"{name}, {nfe} rows": gap for name, gap in worst.items()}
    finish({"default_behind_one_in_se": max(behind.values()), "behind": behind, "table": tables})


def at(nfe: int, trees: int) -> tuple[dict[str, float], dict]:
    """How far the default is behind one leaf at a time, and all that was measured."""
    print(f"T = {STEPS}, lam = 1, {nfe} network rows per tree, {trees} trees, noise seed 0\n")
    found: dict[str, dict[str, Tensor]] = {}
    for leaves in LEAVES:
        began = time.process_time()
        label = "default" if leaves is None else str(leaves)
        found[label] = qualities(nfe, trees, leaves)
        for name, values in found[label].items():
            value, error = average(values)
            print(f"{label:>8} leaves in flight  {name:38} {value:.4f} ± {error:.4f}", flush=True)
        print(f"({time.process_time() - began:.0f} s)\n")
    behind = {}
    for name in found["1"]:
        (one, one_error), (default, error) = (average(found[k][name]) for k in ("1", "default"))
        behind[name] = (default - one) / math.hypot(one_error, error)
        print(f"{name}: default behind one leaf at a time by {behind[name]:+.2f} standard errors")
    print()
    return behind, {k: {n: average(v) for n, v in values.items()} for k, values in found.items()}


if __name__ == "__main__":
    main()
