"""Rewards that look at PIL images: black boxes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from torch import Tensor

from steering.rewards.card import Card
from steering.rewards.compose import Composable
from steering.rewards.functions import Function, ask, card_of, name_of


@dataclass(frozen=True)
class FromPil(Composable):
    """A reward made of a function of PIL images; `from_pil` makes one. Not differentiable.

    An image with a pixel that is not finite is not shown to the function: it scores nan.

    Args:
        function: (list of n images[, their n prompts]) -> n numbers, None where it has no opinion.
        name: for tables.
    """

    function: Function
    name: str
    differentiable: bool = field(default=False, init=False)

    @property
    def card(self) -> Card:
        """Facts."""
        return card_of(self.name)

    def __call__(self, items: Tensor, prompts: Sequence[Any]) -> Tensor:
        return ask(self.function, self.name, "image", to_pil, items, prompts)


def from_pil(function: Function) -> FromPil:
    """Turn a function of PIL images, or of images and prompts, into a reward. A decorator.

    >>> @from_pil
    ... def darkness(images):
    ...     return [-sum(image.convert("L").histogram()[128:]) for image in images]

    Args:
        function: (list of n PIL images[, list of n prompts]) -> n numbers, higher is better. A
            second parameter with a default gets prompts only if that is its name.
    """
    return FromPil(function, name_of(function, "from_pil", "images"))


def to_pil(items: Tensor) -> list[Image.Image]:
    """Images [N, C, H, W] in [0, 1], C = 1 or 3 -> N PIL images of mode L or RGB."""
    if items.ndim != 4 or items.shape[1] not in (1, 3):
        shape = tuple(items.shape)
        raise TypeError(f"items of shape {shape} are no images: [N, 1 or 3, H, W] in [0, 1].")
    pixels = (items.float() * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(p[..., 0] if p.shape[-1] == 1 else p) for p in pixels]
