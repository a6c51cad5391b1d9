"""λ by its target: the divergence from the model, or the effective sample size, that one wants."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from samplers.ancestral import Ancestral
from samplers.core import Budget
from samplers.engine import Engine
from samplers.spec import Spec
from steering.noise import child_key, root_key

_PILOT = -3  # child of a seed's root key that the walks of the λ pilot descend from
_PILOT_SHARE, _PILOT_LEAST, _PILOT_MOST = 0.1, 16, 256  # of the budget, and walks per condition


def find_lam(engine: Engine, spec: Spec, aim: dict[str, float | None]) -> Spec:
    """λ that reaches a target on a counted pilot of independent walks.

    KL(λ) = λ E_λ[r] - log E_p[exp(λ r)] rises with λ, the effective sample size falls, so each is
    met by bisection on log λ; several conditions count by their mean.
    """
    way = int(engine.network.rows.sum(1).max())
    nfe = spec.budget.nfe
    n = _PILOT_LEAST * 4 if nfe is None else int(_PILOT_SHARE * nfe) // way
    n = min(max(n, _PILOT_LEAST), _PILOT_MOST)
    if nfe is not None and 2 * n * way > nfe:
        raise ValueError(
            f"nfe={nfe} is too small to find lam by a pilot: {n} walks of {way} rows take more "
            "than half. Raise nfe or give lam."
        )
    seed = int(child_key(root_key(spec.seed, torch.tensor([0])), _PILOT))
    plan = engine.plan(1.0, seed, Budget())
    pilot = Ancestral(n)
    walks = pilot.init(plan)
    engine.run(pilot, walks, plan)
    id, _ = walks.found()
    r, row = walks.reward[id], walks.row(id)
    rewards = [r[row == c] for c in row.unique().tolist()]
    if not rewards or all(float(v.max() - v.min()) == 0 for v in rewards):
        raise ValueError("the pilot saw no spread of rewards, so no lam has the target: give lam.")
    if aim["kl"] is not None:
        target, value = float(aim["kl"]), _kl
    else:
        target, value = -float(aim["ess"] or 0.0), lambda v, lam: -_ess_per_walk(v, lam)
    low, high = -30.0, 30.0
    if _mean_over(value, rewards, high) < target:
        raise ValueError(
            f"the target lies beyond what {n} pilot walks can show: aim lower or give lam."
        )
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _mean_over(value, rewards, middle) < target else (low, middle)
    rows = tuple(engine.ledger.rows.tolist())
    return dataclasses.replace(spec, lam=math.exp(high), pilot=n, pilot_rows=rows)


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
