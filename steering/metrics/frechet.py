"""Fréchet distance between Gaussians fitted to features."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from steering.metrics.features import checked, named, shares

FEW = 2048  # below this the distance of two equal laws is mostly bias; the usual FID uses 50,000


@dataclass(frozen=True)
class Moments:
    """Mean and covariance of features, and how many items they rest on."""

    mean: Tensor  # [d] float64
    covariance: Tensor  # [d, d] float64
    n: float  # items; with weights, the effective number (sum w)² / sum w²
    weight: float | None = None  # sum of the weights; None = n, every item weighs 1

    @staticmethod
    def of(features: Tensor, weights: Tensor | None = None) -> Moments:
        """Moments of features [N, d], weighted by weights [N] of independent items.

        The covariance is sum_i w_i (f_i - m)(f_i - m)' / (1 - sum_i w_i²): unbiased, and the usual
        1/(N - 1) for equal weights.

        Raises:
            ValueError: N < 2, values that are not finite, features that do not vary, bad weights.
        """
        x = checked("features", features)
        if (x == x[0]).all():
            raise ValueError("features do not vary at all: the extractor ignores its input.")
        w = shares("weights", weights, len(x))
        mean = w @ x
        centred = x - mean
        squares = float(w @ w)
        covariance = (centred * w[:, None]).T @ centred / (1 - squares)
        total = len(x) if weights is None else float(torch.as_tensor(weights).double().sum())
        return Moments(mean, covariance, 1 / squares, total)

    def merged(self, other: Moments) -> Moments:
        """Moments of the two sets together, as if they had been one.

        With W = sum w, n = W² / sum w² and d = m_a - m_b of disjoint sets a and b:
        m = (W_a m_a + W_b m_b) / W and
        W (1 - 1/n) C = W_a (1 - 1/n_a) C_a + W_b (1 - 1/n_b) C_b + (W_a W_b / W) d d'.
        Chan, Golub, LeVeque 1983, "Algorithms for computing the sample variance".

        Raises:
            ValueError: dimensions differ.
        """
        if len(self.mean) != len(other.mean):
            raise ValueError(
                f"other has {len(other.mean)} features, these {len(self.mean)}: use one extractor."
            )
        a, b = (s.n if s.weight is None else s.weight for s in (self, other))
        total = a + b
        n = total**2 / (a**2 / self.n + b**2 / other.n)
        apart = self.mean - other.mean
        scatter = a * (1 - 1 / self.n) * self.covariance + b * (1 - 1 / other.n) * other.covariance
        scatter = scatter + a * b / total * torch.outer(apart, apart)
        mean = (a * self.mean + b * other.mean) / total
        return Moments(mean, scatter / (total * (1 - 1 / n)), n, total)


@dataclass(frozen=True)
class Frechet:
    """A Fréchet distance and what it rests on."""

    value: float  # squared distance, in squared units of the features
    extractor: str
    n: tuple[float, float]  # items on each side; effective numbers where weighted

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        a, b = (f"{n:.0f}" for n in self.n)
        return f"Fréchet distance {self.value:.4f} (extractor {self.extractor}, {a} against {b})"


def frechet(a: Tensor | Moments, b: Tensor | Moments, *, extractor: str) -> Frechet:
    """Fréchet distance of the Gaussians that fit two sets of features.

    d² = |m_a - m_b|² + tr(C_a + C_b - 2 (C_a^½ C_b C_a^½)^½), in float64; both roots by symmetric
    eigendecomposition, so covariances of low rank need no jitter. Heusel et al. 2017,
    arXiv:1706.08500. Biased upwards for few items, so compare only at equal N.

    Args:
        a, b: features [N, d], or their `Moments`.
        extractor: what made the features; distances of two extractors cannot be compared.

    Raises:
        ValueError: N < 2, values that are not finite, dimensions that differ, no extractor named.
    """
    named(extractor)
    first, second = (side if isinstance(side, Moments) else Moments.of(side) for side in (a, b))
    if len(first.mean) != len(second.mean):
        raise ValueError(
            f"a has {len(first.mean)} features and b has {len(second.mean)}: use one extractor."
        )
    few = min(first.n, second.n)
    if few < FEW:
        warnings.warn(
            f"Fréchet distance from {few:.0f} items in {len(first.mean)} dimensions: biased "
            f"upwards below {FEW}. Compare only at equal numbers.",
            stacklevel=2,
        )
    values, vectors = torch.linalg.eigh(first.covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ second.covariance @ root).clamp(min=0).sqrt().sum()
    trace = first.covariance.trace() + second.covariance.trace() - 2 * cross
    distance = (first.mean - second.mean).square().sum() + trace
    return Frechet(max(float(distance), 0.0), extractor, (first.n, second.n))
