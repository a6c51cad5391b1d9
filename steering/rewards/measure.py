"""How well an item explains a measurement: the reward of inverse problems."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from functools import cached_property
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor

from steering.operators import forward
from steering.pipelines.request import digest
from steering.rewards.card import Card
from steering.rewards.compose import Composable, name_of


def measure(
    A: Any,
    y: Tensor | Mapping[Any, Tensor],
    *,
    noise: float = 0.0,
    space: Literal["items", "states"] = "items",
) -> Measure:
    """reward(x) = -|A x - y|², how well an item explains a measurement; differentiable.

    Args:
        A: an object with a differentiable method A(x), such as those of `steering.operators` or
            deepinv's physics, or a function of images [N, C, H, W] in [0, 1] -> [N, ...].
        y: what was measured: of one item, for all; or a dict, one by prompt; or [N, ...] of the N
            items of a batch.
        noise: standard deviation of y's noise; what it alone leaves is not pursued. λ = 1 / (2
            noise²) draws from p(x | y).
        space: "items" (images), or "states": A is of clean states, and nothing is decoded.

    Returns:
        A `steering.rewards.Measure`; what it raises is told there.
    """
    return Measure(A, y, noise, space)


@dataclass(frozen=True, eq=False)
class Measure(Composable):
    """reward(x) = -|A x - y|², summed over the measurement, per item; differentiable.

    Range (-inf, 0]; float32 in and out. With noise of standard deviation s in y, λ = 1 / (2 s²)
    draws from p(x | y).

    Noise is drawn once, when y is made (`steering.operators.observe`): of an object with a method
    `A` only that is used, so that deepinv's physics adds none.

    Args:
        A: an object with a differentiable method A(x), images [N, C, H, W] in [0, 1] -> [N, ...],
            like those of `steering.operators`, or any such function.
        y: one measurement [...] or [1, ...] for all items; or one for each prompt, a dict of them.
            [N, ...] with N > 1 are those of the N items of a call, in their order: for one batch
            of a pipeline, whose prompts keep their order. A sampler's calls do not: give it a dict.
        noise: standard deviation of the noise in y, >= 0; 0 where there is none.
        space: "items", or "states": then it is a reward of clean states, not of what they decode
            to, as in inpainting with a mask in latent space.

    Attributes:
        differentiable: True.
        least_squares: True: guidances may choose their step for a square.
        floor: noise² times the numbers in one measurement: what noise alone leaves of |A x - y|².
            Below it there is nothing to explain, and guidances stop (Morozov's discrepancy).
        of_states: whether it takes states.

    Raises:
        TypeError: `A` cannot be called, `y` is no tensor of floats; on a call, when what `A` puts
            out does not match `y`, or `y` has no entry for a prompt.
        ValueError: `y` is empty, has a value that is not finite, or has measurements of unlike
            size; `noise` is negative; an unknown `space`.
    """

    A: Any
    y: Tensor | Mapping[Any, Tensor]  # kept in float32
    noise: float = 0.0
    space: Literal["items", "states"] = "items"
    differentiable: bool = field(default=True, init=False)
    least_squares: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        forward(self.A)
        several = isinstance(self.y, Mapping)
        measurements = dict(self.y) if isinstance(self.y, Mapping) else {None: self.y}
        for prompt, y in measurements.items():
            name = f"y[{prompt!r}]" if several else "y"
            if not isinstance(y, Tensor) or not y.is_floating_point() or y.ndim == 0:
                what = f"{y.dtype} {list(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
                raise TypeError(
                    f"{name} is {what}: give a tensor of floats of one dimension or more, or a "
                    "dict of them."
                )
            if y.numel() == 0 or not y.isfinite().all():
                bad = f"of shape {list(y.shape)}" if y.numel() == 0 else "with nan or inf"
                raise ValueError(f"{name} is a tensor {bad}: give finite numbers.")
            measurements[prompt] = y.detach().float()
        if len({_numbers(y) for y in measurements.values()}) != 1:
            shapes = [list(y.shape) for y in measurements.values()]
            raise ValueError(f"y has shapes {shapes}: give at least one, all of one shape.")
        if not isinstance(self.noise, Real) or not 0 <= self.noise < math.inf:
            raise ValueError(f"noise={self.noise!r}: give a standard deviation >= 0.")
        if self.space not in ("items", "states"):
            raise ValueError(f"space={self.space!r}: give 'items' or 'states'.")
        object.__setattr__(self, "y", measurements if several else measurements[None])

    @property
    def of_states(self) -> bool:
        """Is it a reward of clean states, not of what they decode to?"""
        return self.space == "states"

    @property
    def floor(self) -> float:
        """What noise alone leaves of |A x - y|²: noise² times the numbers in one measurement."""
        y = next(iter(self.y.values())) if isinstance(self.y, Mapping) else self.y
        return float(self.noise) ** 2 * _numbers(y)

    @cached_property
    def name(self) -> str:
        """For tables, and for records: other measurements have other names."""
        operator = repr(self.A) if is_dataclass(self.A) else name_of(self.A)
        y = self.y.items() if isinstance(self.y, Mapping) else [(None, self.y)]
        told = [f"{prompt!r} {digest(seen)}" for prompt, seen in y]
        told += [operator, repr(self.noise), self.space]
        told = hashlib.blake2b(repr(told).encode(), digest_size=4).hexdigest()
        return f"measure({name_of(self.A)} #{told})"

    @property
    def card(self) -> Card:
        """Facts."""
        return Card(
            higher="what is measured of an item is nearer to y, in squared units of y",
            range=(-math.inf, 0.0),
            differentiable=True,
            memory=None,
            source=name_of(self.A),
            notes="reads the prompt only where y is a dict",
        )

    def __call__(self, items: Tensor, prompts: Sequence[Any]) -> Tensor:
        seen = forward(self.A)(items.float())
        if not isinstance(seen, Tensor) or seen.shape[:1] != items.shape[:1]:
            what = list(seen.shape) if isinstance(seen, Tensor) else type(seen).__name__
            raise TypeError(
                f"A put out {what} for {len(items)} items {list(items.shape)}: it must return one "
                "measurement per item, a tensor [N, ...]."
            )
        y = self._of(prompts, seen).to(seen.device)
        return -(seen.float() - y).reshape(len(items), -1).square().sum(1)

    def _of(self, prompts: Sequence[Any], seen: Tensor) -> Tensor:
        """Measurements [N, ...] or [1, ...] of N items, of which `seen` [N, ...] is seen."""
        n, one = len(seen), seen.shape[1:]
        if isinstance(self.y, Mapping):
            missing = [prompt for prompt in prompts if prompt not in self.y]
            if missing:
                raise TypeError(
                    f"y has no measurement for prompt {missing[0]!r}: it has {list(self.y)[:5]}."
                )
            given, shapes = [self.y[prompt] for prompt in prompts], (one, (1, *one))
        else:
            given, shapes = [self.y], (one, (1, *one), (n, *one))
        for y in given:
            # `floor` had to guess from y alone whether its first dimension counts items
            if y.shape not in shapes or (self.noise and _numbers(y) != one.numel()):
                raise TypeError(
                    f"A puts out {list(one)} for each of {n} items, and y has shape "
                    f"{list(y.shape)}: give one measurement {[1, *one]} for all, or a dict with "
                    "one for each prompt."
                )
        return torch.cat([y.reshape(-1, *one) for y in given])


def _numbers(y: Tensor) -> int:
    """Numbers in one measurement, if y is a vector or an image [C, H, W], or several of them."""
    return y.numel() if y.ndim in (1, 3) else y[0].numel()
