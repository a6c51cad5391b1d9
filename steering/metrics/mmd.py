"""Maximum mean discrepancy: a kernel distance between two sets of samples."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from steering.metrics.features import checked, shares

_BLOCK = 2048  # rows of the kernel matrix held at a time
_MEDIAN_OF = 2000  # items that the median heuristic looks at


@dataclass(frozen=True)
class MMD:
    """A squared MMD, how it was estimated, and what it rests on."""

    value: float  # squared; unbiased, so it may fall below 0
    bandwidth: float  # h of the kernel, in units of the features
    extractor: str
    n: tuple[int, int]
    kernel: str = "RBF exp(-|x - y|² / 2h²)"
    estimator: str = "unbiased U-statistic of MMD²"

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        return (
            f"MMD² {self.value:.3e} ({self.estimator}, {self.kernel}, h = {self.bandwidth:.4g}, "
            f"extractor {self.extractor}, {self.n[0]} against {self.n[1]})"
        )


def mmd(
    x: Tensor,
    y: Tensor,
    *,
    bandwidth: float | None = None,
    extractor: str = "identity",
    weights_x: Tensor | None = None,
    weights_y: Tensor | None = None,
) -> MMD:
    """Squared maximum mean discrepancy, RBF kernel, unbiased.

    MMD² = E k(x, x') + E k(y, y') - 2 E k(x, y),  k(x, y) = exp(-|x - y|² / 2h²); within a set,
    pairs i != j of shares w: sum_{i != j} w_i w_j k_ij / (1 - sum_i w_i²). Gretton et al. 2012,
    "A kernel two-sample test", JMLR 13.

    Args:
        x: [N, d] features, or samples themselves.
        y: [M, d].
        bandwidth: h; None takes the median distance between items of both sets together (of at
            most 2,000, evenly spaced): fix it when several sets are compared.
        extractor: what made the features.
        weights_x, weights_y: [N], [M] importance weights of independent items.

    Raises:
        ValueError: N or M < 2, values that are not finite, dimensions that differ, bad weights.
    """
    if bandwidth is not None and not 0 < bandwidth < float("inf"):
        raise ValueError(f"bandwidth={bandwidth!r}: give a number > 0, or None for the median.")
    a, b = checked("x", x), checked("y", y)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"x has {a.shape[1]} dimensions and y has {b.shape[1]}.")
    w, v = shares("weights_x", weights_x, len(a)), shares("weights_y", weights_y, len(b))
    h = _median_distance(torch.cat([a, b])) if bandwidth is None else float(bandwidth)
    centre = torch.cat([a, b]).mean(0)
    a, b = a - centre, b - centre
    value = _within(a, w, h) + _within(b, v, h) - 2 * _mean_kernel(a, b, w, v, h)
    return MMD(value, h, extractor, (len(a), len(b)))


def _within(x: Tensor, w: Tensor, h: float) -> float:
    squares = float(w @ w)  # the diagonal, where k = 1
    return (_mean_kernel(x, x, w, w, h) - squares) / (1 - squares)


def _mean_kernel(x: Tensor, y: Tensor, w: Tensor, v: Tensor, h: float) -> float:
    total = 0.0
    for rows, share in zip(x.split(_BLOCK), w.split(_BLOCK), strict=True):
        # as a matrix product, far faster in many dimensions; exact to 1e-16 |x|² / h² in float64
        square = rows.square().sum(1)[:, None] + y.square().sum(1) - 2 * rows @ y.T
        total += float(share @ square.clamp_(min=0).mul_(-1 / (2 * h * h)).exp_() @ v)
    return total


def _median_distance(x: Tensor) -> float:
    some = x[:: -(-len(x) // _MEDIAN_OF)]
    distance = torch.nn.functional.pdist(some)
    median = float(distance.median())
    if median == 0:
        raise ValueError(
            "half of the items coincide, so their median distance is 0: give bandwidth."
        )
    return median
