"""Does a guidance under tree sampling or SMC pay, with honest weights and at equal network rows?

    python -m benchmarks.guided_search [--quick] [--nfe N ...] [--seeds S] [--pool N] [--work DIR]

The tasks and the reference of `even_digits` on the built-in MNIST model (50 steps, DDIM eta = 1,
lam = 1): even digits, which are common, and the rare pair, a 4 and a 9 at once. Importance
sampling, SMC at late levels and DTS run unguided and under guidances, all weighed exactly; TDS and
DAS, which are SMC under a guidance, beside them. Fréchet distance to the tilted law on even digits,
MMD² on the rare pair, whose reference is too thin for a covariance. FlowChef's step is searched on
another seed by the effective sample size of importance sampling.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.even_digits import (
    DRAWS,
    EXTRACTOR,
    Bench,
    Drawn,
    Reference,
    look,
    score,
    task_reward,
)
from benchmarks.report import finish, header
from samplers import DAS, SMC, TDS, Importance, TreeSampling, sample
from steering.guidance import FlowChef, Twist

TASKS = ("even", "rare")
LATE = (20, 28, 35, 40, 44)  # where clean guesses foretell the reward
SAMPLERS: dict[str, Callable[[], Any]] = {
    "importance": Importance,
    "SMC, late levels": lambda: SMC(levels=LATE),
    "DTS": TreeSampling,
}
TWISTED: dict[str, Callable[[int], Any]] = {
    "TDS": lambda particles: TDS(particles),
    "DAS": lambda particles: DAS(particles),
}
STEPS = (0.0003, 0.001, 0.003, 0.01, 0.03)  # of FlowChef, in units of sigma · sqrt(dim)


def run(bench: Bench, task: str, sampler: Any, bend: Any, nfe: int, seeds: int) -> list[Drawn]:
    """What is drawn by each of `seeds` repetitions, which are conditions of one run."""
    began = time.process_time()
    found = sample(
        replace(bench.model, prompts=(None,) * seeds),
        task_reward(task, bench.net),
        sampler,
        nfe=nfe,
        draws=DRAWS,
        guidance=bend,
        batch=bench.batch,
        progress=False,
    )
    seconds = (time.process_time() - began) / seeds
    features, logits = look(bench.net, found.items, bench.device)
    drawn = []
    for seed in range(seeds):
        mine = found.rows == seed
        figures = (float(v[seed]) for v in (found.ess, found.root_ess, found.log_z))
        columns = (features[mine], logits[mine], found.counts[mine])
        drawn.append(Drawn(*columns, seconds, *figures))
    return drawn


def searched_step(bench: Bench, task: str, nfe: int) -> float:
    """FlowChef's step with the largest effective sample size of importance sampling."""
    model = bench.model
    bench.model = replace(model, prompts=(None,))
    size = {}
    for step in STEPS:
        found = sample(
            replace(model, prompts=(None,)),
            task_reward(task, bench.net),
            Importance(),
            nfe=nfe,
            guidance=FlowChef(step=step),
            seed=10**6,
            batch=bench.batch,
            progress=False,
        )
        size[step] = float(found.ess)
    bench.model = model
    print(f"{task}: ESS of importance sampling under FlowChef at {nfe} rows:",
          ", ".join(f"{step:g} {value:.1f}" for step, value in size.items()))  # fmt: skip
    return max(size, key=lambda step: size[step])


def distance(reference: Reference, drawn: Drawn) -> float:
    """Fréchet distance, or MMD² where the reference is too thin for it; infinite for one item."""
    if reference.by_kernel:
        return reference.by_mmd(drawn)
    return reference.distances(drawn)[0] if len(drawn.features) > 1 else math.inf


