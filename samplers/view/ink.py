"""What all pictures share: colours, text, thumbnails."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from steering.rewards.pil import to_pil

Colour = tuple[int, int, int]
# of the states of handles [N]: images, or texts where items are sequences
Thumbnails = Callable[[Tensor], Sequence[Image.Image] | Sequence[str] | Tensor]

INK: Colour = (38, 38, 42)
FAINT: Colour = (140, 140, 148)
RULE: Colour = (226, 226, 231)
PAPER: Colour = (255, 255, 255)
# Okabe & Ito 2008: apart for every kind of colour vision
SERIES: tuple[Colour, ...] = (
    (0, 114, 178),
    (213, 94, 0),
    (0, 158, 115),
    (204, 121, 167),
    (230, 159, 0),
    (86, 180, 233),
)
# viridis at nine even stops (Smith & van der Walt 2015): even in lightness, also without colour
VIRIDIS: tuple[Colour, ...] = (
    (68, 1, 84),
    (71, 45, 123),
    (59, 82, 139),
    (44, 114, 142),
    (33, 145, 140),
    (40, 174, 128),
    (94, 201, 98),
    (173, 220, 48),
    (253, 231, 37),
)


def viridis(share: float) -> Colour:
    """Colour of a share in [0, 1], dark to light; nan is gray."""
    if math.isnan(share):
        return (190, 190, 196)
    at = min(max(share, 0.0), 1.0) * (len(VIRIDIS) - 1)
    low = min(int(at), len(VIRIDIS) - 2)
    a, b = VIRIDIS[low], VIRIDIS[low + 1]
    r, g, b = (round(x + (at - low) * (y - x)) for x, y in zip(a, b, strict=True))
    return (r, g, b)


def font(size: float) -> Any:
    """Pillow's own font, which every installation has; it knows Latin letters only."""
    return ImageFont.load_default(size)


def write(
    draw: ImageDraw.ImageDraw,
    at: tuple[float, float],
    text: str,
    size: float,
    colour: Colour = INK,
    anchor: str = "la",
    width: float | None = None,
    halo: int = 0,
) -> None:
    """Write one line, cut to `width` pixels, on a white halo; letters the font lacks become '?'."""
    plain = " ".join(text.encode("latin-1", "replace").decode("latin-1").split("\n"))
    face, kept = font(size), len(plain)
    while width is not None and kept and face.getlength(plain) > width:
        kept -= 1
        plain = plain[:kept] + "..."
    draw.text(at, plain, colour, face, anchor, stroke_width=halo, stroke_fill=PAPER)


def pictures(images: Sequence[Image.Image] | Tensor) -> list[Image.Image]:
    """PIL images from PIL images or from a tensor [N, 1 or 3, H, W] in [0, 1]."""
    return to_pil(images) if isinstance(images, Tensor) else list(images)


def kept(thumbnails: Thumbnails, handles: Tensor) -> list[Any]:
    """Images, or texts, of handles [N]; None for a state that was let go, whose handle raises
    KeyError."""
    if not len(handles):
        return []
    try:
        found: Any = thumbnails(handles)
        return pictures(found)
    except KeyError:  # halves find out whose: those of one step went together
        if len(handles) == 1:
            return [None]
        half = len(handles) // 2
        return kept(thumbnails, handles[:half]) + kept(thumbnails, handles[half:])


def fit(image: Image.Image, size: int) -> Image.Image:
    """RGB image in a square of `size`; small ones keep their pixels, large ones are averaged."""
    ratio = size / max(image.size)
    shape = (max(1, round(image.width * ratio)), max(1, round(image.height * ratio)))
    how = Image.Resampling.NEAREST if ratio > 1 else Image.Resampling.BOX
    scaled = image.convert("RGB").resize(shape, how)
    square = Image.new("RGB", (size, size), PAPER)
    square.paste(scaled, ((size - shape[0]) // 2, (size - shape[1]) // 2))
    return square


def number(value: float) -> str:
    """Three figures; 'failed' for nan."""
    if math.isnan(value):
        return "failed"
    text = f"{value:.3g}" if abs(value) >= 1e-3 or value == 0 else f"{value:.0e}"
    return "0" if text in ("-0", "0e+00") else text
