"""How near do samplers of token models come to the tilted law, for their network calls? All 8-mers.

The built-in model "tfbind8" writes DNA of eight bases; T = 8 parallel steps unmask one base each on
average. The reward is the measured binding of SIX6, scaled to [0, 1], of every one of the 65,536
sequences, so that p, the law of the chain itself, is a table (an exact forward pass over its 5^8
states), and p* ∝ p exp(λ r) too. Nothing is estimated but by the samplers.

The network's answers to those states are asked once and looked up from then on: the same law and
the same count of rows, in less time. Guidance differentiates the network itself.

    TV     total variation between the weighted draws of a run and p*, over the 65,536 sequences;
           most of it is how few draws there are
    KL     of the same two, in nats
    bins   TV of their rewards' histograms, 20 equal bins of [0, 1]
    E[r]   mean reward less that of p*, mean over runs ± its standard error; log Z likewise
    floor  as many exact draws of p*, of equal weight, as independent walks fit the budget
    own    of a sampler that has another law than p*: what it tends to

Settings (particles and levels of SMC, particles of TDS, proposals of SVDD, N of best-of-N) are
those of the lowest mean TV on separate seeds at the same budget; at the largest budget, the choice
at a tenth of it.

DRAKES tunes the network instead, at alpha = 1/λ and through the table's multilinear extension: no
surrogate of the reward. The law of the tuned chain is exact by the same forward pass, and so is

    share = (r - r_pre) / (r* at equal KL - r_pre)

r the mean reward of the tuned chain, r_pre that of the model, and r* that of the tilted law whose
KL to p is that of the tuned chain's law: 1 is the best there is at that KL, whatever the method.

    python -m benchmarks.tfbind8 [--quick] [--only samplers|drakes] [--plot FILE]
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.report import finish, header
from samplers import (
    SMC,
    SVDD,
    TDS,
    Beam,
    BestOfN,
    Importance,
    Result,
    TreeSampling,
    TreeSearch,
    sample,
)
from samplers.core import Sampler
from steering import from_pipeline, zoo
from steering.core import Model
from steering.discrete import MaskedProcess
from steering.finetune import drakes
from steering.metrics.exact import kl, total_variation
from steering.rewards import Table
from tests.exact.estimates import average
from tests.exact.masked import guesses, index_of, masked_law, path_kl, tabulated

STEPS, BINS = 8, 20
LAMS = (10.0, 20.0)
SEEDS = {1_000: 48, 10_000: 16, 100_000: 4}
SEARCH = {1_000: 24, 10_000: 8}  # runs that settings are chosen on
QUICK = {1_000: 6}
ALL = tuple(range(1, STEPS))
TUNED: dict[str, list[Sampler]] = {
    "best of N": [BestOfN(of=n) for n in (2, 4, 8, 16, 32, 64)],
    "SMC": [SMC(k, levels=at) for k in (64, 256, None) for at in (None, ALL)],
    "TDS, skipped": [TDS(k, jacobian="skip") for k in (16, 64, None)],
    "TDS, full": [TDS(k, jacobian="full") for k in (16, 64, None)],
    "SVDD": [SVDD(proposals=m) for m in (2, 4, 8)],
    "SVDD, argmax": [SVDD(proposals=m, selection="argmax") for m in (2, 4, 8)],
}
FIXED: dict[str, Sampler] = {
    "importance": Importance(),
    "DTS": TreeSampling(),
    "DTS, even branches": TreeSampling(branch="even"),
    "DTS, published law": TreeSampling(law="published"),
}
SEARCHES: dict[str, Sampler] = {
    "DTS*": TreeSearch(),
    "beam": Beam(),
    "best of all": BestOfN(),
}


@dataclass(frozen=True)
class Task:
    """The chain, its law and the tilted one. 65,536 sequences, in the order of their letters."""

    model: Model
    answers: Tensor  # [5^8, 8, 4]
    reward: Table
    log_p: Tensor  # [65536] float64

    @property
    def r(self) -> Tensor:
        """[65536] float64 rewards."""
        return self.reward.values.flatten().double()

    def tilted(self, lam: float) -> tuple[Tensor, float]:
        """log p* [65536], and log Z."""
        log_w = self.log_p + lam * self.r
        return log_w.log_softmax(0), float(log_w.logsumexp(0))


@dataclass(frozen=True)
class Score:
    """What one run's draws are worth."""

    tv: float
    kl: float
    bins: float
    gap: float  # of the mean reward
    log_z: float  # gap; nan where there is no estimate


