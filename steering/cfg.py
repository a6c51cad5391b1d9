"""Classifier-free guidance: rules that make one prediction of a pair of them.

A network is asked twice about the same state, for what is wanted (the positive prediction c) and
for what is not (the negative one, u); a rule says what to make of the two. `from_pipeline` takes it
as `cfg=`, and takes w, the scale, as `guidance_scale=`. Rows with w <= 1 and steps that a rule does
not guide use c alone, which costs one network row instead of two. Sums, norms and deviations run
over the data of one item, never over the batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from steering.gaussian import over_data

Space = Literal["output", "clean"]


@runtime_checkable
class ClassifierFree(Protocol):
    """A rule of classifier-free guidance. Stateless: the same arguments give the same answer."""

    @property
    def space(self) -> Space:
        """What it works on: raw network outputs, or the clean guesses that they amount to."""
        ...

    def guided(self, i: Tensor, steps: int) -> Tensor:
        """Which of the steps i [N] out of `steps` are guided: [N] bool, on i's device."""
        ...

    def __call__(self, negative: Tensor, positive: Tensor, scale: Tensor, i: Tensor) -> Tensor:
        """The guided prediction [K, *D] of negative and positive ones [K, *D].

        Args:
            negative, positive: [K, *D] float32 predictions under the two conditions.
            scale: [K] float32 scale w of each item, above 1.
            i: [K] int64 step of each item.
        """
        ...


class _EveryStep:
    """What most rules are like: they guide every step, and work on what the network puts out."""

    space: Space = "output"

    def guided(self, i: Tensor, steps: int) -> Tensor:
        return torch.ones_like(i, dtype=torch.bool)


@dataclass(frozen=True)
class Scale(_EveryStep):
    """Extrapolation, the default: u + w · (c - u).

    Ho and Salimans 2022 (arXiv:2207.12598), in the convention of Imagen: w = 1 is no guidance.
    """

    def __call__(self, negative: Tensor, positive: Tensor, scale: Tensor, i: Tensor) -> Tensor:
        return _extrapolated(negative, positive, scale)


@dataclass(frozen=True)
class Interval:
    """Another rule, in some of the steps only: floor(start · T) <= i < floor(stop · T).

    The other steps are not guided and cost one network row instead of two. Kynkäänniemi et al.
    2024 (arXiv:2404.07724) find guidance harmful at high noise and idle at low noise. They give
    noise levels; these are shares of the steps, counted from the noise, as diffusers counts them,
    so that they mean the same to models with other levels.

    Args:
        start, stop: shares of the steps, 0 <= start < stop <= 1.
        rule: the rule of the guided steps.

    Raises:
        ValueError: numbers that are no such shares, or no rule.
    """

    start: float
    stop: float
    rule: ClassifierFree = Scale()

    def __post_init__(self) -> None:
        shares = (self.start, self.stop)
        if not all(_is_number(share) for share in shares) or not 0 <= self.start < self.stop <= 1:
            raise ValueError(
                f"start={self.start!r}, stop={self.stop!r} is no interval: "
                "give shares of the steps, 0 <= start < stop <= 1."
            )
        check_rule("rule", self.rule)

    @property
    def space(self) -> Space:
        return self.rule.space

    def guided(self, i: Tensor, steps: int) -> Tensor:
        inside = (i >= int(self.start * steps)) & (i < int(self.stop * steps))
        return inside & self.rule.guided(i, steps)

    def __call__(self, negative: Tensor, positive: Tensor, scale: Tensor, i: Tensor) -> Tensor:
        return self.rule(negative, positive, scale, i)


@dataclass(frozen=True)
class Rescale(_EveryStep):
    """Extrapolation brought back to the spread of the positive prediction.

        g = u + w · (c - u)        prediction = phi · g · std(c) / std(g) + (1 - phi) · g

    Against overexposed images at large scales. Lin et al. 2023 (arXiv:2305.08891, section 3.4);
    the pipelines' `guidance_rescale`.

    Args:
        phi: how far, 0 (not at all) to 1.

    Raises:
        ValueError: a phi outside of 0..1.
    """

    phi: float = 0.7

    def __post_init__(self) -> None:
        if not _is_number(self.phi) or not 0 <= self.phi <= 1:
            raise ValueError(f"phi={self.phi!r} is no share: give a number from 0 to 1.")

    def __call__(self, negative: Tensor, positive: Tensor, scale: Tensor, i: Tensor) -> Tensor:
        guided = _extrapolated(negative, positive, scale)
        ratio = positive.flatten(1).std(1) / guided.flatten(1).std(1)
        return guided * over_data(self.phi * ratio + 1 - self.phi, guided)


