"""From noise to image: the states on the way to one draw."""

from __future__ import annotations

import torch
from PIL import Image

from samplers.result import Result
from samplers.view.grid import image_grid
from samplers.view.ink import kept


def strip(result: Result, index: int = 0) -> Image.Image:
    """Draw the kept states on the way to one item in a row, noise on the left.

    States are decoded as they are, noise and all. A tree keeps those that it can branch from, so
    the steps between and where a pilot found that branching does not pay are not there.

    Args:
        result: of a tree sampler; items must be images or clips.
        index: which of the items, as in `result.images`.

    Raises:
        ValueError: the sampler grew no tree, or there is no such item.
        TypeError: items are sequences.
    """
    tree = result.tree
    result.check_pictures()
    if tree is None:
        raise ValueError("the result has no tree: TreeSampling and TreeSearch keep the ways.")
    if not 0 <= index < result.distinct:
        raise ValueError(f"index={index}: the result has items 0 to {result.distinct - 1}.")
    node = int((tree.handle == result.ids[index]).nonzero()[0])
    path = []
    while tree.parent[node] >= 0:
        path.insert(0, node)
        node = int(tree.parent[node])
    found = kept(result.thumbnails, tree.handle[torch.tensor(path)])
    there = [(image, n) for image, n in zip(found, path, strict=True) if image is not None]
    captions = [f"step {int(tree.step[n])}" for _, n in there]
    return image_grid([image for image, _ in there], captions, columns=len(there))
