"""Is the Fréchet distance right? Against scipy's matrix root, closed forms and shards.

    python -m benchmarks.frechet [--quick]

Three parts, each a largest relative error: 50 pairs of random Gaussians against
|m_a - m_b|² + tr(A + B - 2 sqrtm(A B)) with scipy's general matrix square root; pairs whose
covariances commute, or are equal, against the closed form; and moments merged from shards, plain
and weighted, against one pass over the same features.
"""

from __future__ import annotations

import argparse
import warnings

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from benchmarks.report import finish, header
from steering.metrics import Moments, frechet


def gaussian(dim: int, rank: int, rng: torch.Generator) -> Moments:
    """A random mean and a Wishart covariance."""
    root = torch.randn(rank, dim, generator=rng, dtype=torch.float64)
    mean = torch.randn(dim, generator=rng, dtype=torch.float64)
    return Moments(mean, root.T @ root / rank, 10_000)


def by_scipy(a: Moments, b: Moments) -> float:
    """The distance with a general matrix square root, whose imaginary part is rounding."""
    root = scipy.linalg.sqrtm((a.covariance @ b.covariance).numpy())
    trace = float(a.covariance.trace() + b.covariance.trace()) - 2 * float(np.trace(root).real)
    return float((a.mean - b.mean).square().sum()) + trace


def distance(a: Tensor | Moments, b: Tensor | Moments) -> float:
    return float(frechet(a, b, extractor="random"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer dimensions")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    header()
    warnings.simplefilter("ignore")  # few items, on purpose
    rng = torch.Generator().manual_seed(0)
    errors: dict[str, float] = {}

    for dim in (8, 64) if quick else (8, 64, 512):
        worst = 0.0
        for _ in range(50):
            a, b = gaussian(dim, 2 * dim, rng), gaussian(dim, 3 * dim, rng)
            worst = max(worst, abs(distance(a, b) / by_scipy(a, b) - 1))
        errors[f"scipy, {dim} dimensions"] = worst

    worst = 0.0
    for _ in range(50):
        # one basis for both: d² = |m_a - m_b|² + sum (s_a - s_b)² over standard deviations
        basis = torch.linalg.qr(torch.randn(32, 32, generator=rng, dtype=torch.float64)).Q
        deviations = torch.rand(2, 32, generator=rng, dtype=torch.float64) * 3
        means = torch.randn(2, 32, generator=rng, dtype=torch.float64)
        sides = [
            Moments(m, basis * s.square() @ basis.T, 10_000)
            for m, s in zip(means, deviations, strict=True)
        ]
        truth = (means[0] - means[1]).square().sum() + (
            deviations[0] - deviations[1]
        ).square().sum()
        worst = max(worst, abs(distance(*sides) / float(truth) - 1))
    errors["closed form"] = worst

    x = torch.randn(3000, 64, generator=rng, dtype=torch.float64) * 3 + 20
    y = torch.randn(2500, 64, generator=rng, dtype=torch.float64) * 2 + 19
    for label, weights in (("plain", None), ("weighted", torch.rand(3000, generator=rng).double())):
        sizes = [7, 993, 2, 1998]
        parts = [None] * 4 if weights is None else weights.split(sizes)
        shards = [Moments.of(f, w) for f, w in zip(x.split(sizes), parts, strict=True)]
        merged = shards[0].merged(shards[1]).merged(shards[2].merged(shards[3]))
        one_pass = distance(Moments.of(x, weights), y)
        errors[f"shards, {label}"] = abs(distance(merged, y) / one_pass - 1)

    for label, error in errors.items():
        print(f"{label:24} largest relative error {error:.1e}")
    against_scipy = [e for label, e in errors.items() if label.startswith("scipy")]
    finish(
        {
            "max_relative_error": max(against_scipy),
            "closed_form_error": errors["closed form"],
            "shards_error": max(e for label, e in errors.items() if label.startswith("shards")),
            "noise_seed": 0,
        }
    )


if __name__ == "__main__":
    main()
