"""Reward found so far against network rows spent."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise

from PIL import Image, ImageDraw

from samplers.ledger import History
from samplers.view.ink import FAINT, INK, PAPER, RULE, SERIES, Colour, font, number, write

_SCALE = 2  # drawn twice as large and averaged, for smooth lines
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 18, 40, 46


def curve(
    histories: History | Mapping[str, History],
    *,
    size: tuple[int, int] = (640, 360),
    title: str = "reward so far",
) -> Image.Image:
    """Draw the best reward so far (solid) and the mean of all so far (thin) against network rows.

    Args:
        histories: `result.history`, or several by name.
        size: width and height in pixels.
        title: one line above.

    Raises:
        ValueError: no history holds a finite reward.
    """
    named = histories if isinstance(histories, Mapping) else {"": histories}
    lines = {name: _so_far(history) for name, history in named.items()}
    lines = {name: line for name, line in lines.items() if line}
    if not lines:
        raise ValueError("histories hold no finite reward: there is nothing to draw.")
    most = max(line[-1][0] for line in lines.values())
    # The first few means are of very few rewards: they would set the scale, and say nothing.
    shown = [y for line in lines.values() for _, *ys in line[len(line) // 20 :] for y in ys]
    low, high = min(shown), max(shown)
    pad = 0.06 * (high - low) or max(abs(high), 1.0) * 0.1
    low, high = low - pad, high + pad

    sheet = Image.new("RGB", (size[0] * _SCALE, size[1] * _SCALE), PAPER)
    draw = ImageDraw.Draw(sheet)
    left, top = _LEFT * _SCALE, _TOP * _SCALE
    right, bottom = (size[0] - _RIGHT) * _SCALE, (size[1] - _BOTTOM) * _SCALE

    def place(nfe: float, reward: float) -> tuple[float, float]:
        y = bottom - (reward - low) / (high - low) * (bottom - top)
        return left + nfe / most * (right - left), min(max(y, top), bottom)

    for value in _ticks(low, high):
        y = place(0, value)[1]
        draw.line([(left, y), (right, y)], RULE, _SCALE)
        write(draw, (left - 8 * _SCALE, y), number(value), 11 * _SCALE, FAINT, "rm")
    for value in _ticks(0, most):
        x = place(value, low)[0]
        draw.line([(x, bottom), (x, bottom + 4 * _SCALE)], FAINT, _SCALE)
        write(draw, (x, bottom + 7 * _SCALE), f"{value:,.0f}", 11 * _SCALE, FAINT, "ma")
    draw.line([(left, bottom), (right, bottom)], FAINT, _SCALE)
    write(draw, ((left + right) / 2, bottom + 24 * _SCALE), "network rows", 12 * _SCALE, INK, "ma")
    y_names = 16 * _SCALE
    write(draw, (left, y_names), f"{title}: best (thick), mean (thin)", 13 * _SCALE, INK, "lm")

    for k, line in enumerate(lines.values()):
        colour = SERIES[k % len(SERIES)]
        _draw_line(draw, [place(nfe, mean) for nfe, _, mean in line], colour, _SCALE)
        steps = [place(nfe, best) for nfe, best, _ in line]
        corners = [p for a, b in pairwise(steps) for p in (a, (b[0], a[1]))]
        _draw_line(draw, [*corners, steps[-1]], colour, 3 * _SCALE)
    x = right  # names above the plot, where no line can run
    for k, name in reversed(list(enumerate(lines))):
        if name:
            colour = SERIES[k % len(SERIES)]
            draw.line([(x - 20 * _SCALE, y_names), (x, y_names)], colour, 3 * _SCALE)
            write(draw, (x - 25 * _SCALE, y_names), name, 12 * _SCALE, INK, "rm")
            x -= 40 * _SCALE + font(12 * _SCALE).getlength(name)
    return sheet.resize(size, Image.Resampling.LANCZOS)


def _so_far(history: History) -> list[tuple[int, float, float]]:
    """(network rows, best so far, mean so far) where rewards came in, one point per call."""
    best, total, count, line = -math.inf, 0.0, 0, {}
    for nfe, reward in zip(history.nfe, history.reward, strict=True):
        if math.isfinite(reward):
            best, total, count = max(best, reward), total + reward, count + 1
            line[nfe] = (nfe, best, total / count)
    return list(line.values())


def _ticks(low: float, high: float) -> list[float]:
    """Four to eight round numbers."""
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(m for m in (5, 2, 1) if (high - low) / (step * m) >= 4)
    first = math.ceil(low / step)
    return [k * step for k in range(first, math.floor(high / step) + 1)]


def _draw_line(draw: ImageDraw.ImageDraw, points: list, colour: Colour, width: int) -> None:
    if len(points) == 1:
        (x, y), r = points[0], 2 * width
        draw.ellipse([x - r, y - r, x + r, y + r], colour)
    else:
        draw.line(points, colour, width, joint="curve")
