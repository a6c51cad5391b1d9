"""Images in rows and columns."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw
from torch import Tensor

from samplers.view.ink import FAINT, PAPER, fit, font, pictures, write

_GAP, _TEXT = 6, 13


def image_grid(
    images: Sequence[Image.Image] | Tensor,
    captions: Sequence[str] | None = None,
    *,
    columns: int | None = None,
    size: int | None = None,
    title: str | None = None,
) -> Image.Image:
    """Draw images side by side.

    Args:
        images: N PIL images, or [N, 1 or 3, H, W] in [0, 1].
        captions: N lines to write below them.
        columns: images in a row; None makes the grid about as wide as it is high.
        size: side of a cell in pixels; None takes the images' own, at least 72.
        title: one line above.

    Raises:
        ValueError: no image, or not one caption per image.
    """
    shown = pictures(images)
    if not shown:
        raise ValueError("images is empty: there is nothing to draw.")
    if captions is not None and len(captions) != len(shown):
        raise ValueError(f"{len(captions)} captions for {len(shown)} images: give one each.")
    columns = columns or math.ceil(math.sqrt(len(shown)))
    size = size or max(72, *(max(image.size) for image in shown))
    line = _TEXT + 5 if captions is not None else 0
    head = 2 * _TEXT + _GAP if title else 0
    rows = math.ceil(len(shown) / columns)
    width = columns * (size + _GAP) + _GAP
    if title:
        width = max(width, round(font(_TEXT + 2).getlength(title)) + 2 * _GAP)
    sheet = Image.new("RGB", (width, head + rows * (size + _GAP + line) + _GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    if title:
        write(draw, (_GAP, _GAP), title, _TEXT + 2)
    for k, image in enumerate(shown):
        x = _GAP + (k % columns) * (size + _GAP)
        y = head + _GAP + (k // columns) * (size + _GAP + line)
        sheet.paste(fit(image, size), (x, y))
        if captions is not None:
            place = (x + size / 2, y + size + 3)
            write(draw, place, captions[k], _TEXT - 2, FAINT, "ma", size + _GAP - 2)
    return sheet
