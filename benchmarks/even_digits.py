"""Which sampler gets closest to the tilted law of a real image model, for how many network rows?

    python -m benchmarks.even_digits [--quick] [--nfe N ...] [--seeds S] [--rare-seeds S]
                                     [--pool N] [--work DIR] [--minutes M] [--shard K/N]
                                     [--device cuda]

The built-in MNIST model (50 steps, DDIM eta = 1), lam = 1, and four rewards: log p(even), log p(1),
log p(8) under the built-in classifier, and a rare pair, 2 min(log p(4), log p(9)). The reference of
every task is one pool of independent walks with its importance weights, in the features of the
classifier (64 units of its hidden layer); no sampler's run shares a seed with it.

Distances of the rare pair scatter most, so what is compared there has more seeds. Every run is kept
under --work, in a folder of the model's fingerprint, and never made twice, so a long ladder is a
chain of short jobs; with --shard several processes share the work. What is there is reported.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.report import finish, header, nfe_factor
from samplers import SMC, Ancestral, BestOfN, Importance, TreeSampling, TreeSearch, sample
from steering import from_pipeline, rewards, zoo
from steering.metrics import Moments, diversity, frechet, mmd

STEPS, DRAWS, POOL_SEED, SHARD = 50, 5000, 10**6, 1000
EXTRACTOR = "mnist-classifier/64"
CLASSES = {"even": [0, 2, 4, 6, 8], "one": [1], "eight": [8], "rare": [4, 9]}
COMMON = ("even", "one", "eight")
SAMPLERS: dict[str, Callable[[], Any]] = {
    "importance": lambda: Importance(),
    "best_of_n": lambda: BestOfN(),
    "unsteered": lambda: Ancestral(),
    "dts": lambda: TreeSampling(),
    "smc": lambda: SMC(),
    "dts published": lambda: TreeSampling(law="published"),
    "dts_star": lambda: TreeSearch(),
}
COMPARED = ("dts", "smc")  # beside independent walks, with more seeds on the rare pair
INDEPENDENT = ("importance", "best_of_n", "unsteered")  # the same walks whatever the reward


@dataclass(frozen=True)
class Drawn:
    """What a run's draws are judged by. K distinct items."""

    features: Tensor  # [K, 64]
    logits: Tensor  # [K, 10]
    counts: Tensor  # [K] multiplicity among the draws
    seconds: float
    ess: float
    root_ess: float
    log_z: float


def task_reward(task: str, net: Any) -> Any:
    """The reward that samplers are given."""
    if task == "rare":
        each = [rewards.Classifier(net, classes=[c]) for c in CLASSES[task]]
        return 2 * rewards.Minimum(each)
    return rewards.Classifier(net, classes=CLASSES[task])


def score(task: str, logits: Tensor) -> Tensor:
    """The same reward [N] float64, from logits [N, 10] of the classifier."""
    log_p = logits.double().log_softmax(1)[:, CLASSES[task]]
    if task == "rare":
        return 2 * log_p.min(1).values
    return log_p.logsumexp(1).clamp(max=0)


@torch.no_grad()
def look(net: Any, items: Tensor, device: str) -> tuple[Tensor, Tensor]:
    """Features [N, 64] and logits [N, 10] of items."""
    parts = [net.features(chunk.to(device)) for chunk in items.split(500)]
    features = torch.cat(parts)
    return features.cpu(), net.head(features).cpu()


