"""How near do samplers of NoProp chains come to the tilted law of a label, for their network calls?

A NoProp network (arXiv:2503.24322) denoises the label of an image. There are ten labels, so that p,
the law of the chain itself, is a table, and p* ∝ p exp(λ r) too. The table is counted from a
million unsteered walks of the chain; its own error is printed.

Images are the 250 test images of the package and as many mixtures of two, half of each. Which are
steered is decided by unsteered walks of each, with a seed of their own, before any sampler runs:

    prior shift  the image of greatest entropy of p. The classes are no longer alike in number: that
                 of class k is in proportion to 2^-k. r = log(new / old), λ = 1: Bayes' rule
    label set    the image whose likeliest label has a probability nearest .97, of those with a walk
                 that ended elsewhere. r = 1 for all labels but this one, λ = 6
    abstention   the image of greatest entropy again, with "abstain" as one more outcome: chains
                 less sure at their end than all but 3 % of the unsteered. r = 1 for it, λ = 6

    TV      total variation between the weighted draws of a run and p*, mean over runs ± its
            standard error
    pooled  TV of the mean of the runs' laws: what more runs would not take away, and the noise of
            those there are
    E[r]    mean reward less that of p*; log Z likewise
    floor   as many exact draws of p*, of equal weight, as independent walks fit the budget
    table   TV to p* of tables counted from as many draws of p, tilted: the error of p* itself
    own     of a sampler that has another law than p*: what it tends to

Leaves of a tree share walks, so that a tree may come below the floor. Settings (particles and
levels of SMC, N of best-of-N) are those of the lowest mean TV on separate seeds at the same
budget; at the largest budget, the choice at a tenth of it.

    python -m benchmarks.noprop_steered [--quick] [--only dt|ct|fm] [--plot FILE]
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from benchmarks.report import finish, header
from benchmarks.tfbind8 import best_of_law
from samplers import SMC, BestOfN, Importance, Result, TreeSampling, sample
from samplers.core import Sampler
from steering import from_noprop, zoo
from steering.core import Model
from steering.metrics.exact import kl, total_variation
from steering.noise import child_key, root_key
from steering.rewards import Table
from tests.exact.estimates import average

STEPS = {"dt": 10, "ct": 20, "fm": 20}
SEEDS = {1_000: 24, 10_000: 8, 30_000: 4}
SEARCH = {1_000: 16, 10_000: 4}  # runs that settings are chosen on
QUICK = {1_000: 4, 4_000: 2}
WALKS, FEWER = 1_000_000, 50_000  # behind a table
PILOT, SHORT = 400, 50  # unsteered walks of each image that may be chosen
SAMPLED, CHOSEN, CHOOSING, COUNTING = range(4)  # noise seeds
FIXED: dict[str, Sampler] = {
    "importance": Importance(),
    "DTS": TreeSampling(),
    "DTS, even branches": TreeSampling(branch="even"),
    "DTS, published law": TreeSampling(law="published"),
}


@dataclass(frozen=True, eq=False)
class Task:
    """One image's chain, the law of its K outcomes, and what is wanted of it."""

    name: str
    pipe: Any
    image: Tensor  # [1, C, H, W]
    steps: int
    abstain: float
    seen: Tensor  # [K] float64, how many unsteered walks ended in each outcome
    values: Tensor  # [K] float64 rewards
    lam: float

    @property
    def log_p(self) -> Tensor:
        """[K] float64."""
        return (self.seen / self.seen.sum()).log()

    @property
    def log_target(self) -> Tensor:
        """[K] float64 of p*."""
        return (self.log_p + self.lam * self.values).log_softmax(0)

    @property
    def log_z(self) -> float:
        return float((self.log_p + self.lam * self.values).logsumexp(0))

    @property
    def share(self) -> float:
        """Effective share of independent walks."""
        p, q = self.log_p.exp(), self.log_target.exp()
        return 1 / float((q.square() / p)[p > 0].sum())

    def model(self, runs: int) -> Model:
        """The chain; one condition is one independent run."""
        images = self.image.expand(runs, -1, -1, -1)
        return from_noprop(self.pipe, images, steps=self.steps, abstain=self.abstain)


# --- the tables ------------------------------------------------------------------------------


