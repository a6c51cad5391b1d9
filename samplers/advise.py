"""Which sampler, with which settings, for this model and this reward? A counted pilot answers.

Most users need importance sampling or best-of-N, and deserve to be told.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from samplers import branching
from samplers.best_of_n import BestOfN
from samplers.core import Budget, Sampler
from samplers.engine import Engine, Settings
from samplers.importance import Importance
from samplers.probe import Probe, Probing
from samplers.progress import Progress
from samplers.smc import SMC
from samplers.tree_sampling import TreeSampling
from samplers.tree_search import TreeSearch
from search.resample import ess
from steering.core import Model
from steering.noise import child_key, root_key

_PILOT = -5  # child of a seed's root key, so that no run that follows repeats the pilot's noise
_FORESEEN = 0.6  # rank correlation from which a clean guess is worth resampling by
_EARLY = 0.6  # share of the way within which it must be
_ENOUGH = 100  # effective draws of independent walks that no population of particles improves on
Goal = Literal["draws", "best"]


@dataclass(frozen=True)
class Advice:
    """What a pilot saw, and what follows from it."""

    sampler: Sampler
    nfe: int  # rows per prompt: what the pilot left of the budget, or what should be enough
    why: tuple[str, ...]  # in words
    goal: Goal
    lam: float
    share: float  # effective sample size per independent walk at λ, mean over prompts
    steps: tuple[int, ...]  # steps looked at
    agree: tuple[float, ...]  # at each: rank correlation of siblings' rewards that part there,
    # four pairs of what is usual added
    pairs: int  # of siblings at each step, over all prompts
    foreseen: tuple[
        float, ...
    ]  # at each: rank correlation of the clean guess's reward with the end's
    reward: tuple[float, float, float]  # lowest, mean and highest of the independent walks
    failed: int  # walks whose reward failed
    walks: int  # independent walks of the pilot that did not fail, over all prompts
    pilot_rows: int  # network rows that it took, per prompt
    seconds_per_row: float
    seconds_per_reward: float

    def __str__(self) -> str:
        header = f"pilot: {self.walks} walks, {self.pilot_rows} network rows per prompt"
        lines = [
            f"{header}, {1e3 * self.seconds_per_row:.3g} ms a row, "
            f"{1e3 * self.seconds_per_reward:.3g} ms a reward, {self.failed} failed",
            "reward: lowest {:.4g}, mean {:.4g}, highest {:.4g}; effective sample size at lam = "
            "{:g}: {:.3g} per walk".format(*self.reward, self.lam, self.share),
            "step             " + "".join(f"{i:8d}" for i in self.steps),
            "siblings agree   "
            + "".join(f"{v:8.2f}" for v in self.agree)
            + f"   ({self.pairs} pairs each, and 4 of what is usual)",
            "guess foretells  "
            + "".join(f"{v:8.2f}" for v in self.foreseen)
            + f"   ({self.walks} walks)",
            *self.why,
            f"advice: {self.sampler} with nfe={self.nfe}",
        ]
        return "\n".join(lines)


def advise(
    model: Model,
    reward: Any,
    *,
    nfe: int | None = None,
    goal: Goal = "draws",
    lam: float = 1.0,
    pilot: int | None = None,
    seed: int = 0,
    batch: int = 64,
    progress: bool = True,
) -> Advice:
    """Look at a model and a reward with a small counted pilot, and recommend a sampler.

    Args:
        model: what is to be steered.
        reward: by what.
        nfe: network rows per prompt that are to be spent, the pilot included; None: advise on that
            too. Recommended is what gives 100 effective draws by importance sampling.
        goal: "draws" of p(x) exp(λ reward(x)), or the "best" items.
        lam: inverse temperature λ.
        pilot: network rows per prompt of the pilot; None is a tenth of nfe, or of 40 walks if nfe
            is None, and at least what eight walks and their siblings take.
        seed: of the pilot's noise; a run with the same seed does not repeat it.
        batch: walks that share a network call.
        progress: show a bar.

    Raises:
        ValueError: a budget too small for a pilot, or a reward that always fails.
    """
    if goal not in ("draws", "best"):
        raise ValueError(f"goal={goal!r}: give 'draws' or 'best'.")
    if type(lam) not in (int, float) or not 0 <= lam < math.inf:
        raise ValueError(f"lam={lam!r}: give a finite number >= 0.")
    for name, value in (("nfe", nfe), ("pilot", pilot), ("batch", batch)):
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"{name}={value!r}: give a whole number of network rows, or None.")
    engine = Engine(model, reward, None, Settings(batch))
    way = int(engine.network.rows.sum(1).max())
    rows = pilot or max(way * 40 if nfe is None else nfe // 10, 24 * way)
    if nfe is not None and 2 * rows > nfe:
        raise ValueError(
            f"nfe={nfe} is too small to be advised on: a pilot takes {rows} rows, more than half. "
            "Use Importance() or BestOfN()."
        )
    noise = int(child_key(root_key(seed, torch.tensor([0])), _PILOT))
    plan = engine.plan(lam, noise, Budget(nfe=rows))
    probe = Probe()
    state = probe.init(plan)
    with Progress(rows * len(model.prompts), progress, what="pilot") as bar:
        if engine.run(probe, state, plan, watch=bar.update) == "interrupted":
            raise KeyboardInterrupt
    spent = engine.ledger
    found = [state.rewards(r) for r in range(plan.conditions)]
    everything = torch.cat(found)
    if len(everything) < 2:
        raise ValueError(f"the reward failed in the pilot, first with {spent.first_error}.")
    agree, foreseen = _correlations(state, found)
    enough = way * math.ceil(_ENOUGH / _share(found, lam))
    left = enough if nfe is None else nfe - int(spent.rows.max())
    sampler, why = _decide(state, found, agree, foreseen, goal, left, way)
    if nfe is None:
        why.append(
            f"{enough} network rows per prompt give about {_ENOUGH} effective draws by importance "
            "sampling, as far as so few walks can tell; another sampler may need less."
        )
    return Advice(
        sampler=sampler,
        nfe=left,
        why=tuple(why),
        goal=goal,
        lam=lam,
        share=_share(found, lam),
        steps=state.stops[:-1],
        agree=tuple(agree),
        pairs=sum(len(state.pairs(0, row)) for row in range(plan.conditions)),
        foreseen=tuple(foreseen),
        reward=(float(everything.min()), float(everything.mean()), float(everything.max())),
        failed=len(state.ends) - len(everything),
        walks=len(everything),
        pilot_rows=int(spent.rows.max()),
        seconds_per_row=(spent.seconds - spent.waited_seconds) / max(int(spent.rows.sum()), 1),
        seconds_per_reward=spent.scoring_seconds / max(int(spent.reward_calls.sum()), 1),
    )


def _share(found: Sequence[Tensor], lam: float) -> float:
    return statistics.mean(float(ess(lam * r)) / len(r) for r in found if len(r))


def _correlations(state: Probing, found: Sequence[Tensor]) -> tuple[list[float], list[float]]:
    """Of siblings, and of guesses with what became of them, at each step: mean over prompts."""
    agree, foreseen = [], []
    for k in range(len(state.stops) - 1):
        usual = state.stops[k] / state.plan.steps
        pairs = [
            branching.agreement(r.tolist(), state.pairs(k, row), usual)
            for row, r in enumerate(found)
            if len(r)
        ]
        agree.append(statistics.mean(pairs))
        looks = [_rank_correlation(state.looks(k, row)) for row in range(len(found))]
        foreseen.append(statistics.mean(looks))
    return agree, foreseen


def _rank_correlation(pairs: Sequence[tuple[float, float]]) -> float:
    """Spearman's, 0 for less than three pairs or where nothing varies."""
    if len(pairs) < 3:
        return 0.0
    from scipy.stats import rankdata

    ranks = torch.from_numpy(rankdata(pairs, axis=0)).T
    if (ranks.amax(1) == ranks.amin(1)).any():
        return 0.0
    return float(torch.corrcoef(ranks)[0, 1])


