"""How well an image compresses."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from torch import Tensor

from steering.rewards.card import Card
from steering.rewards.compose import Composable
from steering.rewards.pil import FromPil


@dataclass(frozen=True)
class Jpeg(Composable):
    """reward(x) = -(size of x as a JPEG file in kilobytes of 1,000 bytes). Not differentiable.

    Range (-inf, 0), smooth images score higher; `-1 * Jpeg()` asks for detail. A small image's
    size is mostly the file's header, about .3 kB for gray and .6 kB for colour. Introduced by DDPO,
    Black et al. 2023, arXiv:2305.13301.

    Args:
        quality: of the encoder, 1..95; the paper's is 95.
    """

    quality: int = 95
    differentiable: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if type(self.quality) is not int or self.quality not in range(1, 96):
            raise ValueError(f"quality={self.quality!r}: give a whole number from 1 to 95.")

    @property
    def name(self) -> str:
        """For tables."""
        return "-jpeg kB"

    @property
    def card(self) -> Card:
        """Facts."""
        return Card(
            higher="the file is smaller, in kB",
            range=(-math.inf, 0.0),
            differentiable=False,
            paper="arXiv:2305.13301",
            notes="does not read the prompt; smooth images win",
        )

    def __call__(self, items: Tensor, prompts: Sequence[Any]) -> Tensor:
        return FromPil(self._sizes, self.name)(items, prompts)

    def _sizes(self, images: list[Image.Image]) -> list[float]:
        sizes = []
        for image in images:
            file = io.BytesIO()
            image.save(file, "JPEG", quality=self.quality)
            sizes.append(-file.tell() / 1000)
        return sizes
