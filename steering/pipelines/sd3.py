"""Stable Diffusion 3 and 3.5: a transformer trained as a rectified flow on latents."""

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
    """The pipeline as a model; a dynamic shift follows the size of the image."""
    transformer, config = pipe.transformer, pipe.transformer.config
    if pipe.is_ip_adapter_active:
        raise ValueError("pipe has an IP-Adapter, which is not supported: unload it first.")
    prompts, negatives = request.texts()
    factor, patch = pipe.vae_scale_factor, config.patch_size
    own = pipe.default_sample_size * factor
    height, width = request.size(own, own, multiple=factor * patch)
    tokens_high, tokens_wide = height // factor // patch, width // factor // patch
    if max(tokens_high, tokens_wide) > config.pos_embed_max_size:
        raise ValueError(
            f"height={height}, width={width} is too large: this model takes at most "
            f"{config.pos_embed_max_size * factor * patch} pixels a side."
        )
    scale = request.scales(inspect.signature(pipe.__call__).parameters["guidance_scale"].default)
    device, dtype = pipe._execution_device, transformer.dtype
    shape = (config.in_channels, height // factor, width // factor)
    process, prediction = read_scheduler(
        pipe.scheduler,
        shape,
        steps=request.steps,
        eta=request.eta,
        mu=_shift(pipe.scheduler.config, tokens_high * tokens_wide),
    )
    process = process.to(device)
    positive, negative = _encode(pipe, prompts, negatives, device, dtype)

    def network(x: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        with evaluating(transformer):
            output = transformer(x.to(dtype), timestep=t, return_dict=False, **conditions)
        return output[0].float()

    return Model(
        ConditionalDenoiser(network, ToClean(process, prediction), positive, negative, scale),
        process,
        LatentDecoder.of(pipe.vae, height * width, pipe.vae.config.shift_factor),
        prompts=tuple(prompts),
        device=device,
        name=request.describe(pipe),
    )


def _shift(config: Any, tokens: int) -> float:
    """The dynamic shift mu: linear in the number of tokens, as the pipeline sets it."""
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.16)
    return low + (high - low) * (tokens - few) / (many - few)


@torch.no_grad()
def _encode(
    pipe: Any, prompts: list[str], negatives: list[str], device: torch.device, dtype: torch.dtype
) -> tuple[Conditions, Conditions]:
    """Embeddings [R, L, E] and pooled embeddings [R, P] of every prompt and negative prompt."""
    with evaluating(pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3):
        encoded = [
            pipe.encode_prompt(prompt, None, None, device=device, negative_prompt=negative)
            for prompt, negative in zip(prompts, negatives, strict=True)
        ]
    embeds, negative_embeds, pooled, negative_pooled = (
        torch.cat(tables).to(dtype) for tables in zip(*encoded, strict=True)
    )
    return (
        {"encoder_hidden_states": embeds, "pooled_projections": pooled},
        {"encoder_hidden_states": negative_embeds, "pooled_projections": negative_pooled},
    )
