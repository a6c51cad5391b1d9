"""A search tree: thumbnails on nodes, value as colour, visits as width."""

from __future__ import annotations

import math

import torch
from PIL import Image, ImageDraw

from samplers.view.ink import FAINT, INK, PAPER, Thumbnails, fit, kept, number, viridis, write
from search.tree import Tree

_SCALE = 2  # drawn twice as large and averaged, for smooth lines
_MARGIN, _HEAD, _FOOT, _TEXT = 24, 64, 60, 11
_WIDEST = 11  # pixels of the edge that every rollout passed


def tree_picture(
    tree: Tree,
    thumbnails: Thumbnails | None = None,
    *,
    condition: int = 0,
    leaves: int = 16,
    size: int = 44,
    title: str = "",
) -> Image.Image:
    """Draw one tree, from noise on the left to data on the right.

    A node's frame and the edge into it are coloured by its value, the edge is as wide as the root
    of its share of visits; below stand value (a leaf's reward), visits, and "+n" for n children
    left out. What is shown: `leaves` leaves, shared out among the most visited starting noises, in
    each the best first.

    Args:
        tree: `result.tree`.
        thumbnails: handles [N] int64 -> N images, for instance `result.thumbnails`; a node whose
            handle raises KeyError, because its state was let go, is a dot. None: all are, and so
            are sequences.
        condition: which of the R trees.
        leaves: at most so many are drawn.
        size: side of a thumbnail in pixels.
        title: one line above.

    Raises:
        ValueError: there is no such condition, or its tree has no finished leaf.
    """
    if not 0 <= condition < len(tree.ended):
        raise ValueError(f"condition={condition}: the run has trees 0 to {len(tree.ended) - 1}.")
    if leaves < 1:
        raise ValueError(f"leaves={leaves}: give a whole number >= 1.")
    shown = _shown(tree, condition, leaves)
    root = shown[0]
    parent = {n: int(tree.parent[n]) for n in shown}
    children: dict[int, list[int]] = {n: [] for n in shown}
    for n in shown[1:]:
        children[parent[n]].append(n)
    hidden = torch.bincount(tree.parent.clamp(min=0)[tree.parent >= 0], minlength=len(tree.parent))

    levels = sorted({int(tree.step[n]) for n in shown})
    images = {}
    if thumbnails is not None:
        nodes = shown[1:]
        found = kept(thumbnails, tree.handle[torch.tensor(nodes)])
        images = {
            n: fit(image, size * _SCALE)
            for n, image in zip(nodes, found, strict=True)
            if isinstance(image, Image.Image)  # a text, too, is a dot
        }

    pitch, gap = size + _TEXT + 14, max(2 * size, 84)
    tips = _layout(root, children)
    height = _HEAD + _FOOT + pitch * (1 + max(tips.values()))
    width = 2 * _MARGIN + size + gap + (len(levels) - 2) * (size + gap) + 40
    width = max(round(width), 460)
    sheet = Image.new("RGB", (width * _SCALE, round(height) * _SCALE), PAPER)
    draw = ImageDraw.Draw(sheet)
    column = {step: _MARGIN + 8 + k * (size + gap) for k, step in enumerate(levels)}
    for step in levels[1:]:  # the dummy root takes no room for a thumbnail
        column[step] -= size - 8

    def middle(n: int) -> tuple[float, float]:
        offset = 0 if n == root else size / 2
        return column[int(tree.step[n])] + offset, _HEAD + pitch * (tips[n] + 0.5) - _TEXT / 2

    known = [float(tree.value[n]) for n in shown if math.isfinite(float(tree.value[n]))]
    low, high = min(known), max(known)

    def colour(n: int) -> tuple[int, int, int]:
        return viridis((float(tree.value[n]) - low) / (high - low) if high > low else 1.0)

    all_visits = max(int(tree.visits[root]), 1)
    for n in shown[1:]:
        (x0, y0), (x1, y1) = middle(parent[n]), middle(n)
        share = math.sqrt(int(tree.visits[n]) / all_visits)
        _edge(draw, x0, y0, x1, y1, colour(n), max(1.0, _WIDEST * share))
    for n in shown:
        x, y = (c * _SCALE for c in middle(n))
        half, rim = size * _SCALE / 2, 3 * _SCALE
        if n in images:
            draw.rectangle(
                [x - half - rim, y - half - rim, x + half + rim, y + half + rim], colour(n)
            )
            sheet.paste(images[n], (round(x - half), round(y - half)))
        else:
            r = 7 * _SCALE
            draw.ellipse([x - r, y - r, x + r, y + r], colour(n), INK, _SCALE)
            half = r
        parts = [] if n == root else [number(float(tree.value[n])), f"x{int(tree.visits[n])}"]
        left_out = int(hidden[n]) - len(children[n])
        parts += [f"+{left_out}"] if left_out else []
        place = (x, y + half + 4 * _SCALE)
        write(draw, place, "  ".join(parts), _TEXT * _SCALE, INK, "ma", halo=2 * _SCALE)
    _head(draw, tree, title, levels, column, size)
    _legend(draw, low, high, all_visits, height)
    return sheet.resize((width, round(height)), Image.Resampling.LANCZOS)