def build() -> Task:
    """The task; asks the network about every state."""
    model = from_pipeline(zoo.load("tfbind8"), steps=STEPS)
    answers = guesses(model)
    law = masked_law(chain(model), answers)
    return Task(model, answers, Table(zoo.tfbind8_scores()), law.log())


def chain(model: Model) -> MaskedProcess:
    """Its process, which is a masked chain."""
    assert isinstance(model.process, MaskedProcess)
    return model.process


def run(task: Task, sampler: Sampler, lam: float, nfe: int, runs: int, seed: int) -> Result:
    """One condition is one independent run."""
    model = tabulated(task.model, task.answers, runs)
    return sample(model, task.reward, sampler, lam=lam, nfe=nfe, seed=seed, batch=4096,
                  progress=False)  # fmt: skip


def judge(task: Task, share: Tensor, lam: float, log_z: float = math.nan) -> Score:
    """A law [65536] on the sequences against p*."""
    log_target, truth = task.tilted(lam)
    target = log_target.exp()
    share = share / share.sum()
    column = (task.r * BINS).long().clamp(max=BINS - 1)
    bins = [torch.zeros(BINS, dtype=torch.float64).index_add(0, column, q) for q in (share, target)]
    return Score(
        tv=total_variation(share.log(), log_target),
        kl=kl(share.log(), log_target),
        bins=total_variation(bins[0].log(), bins[1].log()),
        gap=float((share - target) @ task.r),
        log_z=log_z - truth,
    )


def judged(task: Task, result: Result, lam: float) -> list[Score]:
    """One score of each run; a run that found nothing counts as the worst of all."""
    index = index_of(result.items.argmax(-1), 4)
    scores = []
    for row, log_z in enumerate(result.log_z.tolist()):
        mine = result.rows == row
        share = torch.bincount(index[mine], result.weights[mine], 4**8)
        if share.sum() > 0:
            scores.append(judge(task, share, lam, log_z))
        else:
            scores.append(Score(1.0, math.inf, 1.0, math.nan, math.nan))
    return scores


def exact_draws(task: Task, lam: float, n: int, repeats: int) -> list[Score]:
    """n exact draws of p*, of equal weight."""
    generator = torch.Generator().manual_seed(0)
    law = task.tilted(lam)[0].exp()
    scores = []
    for _ in range(repeats):
        drawn = torch.multinomial(law, n, replacement=True, generator=generator)
        scores.append(judge(task, torch.bincount(drawn, minlength=4**8).double(), lam))
    return scores


def best_of_law(log_p: Tensor, r: Tensor, n: int) -> Tensor:
    """The law of the best of n draws; among equal rewards, p's."""
    p = log_p.exp()
    value, group = r.unique(return_inverse=True)
    mass = torch.zeros(len(value), dtype=torch.float64).index_add(0, group, p)
    below = mass.cumsum(0).clamp(max=1.0)
    top = below**n - (below - mass).clamp(min=0) ** n
    return p / mass[group] * top[group]


def mean(scores: list[Score], name: str) -> tuple[float, float]:
    """Mean over runs, and its standard error."""
    return average(torch.tensor([getattr(s, name) for s in scores], dtype=torch.float64))


def setting(sampler: Sampler) -> str:
    """What was chosen, in words."""
    if isinstance(sampler, BestOfN):
        return f"N = {sampler.of}"
    if isinstance(sampler, SVDD):
        return f"M = {sampler.proposals}"
    assert isinstance(sampler, SMC)
    everywhere = isinstance(sampler, TDS) or sampler.levels == ALL
    return f"K = {sampler.particles or 'all'}" + (", every level" if everywhere else "")


def choose(task: Task, name: str, lam: float, nfe: int, most: int) -> Sampler:
    """The setting of the lowest mean TV on at most so many seeds of its own."""
    found: list[tuple[float, int, str]] = []
    for k, sampler in enumerate(TUNED[name]):
        try:
            result = run(task, sampler, lam, nfe, min(SEARCH[nfe], most), seed=1)
        except ValueError:
            continue  # one population or group of this size is beyond the budget
        found.append((mean(judged(task, result, lam), "tv")[0], k, setting(sampler)))
    told = "  ".join(f"{what}: {tv:.3f}" for tv, _, what in found)
    print(f"λ = {lam:g}, {nfe:g} rows, {name}: TV with {told}", flush=True)
    return TUNED[name][min(found)[1]]