def row(task: str, reference: Reference, runs: list[Drawn]) -> dict[str, Any]:
    """Means and standard errors over repetitions."""
    distances = [distance(reference, r) for r in runs]

    def over_seeds(values: list[float]) -> tuple[float, float]:
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        return statistics.mean(values), error

    rewards = [float((r.counts.double() / r.counts.sum()) @ score(task, r.logits)) for r in runs]
    return {
        "distance": over_seeds(distances),
        "reward": over_seeds(rewards),
        "ess": statistics.mean(r.ess for r in runs),
        "root_ess": statistics.mean(r.root_ess for r in runs),
        "log_z": over_seeds([r.log_z for r in runs]),
        "seconds": statistics.mean(r.seconds for r in runs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="one small budget and one seed")
    parser.add_argument("--nfe", type=int, nargs="+", default=[3000, 10_000])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pool", type=int, default=10_000, help="walks of the reference")
    parser.add_argument("--work", type=Path, default=Path("runs/even_digits"), help="keeps them")
    args = parser.parse_args()
    if args.quick:
        args.nfe, args.seeds, args.pool = [1000], 1, 150
        args.work = args.work.with_name(args.work.name + "-quick")
    torch.set_num_threads(1)
    header()
    bench = Bench(args.work, "cpu", args.pool, args.seeds, args.seeds)
    for k in range(math.ceil(args.pool / 1000)):
        if not bench.path(f"pool-{k:04d}").exists():
            bench.shard(k)
    pool = [load_file(p) for p in sorted(bench.work.glob("pool-*.safetensors"))]
    features = torch.cat([p["features"] for p in pool])
    logits = torch.cat([p["logits"] for p in pool])
    print(f"pool: {len(features)} independent walks; extractor {EXTRACTOR}; {args.seeds} seeds, "
          "mean ± standard error; seconds of CPU a seed\n")  # fmt: skip
    figures: dict[str, Any] = {"extractor": EXTRACTOR, "pool": len(features), "table": []}
    for task in TASKS:
        reference = Reference(task, features, logits)
        guidances = {
            "none": None,
            "Twist, skip": Twist(jacobian="skip"),
            "FlowChef": FlowChef(step=searched_step(bench, task, args.nfe[0])),
        }
        print(f"\n{task}: mean exp(reward) {reference.mean_weight:.4g}; FlowChef's step "
              f"{guidances['FlowChef'].step:g}")  # fmt: skip
        kind = "MMD² x 1000" if task == "rare" else "Fréchet"
        print(f"{'sampler':18}{'guidance':13}{'nfe':>7}{kind:>17}{'reward':>16}{'ESS':>8}"
              f"{'ESS x_T':>9}{'log Z':>15}{'s':>7}")  # fmt: skip
        pairs = [(s, g) for s in SAMPLERS for g in guidances]
        pairs += [(s, "own") for s in TWISTED]
        for name, bend in pairs:
            for nfe in args.nfe:
                particles = 8 if args.quick else 16
                sampler = SAMPLERS[name]() if name in SAMPLERS else TWISTED[name](particles)
                runs = run(bench, task, sampler, guidances.get(bend), nfe, args.seeds)
                r = row(task, reference, runs)
                figures["table"].append({"task": task, "sampler": name, "guidance": bend,
                                         "nfe": nfe, **r})  # fmt: skip
                d = [1000 * v for v in r["distance"]] if task == "rare" else r["distance"]
                print(f"{name:18}{bend:13}{nfe:7}{d[0]:9.3f} ±{d[1]:6.3f}{r['reward'][0]:9.3f} ±"
                      f"{r['reward'][1]:5.3f}{r['ess']:8.1f}{r['root_ess']:9.1f}"
                      f"{r['log_z'][0]:8.2f} ±{r['log_z'][1]:5.2f}{r['seconds']:7.1f}",
                      flush=True)  # fmt: skip
    top = max(args.nfe)
    for task in TASKS:
        for name in SAMPLERS:
            at = {
                r["guidance"]: r["distance"][0]
                for r in figures["table"]
                if (r["task"], r["sampler"], r["nfe"]) == (task, name, top)
            }
            best = min((g for g in at if g != "none"), key=lambda g: at[g])
            figures[f"{task}/{name}: guided over unguided"] = at[best] / at["none"]
            print(f"{task}, {name}, {top} rows: best guided ({best}) over unguided "
                  f"{at[best] / at['none']:.2f}")  # fmt: skip
    finish(figures)


if __name__ == "__main__":
    main()
