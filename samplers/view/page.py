"""Search trees as one HTML page to look into: zoom, hover, replay. It loads nothing."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from samplers.view.ink import VIRIDIS, Thumbnails, kept
from search.tree import Tree

_PAGE = Path(__file__).with_name("page.html")
_SLOT = "__DATA__"
_MOST, _SIDE = 256, 96  # thumbnails in a page, over all its trees; longest side in pixels
_BYTES = 2_000_000  # of all thumbnails as text; the least important are left out beyond
_LETTERS = 500  # of a sequence that are shown


def tree_page(
    tree: Tree,
    thumbnails: Thumbnails | None = None,
    *,
    prompts: Sequence[Any] = (),
    title: str = "",
) -> str:
    """Write all trees of a run as one self-contained HTML page.

    Noise is on the left, data on the right; colour is a node's value, width its visits, and in each
    branch the best leaf is on top. A slider replays the tree in the order in which it was planted.
    The 256 most important nodes get thumbnails, of at most 96 pixels and 2 MB together: the ways to
    the best leaves, then the most visited. All others are dots. So are sequences: the texts of
    those nodes are read by pointing at them.

    Args:
        tree: `result.tree`.
        thumbnails: handles [N] int64 -> N images or texts, for instance `result.thumbnails`; a node
            whose handle raises KeyError, because its state was let go, is a dot. None: all are.
        prompts: what each of the R conditions asks for; empty numbers them.
        title: one line above.

    Raises:
        ValueError: not one prompt per condition.
    """
    conditions = len(tree.ended)
    if len(prompts) not in (0, conditions):
        raise ValueError(f"{len(prompts)} prompts for {conditions} trees: give one each, or none.")
    names = prompts or [f"condition {r}" if conditions > 1 else "" for r in range(conditions)]
    found = _found(tree, thumbnails, max(1, _MOST // conditions))
    images, pictures = _distinct({n: _uri(x) for n, x in found.items() if not isinstance(x, str)})
    texts, readings = _distinct({n: x[:_LETTERS] for n, x in found.items() if isinstance(x, str)})
    data = {
        "title": title,
        "lam": _short(tree.lam),
        "palette": VIRIDIS,
        "images": images,
        "texts": texts,
        "trees": [
            {
                "prompt": "" if name is None else str(name),
                **_columns(tree, (tree.row == r).nonzero()[:, 0], pictures, readings),
            }
            for r, name in enumerate(names)
        ],
    }
    return _PAGE.read_text(encoding="utf-8").replace(_SLOT, _inert(data))


def _inert(data: Any) -> str:
    """JSON in ASCII, U+2028 escaped, that cannot be mistaken for markup whatever its texts are."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    for letter in "<>&":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text


def _columns(
    tree: Tree, index: Tensor, pictures: dict[int, int], readings: dict[int, int]
) -> dict[str, list]:
    """One tree [n], nodes in the order in which they were planted; numbers not finite are null."""
    local = torch.full((len(tree.parent) + 1,), -1)
    local[index] = torch.arange(len(index))
    return {
        "parent": local[tree.parent[index]].tolist(),  # a root's parent, -1, is the last: -1
        "failed": tree.failed[index].nonzero()[:, 0].tolist(),
        # [[node, image]], the most important first; and [[node, text]]
        "pictures": [[int(local[n]), k] for n, k in pictures.items() if local[n] >= 0],
        "readings": [[int(local[n]), k] for n, k in readings.items() if local[n] >= 0],
        **{name: getattr(tree, name)[index].tolist() for name in ("step", "handle", "visits")},
        **{
            name: [_short(x) for x in getattr(tree, name)[index].tolist()]
            for name in ("value", "reward", "log_w", "log_ratio")
        },
    }


def _short(x: float) -> float | None:
    """Six figures are more than a page shows, and a third of the bytes."""
    return float(f"{x:.6g}") if math.isfinite(x) else None


def _found(tree: Tree, thumbnails: Thumbnails | None, most: int) -> dict[int, Any]:
    """The image or text of each node that has one, important nodes first."""
    if thumbnails is None:
        return {}
    ranks = [_important(tree, r, most) for r in range(len(tree.ended))]
    nodes = [n for k in range(most) for rank in ranks for n in rank[k : k + 1]]
    # states of one step are let go together, so that whole runs of them are missing or not
    asked = sorted(nodes, key=lambda n: int(tree.step[n]))
    handles = tree.handle[torch.tensor(asked, dtype=torch.int64)]
    found = dict(zip(asked, kept(thumbnails, handles), strict=True))
    return {n: found[n] for n in nodes if found[n] is not None}


def _distinct(texts: dict[int, str]) -> tuple[list[str], dict[int, int]]:
    """Distinct texts, up to a limit of their size, and which of them each node shows."""
    all_: dict[str, int] = {}
    chosen: dict[int, int] = {}
    size = 0
    for n, text in texts.items():
        size += 0 if text in all_ else len(text)
        if size > _BYTES:
            break
        chosen[n] = all_.setdefault(text, len(all_))
    return list(all_), chosen


def _important(tree: Tree, condition: int, most: int) -> list[int]:
    """Nodes by importance: half of them on ways to the best leaves, then the most visited."""
    here = ((tree.row == condition) & (tree.parent >= 0)).nonzero()[:, 0]
    leaves = here[tree.reward[here].isfinite()]
    leaves = leaves[tree.reward[leaves].argsort(descending=True, stable=True)]
    found: dict[int, None] = {}
    for n in leaves[:most].tolist():
        if len(found) >= most / 2:
            break
        while tree.parent[n] >= 0:
            found[n] = None
            n = int(tree.parent[n])
    visited = here[tree.visits[here].argsort(descending=True, stable=True)][: 2 * most]
    return list(found | dict.fromkeys(visited.tolist()))[:most]


def _uri(image: Image.Image) -> str:
    """PNG or JPEG, whichever is shorter."""
    image = image if image.mode in ("L", "RGB") else image.convert("RGB")
    image = image.copy()
    image.thumbnail((_SIDE, _SIDE), Image.Resampling.BOX)
    texts = []
    for kind in ("png", "jpeg"):
        file = io.BytesIO()
        image.save(file, kind, optimize=True, quality=80)
        texts.append(f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}")
    return min(texts, key=len)
