"""Rewards that look at PIL images: black boxes."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from steering.rewards.card import Card
from steering.rewards.compose import Composable


@dataclass(frozen=True)
class FromPil(Composable):
    """A reward made of a function of PIL images; `from_pil` makes one. Not differentiable.

    An image with a pixel that is not finite is not shown to the function: it scores nan.

    Args:
        function: (list of n images[, their n prompts]) -> n numbers, None where it has no opinion.
        name: for tables.
    """

    function: Callable[..., Sequence[float | None] | Tensor]
    name: str
    differentiable: bool = field(default=False, init=False)

    @property
    def card(self) -> Card:
        """Facts; of a function of the user's they are few."""
        return Card(
            higher=f"{self.name} says so",
            range=(-math.inf, math.inf),
            differentiable=False,
            memory=None,
            source="a function of the user's",
        )

    def __call__(self, items: Tensor, prompts: Sequence[Any]) -> Tensor:
        return ask(self.function, self.name, "image", to_pil, items, prompts)


def from_pil(function: Callable[..., Sequence[float | None] | Tensor]) -> FromPil:
    """Turn a function of PIL images, or of images and prompts, into a reward. A decorator.

    >>> @from_pil
    ... def darkness(images):
    ...     return [-sum(image.convert("L").histogram()[128:]) for image in images]

    Args:
        function: (list of n PIL images[, list of n prompts]) -> n numbers, higher is better. A
            second parameter with a default gets prompts only if that is its name.
    """
    if not callable(function) or arguments(function) == 0:
        raise TypeError(
            f"{function!r}: from_pil takes a function of (images) or (images, prompts)."
        )
    return FromPil(function, getattr(function, "__name__", type(function).__name__))


def to_pil(items: Tensor) -> list[Image.Image]:
    """Images [N, C, H, W] in [0, 1], C = 1 or 3 -> N PIL images of mode L or RGB."""
    if items.ndim != 4 or items.shape[1] not in (1, 3):
        shape = tuple(items.shape)
        raise TypeError(f"items of shape {shape} are no images: [N, 1 or 3, H, W] in [0, 1].")
    pixels = (items.float() * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(p[..., 0] if p.shape[-1] == 1 else p) for p in pixels]


def ask(
    function: Callable[..., Sequence[float | None] | Tensor],
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
