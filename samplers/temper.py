"""λ by its target: the divergence from the model, or the effective sample size, that one wants."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from samplers.ancestral import Ancestral
from samplers.core import Budget
from samplers.engine import Engine
from samplers.progress import Progress
from samplers.spec import Spec
from steering.noise import child_key, root_key

_PILOT = -3  # child of a seed's root key that the walks of the λ pilot descend from
_SHARE, _LEAST, _MOST = 0.1, 16, 256  # of the budget, and walks per condition
_FEW = 5  # a λ that leaves fewer effective walks of the pilot is mostly chance


def find_lam(engine: Engine, spec: Spec, progress: bool) -> Spec:
    """λ that reaches `spec.aim` on a counted pilot of independent walks of the unguided model.

    KL(λ) = λ E_λ[r] - log E_p[exp(λ r)] rises with λ, the effective sample size falls, so each is
    met by bisection on log λ; several conditions count by their mean.

    Raises:
        ValueError: before the first network row, if the budget is too small for a pilot; after it,
            if the target cannot be met.
        KeyboardInterrupt: it was stopped; nothing was found yet.
    """
    assert spec.aim is not None
    kind, target = spec.aim
    way = int(engine.network.rows.sum(1).max())
    n = _affordable(spec.budget, way)
    seed = int(child_key(root_key(spec.seed, torch.tensor([0])), _PILOT))
    pilot = Engine(engine.model, engine.reward, None, engine.settings)
    plan = pilot.plan(1.0, seed, Budget())
    walks = Ancestral(n).init(plan)
    total = n * int(pilot.network.rows.sum())
    with Progress(total, progress, what=f"lam for {kind}={target:g}") as bar:
        status = pilot.run(Ancestral(n), walks, plan, spec.budget.seconds, bar.update)
    engine.ledger.add(pilot.ledger)
    if status == "interrupted":
        raise KeyboardInterrupt
    if status == "seconds":
        raise ValueError(
            f"seconds={spec.budget.seconds} ran out in the pilot of {n} walks that finds lam: "
            "raise it, or give lam."
        )
    id, _ = walks.found()
    r, row = walks.reward[id], walks.row(id)
    rewards = [r[row == c] for c in row.unique().tolist()]
    if not rewards:
        raise ValueError(f"the reward failed on all {n} pilot walks: {pilot.ledger.first_error}.")
    if all(float(v.max() - v.min()) == 0 for v in rewards):
        raise ValueError("the pilot saw no spread of rewards, so no lam has the target: give lam.")

    def value(log_lam: float) -> float:  # rises with λ
        return _mean_over(_kl, rewards, log_lam) if kind == "kl" else -effective(log_lam)

    def effective(log_lam: float) -> float:
        return _mean_over(_ess_per_walk, rewards, log_lam)

    aim = target if kind == "kl" else -target
    low, high = -30.0, 30.0
    if value(high) < aim:
        raise ValueError(
            f"{kind}={target:g} lies beyond what {n} pilot walks can show: aim lower or give lam."
        )
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if value(middle) < aim else (low, middle)
    if (left := effective(high) * n) < _FEW:
        warnings.warn(
            f"lam={math.exp(high):.3g} for {kind}={target:g} rests on {left:.1f} effective walks "
            f"of a pilot of {n}: it may be far off. Aim lower, raise the budget or give lam.",
            stacklevel=3,
        )
    rows = tuple(pilot.ledger.rows.tolist())
    return dataclasses.replace(spec, lam=math.exp(high), lam_walks=n, lam_rows=rows)


def _affordable(budget: Budget, way: int) -> int:
    """Walks of the pilot: a tenth of the budget if that is enough, never more than half."""
    n, most = _LEAST * 4, _MOST
    limits = {"nfe": (budget.nfe, way), "reward_calls": (budget.reward_calls, 1)}
    shares = [int(_SHARE * limit) // each for limit, each in limits.values() if limit is not None]
    n = min(max(min(shares, default=n), _LEAST), most)
    for name, (limit, each) in limits.items():
        if limit is not None and 2 * n * each > limit:
            raise ValueError(
                f"{name}={limit} is too small to find lam by a pilot: {n} walks take {n * each}, "
                "more than half. Raise it or give lam."
            )
    return n


def _mean_over(
    value: Callable[[Tensor, float], float], rewards: list[Tensor], log_lam: float
) -> float:
    """Mean over conditions of `value(rewards, λ)`."""
    return sum(value(v, math.exp(log_lam)) for v in rewards) / len(rewards)


def _kl(r: Tensor, lam: float) -> float:
    w = torch.softmax(lam * r, 0)
    return float((w * (w * len(w)).log().nan_to_num(neginf=0.0)).sum())


def _ess_per_walk(r: Tensor, lam: float) -> float:
    w = torch.softmax(lam * r, 0)
    return float(1 / (w**2).sum()) / len(w)
