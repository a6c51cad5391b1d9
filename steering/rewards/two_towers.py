"""What rewards share that compare an image with its prompt by a CLIP."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from steering.clip import Towers
from steering.rewards.batched import check_network, in_batches
from steering.rewards.compose import Composable, name_of
from steering.weights import CLIP_LARGE, check_source, loading


@dataclass(frozen=True)
class TwoTowers(Composable, ABC):
    """reward(x) = scale · cos(image embedding of x, text embedding of its prompt)."""

    model: str = CLIP_LARGE
    revision: str | None = None
    device: str | torch.device = "cpu"
    dtype: torch.dtype = torch.float32
    batch: int = 16
    offload: bool = False
    differentiable: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        check_source("model", self.model)
        check_network(self.batch, self.device, self.dtype, self.offload)

    @cached_property
    def towers(self) -> Towers:
        """The network, loaded when it is first wanted."""
        with loading(name_of(self), self.model):
            home = "cpu" if self.offload else self.device
            return Towers.load(self.model, self.revision, home, self.dtype)

    def load(self) -> None:
        """Load the network: now, instead of at the first call."""
        _ = self.towers

    @abstractmethod
    def scale(self) -> float | Tensor:
        """What cosines are multiplied by."""

    def __call__(self, items: Tensor, prompts: Sequence[Any]) -> Tensor:
        def score(images: Tensor, texts: list[str]) -> Tensor:
            return self.scale() * self.towers.cosine(images, texts)

        device = torch.device(self.device)
        visitors = [self.towers.net] if self.offload else []
        return in_batches(
            name_of(self), score, items, prompts, self.batch, device, visitors=visitors
        )
