"""How near do samplers come to the tilted law, for their network calls? Two densities in the plane.

Eight modes under a reward that makes one of them dominate, and the checkerboard under -|x|² / 2
(Diffusion Tree Sampling, arXiv 2506.20701, section 5.1), each with its exact denoiser, so that only
the sampler and the number of steps are at fault. One condition is one independent tree.

MMD: kernel exp(-|x - y|² / 2) (width 1); all items found with their weights against the tilted law
itself in closed form (a V-statistic: no reference sample). Beside it
    floor  as many exact draws of equal weight as independent walks fit the budget,
    chain  the T-step chain's own distance, by the unbiased statistic over a large weighted pool.
best-of-N keeps the best of every N walks, with equal weights. Its N, and SMC's number of particles,
are those of the lowest mean MMD on separate seeds at the same budget (at 1e6, the choice at 1e5;
`all` makes one population of the whole budget).

    python -m benchmarks.mixture_2d [--quick]
"""

from __future__ import annotations

import argparse
import math
import time

import torch
from torch import Tensor

from benchmarks.report import finish, header
from samplers import SMC, Importance, Result, TreeSampling, sample
from samplers.core import Sampler
from tests.exact import Checkerboard, Modes, mmd, planar_chain
from tests.exact.estimates import average

STEPS = 50
SEEDS = {1_000: 48, 10_000: 32, 100_000: 8, 1_000_000: 3}
QUICK = {1_000: 16, 10_000: 4}
SEARCH = {1_000: 24, 10_000: 12, 100_000: 3}  # trees that settings are chosen on
PARTICLES = (16, 64, 256, None)
GROUPS = (2, 4, 8, 16, 32, 64)

Density = Modes | Checkerboard


def run(density: Density, sampler: Sampler, nfe: int, trees: int, seed: int) -> Result:
    model = planar_chain(density, STEPS, conditions=trees)
    return sample(model, density.reward, sampler, nfe=nfe, seed=seed, batch=4096, progress=False)


def each(result: Result):
    """Points [n, 2], weights [n] and rewards [n] of every tree, in the order of their handles."""
    order = result.ids.argsort()
    x, row = result.items[order].flatten(1).double(), result.rows[order]
    for r in range(len(result.log_z)):
        here = row == r
        yield x[here], result.weights[order][here], result.rewards[order][here]


def distances(density: Density, result: Result) -> Tensor:
    return torch.tensor([mmd(x, w, density) for x, w, _ in each(result)], dtype=torch.float64)


