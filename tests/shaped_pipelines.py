"""Pipelines with the networks of well-known models in shape and size, and random weights.

What a network costs does not depend on what it has learned: these take the time and the memory of
the models they are named for, without a download. Text encoders are cut to two layers.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
)

from tests.tiny.parts import byte_tokenizer
from tests.tiny_pipelines import SD_SCHEDULE, vocabulary

NAMES = ("sd15", "sdxl", "flux")
SIZE = {"sd15": 512, "sdxl": 1024, "flux": 1024}  # pixels a side


def shaped(name: str, device: torch.device, dtype: torch.dtype) -> Any:
    """A pipeline of `NAMES` on a device; built there, so that host memory holds no copy."""
    build = {"sd15": _stable_diffusion, "sdxl": _stable_diffusion_xl, "flux": _flux}[name]
    scheduler = _scheduler(name)  # whose tables belong on the CPU, in float32
    with torch.random.fork_rng(), torch.device(device), torch.no_grad():
        torch.manual_seed(0)
        torch.set_default_dtype(dtype)
        try:
            pipe = build(scheduler)
        finally:
            torch.set_default_dtype(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _scheduler(name: str) -> Any:
    if name == "sd15":
        return DDIMScheduler(clip_sample=False, **SD_SCHEDULE)
    if name == "sdxl":
        return EulerDiscreteScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1
        )
    return FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)


def _clip(kind: Any, width: int, projection: int) -> Any:
    config = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=2,
        num_attention_heads=width // 64,
        projection_dim=projection,
        max_position_embeddings=77,
        vocab_size=len(vocabulary()),
        bos_token_id=len(vocabulary()) - 2,
        eos_token_id=len(vocabulary()) - 1,
    )
    return kind(config).eval()


def _tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer(vocab=vocabulary(), merges=[], model_max_length=77)


def _vae(**options: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        **options,
    ).eval()


def _stable_diffusion(scheduler: Any) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=_clip(CLIPTextModel, 768, 768),
        tokenizer=_tokenizer(),
        unet=UNet2DConditionModel(sample_size=64, cross_attention_dim=768).eval(),  # else as is
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _stable_diffusion_xl(scheduler: Any) -> StableDiffusionXLPipeline:
    unet = UNet2DConditionModel(
        sample_size=128,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(320, 640, 1280),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    return StableDiffusionXLPipeline(
        vae=_vae(scaling_factor=0.13025),
        text_encoder=_clip(CLIPTextModel, 768, 768),
        text_encoder_2=_clip(CLIPTextModelWithProjection, 1280, 1280),
        tokenizer=_tokenizer(),
        tokenizer_2=_tokenizer(),
        unet=unet.eval(),
        scheduler=scheduler,
    )


def _flux(scheduler: Any) -> FluxPipeline:
    t5 = T5Config(d_model=4096, d_kv=64, d_ff=10240, num_heads=64, num_layers=2, vocab_size=32128)
    return FluxPipeline(
        vae=_vae(
            latent_channels=16,
            use_quant_conv=False,
            use_post_quant_conv=False,
            scaling_factor=0.3611,
            shift_factor=0.1159,
        ),
        text_encoder=_clip(CLIPTextModel, 768, 768),
        tokenizer=_tokenizer(),
        text_encoder_2=T5EncoderModel(t5).eval(),
        tokenizer_2=byte_tokenizer(),
        transformer=FluxTransformer2DModel(guidance_embeds=True).eval(),
        scheduler=scheduler,
    )