@torch.no_grad()
def ends(model: Model, row: Tensor, seed: int) -> Tensor:
    """States [N, d] at the end of unsteered walks, the n-th of condition row [N]."""
    found = []
    for number in torch.arange(len(row)).split(8192):
        mine = row[number]
        key = child_key(root_key(seed, mine), number)
        x = model.process.prior(key)
        for step in range(model.process.steps):
            i = torch.full_like(mine, step)
            clean = model.denoiser(x, model.process.time(i), mine)
            x = model.process.transition(x, i, clean).sample(child_key(key, step))
        found.append(x)
    return torch.cat(found)


def outcomes(model: Model, states: Tensor) -> Tensor:
    """Outcomes [N] int64 of states [N, d]."""
    return model.decode(states)[:, 0].argmax(-1)


def build(pipe: Any, steps: int, walks: int, pilot: int) -> list[Task]:
    """The three tasks of a network."""
    images = zoo.mnist_slice()[0][:, None].float() / 255
    pool = torch.cat([images, (images + images.roll(-25, 0)) / 2])  # the next class, 25 further on
    model = from_noprop(pipe, pool, steps=steps)
    row = torch.arange(len(pool)).repeat_interleave(pilot)
    labels = outcomes(model, ends(model, row, CHOOSING)).view(-1, pilot)
    p = one_hot(labels, 10).double().mean(1)
    unsure = int(torch.special.entr(p).sum(1).argmax())
    most = p.amax(1)
    nearly = int((most - 0.97).abs().where(most < 1, math.inf).argmin())
    shift = (10 * torch.softmax(-math.log(2) * torch.arange(10.0), 0)).log().double()
    states, tasks = {}, []
    for k in dict.fromkeys((unsure, nearly)):
        model = from_noprop(pipe, pool[k : k + 1], steps=steps)
        states[k] = ends(model, torch.zeros(walks, dtype=torch.int64), COUNTING)
    sure = pipe.network.probabilities(states[unsure]).amax(1)
    least = float(sure.kthvalue(max(1, round(0.03 * walks))).values)
    others = 1 - one_hot(p[nearly].argmax(), 10).double()
    for name, k, abstain, values, lam in (
        ("prior shift", unsure, 0.0, shift, 1.0),
        ("label set", nearly, 0.0, others, 6.0),
        ("abstention", unsure, least, one_hot(torch.tensor(10), 11).double(), 6.0),
    ):
        image = pool[k : k + 1]
        chain = from_noprop(pipe, image, steps=steps, abstain=abstain)
        found = outcomes(chain, states[k])
        seen = torch.bincount(found, minlength=len(values)).double()
        what = f"image {k}" if k < 250 else f"mixture {k - 250}"
        tasks.append(Task(f"{name}, {what}", pipe, image, steps, abstain, seen, values, lam))
    return tasks


def table_error(task: Task, repeats: int = 20) -> float:
    """TV to p* of tables counted from as many draws of p, tilted: mean."""
    generator = torch.Generator().manual_seed(0)
    p, n, found = task.log_p.exp(), int(task.seen.sum()), []
    for _ in range(repeats):
        drawn = torch.multinomial(p, n, replacement=True, generator=generator)
        again = torch.bincount(drawn, minlength=len(p)).double().log() + task.lam * task.values
        found.append(total_variation(again, task.log_target))
    return sum(found) / repeats


# --- the runs --------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Score:
    """What one run's draws are worth."""

    law: Tensor  # [K] float64
    tv: float
    gap: float  # of the mean reward
    log_z: float  # gap; nan where there is no estimate


def judge(task: Task, law: Tensor, log_z: float = math.nan) -> Score:
    """A law [K] on the outcomes, not normalised, against p*."""
    law = law / law.sum()
    gap = float((law - task.log_target.exp()) @ task.values)
    return Score(law, total_variation(law.log(), task.log_target), gap, log_z - task.log_z)


def run(task: Task, sampler: Sampler, nfe: int, runs: int, seed: int) -> Result:
    return sample(task.model(runs), Table(task.values), sampler, lam=task.lam, nfe=nfe, seed=seed,
                  batch=4096, progress=False)  # fmt: skip


def judged(task: Task, result: Result) -> list[Score]:
    """One score of each run."""
    found, scores = result.items[:, 0].argmax(-1), []
    for row, log_z in enumerate(result.log_z.tolist()):
        mine = result.rows == row
        law = torch.bincount(found[mine], result.weights[mine], len(task.values))
        scores.append(judge(task, law, log_z))
    return scores


