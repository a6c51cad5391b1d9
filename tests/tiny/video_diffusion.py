"""Text-to-video diffusion with a noise schedule of betas, and in sigma."""

from typing import Any

import torch
from diffusers import (
    AllegroPipeline,
    AllegroTransformer3DModel,
    AnimateDiffPipeline,
    AutoencoderKLAllegro,
    AutoencoderKLCogVideoX,
    AutoencoderKLCosmos,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    CosmosTextToWorldPipeline,
    CosmosTransformer3DModel,
    DDIMScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    LattePipeline,
    LatteTransformer3DModel,
    MotionAdapter,
)

from tests.tiny.parts import LENGTH, WIDTH, Tiny, byte_tokenizer, clip, kl, lively, t5
from tests.tiny.stable_diffusion import unet
from tests.tiny.video import CALL, HEADS, SIZE, SQUARE
from tests.tiny_pipelines import SD_SCHEDULE, tokenizer


def cogvideo_x():
    vae = AutoencoderKLCogVideoX(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    )
    return CogVideoXPipeline(
        tokenizer=byte_tokenizer(),
        text_encoder=t5(),
        vae=lively(vae, gain=0.8),  # else a third of all pixels would be black or white
        transformer=lively(
            CogVideoXTransformer3DModel(
                in_channels=4,
                out_channels=4,
                time_embed_dim=8,
                text_embed_dim=WIDTH,
                sample_width=2,
                sample_height=2,
                sample_frames=5,
                max_text_seq_length=LENGTH,
                **HEADS,
            )
        ),
        scheduler=CogVideoXDDIMScheduler(
            snr_shift_scale=3.0,
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
            clip_sample=False,
        ),
    )


def allegro():
    vae = AutoencoderKLAllegro(
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4, scaling_factor=1.0
    )
    vae.enable_tiling()  # it decodes no other way; one tile here
    vae.kernel = vae.stride = (8, 16, 16)
    return AllegroPipeline(
        tokenizer=byte_tokenizer(),
        text_encoder=t5(),
        vae=lively(vae),
        transformer=lively(
            AllegroTransformer3DModel(
                cross_attention_dim=24,
                sample_height=2,
                sample_width=2,
                sample_frames=2,
                caption_channels=WIDTH,
                **{**HEADS, "attention_head_dim": 12},
            )
        ),
        scheduler=EulerAncestralDiscreteScheduler(
            beta_schedule="scaled_linear",
            beta_start=SD_SCHEDULE["beta_start"],
            beta_end=SD_SCHEDULE["beta_end"],
        ),
    )


def latte():
    return LattePipeline(
        tokenizer=byte_tokenizer(),
        text_encoder=t5(),
        vae=kl(),
        transformer=lively(
            LatteTransformer3DModel(
                in_channels=4,
                out_channels=8,  # the upper half is the variance, which the pipeline drops
                cross_attention_dim=32,
                attention_bias=True,
                sample_size=SIZE // 2,
                patch_size=2,
                activation_fn="gelu-approximate",
                num_embeds_ada_norm=1000,
                norm_type="ada_norm_single",
                norm_elementwise_affine=False,
                caption_channels=WIDTH,
                video_length=2,
                **HEADS,
            )
        ),
        scheduler=DDIMScheduler(clip_sample=False),
    )


def animate_diff():
    adapter = MotionAdapter(
        block_out_channels=(16, 32),
        motion_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_norm_num_groups=8,
    )
    return AnimateDiffPipeline(
        vae=kl(),
        text_encoder=clip(),
        tokenizer=tokenizer(),
        unet=unet(),
        motion_adapter=lively(adapter),
        scheduler=DDIMScheduler(
            beta_start=SD_SCHEDULE["beta_start"],
            beta_end=SD_SCHEDULE["beta_end"],
            beta_schedule="linear",
            steps_offset=1,
            clip_sample=False,
        ),
    )


class Unguarded(torch.nn.Module):
    """Stands in for the guard models, without which the pipeline refuses to run."""

    device = torch.device("cpu")
    dtype = torch.float32

    def check_text_safety(self, prompt):
        return True

    def check_video_safety(self, frames):
        return frames


def cosmos():
    vae = AutoencoderKLCosmos(
        latent_channels=4,
        encoder_block_out_channels=(8, 8, 8, 8),
        decode_block_out_channels=(8, 8, 8, 8),
        attention_resolutions=(),
        resolution=SIZE,
        num_layers=1,
        latents_mean=None,
        latents_std=None,
    )
    guard: Any = Unguarded()
    return CosmosTextToWorldPipeline(
        text_encoder=t5(),
        tokenizer=byte_tokenizer(),
        transformer=lively(
            CosmosTransformer3DModel(
                in_channels=4,
                out_channels=4,
                concat_padding_mask=False,  # it would need torchvision
                text_embed_dim=WIDTH,
                adaln_lora_dim=8,
                max_size=(4, 8, 8),
                **HEADS,
            )
        ),
        vae=lively(vae, gain=0.5),
        scheduler=EDMEulerScheduler(),
        safety_checker=guard,
    )


def families():
    allegro_call = {**CALL, "num_frames": 8, "clean_caption": False}
    cosmos_call = {**CALL, "height": 32, "width": 32, "num_frames": 9}
    latte_call = {**SQUARE, "video_length": 2, "clean_caption": False}
    return [
        Tiny("CogVideoXPipeline", cogvideo_x, {**CALL, "num_frames": 9}, "clip"),
        Tiny("AllegroPipeline", allegro, allegro_call, "clip"),
        Tiny("LattePipeline", latte, latte_call, "clip"),
        Tiny("AnimateDiffPipeline", animate_diff, {**SQUARE, "num_frames": 2}, "clip"),
        Tiny("CosmosTextToWorldPipeline", cosmos, cosmos_call, "clip"),
    ]
