"""Pixel pipelines with a `UNet2DModel`, unconditional or class-conditional: DDPM and DDIM."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from steering.core import Model, images_in_unit_range
from steering.gaussian import ToClean
from steering.pipelines.conditional import ConditionalDenoiser, Conditions, evaluating
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
    for name, given, own in (("height", request.height, height), ("width", request.width, width)):
        if given not in (None, own):
            raise ValueError(f"{name}={given} cannot be had: this pipeline makes {own} pixels.")
    device, dtype = pipe._execution_device, unet.dtype
    shape = (config.in_channels, height, width)
    process, prediction = read_scheduler(
        pipe.scheduler, shape, steps=request.steps, eta=request.eta
    )
    process = process.to(device)

    def network(x: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        with evaluating(unet):
            return unet(x.to(dtype), t, return_dict=False, **conditions)[0].float()

    positive, negative, scale = _classes(unet, request, device)
    return Model(
        ConditionalDenoiser(network, ToClean(process, prediction), positive, negative, scale),
        process,
        images_in_unit_range,
        prompts=request.prompts or (None,),
        device=device,
        name=request.describe(pipe),
    )


def _classes(
    unet: Any, request: Request, device: torch.device
) -> tuple[Conditions, Conditions | None, Tensor]:
    """Tables of labels and of null labels, and the guidance scales."""
    if unet.class_embedding is None:
        for name in ("prompts", "negative_prompts", "guidance_scale"):
            if getattr(request, name) is not None:
                raise ValueError(f"{name} is given, but this model is unconditional: leave it out.")
        return {}, None, torch.ones(1)
    count = unet.config.num_class_embeds
    if unet.config.class_embed_type is not None or count is None:
        raise ValueError(
            f"pipe.unet with class_embed_type={unet.config.class_embed_type!r} is not supported: "
            "only models that embed class labels (num_class_embeds) are."
        )
    if request.prompts is None:
        raise ValueError(
            "prompts is missing: this model is class-conditional, "
            f"give a list of labels from 0 to {count - 1}."
        )
    scale = request.scales(default=1.0)
    if request.negative_prompts is None and (scale > 1).any():
        raise ValueError(
            "guidance_scale is above 1, but negative_prompts is missing: "
            "give the label that the model was trained to take as no class."
        )
    tables = []
    for name in ("prompts", "negative_prompts"):
        labels = getattr(request, name) or ()
        for label in labels:
            if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < count:
                raise ValueError(f"{name} has {label!r}: give labels, ints from 0 to {count - 1}.")
        tables.append({"class_labels": torch.tensor(labels, device=device)})
    return tables[0], tables[1] if request.negative_prompts else None, scale