def exact_draws(task: Task, n: int, repeats: int = 100) -> list[Score]:
    """n exact draws of p*, of equal weight."""
    generator = torch.Generator().manual_seed(0)
    q = task.log_target.exp()
    drawn = torch.multinomial(q, n * repeats, replacement=True, generator=generator)
    return [judge(task, torch.bincount(d, minlength=len(q)).double()) for d in drawn.split(n)]


def own_law(task: Task, of: int) -> Score:
    """The law of the best of so many walks."""
    there = task.seen > 0
    law = torch.zeros_like(task.values)
    law[there] = best_of_law(task.log_p[there], task.values[there], of)
    return judge(task, law)


def settings(steps: int) -> dict[str, dict[str, Sampler]]:
    """What is chosen among, by name."""
    # the last step draws no noise: copies made before it would stay equal
    every = tuple(range(1, steps - 1))
    smc: dict[str, Sampler] = {}
    for k in (64, 256, None):
        smc[f"K = {k or 'all'}"] = SMC(k)
        smc[f"K = {k or 'all'}, every level"] = SMC(k, levels=every)
    best: dict[str, Sampler] = {f"N = {n}": BestOfN(of=n) for n in (2, 4, 8, 16, 32)}
    return {"SMC": smc, "best of N": best}


def choose(task: Task, name: str, among: dict[str, Sampler], nfe: int, runs: int) -> str:
    """The setting of the lowest mean TV on seeds of its own."""
    found: dict[str, float] = {}
    for what, sampler in among.items():
        try:
            result = run(task, sampler, nfe, runs, CHOSEN)
        except ValueError:
            continue  # one population or group of this size is beyond the budget
        found[what] = mean(judged(task, result), "tv")[0]
    told = "  ".join(f"{what}: {tv:.4f}" for what, tv in found.items())
    print(f"{nfe:g} rows, {name}: TV with {told}", flush=True)
    return min(found, key=lambda what: found[what])


def mean(scores: list[Score], name: str) -> tuple[float, float]:
    """Mean over runs, and its standard error."""
    return average(torch.tensor([getattr(s, name) for s in scores], dtype=torch.float64))


HEAD = (
    f"{'rows':9}{'sampler':32}{'TV':19}{'pooled':9}{'E[r] gap':20}{'log Z gap':20}"
    "calls of network, reward; s of CPU"
)


def line(task: Task, nfe: int, label: str, scores: list[Score], note: str = "") -> dict:
    """Print one row of the table; returns its figures."""
    values = {name: mean(scores, name) for name in ("tv", "gap", "log_z")}
    (tv, tv_se), (gap, gap_se), (log_z, log_z_se) = values.values()
    pooled = judge(task, sum((s.law for s in scores), torch.zeros_like(task.values))).tv
    told = f"{log_z:+.4f} ± {log_z_se:.4f}" if math.isfinite(log_z) else ""
    print(
        f"{nfe:<9g}{label:32}{tv:.4f} ± {tv_se:.4f}    {pooled:.4f}   {gap:+.4f} ± {gap_se:.4f}    "
        f"{told:20}{note}",
        flush=True,
    )
    told = {name: {"value": value, "error": error} for name, (value, error) in values.items()}
    return told | {"pooled": pooled}


