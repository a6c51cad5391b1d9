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

    python -m benchmarks.tfbind8 [--quick] [--plot FILE]
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.report import finish, header
from samplers import SMC, SVDD, TDS, Beam, BestOfN, Importance, Result, TreeSampling, TreeSearch
from samplers import sample
from samplers.core import Sampler
from steering import from_pipeline, zoo
from steering.core import Model
from steering.metrics.exact import kl, total_variation
from steering.rewards import Table
from tests.exact.estimates import average
from tests.exact.masked import guesses, index_of, masked_law, tabulated

STEPS, BINS = 8, 20
LAMS = (10.0, 20.0)
SEEDS = {1_000: 48, 10_000: 24, 100_000: 6, 1_000_000: 2}
SEARCH = {1_000: 24, 10_000: 8, 100_000: 2}  # runs that settings are chosen on
QUICK = {1_000: 16, 10_000: 4}
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
LARGEST = ("importance", "SMC", "DTS", "DTS, even branches")  # those that get the largest budget
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
    law = masked_law(model.process, answers)
    return Task(model, answers, Table(zoo.tfbind8_scores()), law.log())


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


def choose(task: Task, name: str, lam: float, nfe: int) -> Sampler:
    """The setting of the lowest mean TV on seeds of its own."""
    found: list[tuple[float, int, str]] = []
    for k, sampler in enumerate(TUNED[name]):
        try:
            result = run(task, sampler, lam, nfe, SEARCH[nfe], seed=1)
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
            chosen = {name: choose(task, name, lam, nfe) for name in TUNED}
        print("\n" + HEAD)
        labels = {name: f"{name}, {setting(s)}" for name, s in chosen.items()}
        for name, sampler in {**FIXED, **chosen}.items():
            if nfe == max(SEEDS) and name not in LARGEST:
                continue
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