class Bench:
    """The runs of a ladder, kept in a folder."""

    def __init__(self, work: Path, device: str, pool: int, seeds: int, rare_seeds: int) -> None:
        self.device, self.pool_size = device, pool
        self._seeds, self._rare_seeds = seeds, rare_seeds
        self.net = zoo.load("mnist-classifier", device=device)
        self.model = from_pipeline(zoo.load("mnist", device=device), steps=STEPS)
        self.work = work / self.model.name.partition("#")[2]
        self.work.mkdir(parents=True, exist_ok=True)
        self.batch = 64 if device == "cpu" else 1024

    def seeds(self, task: str, name: str) -> int:
        """How many seeds a sampler gets on a task."""
        if name in INDEPENDENT:
            return max(self._seeds, self._rare_seeds)
        return self._rare_seeds if task == "rare" and name in COMPARED else self._seeds

    def jobs(self, ladder: list[int]) -> list[tuple[str, Callable[[], None]]]:
        """Every piece of work that is not done yet, by its file's name: the pool, then the runs."""
        jobs: dict[str, Callable[[], None]] = {}
        for k in range(math.ceil(self.pool_size / SHARD)):
            jobs[f"pool-{k:04d}"] = lambda k=k: self.shard(k)
        for name in SAMPLERS:
            for nfe in sorted(ladder):
                for task in CLASSES:
                    key = self.key(task, name, nfe)
                    if key not in jobs:
                        jobs[key] = lambda t=task, n=name, b=nfe, k=key: self.run(t, n, b, k)
        return [(k, j) for k, j in jobs.items() if not self.path(k).exists()]

    def key(self, task: str, name: str, nfe: int) -> str:
        """Name of a run's file; independent walks do not depend on the task."""
        seeds = self.seeds(task, name)
        if name in INDEPENDENT:
            task, name = "any", "independent"
        return f"{task}-{name.replace(' ', '_')}-{nfe}-{seeds}"

    def path(self, key: str) -> Path:
        return self.work / f"{key}.safetensors"

    def shard(self, k: int) -> None:
        """A part of the pool."""
        n = min(SHARD, self.pool_size - k * SHARD)
        run = sample(
            self.model, _nothing, Ancestral(n), seed=POOL_SEED + k, batch=self.batch, progress=False
        )
        self.keep(f"pool-{k:04d}", run)

    def run(self, task: str, name: str, nfe: int, key: str) -> None:
        """One sampler on one task, all seeds at once: each is a condition with keys of its own."""
        independent = name in INDEPENDENT
        sampler = Ancestral() if independent else SAMPLERS[name]()
        reward = _nothing if independent else task_reward(task, self.net)
        prompts = (None,) * self.seeds(task, name)
        run = sample(
            replace(self.model, prompts=prompts), reward, sampler, nfe=nfe, lam=1.0,
            draws=None if independent else 64 if name == "dts_star" else DRAWS, batch=self.batch,
            progress=False,
        )  # fmt: skip
        self.keep(key, run)

    def keep(self, key: str, run: Any) -> None:
        features, logits = look(self.net, run.items, self.device)
        about = {
            "seconds": [run.spent.seconds / len(run.ess)] * len(run.ess),
            "ess": run.ess.tolist(),
            "root_ess": run.root_ess.tolist(),
            "log_z": [z if math.isfinite(z) else None for z in run.log_z.tolist()],
        }
        tensors = {"features": features, "logits": logits, "counts": run.counts, "rows": run.rows}
        part = self.path(key).with_suffix(".part")
        save_file(
            {k: v.contiguous() for k, v in tensors.items()}, part, {"about": json.dumps(about)}
        )
        part.replace(self.path(key))

    def drawn(self, task: str, name: str, nfe: int, seed: int) -> Drawn | None:
        """What a run found, or None if it has not been made."""
        path = self.path(self.key(task, name, nfe))
        if not path.exists():
            return None
        tensors = load_file(path)
        mine = tensors["rows"] == seed
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})["about"])
        about: dict[str, Any] = {
            k: math.nan if v[seed] is None else v[seed] for k, v in about.items()
        }
        features, logits, counts = (tensors[k][mine] for k in ("features", "logits", "counts"))
        if name in INDEPENDENT:
            reward = score(task, logits)
            about["log_z"] = math.nan  # unweighted walks say nothing of it
            if name == "importance":
                weight = reward.softmax(0)
                counts = (
                    (weight.cumsum(0) * DRAWS - 0.5).ceil().diff(prepend=weight.new_zeros(1)).long()
                )
                about["ess"] = about["root_ess"] = float(1 / weight.square().sum())
                about["log_z"] = float(reward.logsumexp(0) - math.log(len(reward)))
            elif name == "best_of_n":
                counts = torch.zeros_like(counts)
                counts[reward.topk(min(64, len(reward))).indices] = 1
            keep = counts > 0
            features, logits, counts = features[keep], logits[keep], counts[keep]
        return Drawn(features, logits, counts, **about)


def _nothing(items: Tensor, prompts: list) -> Tensor:
    return items.new_zeros(len(items))


