"""Stable Diffusion XL: a U-Net on latents that is also told pooled texts and the image's size."""

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
from steering.pipelines.stable_diffusion import refuse_other_inputs, with_embedded_scale
from steering.pipelines.text import text_tables


def build(pipe: Any, request: Request) -> Model:
    """The pipeline as a model, its network told of an uncropped image of the size asked for."""
    unet, config = pipe.unet, pipe.unet.config
    refuse_other_inputs(pipe, request, additional="text_time")
    if pipe.vae.config.get("latents_mean") is not None:
        raise NotNativeError(
            "pipe.vae has latents_mean, which is not supported: only latents that are scaled as "
            "a whole (scaling_factor) are."
        )
    prompts, negatives = request.texts()
    factor = pipe.vae_scale_factor
    own = pipe.default_sample_size * factor
    height, width = request.size(own, own, multiple=max(8, factor))
    scale = request.scales(default_scale(pipe))
    shape = (config.in_channels, height // factor, width // factor)
    chain = read_scheduler(pipe.scheduler, shape, steps=request.steps, eta=request.eta)
    call = calling(unet)

    def network(x: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        added = {name: conditions[name] for name in ("text_embeds", "time_ids")}
        others = {name: table for name, table in conditions.items() if name not in added}
        return call(x, t, {**others, "added_cond_kwargs": added})

    def conditions() -> tuple[Conditions, Conditions | None]:
        # no negative prompt is not an empty one: most such pipelines take zeros then
        none_given = request.negative_prompts is None
        texts, no_texts, pooled, no_pooled = text_tables(
            pipe, prompts, [None] * len(prompts) if none_given else negatives, unet.dtype
        )
        # original size, upper left corner of the crop, target size
        ids = torch.tensor([height, width, 0, 0, height, width], device=pooled.device)
        ids = ids.to(unet.dtype).expand(len(prompts), -1)
        return with_embedded_scale(
            *(pipe, scale),
            {"encoder_hidden_states": texts, "text_embeds": pooled, "time_ids": ids},
            {"encoder_hidden_states": no_texts, "text_embeds": no_pooled, "time_ids": ids},
        )

    decoding = partial(LatentCodec.of, pixels=height * width)
    return conditional_model(pipe, request, chain, network, conditions, scale, decoding)
