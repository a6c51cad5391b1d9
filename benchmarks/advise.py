"""Is the advice good? The advised sampler against the best of a sweep, at equal network rows.

    python -m benchmarks.advise [--quick] [--nfe N ...] [--seeds S] [--mnist DIR] [--out DIR]

Six tasks. Four of the built-in MNIST model, those of `benchmarks.compute_vs_fid`, whose sweep is
read from --mnist and finished if it is not. Two of a Gaussian with an exact denoiser, T = 50 steps,
whose coordinates have standard deviations 1 and 1/50 and are decided early and late on the way; the
reward is a narrow peak three deviations out, on the one or the other, and its mean exp about .008.

For every seed a pilot is run, and the sampler that it recommends gets what the pilot left of the
budget. Regret is the mean distance of its draws to the tilted law over that of the sampler that
came out best in the sweep, settings searched, at the whole budget: Fréchet distance, and MMD² for
the rare pair of digits. The best of several noisy means is too low on average, so regret is a
little too high.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import compute_vs_fid, ladder
from benchmarks.report import finish, header
from samplers import Sweep, advise, sample, table
from steering import Model
from steering.gaussian import vp
from steering.metrics import Extractor

STEPS, WIDTHS, PEAK, SHARPNESS = 50, (1.0, 0.02), 3.0, 3.0
FIRST_SEED = 100  # of the advised runs: the sweep has seeds of its own
COMPARED = {name: given for name, given in ladder.SAMPLERS.items() if "published" not in name}


class Exact:
    """E[x_0 | x_t] of independent normals of the given widths."""

    def __init__(self, alpha_bar: Tensor) -> None:
        self.alpha_bar = alpha_bar
        self.variance = torch.tensor(WIDTHS).square()

    def __call__(self, x: Tensor, t: Tensor, row: Tensor) -> Tensor:
        a = self.alpha_bar[t.long()][:, None]
        return x * a.sqrt() * self.variance / (a * self.variance + 1 - a)

    def rows(self, t: Tensor, row: Tensor) -> Tensor:
        return torch.ones_like(row)


def peak(axis: int) -> Any:
    """A reward that wants one coordinate three deviations out."""

    def reward(x: Tensor, prompts: list) -> Tensor:
        return -SHARPNESS * (x[:, axis] / WIDTHS[axis] - PEAK) ** 2

    reward.__name__ = ("early", "late")[axis]
    return reward


def synthetic(nfe: list[int], seeds: int) -> Sweep:
    """The sweep of the two synthetic tasks."""
    # alpha_bar from noise to data: a cosine
    alpha_bar = torch.cos((1 - torch.linspace(0.02, 1, STEPS + 1)) * math.pi / 2).square()
    model = Model(Exact(alpha_bar), vp((2,), alpha_bar), name="two widths")
    return Sweep(
        model,
        {"decided early": peak(0), "decided late": peak(1)},
        COMPARED,
        nfe,
        seeds=seeds,
        draws=5000,
        extractor=Extractor("x over its widths", lambda x: x / torch.tensor(WIDTHS)),
        reference=20_000,
        objective="frechet",
        batch=1024,
    )


def advised(sweep: Sweep, out: Path, task: str, nfe: int, seed: int) -> tuple[float, str, int]:
    """Distance of the advised sampler's draws, its name, and the rows it and the pilot took."""
    assert sweep.extractor is not None
    reward = sweep.tasks[task]
    settings: dict[str, Any] = {"seed": seed, "batch": sweep.batch, "progress": False}
    advice = advise(sweep.model, reward, nfe=nfe, lam=sweep.lam, **settings)
    run = sample(
        sweep.model, reward, advice.sampler, nfe=advice.nfe, lam=sweep.lam, draws=sweep.draws,
        **settings,
    )  # fmt: skip
    features, target = sweep.extractor(run.items), table.reference(out, task, 0)
    found = table.distances(features, run.counts, target, sweep.extractor.name)
    spent = run.nfe + advice.pilot_rows
    assert spent <= nfe
    return found[compute_vs_fid.judged_by(task)], type(advice.sampler).__name__, spent


def compare(sweep: Sweep, out: Path, seeds: int) -> dict[str, Any]:
    """Regret of every task and budget of a sweep."""
    if not sweep.run(out):
        raise SystemExit(f"the sweep in {out} is not finished.")
    rows = [row for row in table.read(out) if row["sampler"] in sweep.samplers]
    figures = {}
    for task in sweep.tasks:
        metric = compute_vs_fid.judged_by(task)
        for nfe in sweep.nfe:
            swept: dict[str, list[float]] = {}
            for row in rows:
                if (row["task"], row["nfe"]) == (task, nfe) and row.get(metric) is not None:
                    swept.setdefault(row["sampler"], []).append(row[metric])
            best = min(swept, key=lambda name: statistics.mean(swept[name]))
            runs = [advised(sweep, out, task, nfe, FIRST_SEED + s) for s in range(seeds)]
            (a, da), (b, db) = _mean([r[0] for r in runs]), _mean(swept[best])
            regret, error = a / b, a / b * math.hypot(da / a, db / b)
            names = Counter(name for _, name, _ in runs)
            told = ", ".join(f"{name} x {count}" for name, count in names.items())
            print(
                f"{task:14} {nfe:7d} rows: advised {told:34} {a:9.4g} ± {da:8.2g}   best "
                f"{best:12} {b:9.4g} ± {db:8.2g}   regret {regret:.2f} ± {error:.2f}",
                flush=True,
            )
            others = ", ".join(f"{n} {statistics.mean(v):.4g}" for n, v in sorted(swept.items()))
            print(f"{'':22} all: {others}")
            figures[f"{task}/{nfe}"] = {
                "regret": regret, "error": error, "advised": dict(names), "best": best,
            }  # fmt: skip
    return figures


def _mean(values: list[float]) -> tuple[float, float]:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.mean(values), error


def main() -> None:
    parser = ladder.arguments(__doc__, "advise", [10_000, 30_000], seeds=6)
    parser.add_argument("--mnist", type=Path, default=Path("runs/compute_vs_fid"))
    args = ladder.parse(parser)
    if args.quick:
        args.nfe, args.seeds = [5000], 2
    header()
    many = 2 if args.quick else 16  # they cost next to nothing
    figures = compare(synthetic(args.nfe, many), args.out, many)
    if not args.quick:
        tasks, samplers = compute_vs_fid.TASKS, list(ladder.SAMPLERS)
        mnist = compute_vs_fid.sweep(tasks, samplers, args.nfe, 3, 20_000, args.device)
        figures |= compare(mnist, args.mnist, args.seeds)
    regrets = [f["regret"] for f in figures.values()]
    finish(
        {
            "regret": math.exp(statistics.mean(map(math.log, regrets))),
            "regret_is": "geometric mean over tasks and budgets",
            "regret_worst": max(regrets),
            "by_task": figures,
        }
    )


if __name__ == "__main__":
    main()
