"""Which image people would pick for a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath

from torch import Tensor

from steering.rewards.card import Card
from steering.rewards.two_towers import TwoTowers
from steering.weights import pinned

_MODEL = "yuvalkirstain/PickScore_v1"


@dataclass(frozen=True)
class PickScore(TwoTowers):
    """reward(x) = s cos(image embedding of x, text embedding of its prompt); differentiable.

    s = exp(logit_scale), learned with the towers from people's choices between two images: a
    difference of rewards is the log-odds of being picked. In practice 15 to 26. Kirstain et al.
    2023, Pick-a-Pic, arXiv:2305.01569.

    Args:
        model: hub id or folder of a CLIP with safetensors weights, a processor and a tokenizer.
        revision: its commit; the default model's is pinned, another's is the newest one.
        device, dtype: of the network, loaded at the first call.
        batch: images at a time.
        offload: weights wait in host memory and move to `device` for each call: for a card that
            a pipeline fills.

    Raises:
        TypeError, ValueError: as for `ClipScore`.
    """

    model: str = _MODEL

    @property
    def name(self) -> str:
        """For tables."""
        return "PickScore" + ("" if self.model == _MODEL else f" {PurePath(self.model).name}")

    @property
    def card(self) -> Card:
        """Facts."""
        return Card(
            higher="people pick the image more often; a difference is in nats of the odds",
            range=(-100.0, 100.0),  # training holds s at 100 or below
            differentiable=True,
            memory=3.94 if self.model == _MODEL else None,
            source=self.model,
            revision=pinned(self.model, self.revision),
            paper="arXiv:2305.01569",
            notes="texts beyond 77 tokens are cut",
        )

    def scale(self) -> Tensor:
        """What cosines are multiplied by."""
        return self.towers.scale
