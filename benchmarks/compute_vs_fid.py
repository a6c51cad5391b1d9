"""What does more compute buy on a real image model, and with which sampler?

    python -m benchmarks.compute_vs_fid [--quick] [--nfe N ...] [--seeds S] [--reference N]
                                        [--task NAME ...] [--sampler NAME ...] [--out DIR]
                                        [--minutes M] [--shard K/N] [--device cuda]

The built-in MNIST model (50 steps, DDIM eta = 1), lam = 1, rewards of the built-in classifier: even
and odd digits, single digits, and a rare pair. A sweep (`samplers.Sweep`) measures 5,000 draws of
every sampler against the tilted law, which independent weighted walks of seeds of their own stand
for: Fréchet distance on the classifier's 64 features, and for the rare pair, whose reference is too
thin for a covariance, MMD². Settings of SMC and best-of-N are searched anew for every task and
budget, on two other seeds, by Fréchet distance; what the search cost is printed, and is in nobody's
budget.

The sweep goes on where it was; with --shard several processes share it. What is there is reported,
and drawn to DIR/compute_vs_fid.png where matplotlib is installed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks import ladder
from benchmarks.report import finish, header, nfe_factor
from samplers import SMC, Sweep, table
from steering import from_pipeline, rewards, zoo
from steering.metrics import extractor

CLASSES = {
    "even": [0, 2, 4, 6, 8],
    "odd": [1, 3, 5, 7, 9],
    **{f"digit {k}": [k] for k in range(10)},
}
RARE = "4 and 9"
TASKS = ("even", "digit 1", "digit 8", RARE)  # of these by default
SAMPLERS = {
    **ladder.SAMPLERS,
    # at the steps where the clean guess foretells the reward, which `steer advise` finds
    "SMC, late levels": SMC(levels=(20, 28, 35, 40, 44)),
}
METRICS = ("frechet", "mmd", "reward", "root_ess", "log_z", "also: -jpeg kB", "seconds")
BASELINES = (
    "SMC",
    "SMC, late levels",
    "best-of-N",
)  # published ones; the papers leave importance sampling out


def reward(task: str, net: Any) -> Any:
    """log p(one of the classes); for the pair twice the smaller log p."""
    if task == RARE:
        return 2 * rewards.Minimum([rewards.Classifier(net, [c]) for c in (4, 9)])
    return rewards.Classifier(net, CLASSES[task])


def sweep(
    tasks: Sequence[str],
    samplers: Sequence[str],
    nfe: Sequence[int],
    seeds: int,
    reference: int,
    device: str,
) -> Sweep:
    """What is compared."""
    net = zoo.load("mnist-classifier", device=device)
    return Sweep(
        from_pipeline(zoo.load("mnist", device=device), steps=50),
        {task: reward(task, net) for task in tasks},
        {name: SAMPLERS[name] for name in samplers},
        nfe,
        seeds=seeds,
        draws=5000,
        also=[rewards.Jpeg()],
        extractor=extractor("mnist-classifier", device),
        reference=reference,
        objective="frechet",
        batch=64 if device == "cpu" else 1024,
    )


def judged_by(task: str) -> str:
    """The distance that a task is compared by: the rare pair's reference is too thin for a
    covariance, so that a Fréchet distance to it is mostly bias."""
    return "mmd" if task == RARE else "frechet"


def figures(rows: list[table.Row]) -> dict[str, Any]:
    """The keys of the last line, from the rows of a sweep."""
    curves: dict[tuple[str, str], dict[int, float]] = {}
    for metric in ("frechet", "mmd"):
        for p in table.points(rows, metric):
            if judged_by(p.task) == metric:
                curves.setdefault((p.task, p.sampler), {})[p.nfe] = p.mean
    tasks = sorted({task for task, _ in curves})
    names = sorted({name for _, name in curves})
    top = max(nfe for curve in curves.values() for nfe in curve)

    def mean(name: str, nfe: int, over: list[str]) -> float:
        found = [curves.get((t, name), {}).get(nfe, math.nan) for t in over]
        return statistics.mean(found) if found else math.nan

    def headline(over: list[str]) -> dict[str, Any]:
        best = {b: mean(b, top, over) for b in BASELINES}
        best = {b: value for b, value in best.items() if math.isfinite(value)}
        return {
            "dts_at_tenth": mean("DTS", top // 10, over),
            "best_published": min(best.values(), default=math.nan),
            "best_published_is": min(best, key=best.__getitem__, default=None),
            "dts": mean("DTS", top, over),
            "importance": mean("importance", top, over),
        }

    rungs = sorted({nfe for curve in curves.values() for nfe in curve if nfe * 10 >= top})
    return {
        "nfe": top,
        **headline([t for t in tasks if t != RARE]),
        "rare_by_mmd": headline([t for t in tasks if t == RARE]),
        "by_task": {
            f"{task}/{name}": {f"{n}": value for n, value in sorted(curve.items())}
            for (task, name), curve in sorted(curves.items())
        },
        "nfe_factor": {
            name: {
                f"{task}/{at}": nfe_factor(curves[task, "DTS"], curves[task, name], at)
                for task in tasks
                for at in rungs
                if (task, name) in curves and at in curves.get((task, "DTS"), {})
            }
            for name in names
            if name != "DTS"
        },
    }


def main() -> None:
    parser = ladder.arguments(__doc__, "compute_vs_fid", [1000, 3000, 10_000, 30_000], seeds=3)
    parser.add_argument("--reference", type=int, default=20_000)
    parser.add_argument("--task", action="append", choices=[*CLASSES, RARE], default=[])
    parser.add_argument("--sampler", action="append", choices=list(SAMPLERS), default=[])
    args = ladder.parse(parser)
    tasks, samplers = args.task or TASKS, args.sampler or list(SAMPLERS)
    if args.quick:
        args.nfe, args.seeds, args.reference, tasks = [500], 1, 200, ["even", RARE]
    header()
    compared = sweep(tasks, samplers, args.nfe, args.seeds, args.reference, args.device)
    rows = ladder.climb(compared, args, METRICS, drawn="frechet")
    ess = {row["task"]: row["reference_ess"] for row in rows if "reference_ess" in row}
    print("effective size of the reference:", ", ".join(f"{t} {e:.0f}" for t, e in ess.items()))
    found = figures(rows)
    print("NFE at which a sampler has the distance of DTS at a budget, over that budget:")
    for name, by_task in found["nfe_factor"].items():
        print(f"  {name}: " + ", ".join(f"{cell} {factor}" for cell, factor in by_task.items()))
    finish({**found, "reference_ess": ess, "extractor": "mnist-classifier"})


if __name__ == "__main__":
    main()