class Reference:
    """The tilted law of one task, as a weighted pool; and the real digits."""

    def __init__(self, task: str, features: Tensor, logits: Tensor) -> None:
        reward = score(task, logits)
        self.weights = reward.softmax(0)
        self.mean_weight = float(reward.exp().mean())
        self.ess = float(1 / self.weights.square().sum())
        self.moments = Moments.of(features, self.weights)
        # items that hold all of the weight but a millionth: the others only cost time
        order = self.weights.argsort(descending=True)
        kept = order[: 1 + int((self.weights[order].cumsum(0) < 1 - 1e-6).sum())]
        self.features, self.weights = features[kept], self.weights[kept]
        some = torch.searchsorted(
            self.weights.cumsum(0), (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
        ).clamp(max=len(kept) - 1)
        distance = torch.nn.functional.pdist(self.features[some].double())
        self.bandwidth = float(distance[distance > 0].median())
        self.by_kernel = task == "rare"
        self.real = None if task == "rare" else _real(CLASSES[task])

    def distances(self, drawn: Drawn) -> tuple[float, float, float]:
        """Fréchet distance to the reference, to the real test digits, and MMD² to the reference.

        MMD² is for the rare pair alone, whose reference is too thin for a covariance.
        """
        repeated = drawn.features.repeat_interleave(drawn.counts, 0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numbers of draws are printed beside
            mine = Moments.of(repeated)
            to_reference = float(frechet(mine, self.moments, extractor=EXTRACTOR))
            to_real = math.nan
            if self.real is not None:
                to_real = float(frechet(mine, self.real, extractor=EXTRACTOR))
        kernel = self.by_mmd(drawn) if self.by_kernel else math.nan
        return to_reference, to_real, kernel

    def by_mmd(self, drawn: Drawn) -> float:
        """MMD² to the reference."""
        repeated = drawn.features.repeat_interleave(drawn.counts, 0)
        value = mmd(
            repeated, self.features, bandwidth=self.bandwidth, weights_y=self.weights,
            extractor=EXTRACTOR,
        )  # fmt: skip
        return float(value)


def _real(classes: list[int]) -> Moments:
    """Moments of the real test digits of some classes together."""
    stats = zoo.reference("mnist-test")
    n, mean, cov = (stats[f"class_{k}"][classes].double() for k in ("n", "mean", "cov"))
    share = n / n.sum()
    centre = share @ mean
    away = mean - centre
    within = torch.einsum("c,cij->ij", (n - 1) / (n.sum() - 1), cov)
    between = torch.einsum("c,ci,cj->ij", n / (n.sum() - 1), away, away)
    return Moments(centre, within + between, float(n.sum()))


def report(bench: Bench, ladder: list[int]) -> dict[str, Any]:
    """Print tables of what is there; the figures of the last line."""
    shards = sorted(bench.work.glob("pool-*.safetensors"))
    if not shards:
        raise SystemExit(f"{bench.work} holds no pool yet: give more --minutes.")
    pool = [load_file(p) for p in shards]
    features = torch.cat([p["features"] for p in pool])
    logits = torch.cat([p["logits"] for p in pool])
    print(f"pool: {len(features)} independent walks; extractor {EXTRACTOR}")
    figures: dict[str, Any] = {"pool": len(features), "extractor": EXTRACTOR, "table": []}
    curves: dict[tuple[str, str], dict[int, float]] = {}
    spread: dict[tuple[str, str, int], list[float]] = {}
    for task in CLASSES:
        reference = Reference(task, features, logits)
        print(
            f"\n{task}: mean exp(reward) {reference.mean_weight:.4g}, ESS of the pool "
            f"{reference.ess:.0f}, MMD kernel RBF of h = {reference.bandwidth:.3f}, "
            f"{DRAWS} draws (dts_star, best_of_n: the 64 best); mean ± s.e. over seeds"
        )
        print(
            f"{'sampler':14s} {'nfe':>8s} {'MMD² to ref':>20s} {'Fréchet to ref':>18s} "
            f"{'Fréchet to real':>16s} {'reward':>9s} {'distinct':>9s} {'ESS':>7s} {'ESS x_T':>8s} "
            f"{'diversity':>9s} {'log Z':>14s} {'s':>7s} {'seeds':>5s}"
        )
        for name in SAMPLERS:
            for nfe in ladder:
                runs = [bench.drawn(task, name, nfe, s) for s in range(bench.seeds(task, name))]
                runs = [r for r in runs if r is not None and len(r.features) > 1]
                if not runs:
                    continue
                row = _row(task, name, nfe, runs, reference)
                figures["table"].append(row)
                distance = "mmd" if task == "rare" else "frechet"
                curves.setdefault((task, name), {})[nfe] = row[distance][0]
                spread[task, name, nfe] = row[f"{distance}_seeds"]
    top = max(ladder)
    for group, tasks in (("common", COMMON), ("rare", ("rare",))):
        for rival in ("importance", "smc"):
            ratios = {
                t: _ratio(spread[t, "dts", top], spread[t, rival, top])
                for t in tasks
                if (t, "dts", top) in spread and (t, rival, top) in spread
            }
            means = [mean for mean, _ in ratios.values()]
            errors = math.hypot(*(error for _, error in ratios.values())) / max(len(ratios), 1)
            name = f"{group}_over_{rival}"
            figures[name] = statistics.mean(means) if means else None
            figures[f"{name}_error"] = errors
            figures[f"{name}_by_task"] = ratios
            if means:
                print(f"\n{name} at {top} rows: {figures[name]:.3f} ± {errors:.3f}")
    print("\nNFE factor of dts: NFE at which the other has dts's distance, over dts's NFE")
    factors = {
        f"{task}/{name}/{at}": nfe_factor(curves[task, "dts"], curves[task, name], at)
        for task in CLASSES
        for at in ladder
        for name in ("importance", "smc", "dts published", "best_of_n", "unsteered")
        if at in curves.get((task, "dts"), {}) and (task, name) in curves
    }
    for pair, factor in factors.items():
        print(f"  {pair:32s} {factor}")
    return {**figures, "nfe_factor": factors}


def _ratio(mine: list[float], other: list[float]) -> tuple[float, float]:
    """Ratio of two means and its standard error, to first order."""
    (a, da), (b, db) = (
        (statistics.mean(v), statistics.stdev(v) / math.sqrt(len(v)) if len(v) > 1 else math.nan)
        for v in (mine, other)
    )
    return a / b, abs(a / b) * math.hypot(da / a, db / b)


def _row(task: str, name: str, nfe: int, runs: list[Drawn], reference: Reference) -> dict[str, Any]:
    measured = [reference.distances(r) for r in runs]

    def over_seeds(values: list[float]) -> tuple[float, float]:
        given = torch.tensor(values, dtype=torch.float64)
        error = float(given.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        return float(given.mean()), error

    share = [r.counts.double() / r.counts.sum() for r in runs]
    reward = over_seeds(
        [float(w @ score(task, r.logits)) for w, r in zip(share, runs, strict=True)]
    )
    varied = [
        float(diversity(r.features.repeat_interleave(r.counts, 0), extractor=EXTRACTOR))
        for r in runs
    ]
    fd, real, kernel = (over_seeds([m[k] for m in measured]) for k in range(3))
    log_z = over_seeds([r.log_z for r in runs])
    mean = {k: statistics.mean(getattr(r, k) for r in runs) for k in ("ess", "root_ess", "seconds")}
    distinct = statistics.mean(len(r.features) for r in runs)
    print(
        f"{name:14s} {nfe:8d} {kernel[0]:11.3e} ±{kernel[1]:7.0e} {fd[0]:10.3f} ±{fd[1]:6.3f} "
        f"{real[0]:16.3f} {reward[0]:9.3f} {distinct:9.0f} {mean['ess']:7.1f} "
        f"{mean['root_ess']:8.1f} {statistics.mean(varied):9.3f} {log_z[0]:7.2f} ±{log_z[1]:5.2f} "
        f"{mean['seconds']:7.1f} {len(runs):5d}"
    )
    return {
        "task": task, "sampler": name, "nfe": nfe, "seeds": len(runs), "mmd": kernel,
        "frechet": fd, "frechet_real": real, "reward": reward, "distinct": distinct, **mean,
        "diversity": statistics.mean(varied), "log_z": log_z,
        "mmd_seeds": [m[2] for m in measured], "frechet_seeds": [m[0] for m in measured],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few minutes' worth in one")
    parser.add_argument("--nfe", type=int, nargs="+", default=[3000, 10_000, 30_000])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rare-seeds", type=int, default=6)
    parser.add_argument("--pool", type=int, default=20_000)
    parser.add_argument("--work", type=Path, default=Path("runs/even_digits"))
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop starting runs after")
    parser.add_argument("--shard", default="0/1", help="K/N: do every N-th missing run, from K")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.quick:
        args.nfe, args.seeds, args.rare_seeds, args.pool = [500], 1, 1, 150
        args.work = args.work.with_name(args.work.name + "-quick")
        for slow in ("dts published", "dts_star"):  # few leaves in flight of so few rollouts
            del SAMPLERS[slow]
    torch.set_num_threads(1)
    header()
    began = time.monotonic()
    bench = Bench(args.work, args.device, args.pool, args.seeds, args.rare_seeds)
    k, n = (int(v) for v in args.shard.split("/"))
    jobs = bench.jobs(args.nfe)[k::n]
    for name, job in jobs:
        if time.monotonic() - began > 60 * args.minutes:
            break
        if not bench.path(name).exists():
            job()
    print(f"{len(jobs)} runs were missing; worked on them for {time.monotonic() - began:.0f} s")
    finish(report(bench, sorted(args.nfe)))


if __name__ == "__main__":
    main()
