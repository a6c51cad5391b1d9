"""One reward per clip, from a reward of images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steering.core import Reward
from steering.rewards.compose import Composite, name_of, scores_of


@dataclass(frozen=True)
class OverFrames(Composite):
    """reward(clip) = mean, or least, over frames f of r(frame f, prompt).

    A clip has failed if one of the frames that are looked at has, or any has a pixel that is not
    finite.

    Args:
        reward: of images [N, C, H, W] and their prompts.
        by: "mean" or "min".
        frames: how many are looked at, evenly spaced, the first and the last among them (one: the
            middle); None, or as many as there are, is all.

    Raises:
        TypeError: on a call, items are no clips [N, F, C, H, W].
    """

    reward: Reward
    by: str = "mean"
    frames: int | None = None

    @property
    def parts(self) -> Sequence[Any]:
        """Rewards that this one is made of."""
        return [self.reward]

    def __post_init__(self) -> None:
        if not callable(self.reward):
            raise TypeError(f"reward={self.reward!r} is no reward: give (items, prompts) -> [N].")
        if self.by not in ("mean", "min"):
            raise ValueError(f'by={self.by!r}: give "mean" or "min".')
        if self.frames is not None and (type(self.frames) is not int or self.frames < 1):
            raise ValueError(f"frames={self.frames!r}: give a whole number >= 1, or None for all.")

    @property
    def name(self) -> str:
        """For tables."""
        which = "frames" if self.frames is None else f"{self.frames} frames"
        return f"{self.by} over {which} of {name_of(self.reward)}"

    def __call__(self, items: Tensor, prompts: Sequence[Any]) -> Tensor:
        if not isinstance(items, Tensor) or items.ndim != 5 or items.shape[1] == 0:
            given = tuple(items.shape) if isinstance(items, Tensor) else type(items).__name__
            raise TypeError(f"items {given} are no clips: give a tensor [N, F, C, H, W] in [0, 1].")
        n, length = items.shape[:2]
        shown = length if self.frames is None else min(self.frames, length)
        if shown == 1 < length:
            at = torch.tensor([length // 2])
        else:
            at = torch.linspace(0, length - 1, shown).round().long()
        images = items[:, at.to(items.device)].flatten(0, 1)
        scores = scores_of(self.reward, images, [p for p in prompts for _ in range(shown)])
        scores = scores.reshape(n, shown)
        total = scores.mean(1) if self.by == "mean" else scores.amin(1)
        whole = items.detach().flatten(1).isfinite().all(1) & scores.isfinite().all(1)
        return total.where(whole, torch.nan)