def line(lam: float, nfe: int, label: str, scores: list[Score], note: str = "") -> dict:
    """Print one row of the table; returns its figures."""
    values = {name: mean(scores, name) for name in ("tv", "kl", "bins", "gap", "log_z")}
    (tv, tv_se), (far, far_se), (bins, _), (gap, gap_se), (log_z, log_z_se) = values.values()
    told = f"{log_z:+.3f} ± {log_z_se:.3f}" if math.isfinite(log_z) else ""
    print(
        f"{lam:<4g}{nfe:<9g}{label:30}{tv:.4f} ± {tv_se:.4f}  {far:.3f} ± {far_se:.3f}  {bins:.3f}"
        f"  {gap:+.4f} ± {gap_se:.4f}  {told:17}  {note}",
        flush=True,
    )
    return {name: {"value": value, "error": error} for name, (value, error) in values.items()}


HEAD = (
    f"{'λ':4}{'rows':9}{'sampler':30}{'TV':17}{'KL':15}{'bins':7}{'E[r] gap':18}{'log Z gap':19}"
    "calls of network, reward; s of CPU"
)


def compare(task: Task, lam: float, budgets: dict[int, int]) -> dict:
    """All samplers at all budgets."""
    figures: dict = {}
    chosen: dict[str, Sampler] = {}
    for nfe, runs in budgets.items():
        if nfe in SEARCH:
            chosen = {name: choose(task, name, lam, nfe, runs) for name in TUNED}
        print("\n" + HEAD)
        labels = {name: f"{name}, {setting(s)}" for name, s in chosen.items()}
        for name, sampler in {**FIXED, **chosen}.items():
            began = time.process_time()
            result = run(task, sampler, lam, nfe, runs, seed=0)
            scores = judged(task, result, lam)
            spent = result.spent
            asked = (int(spent.reward_calls.sum()) + spent.guided) / runs
            note = f"{result.nfe / runs:.0f}, {asked:.0f}; {time.process_time() - began:.0f} s"
            if result.tree is not None and result.tree.flat:
                note += ", flat"
            if result.biased:
                note += ", BIASED"
            figures[f"{name} {nfe:g}"] = line(lam, nfe, labels.get(name, name), scores, note)
            if isinstance(sampler, BestOfN):
                assert sampler.of is not None
                own = judge(task, best_of_law(task.log_p, task.r, sampler.of), lam)
                line(lam, nfe, "  own law", [own] * 2)
        figures[f"floor {nfe:g}"] = line(
            lam, nfe, "floor: exact draws", exact_draws(task, lam, nfe // STEPS, 8)
        )
        print(flush=True)
    return figures


def search(task: Task, budgets: dict[int, int]) -> dict:
    """Best sequences found: mean over runs of the largest reward, and its place among all."""
    figures: dict = {}
    strands = task.r.unique()  # a sequence and its reverse complement are one site
    print(f"best found, λ = {max(LAMS):g}: reward, and sites (of {len(strands)}) that are better")
    for nfe, runs in budgets.items():
        for name, sampler in SEARCHES.items():
            result = run(task, sampler, max(LAMS), nfe, runs, seed=0)
            best = torch.zeros(runs, dtype=torch.float64)
            best.scatter_reduce_(0, result.rows, result.rewards, "amax")
            better = (strands > best[:, None] + 1e-6).sum(1).double()
            (value, error), (place, place_se) = average(best), average(better)
            figures[f"{name} {nfe:g}"] = {"best": value, "error": error, "better": place}
            print(
                f"{nfe:<9g}{name:15}{value:.4f} ± {error:.4f}   {place:.1f} ± {place_se:.1f}",
                flush=True,
            )
    print()
    return figures


# --- tuning ----------------------------------------------------------------------------------

TUNING = {"truncate": STEPS, "tau": 0.5, "batch": 64, "updates": 300, "lr": 1e-3}
PUBLISHED_ALPHA = {10.0: 0.03, 20.0: 0.01}


def equal_kl(task: Task, far: float) -> float:
    """Mean reward of the tilted law whose KL to p is `far` nats, by bisection over λ."""
    low, high = 0.0, 1e4
    for _ in range(100):
        lam = (low + high) / 2
        target, _ = task.tilted(lam)
        near = float(target.exp() @ (target - task.log_p)) < far
        low, high = (lam, high) if near else (low, lam)
    return float(task.tilted(low)[0].exp() @ task.r)


@dataclass(frozen=True)
class Tuning:
    """What tuning came to, all but the cost exact."""

    share: float
    r: float
    r_star: float
    kl: float  # of the law to p
    path: float  # KL of paths
    tv: float  # to p*
    to_target: float  # KL to p*
    rows: float  # network rows of tuning, forward; as many again are run backward
    seconds: float


def tune(task: Task, lam: float, kind: str, seed: int, **settings) -> Tuning:
    """DRAKES at alpha = 1/λ (under the published weighting: its own), and the law it leads to."""
    pipe = zoo.load("tfbind8")
    alpha = 1 / lam if kind == "path" else PUBLISHED_ALPHA[lam]
    settings = {"alpha": alpha, **TUNING, **settings}
    began = time.process_time()
    tuned = drakes(pipe, task.reward, steps=STEPS, kl=kind, seed=seed, progress=False, **settings)
    seconds = time.process_time() - began
    process = chain(task.model)
    answers = guesses(from_pipeline(tuned.pipe, steps=STEPS))
    law = masked_law(process, answers)
    far = kl(law.log(), task.log_p)
    r, r_pre, r_star = float(law @ task.r), float(task.log_p.exp() @ task.r), equal_kl(task, far)
    target = task.tilted(lam)[0]
    return Tuning(
        share=(r - r_pre) / (r_star - r_pre),
        r=r,
        r_star=r_star,
        kl=far,
        path=path_kl(process, answers, task.answers),
        tv=total_variation(law.log(), target),
        to_target=kl(law.log(), target),
        rows=tuned.total("forward"),
        seconds=seconds,
    )


def tell(lam: float, label: str, t: Tuning) -> None:
    """Print one row of the table of tuning."""
    print(
        f"{lam:<4g}{label:34}{t.share:6.3f}  {t.r:.4f} {t.r_star:.4f}   {t.kl:.3f} {t.path:.3f}"
        f"   {t.tv:.4f} {t.to_target:.4f}   {t.rows:.2e} rows, {t.seconds:.0f} s",
        flush=True,
    )


def tuning(task: Task, seeds: int, lams: tuple[float, ...], **settings) -> dict:
    """DRAKES with both weightings of the KL."""
    figures: dict = {}
    r_pre = float(task.log_p.exp() @ task.r)
    print(f"DRAKES, {TUNING | settings}; published weighting: alpha {PUBLISHED_ALPHA}")
    print(f"mean reward before: {r_pre:.4f}")
    print(f"{'λ':4}{'KL weighting, seed':34}share   r      r*       KL    of paths TV, KL to p*")
    for lam in lams:
        best, _ = task.tilted(lam)
        own = float(best.exp() @ task.r)
        far = kl(best, task.log_p)
        print(f"{lam:<4g}{'p* itself':34}{1:6.3f}  {own:.4f} {own:.4f}   {far:.3f}")
        for kind in ("path", "published")[: max(1, seeds - 1)]:  # one seed: a quick look
            found = []
            for seed in range(seeds):
                found.append(tune(task, lam, kind, seed, **settings))
                tell(lam, f"{kind}, seed {seed}", found[-1])
            share = torch.tensor([t.share for t in found], dtype=torch.float64)
            figures[f"{kind} {lam:g}"] = {
                name: sum(getattr(t, name) for t in found) / len(found)
                for name in ("share", "r", "r_star", "kl", "path", "tv", "to_target", "rows")
            } | {"least_share": float(share.min())}
    print()
    return figures


# --- the whole -------------------------------------------------------------------------------


def plot(task: Task, figures: dict, path: Path) -> None:
    """TV and KL against rows, one panel for each λ; DRAKES as levels."""
    from matplotlib import pyplot as plt

    lams = [lam for lam in LAMS if f"samplers {lam:g}" in figures]
    fig, axes = plt.subplots(2, len(lams), figsize=(11, 8), sharex=True, squeeze=False)
    for column, lam in enumerate(lams):
        found = figures[f"samplers {lam:g}"]
        names = dict.fromkeys(key.rpartition(" ")[0] for key in found)
        for name in sorted(names, key=lambda n: (n == "floor", n)):
            at = sorted(int(float(k.rpartition(" ")[2])) for k in found
                        if k.rpartition(" ")[0] == name)  # fmt: skip
            for k, metric in enumerate(("tv", "kl")):
                y = [found[f"{name} {nfe:g}"][metric]["value"] for nfe in at]
                e = [found[f"{name} {nfe:g}"][metric]["error"] for nfe in at]
                how = {"color": "black", "linestyle": ":"} if name == "floor" else {}
                if name.startswith("DTS"):
                    how = {"linewidth": 2.2}
                axes[k, column].errorbar(at, y, e, label=name, marker="o", markersize=3, **how)
        tuned = figures.get("drakes", {}).get(f"path {lam:g}")
        for k, metric in enumerate(("tv", "to_target")):
            if tuned:
                axes[k, column].axhline(
                    tuned[metric], color="grey", linestyle="--", label="DRAKES, own law"
                )
        axes[0, column].set_title(f"λ = {lam:g}")
        axes[0, column].set_ylabel("TV to p*")
        axes[1, column].set_ylabel("KL to p*, nats")
        axes[1, column].set_xlabel("network rows")
        for row in (0, 1):
            axes[row, column].set_xscale("log")
            axes[row, column].set_yscale("log")
            axes[row, column].grid(alpha=0.3)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="lower center", ncol=5, frameon=False, fontsize=9)
    fig.tight_layout(rect=(0, 0.09, 1, 1))
    fig.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="small numbers, under a minute")
    parser.add_argument("--only", choices=("samplers", "drakes"), help="one half of it")
    parser.add_argument("--plot", type=Path, help="PNG to draw TV and KL in")
    args = parser.parse_args()
    torch.set_num_threads(1)
    header()
    began = time.process_time()
    task = build()
    p = task.log_p.exp()
    print(
        f"T = {STEPS}; noise seed 0, settings chosen on seed 1; mean reward under p "
        f"{float(p @ task.r):.4f}; p by forward pass, {time.process_time() - began:.0f} s"
    )
    for lam in LAMS:
        target, log_z = task.tilted(lam)
        q = target.exp()
        print(
            f"λ = {lam:g}: log Z {log_z:.4f}, E[r] {float(q @ task.r):.4f}, KL(p* || p) "
            f"{kl(target, task.log_p):.3f} nats, 1 / Σ p*² {float(1 / q.square().sum()):.0f} "
            f"sequences; effective share of independent walks {1 / float((q * q / p).sum()):.4f}"
        )
    print()
    figures: dict = {}
    budgets = QUICK if args.quick else SEEDS
    lams = LAMS[1:] if args.quick else LAMS
    if args.only != "drakes":
        for lam in lams:
            figures[f"samplers {lam:g}"] = compare(task, lam, budgets)
        figures["search"] = search(task, {k: n for k, n in budgets.items() if k <= 10_000})
    if args.only != "samplers":
        few = {"updates": 20} if args.quick else {}
        figures["drakes"] = tuning(task, 1 if args.quick else 3, lams, **few)
    if args.plot is not None and args.only != "drakes":
        plot(task, figures, args.plot)
    finish({**headline(figures, max(budgets)), **figures})


def headline(figures: dict, nfe: int) -> dict:
    """TV of DTS at the largest budget where it is worst, its floor, and DRAKES' least share."""
    told: dict = {}
    found = [figures[f"samplers {lam:g}"] for lam in LAMS if f"samplers {lam:g}" in figures]
    if found:
        worst = max(found, key=lambda f: f[f"DTS {nfe:g}"]["tv"]["value"])
        told["tv_dts"] = worst[f"DTS {nfe:g}"]["tv"]["value"]
        told["floor"] = worst[f"floor {nfe:g}"]["tv"]["value"]
    tuned = figures.get("drakes", {})
    shares = [value["least_share"] for name, value in tuned.items() if name.startswith("path")]
    return told | ({"drakes_least_share": min(shares)} if shares else {})


if __name__ == "__main__":
    main()
