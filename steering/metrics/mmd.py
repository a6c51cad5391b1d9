"""Maximum mean discrepancy: kernel distances between two sets of samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from steering.metrics.features import checked, named, shares

_BLOCK = 2048  # rows of the kernel matrix held at a time
_MEDIAN_OF = 2000  # items that the median heuristic looks at
_CMMD_BANDWIDTH = 10.0  # on embeddings of unit length, as published
_CMMD_SCALE = 1000.0

Kernel = Callable[[Tensor, Tensor], Tensor]  # [N, d], [M, d] -> [N, M]


@dataclass(frozen=True)
class MMD:
    """A squared MMD, how it was estimated, and what it rests on."""

    value: float  # squared; unbiased, so it may fall below 0
    kernel: str
    extractor: str
    n: tuple[int, int]
    bandwidth: float | None = None  # h of an RBF kernel, in units of the features
    estimator: str = "unbiased U-statistic of MMD²"
    name: str = "MMD²"

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        width = "" if self.bandwidth is None else f", h = {self.bandwidth:.4g}"
        return (
            f"{self.name} {self.value:.3e} ({self.estimator}, {self.kernel}{width}, "
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
    counts_x: Tensor | None = None,
    within_y: float | None = None,
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
        counts_x: [N] how often each item was drawn, instead of repeating it: the same value.
        within_y: E k(y, y') where `within` has told it already, at the same bandwidth.

    Raises:
        ValueError: N or M < 2, values that are not finite, dimensions that differ, bad weights,
            counts and weights at once, within_y without a bandwidth, no extractor named.
    """
    if bandwidth is not None and not 0 < bandwidth < float("inf"):
        raise ValueError(f"bandwidth={bandwidth!r}: give a number > 0, or None for the median.")
    if within_y is not None and bandwidth is None:
        raise ValueError("within_y holds at one bandwidth alone: give that bandwidth too.")
    if counts_x is not None and weights_x is not None:
        raise ValueError("counts_x and weights_x: give one of them.")
    a, b, w, v = _pair(x, y, extractor, weights_x if counts_x is None else counts_x, weights_y)
    h = _median_distance(torch.cat([a, b])) if bandwidth is None else float(bandwidth)
    # distances from a centre lose fewer figures; each set has one of its own to be told `within`
    kernel, centre = _rbf(h), b.mean(0)
    if counts_x is None:
        own, n = _within(a - centre, w, kernel), len(a)
    else:
        # pairs of two draws of one item are pairs, at distance 0; a draw with itself is none
        n = int(counts_x.sum())
        own = (_mean_kernel(a - centre, a - centre, w, w, kernel)[0] - 1 / n) / (1 - 1 / n)
    other = _within(b - centre, v, kernel) if within_y is None else within_y
    value = own + other - 2 * _mean_kernel(a - centre, b - centre, w, v, kernel)[0]
    return MMD(value, "RBF exp(-|x - y|² / 2h²)", extractor, (n, len(b)), h)


def within(y: Tensor, *, bandwidth: float, weights: Tensor | None = None) -> float:
    """E k(y, y') over pairs of a set, RBF kernel: the part of `mmd` that one reference keeps.

    Args:
        y: [M, d].
        bandwidth: h.
        weights: [M] importance weights.

    Raises:
        ValueError: M < 2, values that are not finite, bad weights.
    """
    b = checked("y", y)
    return _within(b - b.mean(0), shares("weights", weights, len(b)), _rbf(bandwidth))


def kid(
    x: Tensor,
    y: Tensor,
    *,
    extractor: str,
    weights_x: Tensor | None = None,
    weights_y: Tensor | None = None,
) -> MMD:
    """Kernel inception distance: squared MMD with k(x, y) = (x·y / d + 1)³, unbiased.

    Over all pairs at once, not over random subsets, so it has no randomness of its own. Unlike the
    Fréchet distance it is unbiased at every N. Binkowski et al. 2018, arXiv:1801.01401.

    Args:
        x, y: [N, d] and [M, d] features.
        extractor: what made them; "kernel inception distance" proper is of Inception's.
        weights_x, weights_y: as for `mmd`.

    Raises:
        ValueError: as `mmd`.
    """
    a, b, w, v = _pair(x, y, extractor, weights_x, weights_y)

    def cubic(rows: Tensor, others: Tensor) -> Tensor:
        return (rows @ others.T / rows.shape[1] + 1).pow_(3)

    value = _distance(a, b, w, v, cubic)
    return MMD(value, "cubic (x·y / d + 1)³", extractor, (len(a), len(b)), name="KID")


