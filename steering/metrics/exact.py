"""Exact divergences of laws on spaces small enough to write down."""

from __future__ import annotations

import torch
from torch import Tensor


def kl(log_p: Tensor, log_q: Tensor) -> float:
    """KL(p || q) = sum_x p(x) (log p(x) - log q(x)), in nats; inf where q lacks mass that p has.

    Args:
        log_p, log_q: [S] log-probabilities of the same S states, -inf for none; need not be
            normalised.

    Raises:
        ValueError: shapes that differ, nan or +inf, no mass at all.
    """
    p, q = _laws(log_p, log_q)
    mass = p > -torch.inf
    return max(float((p[mass].exp() * (p[mass] - q[mass])).sum()), 0.0)


def total_variation(log_p: Tensor, log_q: Tensor) -> float:
    """TV(p, q) = ½ sum_x |p(x) - q(x)|, from 0 (equal) to 1 (apart).

    Args:
        log_p, log_q: as for `kl`.

    Raises:
        ValueError: as `kl`.
    """
    p, q = _laws(log_p, log_q)
    return float((p.exp() - q.exp()).abs().sum()) / 2


def _laws(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    laws = []
    for name, values in (("log_p", log_p), ("log_q", log_q)):
        v = torch.as_tensor(values).detach().to("cpu", torch.float64).flatten()
        if v.isnan().any() or (v == torch.inf).any():
            raise ValueError(f"{name} holds nan or +inf: give log-probabilities, -inf for none.")
        if not (v > -torch.inf).any():
            raise ValueError(f"{name} has no mass: at least one value must be above -inf.")
        laws.append(v - v.logsumexp(0))
    if len(laws[0]) != len(laws[1]):
        raise ValueError(f"log_p has {len(laws[0])} states and log_q has {len(laws[1])}.")
    return laws[0], laws[1]