def _decide(
    state: Probing,
    found: Sequence[Tensor],
    agree: Sequence[float],
    foreseen: Sequence[float],
    goal: Goal,
    left: int,
    way: int,
) -> tuple[Sampler, list[str]]:
    lam, steps = state.plan.lam, state.plan.steps
    planted = state.stops[:-1]
    shares = {i / steps: a for i, a in zip(planted, agree, strict=True)}
    branch = branching.chosen(planted, steps, shares)
    walks = left // way
    if goal == "best":
        if not branch:
            return BestOfN(), [
                "Siblings never agree in part: there is nothing between chance and certainty that "
                "a search could follow, so the best of independent walks is as good."
            ]
        return TreeSearch(branch=branch), [
            f"Rewards are decided around steps {', '.join(map(str, branch))}: a search can branch "
            "there and follow what it finds."
        ]
    share = _share(found, lam)
    effective = round(share * walks)
    words = f"{share:.3g} of independent walks count, about {effective} effective draws"
    common = all(branching.common(r, lam) for r in found if len(r))
    if common and effective >= _ENOUGH:
        return Importance(), [
            f"exp(lam * reward) is common under the model: {words}. Importance sampling is exact."
        ]
    early = [i for i, f in zip(planted, foreseen, strict=True) if f >= _FORESEEN]
    if early and early[0] <= _EARLY * steps:
        return SMC(levels=tuple(early)), [
            f"{words[0].upper()}{words[1:]}, and the reward of the clean guess foretells the end "
            f"from step {early[0]} on: particles resampled by it waste few walks."
        ]
    if common or not branch:
        why = "common under the model" if common else (
            "rare, but siblings never agree in part, so trees gain nothing"
        )  # fmt: skip
        return Importance(), [f"exp(lam * reward) is {why}: {words}. Importance sampling is exact."]
    return TreeSampling(branch=branch), [
        f"exp(lam * reward) is rare ({words}) and cannot be foretold early, but is decided around "
        f"steps {', '.join(map(str, branch))}: a tree that branches there reuses its beginnings. "
        "Its default widening, Widening(1, .4), is narrow, as is right where few walks matter."
    ]
