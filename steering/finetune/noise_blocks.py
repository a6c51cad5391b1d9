"""A generator that learns block by block: each range of noise by a network of its own."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from steering.digest import digest
from steering.finetune.blocks import settings_of, train_blocks
from steering.gaussian import over_data

_PREDICTIONS = ("epsilon", "v_prediction", "sample")


def noise_blocks(
    unet: Any,
    scheduler: Any,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    epochs: float,
    batch: int = 64,
    lr: float = 2e-3,
    decay: float = 1e-3,
    average: float = 0.999,
    clip: float = 1.0,
    blocks: Sequence[int] | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    progress: bool = True,
) -> dict[int, list[dict[str, Any]]]:
    """Train the blocks of a generator in place, each alone (arXiv:2506.14202); see `train_blocks`.

    A block sees x = sqrt(ab) image + sqrt(1 - ab) noise at timesteps of its own range, spread
    evenly over it, and lowers the mean of |output - target|², the target what the scheduler's
    prediction type says: noise, v or the image.

    Args:
        unet: a `BlockwiseUNet2D`, on the device that it is trained on; or any one network, which is
            then one block: training end to end.
        scheduler: of diffusers, with `alphas_cumprod` and a prediction type.
        images: [N, C, H, W] uint8, or float in [-1, 1].
        labels: [N] int64, where the network takes labels.
        epochs, batch, lr, decay, average, clip, blocks, seed, out, progress: see `train_blocks`.

    Raises:
        ValueError: a scheduler without levels or not of the network's timesteps, images that are
            not the network's.
        LocalityError, NotFiniteError: as `train_blocks`.
    """
    return train_blocks(
        NoiseBlocks(unet, scheduler, images, labels),
        epochs=epochs, batch=batch, lr=lr, decay=decay, average=average, clip=clip, blocks=blocks,
        seed=seed, out=out, progress=progress,
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class NoiseBlocks:
    """The local rule of `noise_blocks`, whose arguments these are.

    Raises:
        ValueError: a scheduler without levels or not of the network's timesteps, images or labels
            that are not the network's.
    """

    unet: Any
    scheduler: Any
    images: Tensor
    labels: Tensor | None = None

    def __post_init__(self) -> None:
        prediction = self.scheduler.config.get("prediction_type")
        if not hasattr(self.scheduler, "alphas_cumprod") or prediction not in _PREDICTIONS:
            raise ValueError(
                f"scheduler {type(self.scheduler).__name__} with prediction_type={prediction!r}: "
                f"give one with alphas_cumprod and one of {', '.join(_PREDICTIONS)}."
            )
        config = self.unet.config
        size = config["sample_size"]
        shape = (config["in_channels"], *((size, size) if isinstance(size, int) else size))
        if tuple(self.images.shape[1:]) != shape:
            raise ValueError(f"images have shape {list(self.images.shape)}: give [N, *{shape}].")
        if (self.labels is None) != (config["num_class_embeds"] is None):
            raise ValueError("labels: give them where the network takes labels, and only there.")
        if self.labels is not None and tuple(self.labels.shape) != (len(self.images),):
            raise ValueError(f"labels have shape {list(self.labels.shape)}: give one an image.")
        levels, bounds = len(self.scheduler.alphas_cumprod), self.bounds
        rising = all(a < b for a, b in itertools.pairwise(bounds))
        if bounds[0] < 0 or bounds[-1] > levels or not rising:
            raise ValueError(
                f"unet has bounds={list(config['bounds'])}: the scheduler has timesteps 0 to "
                f"{levels - 1}, and each block needs one."
            )

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return getattr(self.unet, "blocks", [self.unet])

    @property
    def rows(self) -> int:
        return len(self.images)

    @cached_property
    def bounds(self) -> list[int]:
        """B + 1 timesteps, the first whole ones of each block."""
        whole = [0, len(self.scheduler.alphas_cumprod)]
        return [math.ceil(t) for t in self.unet.config.get("bounds", whole)]

    def told(self) -> dict[str, Any]:
        return {
            "network": settings_of(self.unet),
            "prediction": self.scheduler.config["prediction_type"],
            "levels": digest(self.scheduler.alphas_cumprod),
            "data": [digest(self.images), self.labels is not None and digest(self.labels)],
        }

    def loss(self, block: int, numbers: Tensor, rng: torch.Generator) -> Tensor:
        module = self.blocks[block]
        device = next(module.parameters()).device
        clean = self.images[numbers]
        if not clean.is_floating_point():
            clean = clean.float() / 127.5 - 1
        n, (low, high) = len(numbers), self.bounds[block : block + 2]
        # stratified over the range: the loss depends on t far more than on the image
        spread = (torch.arange(n) + torch.rand(n, generator=rng)) / n
        t = (low + spread * (high - low)).long().clamp(max=high - 1)
        noise = torch.randn(clean.shape, generator=rng)
        level = over_data(self.scheduler.alphas_cumprod[t], clean)
        signal, sigma = level.sqrt(), (1 - level).sqrt()
        target = {
            "epsilon": noise,
            "v_prediction": signal * noise - sigma * clean,
            "sample": clean,
        }[self.scheduler.config["prediction_type"]]
        labels = () if self.labels is None else (self.labels[numbers].to(device),)
        x = (signal * clean + sigma * noise).to(device)
        output = module(x, t.to(device), *labels, return_dict=False)[0]
        return (output.float() - target.to(device)).square().mean()

    def watch(self, block: int) -> dict[str, float]:
        return {}