def best_of(density: Density, walks: Result, n: int) -> Tensor:
    """MMD [trees] of the best of every n independent walks."""
    found = []
    for x, _, reward in each(walks):
        whole = len(x) // n * n
        best = reward[:whole].view(-1, n).argmax(1) + n * torch.arange(whole // n)
        found.append(mmd(x[best], torch.full((len(best),), 1 / len(best)).double(), density))
    return torch.tensor(found, dtype=torch.float64)


def exact(density: Density, n: int, repeats: int) -> tuple[float, float]:
    """MMD of n exact draws."""
    generator = torch.Generator().manual_seed(0)
    equal = torch.full((n,), 1 / n, dtype=torch.float64)
    draws = [mmd(density.draw(n, generator), equal, density) for _ in range(repeats)]
    return average(torch.tensor(draws, dtype=torch.float64))


def chain_bias(density: Density, pools: Result) -> float:
    """Distance of the chain's own tilted law, squared pairs of equal points left out."""
    squared = []
    for x, w, _ in each(pools):
        alone = float(w.square().sum())
        far = density.own(1.0) - 2 * float(w @ density.near(x, 1.0))
        pairs = mmd(x, w, density) ** 2 - far
        squared.append((pairs - alone) / (1 - alone) + far)
    return math.sqrt(max(sum(squared) / len(squared), 0.0))


def compare(name: str, density: Density, budgets: dict[int, int]) -> dict:
    figures: dict = {}
    k, n = None, 8
    for nfe, trees in budgets.items():
        affordable = [k for k in PARTICLES if k is None or k * STEPS <= nfe]
        if nfe in SEARCH:
            scores = {
                k: float(distances(density, run(density, SMC(k), nfe, SEARCH[nfe], 1)).mean())
                for k in affordable
            }
            k = min(scores, key=scores.__getitem__)
            walks = run(density, Importance(), nfe, SEARCH[nfe], 1)
            groups = {
                n: float(best_of(density, walks, n).mean()) for n in GROUPS if 4 * n * STEPS <= nfe
            }
            n = min(groups, key=groups.__getitem__)
            print(
                f"{name} {nfe:g}: SMC particles "
                + ", ".join(f"{k or 'all'} {v:.3f}" for k, v in scores.items())
                + "; best of "
                + ", ".join(f"{n} {v:.3f}" for n, v in groups.items())
            )
        found: dict[str, Tensor] = {}
        notes: dict[str, str] = {}
        samplers: dict[str, Sampler] = {
            "DTS, default": TreeSampling(),
            "DTS, even branches": TreeSampling(branch="even"),
            "DTS, published law": TreeSampling(law="published"),
            "importance": Importance(),
            f"SMC, {k or 'all'} particles": SMC(k),
        }
        if nfe == max(SEEDS):  # minutes, and settled at a tenth of the budget
            del samplers["DTS, published law"]
        for label, sampler in samplers.items():
            began = time.process_time()
            result = run(density, sampler, nfe, trees, 0)
            found[label] = distances(density, result)
            gap, gap_error = average(result.log_z - density.log_z)
            notes[label] = (
                f"log Z {gap:+.3f} ± {gap_error:.3f}  {result.nfe / trees:.0f} rows a tree"
                f"  ({time.process_time() - began:.0f} s)"
            )
            if label == "importance":
                found[f"best of {n}"] = best_of(density, result, n)
                notes[f"best of {n}"] = "the same walks"
                pools = result
        floor, floor_error = exact(density, nfe // STEPS, 8)
        for label, values in found.items():
            value, error = average(values)
            figures[f"{label} {nfe:g}"] = {"mmd": value, "error": error}
            print(f"{name} {nfe:<8g} {label:20} MMD {value:.4f} ± {error:.4f}  {notes[label]}")
        print(f"{name} {nfe:<8g} {'floor':20} MMD {floor:.4f} ± {floor_error:.4f}", flush=True)
        figures[f"floor {nfe:g}"] = {"mmd": floor, "error": floor_error}
        rivals = {label: average(v) for label, v in found.items() if not label.startswith("DTS")}
        best, best_error = min(rivals.values())
        for label in found.keys() - rivals.keys():
            value, error = average(found[label])
            behind = (value - best) / math.hypot(error, best_error)
            figures[f"{label} behind_best_in_se {nfe:g}"] = behind
            print(
                f"{name} {nfe:<8g} {label} behind the best rival by {behind:+.2f} standard errors"
            )
        print()
    figures["chain"] = chain_bias(density, pools)
    print(f"{name}: the {STEPS}-step chain's own distance {figures['chain']:.4f}\n", flush=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small numbers, under a minute")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    header()
    print(f"T = {STEPS}, lam = 1; noise seed 0, settings chosen on seed 1; trees per budget "
          f"{QUICK if quick else SEEDS}\n")  # fmt: skip
    densities = {"modes": Modes(), "checkerboard": Checkerboard()}
    if quick:
        densities.pop("checkerboard")
    budgets = QUICK if quick else SEEDS
    figures = {name: compare(name, density, budgets) for name, density in densities.items()}

    def worst(label: str) -> float:
        return max(
            value
            for found in figures.values()
            for name, value in found.items()
            if name.startswith(f"{label} behind") and not name.endswith(" 1000")
        )

    behind = {
        "dts_behind_best_in_se": worst("DTS, default"),
        "dts_even_behind_best_in_se": worst("DTS, even branches"),
    }
    finish({**behind, **figures})


if __name__ == "__main__":
    main()
