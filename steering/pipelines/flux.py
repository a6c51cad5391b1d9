"""FLUX.1: a transformer trained as a rectified flow on packed latents, guidance distilled into it.

States are packed as the pipeline's `latents=` are: [L, 4 C], L patches of 2 x 2 latent pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from steering.core import Model
from steering.pipelines.conditional import Conditions, calling, conditional_model
from steering.pipelines.latent import LatentCodec
from steering.pipelines.request import NotNativeError, Request, default_scale
from steering.pipelines.schedulers import read_scheduler
from steering.pipelines.sd3 import dynamic_shift
from steering.pipelines.text import text_tables


def build(pipe: Any, request: Request) -> Model:
    """The pipeline as a model. The guidance scale is an input of the network, so rows cost one."""
    transformer, config = pipe.transformer, pipe.transformer.config
    _refuse(pipe, request)
    prompts, _ = request.texts()
    scale = request.scales(default_scale(pipe))
    factor = pipe.vae_scale_factor
    own = pipe.default_sample_size * factor
    height, width = request.size(own, own, multiple=2 * factor)
    high, wide = height // factor // 2, width // factor // 2
    mu = dynamic_shift(pipe.scheduler.config, high * wide, largest=1.15)
    process, prediction = read_scheduler(
        pipe.scheduler,
        (high * wide, config.in_channels),
        steps=request.steps,
        eta=request.eta,
        mu=mu,
        even=True,
    )
    # the transformer is told sigma; the scheduler's times are so many times that
    process = replace(process, times=process.times / pipe.scheduler.config.num_train_timesteps)
    call, device, dtype = calling(transformer), pipe._execution_device, transformer.dtype
    image_ids = pipe._prepare_latent_image_ids(1, high, wide, device, dtype)

    def network(x: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        text_ids = image_ids.new_zeros(conditions["encoder_hidden_states"].shape[1], 3)
        return call(x, t, {**conditions, "img_ids": image_ids, "txt_ids": text_ids})

    def conditions() -> tuple[Conditions, None]:
        embeds, pooled, _ = text_tables(pipe, prompts, None, dtype, prompt_2=None)
        table = {"encoder_hidden_states": embeds, "pooled_projections": pooled}
        if config.guidance_embeds:
            table["guidance"] = scale.to(device)
        return table, None

    def decoding(vae: Any) -> PackedCodec:
        codec = LatentCodec.of(vae, height * width, vae.config.shift_factor)
        return PackedCodec(codec, pipe, height, width)

    return conditional_model(
        pipe, request, (process, prediction), network, conditions, scale, decoding
    )


@dataclass(frozen=True, eq=False)
class PackedCodec:
    """Images of packed latents, and back, of height x width pixels."""

    latents: LatentCodec
    pipe: Any
    height: int
    width: int

    def __call__(self, x: Tensor) -> Tensor:
        unpack, factor = self.pipe._unpack_latents, self.pipe.vae_scale_factor
        return self.latents(unpack(x, self.height, self.width, factor))

    def encode(self, images: Tensor) -> Tensor:
        latents = self.latents.encode(images)
        return self.pipe._pack_latents(latents, *latents.shape)


def _refuse(pipe: Any, request: Request) -> None:
    config = pipe.transformer.config
    if config.in_channels != 4 * pipe.vae.config.latent_channels:
        raise NotNativeError(
            f"pipe.transformer takes {config.in_channels} channels for "
            f"{pipe.vae.config.latent_channels} latent ones, packed by four: inpainting and "
            "image-conditioned models are not supported."
        )
    if getattr(pipe.transformer, "encoder_hid_proj", None) is not None:
        raise NotNativeError("pipe has an IP-Adapter, which is not supported: unload it first.")
    if type(pipe.scheduler).__name__ != "FlowMatchEulerDiscreteScheduler":
        raise NotNativeError(
            f"scheduler {type(pipe.scheduler).__name__} is not supported with FLUX, whose grid it "
            "does not take: use FlowMatchEulerDiscreteScheduler."
        )
    request.refuse(
        *("negative_prompts", "cfg"), because="guidance is distilled into this model: one row"
    )
    # as 0, which many write with these models, it asks for nothing
    if not config.guidance_embeds and (request.scales(0.0) > 1).any():
        request.refuse("guidance_scale", because="this model was distilled for one scale")
