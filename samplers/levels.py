"""Steps at which particles are compared on their way from noise to data."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from samplers.core import Plan


def check_levels(levels: tuple[int, ...] | None) -> None:
    """Raise ValueError unless `levels` is a tuple (or a list), or None."""
    if not isinstance(levels, (tuple, list, type(None))):
        raise ValueError(f"levels={levels!r}: give a tuple of step indices, or None.")


def usable_levels(
    plan: Plan,
    given: tuple[int, ...] | None,
    usual: Iterable[int],
    name: str,
    *,
    apart: bool = False,
) -> list[int]:
    """Levels, ascending, each with a step that draws noise after it.

    Args:
        plan: the run.
        given: step indices in 1..T-1; None takes those of `usual` that can be used.
        usual: step indices, any order.
        name: the sampler's, for the error.
        apart: must noise be drawn between one level and the next, too?

    Raises:
        ValueError: steps off the grid, or where no noise is drawn; no level can be used.
    """
    steps = plan.steps
    after = (plan.stochastic.flip(0).cumsum(0).flip(0) > 0).tolist()  # is there noise from i on?
    levels: list[int] = []
    if given is None:
        for level in sorted(set(usual) & set(range(1, steps))):
            quiet = apart and levels and not plan.stochastic[levels[-1] : level].any()
            levels += [level] if after[level] and not quiet else []
        if not levels:
            raise ValueError(
                f"{name} finds no level to compare particles at among {steps} steps: it needs "
                "noise after one. Give more steps or a stochastic process (eta > 0); or use "
                "BestOfN, ZeroOrder, Importance or a tree, which need none."
            )
        return levels
    levels = sorted(set(given))
    if not levels or len(levels) < len(given) or set(levels) - set(range(1, steps)):
        raise ValueError(
            f"levels={given!r} of {steps} steps: give distinct step indices from 1 to {steps - 1}."
        )
    for level in levels:
        if not after[level]:
            raise ValueError(
                f"levels: no step from {level} to {steps} draws noise, so copies made there "
                "would stay equal. Leave the level out, or use a stochastic process (eta > 0)."
            )
    for low, high in itertools.pairwise(levels):
        if apart and not plan.stochastic[low:high].any():
            raise ValueError(
                f"levels: no step from {low} to {high} draws noise, so there is nothing to choose "
                f"between at {high}. Leave one of them out."
            )
    return levels
