"""How far to go along a gradient: rules that mean the same at every resolution and batch size.

A rule turns the value [N] and the gradient [N, *D] of a reward at N points into moves [N, *D]. Sums
and norms run over the data of one item, never over the batch.

    polyak      2 · step · gap / |g|² · g          gap = -reward - floor, at least 0
    normalised  step · sigma · sqrt(dim) · g / |g|
    norm        step · g / sqrt(-reward)
    plain       step · g
    adam        step · m / (sqrt(v) + 1e-8), moments of the inner steps so far, new in each step

Polyak's is for rewards that are minus a sum of squares, -|A x - y|². For these g · (x* - x) is
2 · gap for *every* solution x*, so with step = 1 it is the longest move that brings x nearer to all
of them; where A is the identity, or a mask, it arrives. What is left below `floor`, the noise of
the measurement, is not pursued (Morozov's discrepancy principle). The norm rule, DPS's, is for the
same rewards: twice the gradient of -|A x - y|, unsquared.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from steering.gaussian import over_data

RuleName = Literal["polyak", "normalised", "norm", "plain", "adam"]
RULES: tuple[RuleName, ...] = ("polyak", "normalised", "norm", "plain", "adam")
# (reward [N], gradient [N, *D], sigma [N]) -> move [N, *D]
Rule = Callable[[Tensor, Tensor, Tensor], Tensor]

_FIRST, _SECOND, _TINY = 0.9, 0.999, 1e-8  # Adam's decay rates and epsilon


def rule_for(
    name: RuleName | None, reward: Any, step: float, *, squares: RuleName = "polyak"
) -> Rule:
    """The rule of this name, for the inner steps of one step; None is the rule `squares` where the
    reward is minus a sum of squares (its attribute `least_squares`), else normalised."""
    least_squares = getattr(reward, "least_squares", False)
    name = name or (squares if least_squares else "normalised")
    if name in ("polyak", "norm") and not least_squares:
        raise ValueError(
            f"rule={name!r} is for rewards that are minus a sum of squares, such as "
            "measure(A, y): give rule='normalised', or 'plain'."
        )
    if name == "polyak":
        return _polyak(step, float(getattr(reward, "floor", 0.0)))
    if name == "normalised":
        return _normalised(step)
    if name == "norm":
        return _norm(step)
    return _adam(step) if name == "adam" else lambda value, slope, sigma: step * slope


def check_rule(name: object) -> None:
    """ValueError unless `name` is None or the name of a rule."""
    if name is not None and name not in RULES:
        raise ValueError(f"rule={name!r} is unknown: give one of {', '.join(RULES)}, or None.")


def check_step(step: float) -> None:
    """ValueError unless `step` is a finite number, at least 0."""
    if type(step) not in (int, float) or not 0 <= step < math.inf:
        raise ValueError(f"step={step!r}: give a finite number >= 0; 0 is no guidance.")


def _polyak(step: float, floor: float) -> Rule:
    def move(value: Tensor, slope: Tensor, sigma: Tensor) -> Tensor:
        gap = (-value - floor).clamp(min=0)
        square = slope.flatten(1).square().sum(1)
        length = torch.where(square > 0, 2 * step * gap / square, 0.0)
        return over_data(length, slope) * slope

    return move


def _normalised(step: float) -> Rule:
    def move(value: Tensor, slope: Tensor, sigma: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(slope.flatten(1), dim=1)
        length = step * sigma * math.sqrt(slope[0].numel())
        return over_data(torch.where(norm > 0, length / norm, 0.0), slope) * slope

    return move


def _norm(step: float) -> Rule:
    def move(value: Tensor, slope: Tensor, sigma: Tensor) -> Tensor:
        left = (-value).clamp(min=0).sqrt()
        return over_data(torch.where(left > 0, step / left, 0.0), slope) * slope

    return move


def _adam(step: float) -> Rule:
    first = second = torch.zeros(())
    count = 0

    def move(value: Tensor, slope: Tensor, sigma: Tensor) -> Tensor:
        nonlocal first, second, count
        count += 1
        first = _FIRST * first + (1 - _FIRST) * slope
        second = _SECOND * second + (1 - _SECOND) * slope.square()
        mean, square = first / (1 - _FIRST**count), second / (1 - _SECOND**count)
        return step * mean / (square.sqrt() + _TINY)

    return move
