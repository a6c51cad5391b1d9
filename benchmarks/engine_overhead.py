"""What does the engine add to the network it calls?

    python -m benchmarks.engine_overhead [--quick]

CPU time of whole runs on the built-in model (50 steps, batch 64), reward and all, over that of the
same number of rows through the bare UNet at its best batch size. The two are interleaved within one
process, one thread, and compared pair by pair; rows are useful rows, so padding counts as overhead.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from benchmarks.report import finish, header
from samplers import SMC, BestOfN, TreeSampling, TreeSearch, sample
from steering import from_pipeline, zoo

TREES, LEAVES, STEPS, BATCH = 16, 16, 50, 64


def brightness(items: torch.Tensor, prompts: list) -> torch.Tensor:
    """A reward that costs next to nothing: the engine is measured, not the reward."""
    return items.flatten(1).mean(1)


def cpu(run: Callable[[], int]) -> tuple[float, int]:
    """CPU seconds of a run, all its threads, and the rows it says it used."""
    began = time.process_time()
    rows = run()
    return time.process_time() - began, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer leaves and repeats")
    parser.add_argument("--repeats", type=int, default=3, help="pairs of each run and the network")
    args = parser.parse_args()
    quick = args.quick
    torch.set_num_threads(1)
    header()
    rollouts, repeats = (8, 1) if quick else (2 * LEAVES, args.repeats)

    pipe = zoo.load("mnist")
    single = from_pipeline(pipe, steps=STEPS)
    trees = replace(single, prompts=(None,) * TREES)
    x = torch.randn(256, 1, 28, 28, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def bare(batch: int, calls: int) -> int:
        t = torch.full((batch,), 500)
        for _ in range(calls):
            pipe.unet(x[:batch], t)
        return batch * calls

    bare(BATCH, 5)
    sizes = {
        b: min(cpu(lambda b=b: bare(b, 640 // b))[0] for _ in range(3)) for b in (16, 32, 64, 128)
    }
    best = min(sizes, key=lambda b: sizes[b])
    for b, seconds in sizes.items():
        print(f"bare network at batch {b:4d}: {seconds / (640 // b * b) * 1e3:.3f} ms per row")

    nfe = rollouts * STEPS
    settings = {"batch": BATCH, "progress": False}
    runs = {
        # so few rollouts have no pilot, and a tree that stays flat would select nothing
        "dts": (trees, TreeSampling(branch="even", parallel=LEAVES), nfe),
        "dts_star": (trees, TreeSearch(branch="even", parallel=LEAVES), nfe),
        "smc": (trees, SMC(), nfe),
        "best_of_n": (trees, BestOfN(), nfe),
        "single_dts": (single, TreeSampling(), 1000 if quick else 10_000),
        "single_dts_star": (single, TreeSearch(), 1000 if quick else 10_000),
    }
    ratios: dict[str, list[float]] = {name: [] for name in runs}
    per_row: dict[str, list[float]] = {name: [] for name in runs}
    fill: dict[str, float] = {}
    star_over_bon = []
    for repeat in range(repeats):
        spent = {}
        for name, (model, sampler, budget) in runs.items():
            calls = -(-(budget * len(model.prompts)) // best // 2)
            before, rows_before = cpu(lambda calls=calls: bare(best, calls))
            began = time.process_time()
            run = sample(model, brightness, sampler, nfe=budget, seed=repeat, **settings)
            seconds, rows = time.process_time() - began, run.nfe
            fill[name] = rows / run.spent.calls
            after, rows_after = cpu(lambda calls=calls: bare(best, calls))
            network = (before + after) / (rows_before + rows_after)
            ratios[name].append(seconds / rows / network)
            per_row[name].append((seconds / rows - network) * 1e6)
            spent[name] = seconds / rows
        star_over_bon.append(spent["dts_star"] / spent["best_of_n"])

    print(f"\n{TREES} trees x {LEAVES} leaves in flight, {nfe} rows per tree, {repeats} pairs;")
    print("ratio = CPU time per useful row / CPU time per row of the bare network (median, range)")
    for name, values in ratios.items():
        over = statistics.median(per_row[name])
        low, middle, high = min(values), statistics.median(values), max(values)
        print(
            f"{name:16s} ratio {middle:.3f} ({low:.3f}..{high:.3f})   {over:7.1f} us per row above "
            f"the network   mean batch {fill[name]:.1f}"
        )
    finish(
        {
            **{f"ratio_{n}": statistics.median(ratios[n]) for n in ("dts", "dts_star", "smc")},
            "ratio_star_bon": statistics.median(star_over_bon),
            "ratio_single_dts": statistics.median(ratios["single_dts"]),
            "ratio_single_dts_star": statistics.median(ratios["single_dts_star"]),
            "us_per_row": {n: statistics.median(v) for n, v in per_row.items()},
            "ms_per_row_bare": min(s / (640 // b * b) for b, s in sizes.items()) * 1e3,
            "repeats": repeats,
        }
    )


if __name__ == "__main__":
    main()
