"""Stable Diffusion 3 and 3.5: a transformer trained as a rectified flow on latents."""

from __future__ import annotations

from typing import Any

from steering.core import Model
from steering.pipelines.conditional import Conditions, calling, conditional_model
from steering.pipelines.latent import LatentCodec
from steering.pipelines.request import NotNativeError, Request, default_scale
from steering.pipelines.schedulers import read_scheduler
from steering.pipelines.text import text_tables


def build(pipe: Any, request: Request) -> Model:
    """The pipeline as a model; a dynamic shift follows the size of the image."""
    transformer, config = pipe.transformer, pipe.transformer.config
    if pipe.is_ip_adapter_active:
        raise NotNativeError("pipe has an IP-Adapter, which is not supported: unload it first.")
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
    scale = request.scales(default_scale(pipe))
    chain = read_scheduler(
        pipe.scheduler,
        (config.in_channels, height // factor, width // factor),
        steps=request.steps,
        eta=request.eta,
        mu=dynamic_shift(pipe.scheduler.config, tokens_high * tokens_wide, largest=1.16),
    )

    def conditions() -> tuple[Conditions, Conditions]:
        embeds, negative_embeds, pooled, negative_pooled = text_tables(
            pipe, prompts, negatives, transformer.dtype, prompt_2=None, prompt_3=None
        )
        return (
            {"encoder_hidden_states": embeds, "pooled_projections": pooled},
            {"encoder_hidden_states": negative_embeds, "pooled_projections": negative_pooled},
        )

    def decoding(vae: Any) -> LatentCodec:
        return LatentCodec.of(vae, height * width, vae.config.shift_factor)

    return conditional_model(
        pipe, request, chain, calling(transformer), conditions, scale, decoding
    )


def dynamic_shift(config: Any, tokens: int, largest: float) -> float:
    """The dynamic shift mu: linear in the number of tokens, as the pipelines set it.

    Args:
        config: of the scheduler.
        tokens: of one image.
        largest: the pipeline's own `max_shift`, where the scheduler has none.
    """
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", largest)
    return low + (high - low) * (tokens - few) / (many - few)
