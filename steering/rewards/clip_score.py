"""How well an image goes with its prompt, by CLIP."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath

from steering.rewards.card import Card
from steering.rewards.two_towers import TwoTowers
from steering.weights import CLIP_LARGE, pinned


@dataclass(frozen=True)
class ClipScore(TwoTowers):
    """reward(x) = 100 cos(image embedding of x, text embedding of its prompt); differentiable.

    Range [-100, 100], in practice 10 to 40. The paper cuts off below 0, where there would be no
    gradient; it is not done here. Hessel et al. 2021, arXiv:2104.08718; CLIP: Radford et al. 2021,
    arXiv:2103.00020.

    Args:
        model: hub id or folder of a CLIP with safetensors weights.
        revision: its commit; the default model's is pinned, another's is the newest one.
        device, dtype: of the network, loaded at the first call.
        batch: images at a time.
        offload: weights wait in host memory and move to `device` for each call: for a card that
            a pipeline fills.

    Raises:
        TypeError, ValueError: an argument cannot be; on a call, items are no images [N, C, H, W]
            of 1 or 3 channels or prompts no texts.
    """

    @property
    def name(self) -> str:
        """For tables."""
        return "CLIPScore" + ("" if self.model == CLIP_LARGE else f" {PurePath(self.model).name}")

    @property
    def card(self) -> Card:
        """Facts."""
        return Card(
            higher="image and prompt agree more",
            range=(-100.0, 100.0),
            differentiable=True,
            memory=1.71 if self.model == CLIP_LARGE else None,
            source=self.model,
            revision=pinned(self.model, self.revision),
            licence="MIT" if self.model == CLIP_LARGE else "",
            paper="arXiv:2104.08718",
            notes="texts beyond 77 tokens are cut",
        )

    def scale(self) -> float:
        """What cosines are multiplied by."""
        return 100.0
