"""Estimates over independent repetitions, with their standard errors."""

from __future__ import annotations

import torch
from torch import Tensor


def average(value: Tensor) -> tuple[float, float]:
    """Mean of independent values [R], and its standard error."""
    return float(value.mean()), float(value.std() / len(value) ** 0.5)


def ratio(top: Tensor, bottom: Tensor) -> tuple[float, float]:
    """E[top] / E[bottom] from independent pairs [R], and its standard error by the delta method."""
    value = top.mean() / bottom.mean()
    spread = (top - value * bottom).std() / bottom.mean().abs()
    return float(value), float(spread / len(top) ** 0.5)


def tilted_moments(result, log_z: float) -> dict[str, tuple[float, float]]:
    """What unbiased weights say of the tilted law: Ẑ / Z, and mean and variance of coordinate 0.

    Each repetition (condition) counts by its own Ẑ, whose expectation is Z, so that the ratios are
    consistent over repetitions however few draws each of them has.

    Args:
        result: of `samplers.sample`, one condition per repetition.
        log_z: the truth.

    Returns:
        name -> (estimate, standard error).
    """
    z = (result.log_z - log_z).exp()
    x = result.items.flatten(1)[:, 0].double()

    def total(value: Tensor) -> Tensor:
        return z * torch.zeros_like(z).index_add(0, result.rows, result.weights * value)

    mean = ratio(total(x), z)
    return {"z": average(z), "mean": mean, "var": ratio(total((x - mean[0]) ** 2), z)}
