"""Stable Diffusion 1.x and 2.x: a text-conditioned U-Net on latents."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from steering.core import Model
from steering.pipelines.conditional import Conditions, calling, conditional_model
from steering.pipelines.latent import LatentCodec
from steering.pipelines.request import NotNativeError, Request, default_scale
from steering.pipelines.schedulers import read_scheduler
from steering.pipelines.text import text_tables


def build(pipe: Any, request: Request) -> Model:
    """The pipeline as a model. A U-Net distilled on the scale takes it as an input: one row."""
    unet, config = pipe.unet, pipe.unet.config
    refuse_other_inputs(pipe, request)
    prompts, negatives = request.texts()
    side = config.sample_size
    side = (side, side) if isinstance(side, int) else side
    factor = pipe.vae_scale_factor
    height, width = request.size(side[0] * factor, side[1] * factor, multiple=max(8, factor))
    scale = request.scales(default_scale(pipe))
    shape = (config.in_channels, height // factor, width // factor)
    chain = read_scheduler(pipe.scheduler, shape, steps=request.steps, eta=request.eta)

    def conditions() -> tuple[Conditions, Conditions | None]:
        positive, negative = text_tables(
            *(pipe, prompts, negatives, unet.dtype),
            num_images_per_prompt=1,
            do_classifier_free_guidance=True,
        )
        return with_embedded_scale(
            pipe, scale, {"encoder_hidden_states": positive}, {"encoder_hidden_states": negative}
        )

    decoding = partial(LatentCodec.of, pixels=height * width)
    return conditional_model(pipe, request, chain, calling(unet), conditions, scale, decoding)


def refuse_other_inputs(pipe: Any, request: Request, additional: str | None = None) -> None:
    """ValueError if the U-Net needs more than latents, text and what is in `additional`."""
    config = pipe.unet.config
    if config.in_channels != pipe.vae.config.latent_channels:
        raise NotNativeError(
            f"pipe.unet takes {config.in_channels} channels for {pipe.vae.config.latent_channels} "
            "latent ones: inpainting and image-conditioned models are not supported."
        )
    if config.out_channels != config.in_channels:
        raise NotNativeError(
            f"pipe.unet puts out {config.out_channels} channels for {config.in_channels}: "
            "a learned variance is not supported."
        )
    supported = {
        "addition_embed_type": additional,
        "class_embed_type": None,
        "encoder_hid_dim_type": None,
    }
    for setting, expected in supported.items():
        if config.get(setting) != expected:
            raise NotNativeError(
                f"pipe.unet with {setting}={config.get(setting)!r} is not supported: "
                "it needs an input besides the text (unload IP-Adapters first)."
            )
    if config.time_cond_proj_dim is not None:
        request.refuse("cfg", because="this student takes its guidance scale as an input: one row")


def with_embedded_scale(
    pipe: Any, scale: Tensor, positive: Conditions, negative: Conditions
) -> tuple[Conditions, Conditions | None]:
    """The tables as they are, or those of a student that takes the scale [R] as an input."""
    unet = pipe.unet
    if unet.config.time_cond_proj_dim is None:
        return positive, negative
    embedded = pipe.get_guidance_scale_embedding(
        scale - 1, embedding_dim=unet.config.time_cond_proj_dim
    )
    return {**positive, "timestep_cond": embedded.to(pipe._execution_device, unet.dtype)}, None