def compare(task: Task, budgets: dict[int, int]) -> dict:
    """All samplers at all budgets."""
    figures: dict = {"share": task.share, "table": table_error(task)}
    p, q = ([round(v, 4) for v in law.exp().tolist()] for law in (task.log_p, task.log_target))
    print(
        f"{task.name}: λ = {task.lam:g}, log Z {task.log_z:.4f}, KL(p* || p) "
        f"{kl(task.log_target, task.log_p):.3f} nats, effective share of independent walks "
        f"{task.share:.4f}\np     {p}\np*    {q}\n"
        f"table of {task.seen.sum():.0f} walks, TV {figures['table']:.5f}"
        + (f"; abstains below a probability of {task.abstain:.3f}" if task.abstain else "")
    )
    chosen: dict[str, tuple[str, Sampler]] = {}
    for nfe, runs in budgets.items():
        if nfe in SEARCH:
            for name, among in settings(task.steps).items():
                what = choose(task, name, among, nfe, min(SEARCH[nfe], runs))
                chosen[name] = what, among[what]
        print(HEAD)
        everyone = {name: (name, s) for name, s in FIXED.items()}
        everyone |= {name: (f"{name}, {what}", s) for name, (what, s) in chosen.items()}
        for name, (label, sampler) in everyone.items():
            began = time.process_time()
            result = run(task, sampler, nfe, runs, SAMPLED)
            asked = int(result.spent.reward_calls.sum()) / runs
            spent = time.process_time() - began
            note = f"{result.nfe / runs:.0f}, {asked:.0f}; {spent:.0f} s"
            if result.tree is not None and result.tree.flat:
                note += ", flat"
            if result.biased:
                note += ", BIASED"
            figures[f"{name} {nfe:g}"] = line(task, nfe, label, judged(task, result), note)
            if isinstance(sampler, BestOfN):
                assert sampler.of is not None
                line(task, nfe, "  own law", [own_law(task, sampler.of)] * 2)
        figures[f"floor {nfe:g}"] = line(
            task, nfe, "floor: exact draws", exact_draws(task, nfe // task.steps)
        )
        print(flush=True)
    return figures


# --- the whole -------------------------------------------------------------------------------


def plot(figures: dict, path: Path) -> None:
    """TV against rows, one panel for each task."""
    from matplotlib import pyplot as plt
    from matplotlib.ticker import NullFormatter

    columns = 3
    rows = len(figures) // columns
    fig, axes = plt.subplots(rows, columns, figsize=(13, 1.2 + 3.6 * rows), squeeze=False)
    for panel, (task, found) in zip(axes.flat, figures.items(), strict=True):
        names = dict.fromkeys(key.rpartition(" ")[0] for key in found if " " in key)
        for name in names:
            at = sorted(int(float(key.rpartition(" ")[2])) for key in found
                        if key.rpartition(" ")[0] == name)  # fmt: skip
            y = [found[f"{name} {nfe:g}"]["tv"]["value"] for nfe in at]
            e = [found[f"{name} {nfe:g}"]["tv"]["error"] for nfe in at]
            how = {"color": "black", "linestyle": ":"} if name == "floor" else {}
            if name.startswith("DTS"):
                how = {"linewidth": 2.2}
            panel.errorbar(at, y, e, label=name, marker="o", markersize=3, **how)
        panel.axhline(found["table"], label="error of the table", color="grey", linestyle="--")
        panel.set(title=task, xscale="log", yscale="log", xlabel="network rows")
        panel.yaxis.set_minor_formatter(NullFormatter())
        panel.grid(alpha=0.3)
    for panel in axes[:, 0]:
        panel.set_ylabel("TV to p*")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="lower center", ncol=4, frameon=False, fontsize=9)
    fig.tight_layout(rect=(0, 0.7 / (1.2 + 3.6 * rows), 1, 1))
    fig.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="small numbers, under a minute")
    parser.add_argument("--only", choices=tuple(STEPS), help="one of the networks")
    parser.add_argument("--plot", type=Path, help="PNG to draw TV in")
    args = parser.parse_args()
    torch.set_num_threads(1)
    header()
    figures: dict = {}
    budgets = QUICK if args.quick else SEEDS
    variants = [args.only] if args.only else ["dt"] if args.quick else list(STEPS)
    for variant in variants:
        began, steps = time.process_time(), STEPS[variant]
        walks, pilot = (FEWER, SHORT) if args.quick else (WALKS, PILOT)
        tasks = build(zoo.load(f"noprop-{variant}"), steps, walks, pilot)
        print(
            f"\nnoprop-{variant}, T = {steps}; tables of {walks:g} walks of two images, chosen by "
            f"{pilot} walks of each of 500: {time.process_time() - began:.0f} s\n"
        )
        for task in tasks:
            figures[f"{variant}, {task.name}"] = compare(task, budgets)
    if args.plot is not None:
        plot(figures, args.plot)
    most = max(budgets)
    worst = max(figures.values(), key=lambda found: found[f"DTS {most:g}"]["tv"]["value"])
    told = {name: worst[f"{key} {most:g}"]["tv"]["value"]
            for name, key in (("tv", "DTS"), ("floor", "floor"))}  # fmt: skip
    finish({**told, "table": worst["table"], **figures})


if __name__ == "__main__":
    main()
