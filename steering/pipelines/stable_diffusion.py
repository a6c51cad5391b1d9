"""Stable Diffusion 1.x and 2.x: a text-conditioned U-Net on latents."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from steering.core import Model
from steering.gaussian import ToClean
from steering.pipelines.conditional import ConditionalDenoiser, Conditions, evaluating
from steering.pipelines.latent import LatentDecoder
from steering.pipelines.request import Request
from steering.pipelines.schedulers import read_scheduler


def build(pipe: Any, request: Request) -> Model:
    """The pipeline as a model. A U-Net distilled on the scale takes it as an input: one row."""
    unet, config = pipe.unet, pipe.unet.config
    _refuse_other_inputs(pipe)
    prompts, negatives = request.texts()
    side = config.sample_size
    side = (side, side) if isinstance(side, int) else side
    factor = pipe.vae_scale_factor
    height, width = request.size(side[0] * factor, side[1] * factor, multiple=max(8, factor))
    scale = request.scales(inspect.signature(pipe.__call__).parameters["guidance_scale"].default)
    device, dtype = pipe._execution_device, unet.dtype
    shape = (config.in_channels, height // factor, width // factor)
    process, prediction = read_scheduler(
        pipe.scheduler, shape, steps=request.steps, eta=request.eta
    )
    process = process.to(device)
    positive, negative = _encode(pipe, prompts, negatives, device, dtype)
    if config.time_cond_proj_dim is not None:
        positive["timestep_cond"] = pipe.get_guidance_scale_embedding(
            scale - 1, embedding_dim=config.time_cond_proj_dim
        ).to(device, dtype)
        negative = None

    def network(x: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        with evaluating(unet):
            return unet(x.to(dtype), t, return_dict=False, **conditions)[0].float()

    return Model(
        ConditionalDenoiser(network, ToClean(process, prediction), positive, negative, scale),
        process,
        LatentDecoder.of(pipe.vae, height * width),
        prompts=tuple(prompts),
        device=device,
        name=request.describe(pipe),
    )


def _refuse_other_inputs(pipe: Any) -> None:
    config = pipe.unet.config
    if config.in_channels != pipe.vae.config.latent_channels:
        raise ValueError(
            f"pipe.unet takes {config.in_channels} channels for {pipe.vae.config.latent_channels} "
            "latent ones: inpainting and image-conditioned models are not supported."
        )
    if config.out_channels != config.in_channels:
        raise ValueError(
            f"pipe.unet puts out {config.out_channels} channels for {config.in_channels}: "
            "a learned variance is not supported."
        )
    for setting in ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type"):
        if config.get(setting) is not None:
            raise ValueError(
                f"pipe.unet with {setting}={config.get(setting)!r} is not supported: "
                "it needs an input besides the text (unload IP-Adapters first)."
            )


@torch.no_grad()
def _encode(
    pipe: Any, prompts: list[str], negatives: list[str], device: torch.device, dtype: torch.dtype
) -> tuple[Conditions, Conditions]:
    """Embeddings [R, L, E] of every prompt and negative prompt, one pair at a time."""
    with evaluating(pipe.text_encoder):
        pairs = [
            pipe.encode_prompt(prompt, device, 1, True, negative)[:2]
            for prompt, negative in zip(prompts, negatives, strict=True)
        ]
    positive, negative = (torch.cat(side).to(dtype) for side in zip(*pairs, strict=True))
    return {"encoder_hidden_states": positive}, {"encoder_hidden_states": negative}
