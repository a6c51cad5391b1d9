"""What a measurement sees of an image: four small linear operators, and measurements made of them.

Each has `A(x)`, images or states [N, C, H, W] of any float type -> float32, differentiable, without
noise; so has the physics of deepinv (`pip install -e ".[physics]"`), which can stand in for them.
A shape that an operator cannot take is a TypeError: no other item would fare better.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from steering.noise import child_key, normal, root_key, uniform

__all__ = ["Blur", "Box", "Downsample", "Random", "forward", "observe"]

_MEASUREMENT = -7  # child of a seed's root key, so that no walk of that seed has the same noise


@dataclass(frozen=True)
class Box:
    """A(x) = x · mask, 0 in a box and 1 around it: box inpainting.

    Args:
        size: side of the box in pixels, or (height, width).
        top, left: its upper left corner in pixels; None centres it.

    Raises:
        ValueError: a size below 1, a corner below 0.
        TypeError: on a call, when the box does not fit into the image.
    """

    size: int | tuple[int, int]
    top: int | None = None
    left: int | None = None

    def __post_init__(self) -> None:
        pair = self.size if isinstance(self.size, tuple) else (self.size, self.size)
        if len(pair) != 2 or not all(_whole(side, least=1) for side in pair):
            raise ValueError(f"size={self.size!r}: give pixels >= 1, or (height, width).")
        for name in ("top", "left"):
            corner = getattr(self, name)
            if corner is not None and not _whole(corner, least=0):
                raise ValueError(f"{name}={corner!r}: give pixels >= 0, or None for the centre.")

    def mask(self, h: int, w: int) -> Tensor:
        """What is seen: [h, w] float32, 1 where it is and 0 in the box."""
        high, wide = self.size if isinstance(self.size, tuple) else (self.size, self.size)
        top = (h - high) // 2 if self.top is None else self.top
        left = (w - wide) // 2 if self.left is None else self.left
        if min(top, left) < 0 or top + high > h or left + wide > w:
            raise TypeError(f"{self} does not fit into {h} x {w}: give a smaller size.")
        mask = torch.ones(h, w)
        mask[top : top + high, left : left + wide] = 0
        return mask

    def A(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H, W] float32."""
        return _images(x, self) * self.mask(*x.shape[-2:]).to(x.device)


@dataclass(frozen=True)
class Random:
    """A(x) = x · mask, 0 at pixels drawn at random: random inpainting.

    The mask is a pure function of `seed`, H and W: the same for all channels, items and calls.

    Args:
        share: of the pixels that is hidden, in [0, 1); to the nearest pixel.
        seed: any integer.

    Raises:
        ValueError: a share out of range, a seed that is not an integer.
    """

    share: float
    seed: int = 0

    def __post_init__(self) -> None:
        if not (_number(self.share) and 0 <= self.share < 1):
            raise ValueError(f"share={self.share!r}: give a number in [0, 1).")
        if not _whole(self.seed):
            raise ValueError(f"seed={self.seed!r}: give an integer.")

    def mask(self, h: int, w: int) -> Tensor:
        """What is seen: [h, w] float32, 1 where it is and 0 at hidden pixels."""
        return _random_mask(self.share, self.seed, h, w).clone()

    def A(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H, W] float32."""
        return _images(x, self) * _random_mask(self.share, self.seed, *x.shape[-2:]).to(x.device)


@lru_cache(maxsize=8)  # a mask of a million pixels takes longer than a step's other arithmetic
def _random_mask(share: float, seed: int, h: int, w: int) -> Tensor:
    with torch.inference_mode(False):  # what is kept must do for gradients too
        drawn = uniform(root_key(seed, torch.zeros(1, dtype=torch.int64)), (h * w,))[0]
        mask = torch.ones(h * w)
        mask[drawn.argsort()[: round(share * h * w)]] = 0
        return mask.view(h, w)


@dataclass(frozen=True)
class Downsample:
    """A(x) = the mean of each factor x factor block: super-resolution.

    Args:
        factor: 2, 4 or any whole number; must divide H and W.

    Raises:
        ValueError: a factor below 1.
        TypeError: on a call, when it does not divide H and W.
    """

    factor: int

    def __post_init__(self) -> None:
        if not _whole(self.factor, least=1):
            raise ValueError(f"factor={self.factor!r}: give a whole number >= 1.")

    def A(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H / factor, W / factor] float32."""
        x = _images(x, self)
        h, w = x.shape[-2:]
        if h % self.factor or w % self.factor:
            raise TypeError(f"{self} does not divide {h} x {w}: give a factor of both.")
        return functional.avg_pool2d(x, self.factor)


