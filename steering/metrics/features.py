"""The one way that metrics take features and weights in."""

from __future__ import annotations

import torch
from torch import Tensor


def named(extractor: str) -> str:
    """The extractor's name; a distance without one means nothing.

    Raises:
        ValueError: no name.
    """
    if not isinstance(extractor, str) or not extractor:
        raise ValueError(f"extractor={extractor!r}: name what made the features.")
    return extractor


def checked(name: str, features: Tensor) -> Tensor:
    """Features [N, d] as float64 on the CPU.

    Raises:
        ValueError: not two-dimensional, N < 2, or not finite.
    """
    x = torch.as_tensor(features).detach().to("cpu", torch.float64)
    if x.ndim != 2:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}: give features [N, d], one row per item."
        )
    if len(x) < 2:
        raise ValueError(f"{name} has {len(x)} item: nothing can be estimated from less than 2.")
    if not x.isfinite().all():
        raise ValueError(f"{name} holds values that are not finite: drop those items first.")
    return x


def shares(name: str, weights: Tensor | None, n: int) -> Tensor:
    """Weights [N] as float64 shares that add to 1; equal ones when None.

    Raises:
        ValueError: wrong shape, negative, not finite, or all on one item.
    """
    if weights is None:
        return torch.full((n,), 1 / n, dtype=torch.float64)
    w = torch.as_tensor(weights).detach().to("cpu", torch.float64)
    if tuple(w.shape) != (n,):
        raise ValueError(f"{name} has shape {tuple(w.shape)}: give one weight per item, ({n},).")
    if not (w.isfinite().all() and (w >= 0).all() and (w > 0).sum() >= 2):
        raise ValueError(f"{name}: give finite weights >= 0, at least two of them above 0.")
    return w / w.sum()