def cmmd(
    x: Tensor,
    y: Tensor,
    *,
    extractor: str,
    weights_x: Tensor | None = None,
    weights_y: Tensor | None = None,
) -> MMD:
    """CMMD: 1000 · squared MMD of embeddings of unit length, RBF kernel of bandwidth 10.

    The published one takes CLIP ViT-L/14 embeddings at 336 pixels and the biased V-statistic, whose
    diagonal adds about 1000 · (1 - E k) · (1/N + 1/M); here the unbiased one, so that sizes may
    differ. Jayasumana et al. 2024, arXiv:2401.09603.

    Args:
        x, y: [N, d] and [M, d] embeddings; scaled to unit length here.
        extractor: what made them.
        weights_x, weights_y: as for `mmd`.

    Raises:
        ValueError: as `mmd`; a row of zeros.
    """
    a, b, w, v = _pair(x, y, extractor, weights_x, weights_y)
    if not ((a.norm(dim=1) > 0).all() and (b.norm(dim=1) > 0).all()):
        raise ValueError("x or y has a row of zeros, which has no direction.")
    a, b = a / a.norm(dim=1, keepdim=True), b / b.norm(dim=1, keepdim=True)
    value = _CMMD_SCALE * _distance(a, b, w, v, _rbf(_CMMD_BANDWIDTH))
    kernel = "RBF on unit embeddings, times 1000"
    return MMD(value, kernel, extractor, (len(a), len(b)), _CMMD_BANDWIDTH, name="CMMD")


def _pair(
    x: Tensor, y: Tensor, extractor: str, weights_x: Tensor | None, weights_y: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    named(extractor)
    a, b = checked("x", x), checked("y", y)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"x has {a.shape[1]} dimensions and y has {b.shape[1]}.")
    return a, b, shares("weights_x", weights_x, len(a)), shares("weights_y", weights_y, len(b))


def _rbf(h: float) -> Kernel:
    def kernel(x: Tensor, y: Tensor) -> Tensor:
        # as a matrix product, far faster in many dimensions; exact to 1e-16 |x|² / h² in float64
        square = x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T
        return square.clamp_(min=0).mul_(-1 / (2 * h * h)).exp_()

    return kernel


def _distance(x: Tensor, y: Tensor, w: Tensor, v: Tensor, kernel: Kernel) -> float:
    across = _mean_kernel(x, y, w, v, kernel)[0]
    return _within(x, w, kernel) + _within(y, v, kernel) - 2 * across


def _within(x: Tensor, w: Tensor, kernel: Kernel) -> float:
    total, diagonal = _mean_kernel(x, x, w, w, kernel)
    return (total - diagonal) / (1 - float(w @ w))


def _mean_kernel(x: Tensor, y: Tensor, w: Tensor, v: Tensor, kernel: Kernel) -> tuple[float, float]:
    """sum_ij w_i v_j k_ij, and its part i = j."""
    total = diagonal = 0.0
    for start in range(0, len(x), _BLOCK):
        k, share = kernel(x[start : start + _BLOCK], y), w[start : start + _BLOCK]
        total += float(share @ k @ v)
        own = k.diagonal(start)
        diagonal += float((share[: len(own)] * own) @ v[start : start + len(own)])
    return total, diagonal


def _median_distance(x: Tensor) -> float:
    some = x[:: -(-len(x) // _MEDIAN_OF)]
    distance = torch.nn.functional.pdist(some)
    median = float(distance.median())
    if median == 0:
        raise ValueError(
            "half of the items coincide, so their median distance is 0: give bandwidth."
        )
    return median
