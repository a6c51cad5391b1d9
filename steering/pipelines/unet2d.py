"""Pixel pipelines with a `UNet2DModel`: DDPM and DDIM, and by class label our `LabelPipeline`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steering.core import Model, images_in_unit_range
from steering.pipelines.conditional import Conditions, calling, conditional_model
from steering.pipelines.latent import check_images
from steering.pipelines.request import Request
from steering.pipelines.schedulers import read_scheduler


def build(pipe: Any, request: Request) -> Model:
    """The pipeline as a model. Prompts are class labels; negative prompts the null class's."""
    unet, config = pipe.unet, pipe.unet.config
    if config.out_channels != config.in_channels:
        raise ValueError(
            f"pipe.unet puts out {config.out_channels} channels for {config.in_channels}: "
            "a learned variance is not supported."
        )
    size = config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    request.only_size(height, width)
    request.refuse("preview", because="states of this model are images already")
    shape = (config.in_channels, height, width)
    null_class = getattr(pipe, "null_class", None)  # which a `LabelPipeline` has
    even = null_class is not None
    chain = read_scheduler(pipe.scheduler, shape, steps=request.steps, eta=request.eta, even=even)
    positive, negative, scale = _classes(unet, request, null_class, pipe._execution_device)
    return conditional_model(
        pipe,
        request,
        chain,
        calling(unet),
        lambda: (positive, negative),
        scale,
        lambda vae: PixelCodec(shape),
    )


@dataclass(frozen=True)
class PixelCodec:
    """States that are images already: [-1, 1] instead of [0, 1].

    Args:
        shape: (C, H, W) of one.
    """

    shape: tuple[int, ...]

    def __call__(self, x: Tensor) -> Tensor:
        return images_in_unit_range(x)

    def encode(self, images: Tensor) -> Tensor:
        check_images(images)
        if images.shape[1:] != self.shape:
            raise ValueError(
                f"images have shape {list(images.shape)}: give [N, C, H, W] with the model's own "
                f"{list(self.shape)}."
            )
        return 2 * images.float() - 1


def _classes(
    unet: Any, request: Request, null_class: int | None, device: torch.device
) -> tuple[Conditions, Conditions | None, Tensor]:
    """Tables of labels and of null labels, and the guidance scales."""
    if unet.class_embedding is None:
        request.refuse(
            *("prompts", "negative_prompts", "guidance_scale", "cfg"),
            because="this model is unconditional",
        )
        return {}, None, torch.ones(1)
    count = unet.config.num_class_embeds
    if unet.config.class_embed_type is not None or count is None:
        raise ValueError(
            f"pipe.unet with class_embed_type={unet.config.class_embed_type!r} is not supported: "
            "only models that embed class labels (num_class_embeds) are."
        )
    labels = request.labels("prompts", count)
    scale = request.scales(default=1.0)
    if request.negative_prompts is not None:
        null = request.labels("negative_prompts", count)
    elif null_class is not None:
        null = torch.full_like(labels, null_class)
    else:
        if (scale > 1).any():
            raise ValueError(
                "guidance_scale is above 1, but negative_prompts is missing: "
                "give the label that the model was trained to take as no class."
            )
        return {"class_labels": labels.to(device)}, None, scale
    return {"class_labels": labels.to(device)}, {"class_labels": null.to(device)}, scale