@dataclass(frozen=True)
class ZeroStar(_EveryStep):
    """CFG-Zero*: the negative prediction is scaled to fit the positive one, and first steps rest.

        s = <c, u> / <u, u>        prediction = s · u + w · (c - s · u), and 0 where i < zero_steps

    Made for velocities of flows, which are poor at the noisy end; 0 leaves a deterministic chain
    where it is. A step that rests still costs its two rows. Fan et al. 2025 (arXiv:2503.18886).

    Args:
        zero_steps: number of first steps that rest.

    Raises:
        ValueError: a zero_steps that is no number of steps.
    """

    zero_steps: int = 1

    def __post_init__(self) -> None:
        steps = self.zero_steps
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
            raise ValueError(f"zero_steps={steps!r} is no number of steps: give an int from 0.")

    def __call__(self, negative: Tensor, positive: Tensor, scale: Tensor, i: Tensor) -> Tensor:
        fitted = _share(positive, negative) * negative
        guided = _extrapolated(fitted, positive, scale)
        return torch.where(over_data(i < self.zero_steps, guided), 0.0, guided)


@dataclass(frozen=True)
class Projected(_EveryStep):
    """Adaptive projected guidance (APG), without its momentum, on clean guesses.

        d = (c - u) · min(1, norm / |c - u|)        d_parallel = <d, c> / <c, c> · c
        prediction = c + (w - 1) · (d - d_parallel + eta · d_parallel)

    What is parallel to c oversaturates. Sadat et al. 2024 (arXiv:2410.02416) write it for
    denoised predictions, and so it is applied here whatever the network puts out. Momentum would
    make a step depend on the steps before it, in which walks that share a state may differ.

    Args:
        eta: how much of the parallel part is kept; 1 with norm=None is `Scale`.
        norm: largest Euclidean length of c - u, over all data of an item; None for no limit.

    Raises:
        ValueError: an eta that is not finite, or a norm that is not above 0.
    """

    eta: float = 0.0
    norm: float | None = None
    space = "clean"

    def __post_init__(self) -> None:
        if not _is_number(self.eta):
            raise ValueError(f"eta={self.eta!r} is no number: give the share to keep, such as 0.")
        if self.norm is not None and not (_is_number(self.norm) and self.norm > 0):
            raise ValueError(f"norm={self.norm!r} is no length: give a number above 0, or None.")

    def __call__(self, negative: Tensor, positive: Tensor, scale: Tensor, i: Tensor) -> Tensor:
        update = positive - negative
        if self.norm is not None:
            length = torch.linalg.vector_norm(update.flatten(1), dim=1)
            update = update * over_data(self.norm / length.clamp(min=self.norm), update)
        update = update - (1 - self.eta) * _share(update, positive) * positive
        return positive + over_data(scale - 1, update) * update


def check_rule(name: str, rule: object) -> None:
    """ValueError unless `rule`, given as the argument `name`, is a rule."""
    if isinstance(rule, type) or not isinstance(rule, ClassifierFree):
        raise ValueError(
            f"{name}={rule!r} is no rule of classifier-free guidance: "
            "give one of steering.cfg, such as cfg.Rescale(0.7)."
        )


def _extrapolated(negative: Tensor, positive: Tensor, scale: Tensor) -> Tensor:
    return negative + over_data(scale, positive) * (positive - negative)


def _share(a: Tensor, b: Tensor) -> Tensor:
    """<a, b> / <b, b> of each item, to multiply b with; 0 where b is 0."""
    a, flat = a.flatten(1), b.flatten(1)
    tiny = torch.finfo(flat.dtype).tiny
    return over_data((a * flat).sum(1) / flat.square().sum(1).clamp(min=tiny), b)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
