"""Rewards by a network: items checked, split, moved, and what is not finite left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def in_batches(
    name: str,
    score: Callable[[Tensor, list[Any]], Tensor],
    items: Any,
    prompts: Sequence[Any],
    batch: int,
    device: torch.device,
    texts: bool = True,
    visitors: Sequence[nn.Module] = (),
) -> Tensor:
    """[N] float32 on the items' device, nan for an item with a pixel that is not finite.

    Args:
        name: of the reward, for errors.
        score: (images [n, C, H, W] on `device`, their n prompts) -> [n].
        items: images [N, 1 or 3, H, W] in [0, 1].
        prompts: N of them.
        batch: images at a time: what bounds memory.
        device: the network's.
        texts: must prompts be texts?
        visitors: networks that wait in host memory, and are on `device` only now.

    Raises:
        TypeError: items are no images, prompts no texts, or their numbers differ.
    """
    if not isinstance(items, Tensor) or items.ndim != 4 or items.shape[1] not in (1, 3):
        given = tuple(items.shape) if isinstance(items, Tensor) else type(items).__name__
        raise TypeError(
            f"{name} was given items {given}: give images, a tensor [N, 1 or 3, H, W] in [0, 1]."
        )
    if len(prompts) != len(items):
        raise TypeError(f"{name} was given {len(prompts)} prompts for {len(items)} images.")
    wrong = [prompt for prompt in prompts if texts and not isinstance(prompt, str)]
    if wrong:
        raise TypeError(
            f"{name} was given the prompt {wrong[0]!r}: it compares images with texts, so the "
            "model needs texts as prompts."
        )
    whole = items.detach().flatten(1).isfinite().all(1)
    # zeros instead, and no gradient: a network may make a number of broken pixels
    shown = items.where(whole[:, None, None, None], 0).to(device)
    try:
        for network in visitors:
            network.to(device)
        parts = [
            score(shown[k : k + batch], list(prompts[k : k + batch])).float()
            for k in range(0, len(items), batch)
        ]
    finally:
        for network in visitors:
            network.to("cpu")
    scores = torch.cat(parts).to(items.device) if parts else items.new_zeros(0).float()
    return scores.where(whole, torch.nan)


def check_network(
    batch: Any, device: Any, dtype: Any = torch.float32, offload: Any = False
) -> None:
    """Refuse what no network can run with, by the argument's name."""
    if not isinstance(offload, bool):
        raise TypeError(f"offload={offload!r}: give True or False.")
    if type(batch) is not int or batch < 1:
        raise ValueError(f"batch={batch!r}: give a whole number >= 1, the images at a time.")
    try:
        torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device={device!r}: give a device of torch, as in 'cuda'.") from error
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype!r}: give a floating torch.dtype, as in torch.bfloat16.")
