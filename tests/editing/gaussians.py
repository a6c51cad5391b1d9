"""A denoiser whose conditions are isotropic Gaussians: the exact one, in closed form."""

from __future__ import annotations

import torch
from torch import Tensor

from steering.gaussian import GaussianProcess, ToClean, over_data


class Gaussians:
    """E[x_0 | x_t] for x_0 ~ N(mean[row], spread[row]²) in every coordinate.

        c = m + alpha s² / (alpha² s² + sigma²) · (x - alpha m)

    Counts the rows it was asked for; `cost` [R] is what a call of each condition is said to cost.
    """

    fills = False

    def __init__(self, process: GaussianProcess, mean, spread) -> None:
        self.process, self.grid = process, ToClean(process, "sample")
        self.mean, self.spread = torch.tensor(mean), torch.tensor(spread)
        self.cost = torch.ones(len(mean), dtype=torch.int64)
        self.asked = 0

    def rows(self, t: Tensor, row: Tensor) -> Tensor:
        return self.cost[row]

    def __call__(self, x: Tensor, t: Tensor, row: Tensor) -> Tensor:
        self.asked += len(x)
        i = self.grid.step(t)
        assert (i >= 0).all(), "a time that is not on the grid"
        alpha, sigma = (
            over_data(v[i].float(), x) for v in (self.process.alpha, self.process.sigma)
        )
        mean, spread = (over_data(v[row], x) for v in (self.mean, self.spread))
        gain = alpha * spread**2 / (alpha**2 * spread**2 + sigma**2)
        return mean + gain * (x - alpha * mean)
