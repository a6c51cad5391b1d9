"""Densities in the plane with an exact denoiser, an exact tilted law, and exact draws from it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from steering.core import Model
from steering.gaussian import GaussianProcess, vp
from tests.exact.gaussian import diffusion_levels


@dataclass(frozen=True)
class Modes:
    """Eight equal normals on a circle, and a reward under which mode k weighs exp(1.5 k).

    reward(x) = log Σ_k ρ_k(x) exp(1.5 k), ρ the responsibilities, makes p · exp(reward) a mixture
    of the same normals exactly. arXiv 2506.20701, section 5.1.
    """

    radius: float = 4.0
    std: float = 0.3
    slope: float = 1.5
    modes: int = 8

    @property
    def means(self) -> Tensor:
        """[K, 2] float64."""
        angle = 2 * math.pi * torch.arange(self.modes, dtype=torch.float64) / self.modes
        return self.radius * torch.stack([angle.cos(), angle.sin()], 1)

    @property
    def weights(self) -> Tensor:
        """[K] float64 of the tilted law."""
        return torch.softmax(self.slope * torch.arange(self.modes, dtype=torch.float64), 0)

    @property
    def log_z(self) -> float:
        tilt = self.slope * torch.arange(self.modes, dtype=torch.float64)
        return float(tilt.logsumexp(0)) - math.log(self.modes)

    def clean(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """E[x_0 | alpha x_0 + sigma z = x]: [N, 2] float64, for alpha, sigma [N, 1]."""
        var = (alpha * self.std) ** 2 + sigma**2
        gap = x[:, None] - alpha[:, None] * self.means  # [N, K, 2]
        resp = torch.softmax(-gap.square().sum(2) / (2 * var), 1)
        pull = alpha * self.std**2 / var
        return (resp[..., None] * (self.means + pull[:, None] * gap)).sum(1)

    def reward(self, x: Tensor, prompts: object = None) -> Tensor:
        """[N] float64 of points [N, 2], or [N, C, 2] summed over copies."""
        gap = (x.double()[..., None, :] - self.means).square().sum(-1) / (2 * self.std**2)
        tilt = self.slope * torch.arange(self.modes, dtype=torch.float64)
        each = (tilt - gap).logsumexp(-1) - (-gap).logsumexp(-1)
        return each.flatten(1).sum(1) if each.dim() > 1 else each

    def near(self, x: Tensor, width: float) -> Tensor:
        """E[exp(-|x - y|² / (2 width²))] over y of the tilted law: [N] for x [N, 2]."""
        var = width**2 + self.std**2
        gap = (x[:, None] - self.means).square().sum(2)
        return width**2 / var * (-gap / (2 * var)).exp() @ self.weights

    def own(self, width: float) -> float:
        """The same for x of the tilted law, too."""
        var = width**2 + 2 * self.std**2
        gap = (self.means[:, None] - self.means).square().sum(2)
        kernel = width**2 / var * (-gap / (2 * var)).exp()
        return float(self.weights @ kernel @ self.weights)

    def draw(self, n: int, generator: torch.Generator, target: bool = True) -> Tensor:
        """[n, 2] float64 exact draws from the tilted law, or from the model's data."""
        law = self.weights if target else torch.ones(self.modes, dtype=torch.float64)
        mode = torch.multinomial(law, n, replacement=True, generator=generator)
        return self.means[mode] + self.std * torch.randn(
            n, 2, generator=generator, dtype=torch.float64
        )


