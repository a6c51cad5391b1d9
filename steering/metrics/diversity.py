"""How much one set of samples varies."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from steering.metrics.features import checked, named


@dataclass(frozen=True)
class Diversity:
    """Mean pairwise cosine distance and what it rests on."""

    value: float  # 0 (all point one way) .. 1 (unrelated) .. N / (N - 1) (opposed)
    extractor: str
    n: int

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        return (
            f"diversity {self.value:.4f} (mean pairwise cosine distance, extractor "
            f"{self.extractor}, {self.n} items)"
        )


def diversity(features: Tensor, *, extractor: str) -> Diversity:
    """Mean cosine distance over all pairs of items.

    mean_{i < j} (1 - cos(f_i, f_j)) = 1 - (|sum_i f_i / |f_i||² - N) / (N (N - 1)).

    Args:
        features: [N, d]. Repeated draws count: an item drawn twice is two rows.
        extractor: what made the features.

    Raises:
        ValueError: N < 2, values that are not finite, a row of zeros, no extractor named.
    """
    named(extractor)
    x = checked("features", features)
    length = x.norm(dim=1, keepdim=True)
    if not (length > 0).all():
        raise ValueError("features has a row of zeros, which has no direction.")
    n = len(x)
    alike = float((x / length).sum(0).square().sum() - n) / (n * (n - 1))
    return Diversity(1 - alike, extractor, n)