@dataclass(frozen=True)
class Blur:
    """A(x) = x convolved with a Gaussian, mirrored at the edges: deblurring.

    Separable: R x C^T, with one matrix per axis that holds the kernel and the mirror.

    Args:
        sigma: standard deviation in pixels, > 0.
        size: pixels of the kernel a side, odd; None is 2 ceil(3 sigma) + 1. Its sum is 1.

    Raises:
        ValueError: a sigma that is not above 0, a size that is not odd.
        TypeError: on a call, when the kernel reaches beyond the mirrored image.
    """

    sigma: float
    size: int | None = None

    def __post_init__(self) -> None:
        if not (_number(self.sigma) and 0 < self.sigma < math.inf):
            raise ValueError(f"sigma={self.sigma!r}: give pixels above 0.")
        if self.size is not None and not (_whole(self.size, least=1) and self.size % 2):
            raise ValueError(f"size={self.size!r}: give an odd number of pixels, or None.")

    def A(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H, W] float32."""
        x = _images(x, self)
        rows, columns = (self._along(n).to(x.device) for n in x.shape[-2:])
        return rows @ x @ columns.T

    def _along(self, n: int) -> Tensor:
        """[n, n] float32: row i has what pixels give to pixel i."""
        reach = math.ceil(3 * self.sigma) if self.size is None else self.size // 2
        if reach >= n:
            raise TypeError(
                f"{self} reaches {reach} pixels, which a side of {n} cannot mirror: give a "
                "smaller sigma or size."
            )
        offset = torch.arange(-reach, reach + 1)
        kernel = (-(offset.double() ** 2) / (2 * self.sigma**2)).exp()
        source = (torch.arange(n)[:, None] + offset).abs()  # [n, size], mirrored at 0
        source = (n - 1) - ((n - 1) - source).abs()  # and at n - 1
        matrix = torch.zeros(n, n, dtype=torch.float64)
        return matrix.scatter_add_(1, source, (kernel / kernel.sum()).expand(n, -1)).float()


def forward(A: Any) -> Callable[[Tensor], Tensor]:
    """x -> A x without noise: `A.A` where there is one, else `A` itself.

    Calling the physics of deepinv would add noise, anew at each call.

    Raises:
        TypeError: neither can be called.
    """
    own: Callable[[Tensor], Tensor] = getattr(A, "A", A)
    if isinstance(A, type) or not callable(own):
        what = f"the class {A.__name__}" if isinstance(A, type) else f"a {type(A).__name__}"
        raise TypeError(
            f"A is {what}: give an object with a method A(x), as steering.operators.Box(8) has, "
            "or a function of x."
        )
    return own


def observe(A: Any, x: Tensor, noise: float = 0.0, seed: int = 0) -> Tensor:
    """Measurements y = A x + noise · z: the noise is drawn here, once.

    Args:
        A: an operator, see `forward`.
        x: [N, C, H, W] images or states.
        noise: standard deviation, >= 0, in the units of A x.
        seed: z of item n is a pure function of it and n.

    Returns:
        [N, ...] float32.

    Raises:
        TypeError, ValueError: `A` cannot be called, `noise` is negative.
    """
    if not (_number(noise) and 0 <= noise < math.inf):
        raise ValueError(f"noise={noise!r}: give a standard deviation >= 0.")
    with torch.no_grad():
        y = forward(A)(x.float()).float()
    if noise == 0:
        return y
    key = child_key(root_key(seed, torch.arange(len(y), device=y.device)), _MEASUREMENT)
    return y + noise * normal(key, y.shape[1:])


def _images(x: Tensor, operator: Any) -> Tensor:
    if not isinstance(x, Tensor) or x.ndim != 4 or not x.is_floating_point():
        what = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{operator} was given {what}: it takes floats [N, C, H, W].")
    return x.float()


def _number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _whole(value: Any, least: float = -math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