@dataclass(frozen=True)
class Checkerboard:
    """Uniform on the eight dark squares of a 4 x 4 board on [-4, 4]², reward -|x|² / 2.

    arXiv 2506.20701, section 5.1.
    """

    side: float = 2.0

    @property
    def edges(self) -> Tensor:
        """[5] float64, the same on both axes."""
        return self.side * torch.arange(-2, 3, dtype=torch.float64)

    @property
    def dark(self) -> Tensor:
        """[4, 4] float64, 1 on dark squares."""
        cell = torch.arange(4)
        return ((cell[:, None] + cell) % 2 == 0).double()

    @property
    def log_z(self) -> float:
        return math.log(self._total() / (8 * self.side**2))

    def clean(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """E[x_0 | alpha x_0 + sigma z = x]: [N, 2] float64, for alpha, sigma [N, 1]."""
        log_mass, mean = _truncated(x / alpha, sigma / alpha, self.edges)  # [N, 2, 4] each
        cell = log_mass[:, 0, :, None] + log_mass[:, 1, None, :] + self.dark.log()
        cell = torch.softmax(cell.flatten(1), 1).view(-1, 4, 4)
        return torch.stack(
            [(cell.sum(2) * mean[:, 0]).sum(1), (cell.sum(1) * mean[:, 1]).sum(1)], 1
        )

    def reward(self, x: Tensor, prompts: object = None) -> Tensor:
        """[N] float64 of points [N, 2], or [N, C, 2] summed over copies."""
        return -0.5 * x.double().square().flatten(1).sum(1)

    def near(self, x: Tensor, width: float) -> Tensor:
        """E[exp(-|x - y|² / (2 width²))] over y of the tilted law: [N] for x [N, 2]."""
        var = width**2 / (1 + width**2)  # of y under kernel times exp(-y²/2)
        at = (self.edges - (x / (1 + width**2))[..., None]) / math.sqrt(var)  # [N, 2, 5]
        part = math.sqrt(2 * math.pi * var) * torch.special.ndtr(at).diff()
        part = part * (-x.square() / (2 * (1 + width**2))).exp()[..., None]  # [N, 2, 4]
        return torch.einsum("ni,ij,nj->n", part[:, 0], self.dark, part[:, 1]) / self._total()

    def own(self, width: float) -> float:
        """The same for x of the tilted law, too; by Gauss-Legendre quadrature in each cell."""
        node, weight = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(64))
        y = self.edges[:-1, None] + self.side * (node + 1) / 2  # [4, 64]
        mass = self.side / 2 * weight * (-y.square() / 2).exp()
        flat, mass = y.flatten(), mass.flatten()
        kernel = (-(flat[:, None] - flat).square() / (2 * width**2)).exp() * mass[:, None] * mass
        cells = kernel.view(4, 64, 4, 64).sum((1, 3))
        both = torch.einsum("ij,kl,ik,jl->", self.dark, self.dark, cells, cells)
        return float(both) / self._total() ** 2

    def draw(self, n: int, generator: torch.Generator, target: bool = True) -> Tensor:
        """[n, 2] float64 exact draws from the tilted law, or from the model's data."""
        mass = self._mass() if target else torch.ones(4, dtype=torch.float64)
        cell = torch.multinomial(
            (self.dark * mass[:, None] * mass).flatten(), n, replacement=True, generator=generator
        )
        cell = torch.stack([cell // 4, cell % 4], 1)
        u = torch.rand(n, 2, generator=generator, dtype=torch.float64)
        if not target:
            return self.edges[cell] + self.side * u
        below = torch.special.ndtr(self.edges)
        return torch.special.ndtri(below[cell] + u * (below[cell + 1] - below[cell]))

    def _total(self) -> float:
        """∫ exp(-|x|²/2) over the dark squares."""
        mass = self._mass()
        return float((self.dark * mass[:, None] * mass).sum())

    def _mass(self) -> Tensor:
        """[4] ∫ exp(-x²/2) over the cells of one axis."""
        return math.sqrt(2 * math.pi) * torch.special.ndtr(self.edges).diff()


@dataclass(frozen=True)
class Planar:
    """The exact denoiser of a density in the plane, on a chain whose times are its step indices."""

    density: Modes | Checkerboard
    process: GaussianProcess

    def __call__(self, x: Tensor, t: Tensor, row: Tensor) -> Tensor:
        i = t.long().repeat_interleave(x.shape[1])  # copies are independent
        alpha, sigma = self.process.alpha[i, None], self.process.sigma[i, None]
        clean = self.density.clean(x.flatten(0, 1).double(), alpha, sigma)
        return clean.float().view_as(x)

    def rows(self, t: Tensor, row: Tensor) -> Tensor:
        return torch.ones(len(t), dtype=torch.int64)


def planar_chain(
    density: Modes | Checkerboard, steps: int = 50, copies: int = 1, conditions: int = 1
) -> Model:
    """A variance-preserving chain (DDIM, eta = 1) with the exact denoiser.

    States are [N, copies, 2]: independent copies of `density`, which make large rewards rare.
    """
    process = vp((copies, 2), diffusion_levels(steps))
    denoiser = Planar(density, process)
    return Model(denoiser, process, prompts=(None,) * conditions, name=type(density).__name__)


def mmd(x: Tensor, w: Tensor, law: Modes | Checkerboard, width: float = 1.0) -> float:
    """Maximum mean discrepancy of weighted points to the tilted law itself, in closed form.

        MMD² = Σ_ij w_i w_j k(x_i, x_j) - 2 Σ_i w_i E_y k(x_i, y) + E_yy' k(y, y')
        k(x, y) = exp(-|x - y|² / (2 width²))

    A V-statistic of the points: its expectation for n independent draws is of the order 1/sqrt(n).

    Args:
        x: [N, 2]; w: [N] weights that add to 1.
        law: has the expectations over y in closed form.
        width: of the kernel.
    """
    x, w = x.double(), w.double()
    pairs = sum(
        float(c_w @ (-torch.cdist(c_x, x).square() / (2 * width**2)).exp() @ w)
        for c_x, c_w in zip(x.split(1024), w.split(1024), strict=True)
    )
    squared = pairs - 2 * float(w @ law.near(x, width)) + law.own(width)
    return math.sqrt(max(squared, 0.0))


def _truncated(mean: Tensor, std: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
    """N(mean, std²) cut to each interval: log mass and mean.

    Args:
        mean: [N, A]; std: [N, 1]; edges: [C + 1], ascending.

    Returns:
        Two [N, A, C] tensors.
    """
    at = (edges - mean[..., None]) / std[..., None]  # [N, A, C + 1]
    low, high = at[..., :-1], at[..., 1:]
    # in the right tail 1 - Φ is kept, where Φ would round to 1
    flip = low > 0
    near, far = torch.where(flip, low, -high), torch.where(flip, high, -low)
    log_near, log_far = torch.special.log_ndtr(-near), torch.special.log_ndtr(-far)
    log_mass = log_near + torch.log1p(-(log_far - log_near).exp())
    log_phi_low, log_phi_high = -low.square() / 2, -high.square() / 2
    scale = math.log(math.sqrt(2 * math.pi))
    shift = (log_phi_low - scale - log_mass).exp() - (log_phi_high - scale - log_mass).exp()
    inner = mean[..., None] + std[..., None] * shift
    return log_mass, inner.clamp(edges[:-1], edges[1:])
