"""Gaussian chains: variance-preserving diffusion, rectified flow, consistency re-noising.

All share one form. A state at step i is x_i = alpha_i · clean + sigma_i · noise, and one step is

    x_{i+1} ~ N(on_x · x_i + on_clean · bound(clean) + on_eps · eps, std²)
    eps = (x_i - alpha_i · clean) / sigma_i

with four tables over i. eps comes from the raw guess and bound(clean) from the clipped one, as
diffusers' DDIM has it. Variance-exploding chains run here too: x_ve / sqrt(sigma_ve² + 1) is
variance-preserving with alpha = 1 / sqrt(sigma_ve² + 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from steering.noise import normal

Prediction = Literal["epsilon", "v_prediction", "sample", "flow"]


@dataclass(frozen=True, eq=False)
class NormalTransition:
    """N(mean, std²) independently in every coordinate; std = 0 is a deterministic step."""

    mean: Tensor  # [N, *D] float32
    std: Tensor  # [N] float32

    def sample(self, key: Tensor) -> Tensor:
        """mean + std · z(key): [N, *D], for key [N] int64 on the mean's device."""
        # looking at std is free on the CPU and spares a draw; elsewhere it waits for the device
        if self.std.device.type == "cpu" and not self.std.any():
            return self.mean
        noise = normal(key, self.mean.shape[1:])
        return self.mean + over_data(self.std, noise) * noise

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density [N] float64 of x [N, *D], summed over the data; 0 where std = 0."""
        size = math.prod(self.mean.shape[1:])
        std = self.std.double()
        moves = std > 0
        scale = torch.where(moves, std, 1.0)
        square = (x.double() - self.mean.double()).flatten(1).square().sum(1) / scale**2
        density = -0.5 * square - size * (scale.log() + 0.5 * math.log(2 * math.pi))
        return torch.where(moves, density, 0.0)


@dataclass(frozen=True, eq=False)
class Kernel:
    """The four tables of a step (the module's formula), one entry per step."""

    on_x: Tensor  # [T] float64
    on_clean: Tensor  # [T] float64
    on_eps: Tensor  # [T] float64
    std: Tensor  # [T] float64


def ddim_kernel(
    alpha: Tensor, sigma: Tensor, alpha_to: Tensor, sigma_to: Tensor, eta: float
) -> Kernel:
    """Jump to the clean guess and come back up with old noise, new noise, or both.

        x' = alpha' · clean + sqrt(sigma'² - s²) · eps + s · z
        s  = eta · sigma' · sqrt(1 - (alpha · sigma' / (alpha' · sigma))²)

    DDIM (arXiv:2010.02502) when alpha² + sigma² = 1: eta = 0 is the ODE step, eta = 1 the ancestral
    one. On a rectified flow (alpha = 1 - sigma, arXiv:2209.03003) eta = 0 is the Euler step, and
    eta = 1 the Gaussian bridge between the two levels, not singular at sigma = 1.

    Args:
        alpha, sigma: [T] float64 level that each step leaves; sigma > 0.
        alpha_to, sigma_to: [T] float64 level that it reaches; alpha_to > 0.
        eta: share of new noise, 0..1.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta={eta} is no share of noise: give a number from 0 (ODE) to 1.")
    kept = (alpha * sigma_to / (alpha_to * sigma)).square()
    std = eta * sigma_to * (1 - kept).clamp(min=0).sqrt()
    std = torch.where(std < 1e-7 * sigma, 0.0, std)  # rounding of a step that stays where it is
    return Kernel(
        torch.zeros_like(alpha),
        alpha_to,
        (sigma_to.square() - std.square()).clamp(min=0).sqrt(),
        std,
    )


def ddpm_kernel(
    alpha: Tensor, sigma: Tensor, alpha_to: Tensor, sigma_to: Tensor, large: bool = False
) -> Kernel:
    """The posterior q(x' | x, clean) of the forward chain (arXiv:2006.11239, eq. 7).

        r    = alpha² / alpha'²
        mean = alpha' · (1 - r) / sigma² · clean + sqrt(r) · sigma'² / sigma² · x
        std² = (1 - r) · sigma'² / sigma², or 1 - r when `large`

    Differs from DDIM with eta = 1 in using the clipped guess throughout.

    Args:
        alpha, sigma, alpha_to, sigma_to: [T] float64 levels left and reached, alpha² + sigma² = 1.
        large: the wider of the paper's two variances.
    """
    r = (alpha / alpha_to).square()
    variance = 1 - r if large else (1 - r) * sigma_to.square() / sigma.square()
    return Kernel(
        r.sqrt() * sigma_to.square() / sigma.square(),
        alpha_to * (1 - r) / sigma.square(),
        torch.zeros_like(alpha),
        torch.where(variance > 1e-14, variance, 0.0).sqrt(),
    )


def consistency_kernel(alpha_to: Tensor, sigma_to: Tensor) -> Kernel:
    """Re-noise the clean guess: x' = alpha' · clean + sigma' · z, as few-step students do.

    Consistency models (arXiv:2303.01469, alg. 1). Args: [T] float64 levels reached.
    """
    zero = torch.zeros_like(alpha_to)
    return Kernel(zero, alpha_to, zero, sigma_to)


@dataclass(frozen=True)
class Clamp:
    """Clean guesses clipped to [-limit, limit]."""

    limit: float = 1.0

    def __call__(self, clean: Tensor) -> Tensor:
        return clean.clamp(-self.limit, self.limit)


@dataclass(frozen=True)
class DynamicThreshold:
    """Clipped to each item's own quantile of |clean|, between 1 and `ceiling`, and rescaled by it.

    Imagen (arXiv:2205.11487, section 2.3).

    Args:
        quantile: of the item's absolute values.
        ceiling: largest threshold.
    """

    quantile: float = 0.995
    ceiling: float = 1.0

    def __call__(self, clean: Tensor) -> Tensor:
        limit = clean.flatten(1).abs().quantile(self.quantile, dim=1).clamp(1, self.ceiling)
        limit = over_data(limit, clean)
        return clean.clamp(-limit, limit) / limit


@dataclass(frozen=True, eq=False)
class GaussianProcess:
    """A chain of normal steps, vectorised over particles at different steps.

    Args:
        shape: D, shape of one state.
        times: [T] float32 what the network is told at each step.
        alpha, sigma: [T + 1] float64 levels; the last is what the last step reaches.
        kernel: the steps.
        prior_std: standard deviation of states at step 0.
        bound: clips clean guesses, [N, *D] -> [N, *D]; each item by itself.

    Raises:
        ValueError: tables of other lengths, no step, or a step that leaves a level without noise.
    """

    shape: tuple[int, ...]
    times: Tensor
    alpha: Tensor
    sigma: Tensor
    kernel: Kernel
    prior_std: float = 1.0
    bound: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        T = len(self.times)
        lengths = [len(self.alpha) - 1, len(self.sigma) - 1, len(self.kernel.std)]
        if T == 0 or lengths != [T] * 3:
            raise ValueError(
                f"times has {T} entries, and alpha - 1, sigma - 1, kernel have {lengths}: "
                "all must be the number of steps, at least one."
            )
        if not (self.sigma[:-1] > 0).all():
            raise ValueError("sigma has a zero before its last entry: every step must leave noise.")

    @property
    def steps(self) -> int:
        return len(self.times)

    @property
    def stochastic(self) -> Tensor:
        return (self.kernel.std > 0).cpu()

    def prior(self, key: Tensor) -> Tensor:
        return self.prior_std * normal(key, self.shape)

    def time(self, i: Tensor) -> Tensor:
        return _rows(self.times, i)

    def transition(self, x: Tensor, i: Tensor, clean: Tensor) -> NormalTransition:
        on_x, on_bound, on_raw, std = _rows(self._table, i).unbind(1)
        mean = over_data(on_x, x) * x
        if self.bound is None:
            mean = mean + over_data(on_bound + on_raw, x) * clean
        else:
            bounded = self.bound(clean)
            mean = mean + over_data(on_bound, x) * bounded + over_data(on_raw, x) * clean
        return NormalTransition(mean, std)

    def carry(self, i: Tensor) -> Tensor:
        """How far the next states go when clean guesses are moved by 1: [N] float32, for steps i.

        The other end of the line through the state is held: on a flow (alpha + sigma = 1) the
        velocity, so that both ends move, on a diffusion the noise,

            on_x · (alpha + k · sigma) + on_clean + k · on_eps,        k = 1 on a flow, else 0

        which is 1 for Euler's step on a flow and alpha' for DDIM's.
        """
        return _rows(self._carry, i)

    def to(self, device: torch.device | str) -> GaussianProcess:
        """The same chain with its tables on another device.

        Raises:
            ValueError: a device without float64, which the tables are kept in.
        """
        if torch.device(device).type == "mps":
            raise ValueError(f"device={str(device)!r} has no float64: use cuda or cpu.")
        kernel = Kernel(*(table.to(device) for table in vars(self.kernel).values()))
        tables = {name: getattr(self, name).to(device) for name in ("times", "alpha", "sigma")}
        return replace(self, kernel=kernel, **tables)

    @cached_property
    def straight(self) -> bool:
        """Is this a flow, alpha + sigma = 1 at every level?"""
        return bool(((self.alpha + self.sigma - 1).abs() < 1e-6).all())

    @cached_property
    def _carry(self) -> Tensor:
        """[T] float32."""
        k, held = self.kernel, float(self.straight)
        along = self.alpha[:-1] + held * self.sigma[:-1]
        return (k.on_x * along + k.on_clean + held * k.on_eps).float()

    @cached_property
    def _table(self) -> Tensor:
        """[T, 4] float32: the mean's weights of x, bound(clean) and raw clean, and std."""
        k, alpha, sigma = self.kernel, self.alpha[:-1], self.sigma[:-1]
        columns = [k.on_x + k.on_eps / sigma, k.on_clean, -k.on_eps * alpha / sigma, k.std]
        return torch.stack(columns, 1).float()


def vp(
    shape: tuple[int, ...],
    alpha_bar: Tensor,
    *,
    times: Tensor | None = None,
    eta: float = 1.0,
    bound: Callable[[Tensor], Tensor] | None = None,
) -> GaussianProcess:
    """The DDIM chain through given levels.

    Args:
        shape: D.
        alpha_bar: [T + 1] products of the forward chain, noise first, usually 1 last.
        times: [T] network times; the step index when None.
        eta: see `ddim_kernel`.
        bound: clips clean guesses.
    """
    alpha_bar = torch.as_tensor(alpha_bar, dtype=torch.float64)
    return _through(shape, alpha_bar.sqrt(), (1 - alpha_bar).sqrt(), times, eta, bound)


def flow(
    shape: tuple[int, ...], sigma: Tensor, *, times: Tensor | None = None, eta: float = 1.0
) -> GaussianProcess:
    """The rectified flow x = (1 - sigma) · clean + sigma · noise through given levels.

    Args:
        shape: D.
        sigma: [T + 1] levels, noise (1) first, usually 0 last.
        times: [T] network times; the step index when None.
        eta: 0 is the Euler step of the ODE, 1 the Gaussian bridge; see `ddim_kernel`.
    """
    sigma = torch.as_tensor(sigma, dtype=torch.float64)
    return _through(shape, 1 - sigma, sigma, times, eta, None)


@dataclass(frozen=True, eq=False)
class ToClean:
    """Turns what a network puts out into its guess of the clean end, raw and unclipped.

        epsilon: (x - sigma · out) / alpha        v_prediction: alpha · x - sigma · out
        sample:  out                              flow:         x - sigma · out

    v is that of arXiv:2202.00512; a flow's velocity is noise - clean. A time that is not on the
    chain's grid gives nan: its level is not known.

    Args:
        process: whose levels and times.
        prediction: what the network was trained to put out.

    Raises:
        ValueError: an unknown prediction, or epsilon where a level holds no signal (alpha = 0).
    """

    process: GaussianProcess
    prediction: Prediction

    def __post_init__(self) -> None:
        if self.prediction not in ("epsilon", "v_prediction", "sample", "flow"):
            raise ValueError(
                f"prediction={self.prediction!r} is not known: "
                "give epsilon, v_prediction, sample or flow."
            )
        if self.prediction == "epsilon" and not (self.process.alpha > 0).all():
            raise ValueError(
                "prediction='epsilon' has no clean guess at a level without signal (alpha = 0, "
                "zero terminal SNR): use a v_prediction model, or a schedule that is not rescaled."
            )

    def __call__(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Clean guesses [N, *D] from output and x [N, *D] at network times t [N]."""
        if self.prediction == "sample":
            return output
        alpha, sigma = (over_data(level, x) for level in self._table[:, self.step(t)])
        if self.prediction == "epsilon":
            return (x - sigma * output) / alpha
        if self.prediction == "v_prediction":
            return alpha * x - sigma * output
        return x - sigma * output

    def step(self, t: Tensor) -> Tensor:
        """Steps [N] int64 of network times t [N], on the chain's device; -1 off its grid."""
        times, order = self._sorted
        at = torch.searchsorted(times, t.to(times)).clamp(max=len(times) - 1)
        return torch.where(times[at] == t, order[at], -1)

    @cached_property
    def _sorted(self) -> tuple[Tensor, Tensor]:
        times, order = self.process.times.sort()
        return times, order

    @cached_property
    def _table(self) -> Tensor:
        """[2, T + 1] float32: alpha and sigma that each step leaves; nan last, where -1 points."""
        table = torch.stack([self.process.alpha, self.process.sigma]).float()
        table[:, -1] = torch.nan
        return table


def _through(shape, alpha: Tensor, sigma: Tensor, times, eta: float, bound) -> GaussianProcess:
    if times is None:
        times = torch.arange(len(alpha) - 1)
    kernel = ddim_kernel(alpha[:-1], sigma[:-1], alpha[1:], sigma[1:], eta)
    times = torch.as_tensor(times, dtype=torch.float32)
    return GaussianProcess(tuple(shape), times, alpha, sigma, kernel, bound=bound)


def _rows(table: Tensor, i: Tensor) -> Tensor:
    return table[i.to(table.device)]


def over_data(value: Tensor, x: Tensor) -> Tensor:
    """[N] -> [N, 1, ...], to broadcast over the data of x [N, *D]."""
    return value.view(-1, *[1] * (x.dim() - 1))
