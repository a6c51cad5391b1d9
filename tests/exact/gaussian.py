"""Linear-Gaussian chains: the law of the discrete chain itself, pushed forward in float64.

With an affine denoiser every step is x' = A x + b + s z, so that mean and variance at the end, and
log Z under a quadratic reward, are exact for the chain that is run: there is no step-size error.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from steering.core import Model
from steering.gaussian import GaussianProcess, consistency_kernel, flow, vp


@dataclass(frozen=True)
class GaussianChain:
    """E[x_0 | x_t] of data N(mean, diag var), exact: clean = mean + gain · (x - alpha · mean)."""

    process: GaussianProcess
    mean: Tensor  # [D] float64
    gain: Tensor  # [T, D] float64

    def __call__(self, x: Tensor, t: Tensor, row: Tensor) -> Tensor:
        i = t.long()  # the chain's times are its step indices
        alpha = self.process.alpha[i].float()[:, None]
        mean = self.mean.float()
        return mean + self.gain[i].float() * (x - alpha * mean)

    def rows(self, t: Tensor, row: Tensor) -> Tensor:
        return torch.ones(len(t), dtype=torch.int64)

    def law(self) -> tuple[Tensor, Tensor]:
        """Mean and variance [D] float64 of the state that the T-step chain ends in."""
        kernel, process = self.process.kernel, self.process
        mean, var = torch.zeros_like(self.mean), torch.full_like(self.mean, process.prior_std**2)
        for i in range(process.steps):
            alpha, sigma = process.alpha[i], process.sigma[i]
            on_x = kernel.on_x[i] + kernel.on_eps[i] / sigma
            on_clean = kernel.on_clean[i] - kernel.on_eps[i] * alpha / sigma
            slope = on_x + on_clean * self.gain[i]
            offset = on_clean * (1 - self.gain[i] * alpha) * self.mean
            mean, var = slope * mean + offset, slope**2 * var + kernel.std[i] ** 2
        return mean, var


def gaussian_chain(
    mean: float | list[float] = 0.0,
    var: float | list[float] = 1.0,
    steps: int = 50,
    dim: int = 1,
    kind: str = "vp",
    eta: float = 1.0,
    conditions: int = 1,
) -> Model:
    """A model of N(mean, diag var) with its exact denoiser, on our own tables.

    Args:
        mean, var: of the data, a number or one per coordinate.
        steps: T.
        dim: coordinates.
        kind: "vp" (DDPM's linear betas, spread over T steps), "flow" (evenly spaced sigmas), or
            "student" (the levels of "vp", with the clean guess re-noised at every step).
        eta: share of new noise.
        conditions: equal conditions, for independent repetitions in one run.
    """
    if kind == "vp":
        process = vp((dim,), diffusion_levels(steps), eta=eta)
    elif kind == "student":
        alpha_bar = diffusion_levels(steps)
        alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        kernel = consistency_kernel(alpha[1:], sigma[1:])
        process = GaussianProcess((dim,), torch.arange(steps).float(), alpha, sigma, kernel)
    else:
        process = flow((dim,), torch.linspace(1, 0, steps + 1, dtype=torch.float64), eta=eta)
    mean_ = torch.as_tensor(mean, dtype=torch.float64).expand(dim)
    var_ = torch.as_tensor(var, dtype=torch.float64).expand(dim)
    alpha, sigma = process.alpha[:-1, None], process.sigma[:-1, None]
    gain = alpha * var_ / (alpha**2 * var_ + sigma**2)
    denoiser = GaussianChain(process, mean_, gain)
    return Model(denoiser, process, prompts=(None,) * conditions, name=f"gaussian-{kind}")


@dataclass(frozen=True)
class NoisyClassifier:
    """log p(y | x_t) for y = x_0 + noise · normal, x_0 ~ N(·, diag var) the data of a chain: exact.

    x_0 given x_t is normal about the denoiser's guess, of variance 1 / (1/var + alpha²/sigma²).
    """

    chain: GaussianChain
    var: Tensor | float  # [D] float64, or a number
    y: Tensor  # [D]
    noise: float

    def __call__(self, x: Tensor, t: Tensor, row: Tensor) -> Tensor:
        alpha, sigma = self.chain.process.alpha[t.long()], self.chain.process.sigma[t.long()]
        spread = 1 / (1 / self.var + (alpha / sigma).square()[:, None]) + self.noise**2
        off = self.y - self.chain(x, t, row)
        return -(off.square() / spread + (2 * torch.pi * spread).log()).sum(1).float() / 2


def tilted(
    mean: Tensor, var: Tensor, slope: Tensor | float, curve: Tensor | float = 0.0
) -> tuple[Tensor, Tensor, float]:
    """N(mean, diag var) tilted by exp(Σ slope · x - curve · x² / 2), slope and curve times λ.

        precision P = 1/var + curve,  h = mean/var + slope:  N(h/P, 1/P),
        log Z = Σ (h²/P - mean²/var - log(var P)) / 2

    Args:
        mean, var: [D] float64.
        slope, curve: [D] or a number.

    Returns:
        Mean [D], variance [D] and log Z.
    """
    precision = 1 / var + curve
    pull = mean / var + slope
    log_z = (pull**2 / precision - mean**2 / var - (var * precision).log()).sum() / 2
    return pull / precision, 1 / precision, float(log_z)


def diffusion_levels(steps: int) -> Tensor:
    """[T + 1] alpha_bar of DDPM's 1,000 linear betas, spread evenly over T steps, 1 last."""
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    alpha_bar = (1 - beta).cumprod(0)
    at = torch.linspace(999, 999 / steps, steps, dtype=torch.float64).round().long()
    return torch.cat([alpha_bar[at], torch.ones(1, dtype=torch.float64)])
