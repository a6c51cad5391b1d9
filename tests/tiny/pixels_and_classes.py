"""Pipelines without text: pixels (DDPM, DDIM) and class labels (DiT)."""

from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
)

from tests.tiny.parts import Tiny, kl, lively
from tests.tiny_pipelines import pixel_pipeline


def pixels(kind, scheduler):
    pipe = pixel_pipeline(scheduler, kind, channels=3, size=16)
    lively(pipe.unet)
    return pipe


def dit():
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,  # the upper half is the variance, which the pipeline drops
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=1000,  # the pipeline's empty class is 1000, whatever is said here
    )
    return DiTPipeline(
        transformer=lively(transformer), vae=kl(), scheduler=DDIMScheduler(clip_sample=False)
    )


def families():
    return [
        Tiny("DiTPipeline", dit, prompt="class"),
        Tiny("DDPMPipeline", lambda: pixels(DDPMPipeline, DDPMScheduler()), prompt=None),
        Tiny("DDIMPipeline", lambda: pixels(DDIMPipeline, DDIMScheduler()), prompt=None),
    ]
