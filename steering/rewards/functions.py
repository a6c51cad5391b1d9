"""What rewards made of a user's function share, whether it looks at images or reads texts."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from steering.rewards.card import Card

Function = Callable[..., Sequence[float | None] | Tensor]


def card_of(name: str, notes: str = "") -> Card:
    """Facts; of a function of the user's they are few."""
    return Card(
        higher=f"{name} says so",
        range=(-math.inf, math.inf),
        differentiable=False,
        memory=None,
        source="a function of the user's",
        notes=notes,
    )


def name_of(function: Any, maker: str, things: str) -> str:
    """The function's name.

    Raises:
        TypeError: it is none of `things`, which `maker` takes.
    """
    if not callable(function) or arguments(function) == 0:
        raise TypeError(
            f"{function!r}: {maker} takes a function of ({things}) or ({things}, prompts)."
        )
    return getattr(function, "__name__", type(function).__name__)


def ask(
    function: Function,
    name: str,
    kind: str,
    show: Callable[[Tensor], list[Any]],
    items: Tensor,
    prompts: Sequence[Any],
) -> Tensor:
    """[N] float64 that a function of things to look at or to read says of items; nan for an item
    that is not finite, which it is not shown, and where it says None.

    Args:
        function: (list of n things[, their n prompts]) -> n numbers or None.
        name: of the reward, for errors.
        kind: what one thing is called there.
        show: items [n, ...] -> n things.
        items: [N, ...].
        prompts: N of them.

    Raises:
        TypeError: not one number per thing.
    """
    shown = items.detach().flatten(1).isfinite().all(1).nonzero().flatten().tolist()
    given = (show(items.detach()[shown]), [prompts[k] for k in shown])[: arguments(function)]
    values = function(*given) if shown else []
    count = len(values) if hasattr(values, "__len__") else None
    if count != len(shown):
        returned = repr(values) if count is None else f"{count} numbers"
        raise TypeError(
            f"reward {name} returned {returned} for {len(shown)} {kind}s: return one per {kind}."
        )
    scores = torch.full((len(items),), math.nan, dtype=torch.float64)
    for k, value in zip(shown, values, strict=True):
        scores[k] = math.nan if value is None else float(value)
    return scores


def arguments(function: Callable) -> int:
    """How many of (things, prompts) a function takes by position."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # a builtin without a signature
        return 1
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return 2
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    # a second one with a default of its own is a setting, unless it is named for prompts
    wanted = [p for p in positional[1:2] if p.default is p.empty or p.name == "prompts"]
    return len(positional[:1]) + len(wanted)