def _shown(tree: Tree, condition: int, leaves: int) -> list[int]:
    """Nodes to draw, parents first: the ways from the root to the chosen leaves."""
    parent = tree.parent.tolist()
    here = (tree.row == condition) & tree.reward.isfinite()
    by_start: dict[int, list[int]] = {}
    for leaf in here.nonzero().flatten().tolist():
        start = leaf
        while parent[parent[start]] >= 0:
            start = parent[start]
        by_start.setdefault(start, []).append(leaf)
    if not by_start:
        raise ValueError(f"the tree of condition {condition} has no finished leaf to draw.")
    for found in by_start.values():
        found.sort(key=lambda n: -float(tree.reward[n]))
    starts = sorted(by_start, key=lambda n: (-int(tree.visits[n]), n))
    quota = max(4, math.ceil(leaves / len(starts)))
    chosen = [n for start in starts for n in by_start[start][:quota]][:leaves]
    nodes = set()
    for n in chosen:
        while n >= 0 and n not in nodes:
            nodes.add(n)
            n = parent[n]
    return sorted(nodes)  # a parent stands before its children


def _layout(root: int, children: dict[int, list[int]]) -> dict[int, float]:
    """Vertical place of each node: leaves one below the other, a parent amid its children."""
    place: dict[int, float] = {}
    order, stack = [], [root]
    while stack:
        n = stack.pop()
        order.append(n)
        stack += reversed(children[n])
    tips = (n for n in order if not children[n])
    place.update({n: float(k) for k, n in enumerate(tips)})
    for n in reversed(order):
        if children[n]:
            place[n] = (place[children[n][0]] + place[children[n][-1]]) / 2
    return place


def _edge(draw, x0: float, y0: float, x1: float, y1: float, colour, width: float) -> None:
    """An S from left to right: flat where it meets the nodes."""
    points = []
    for k in range(25):
        t = k / 24
        ease = t * t * (3 - 2 * t)
        points.append(((x0 + t * (x1 - x0)) * _SCALE, (y0 + ease * (y1 - y0)) * _SCALE))
    draw.line(points, colour, round(width * _SCALE), joint="curve")


def _head(draw, tree: Tree, title: str, levels: list[int], column, size: int) -> None:
    if title:
        write(draw, (_MARGIN * _SCALE, 12 * _SCALE), title, 14 * _SCALE)
    last = max(levels)
    for step in levels[1:]:
        name = f"step {step}" + (" (noise)" if step == 0 else " (data)" if step == last else "")
        x = (column[step] + size / 2) * _SCALE
        write(draw, (x, (_HEAD - 22) * _SCALE), name, _TEXT * _SCALE, FAINT, "ma")


def _legend(draw, low: float, high: float, visits: int, height: float) -> None:
    y, x, length = height - 34, _MARGIN, 150
    for k in range(length):
        share = k / (length - 1)
        line = [((x + k) * _SCALE, y * _SCALE), ((x + k) * _SCALE, (y + 10) * _SCALE)]
        draw.line(line, viridis(share), _SCALE + 1)
    write(draw, (x * _SCALE, (y + 14) * _SCALE), number(low), 10 * _SCALE, FAINT)
    write(draw, ((x + length) * _SCALE, (y + 14) * _SCALE), number(high), 10 * _SCALE, FAINT, "ra")
    write(draw, ((x + length / 2) * _SCALE, (y + 14) * _SCALE), "value", 10 * _SCALE, INK, "ma")
    x += length + 36
    for share in (1.0, 0.1, 0.01):
        count = max(1, round(share * visits))
        width = max(1.0, _WIDEST * math.sqrt(count / visits))
        line = [(x * _SCALE, (y + 5) * _SCALE), ((x + 34) * _SCALE, (y + 5) * _SCALE)]
        draw.line(line, FAINT, round(width * _SCALE))
        write(draw, ((x + 17) * _SCALE, (y + 14) * _SCALE), f"{count}", 10 * _SCALE, FAINT, "ma")
        x += 50
        if count == 1:
            break
    write(draw, (x * _SCALE, (y + 5) * _SCALE), "x visits   + left out", 10 * _SCALE, INK, "lm")
