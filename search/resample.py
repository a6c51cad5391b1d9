"""Weights in log space: effective sample size, and the ways to draw by weight from given uniforms.

All functions are deterministic in their uniforms, so that keyed noise decides what is drawn.
Weight zero is log-weight -inf, and is never drawn.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def ess(log_w: Tensor) -> Tensor:
    """Effective sample size (Σ w)² / Σ w².

    Args:
        log_w: [..., K] float64.

    Returns:
        [...] float64, between 1 and K; 0 where every weight is zero.
    """
    # against the largest: next to a log weight of 1e40 the logarithm of a sum is lost to rounding
    weight = (log_w - log_w.amax(-1, keepdim=True)).exp()
    size = weight.sum(-1).square() / weight.square().sum(-1)
    return size.nan_to_num(nan=0.0)  # -inf - -inf: no weight at all


def logsumexp_by(log_w: Tensor, group: Tensor, groups: int) -> Tensor:
    """log Σ exp(log_w) over the members of each group.

    Args:
        log_w: [K] float64.
        group: [K] int64 in 0..groups-1.
        groups: number of groups R.

    Returns:
        [R] float64, -inf for a group with no weight.
    """
    top = torch.full((groups,), -torch.inf, dtype=torch.float64)
    top = top.scatter_reduce(0, group, log_w, "amax")
    shift = torch.where(top.isfinite(), top, 0.0)
    total = torch.zeros(groups, dtype=torch.float64)
    return shift + total.index_add(0, group, (log_w - shift[group]).exp()).log()


def systematic(log_w: Tensor, u: Tensor) -> Tensor:
    """Systematic resampling (Kitagawa 1996): one uniform, evenly spaced points.

    Item k is drawn floor or ceil of n w_k times, n w_k in expectation: the least spread of the
    three in practice, though not provably.

    Args:
        log_w: [K] float64, unnormalised.
        u: [n] uniforms in [0, 1); the first is used, n says how many to draw.

    Returns:
        [n] int64 indices, ascending.
    """
    n = len(u)
    return _at(log_w, (torch.arange(n, dtype=torch.float64) + u[:1]) / max(n, 1))


def stratified(log_w: Tensor, u: Tensor) -> Tensor:
    """Stratified resampling (Kitagawa 1996): one uniform in each of n equal strata.

    Args:
        log_w: [K] float64, unnormalised.
        u: [n] uniforms in [0, 1).

    Returns:
        [n] int64 indices, ascending.
    """
    n = len(u)
    return _at(log_w, (torch.arange(n, dtype=torch.float64) + u) / max(n, 1))


def multinomial(log_w: Tensor, u: Tensor) -> Tensor:
    """Independent draws by weight.

    Args:
        log_w: [K] float64, unnormalised.
        u: [n] uniforms in [0, 1).

    Returns:
        [n] int64 indices, in the order of u.
    """
    return _at(log_w, u)


SCHEMES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "systematic": systematic,
    "stratified": stratified,
    "multinomial": multinomial,
}


def _at(log_w: Tensor, point: Tensor) -> Tensor:
    """Invert the cumulative weights at points [n] of [0, 1]."""
    if log_w.isnan().any() or (log_w == torch.inf).any():
        raise ValueError("log_w holds nan or +inf: weights must be finite, or zero (-inf).")
    if not (log_w > -torch.inf).any():
        raise ValueError(f"log_w: all {len(log_w)} weights are zero, so nothing can be drawn.")
    weight = (log_w - log_w.max()).exp()
    mass = weight.cumsum(0)
    index = torch.searchsorted(mass, point * mass[-1], right=True)
    # a point that rounds up to 1 belongs to the last item that has any weight
    return index.clamp(max=int(weight.nonzero().max()))
