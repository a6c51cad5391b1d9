"""DiT: a transformer on latents, conditional on ImageNet classes."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from steering.core import Model
from steering.pipelines.conditional import Conditions, calling, conditional_model
from steering.pipelines.latent import LatentCodec
from steering.pipelines.request import NotNativeError, Request, default_scale
from steering.pipelines.schedulers import read_scheduler

NULL_CLASS = 1000  # the pipeline's own, whatever the transformer


def build(pipe: Any, request: Request) -> Model:
    """The pipeline as a model. Prompts are class labels; a learned variance is left unused."""
    transformer, config = pipe.transformer, pipe.transformer.config
    channels, count = config.in_channels, config.num_embeds_ada_norm
    if config.out_channels not in (channels, 2 * channels):
        raise NotNativeError(
            f"pipe.transformer puts out {config.out_channels} channels for {channels}: "
            "only as many, or with a learned variance twice as many, are supported."
        )
    if count != NULL_CLASS:
        raise NotNativeError(
            f"pipe.transformer embeds {count} classes, which is not supported: the pipeline takes "
            f"class {NULL_CLASS} for none, so that there must be {NULL_CLASS}."
        )
    request.refuse("negative_prompts", because=f"this pipeline has a null class, {NULL_CLASS}")
    labels = request.labels("prompts", count)
    pixels = config.sample_size * 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    request.only_size(pixels, pixels)
    scale = request.scales(default_scale(pipe))
    shape = (channels, config.sample_size, config.sample_size)
    chain = read_scheduler(pipe.scheduler, shape, steps=request.steps, eta=request.eta)
    call = calling(transformer)

    def network(x: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        return call(x, t, conditions)[:, :channels]

    def conditions() -> tuple[Conditions, Conditions]:
        positive = labels.to(pipe._execution_device)
        return {"class_labels": positive}, {"class_labels": torch.full_like(positive, NULL_CLASS)}

    decoding = partial(LatentCodec.of, pixels=pixels**2)
    return conditional_model(pipe, request, chain, network, conditions, scale, decoding)
