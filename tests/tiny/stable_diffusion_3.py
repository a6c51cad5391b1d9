"""Stable Diffusion 3 and what was built around it."""

from typing import Any

from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3ControlNetModel,
    SD3Transformer2DModel,
    StableDiffusion3ControlNetInpaintingPipeline,
    StableDiffusion3ControlNetPipeline,
    StableDiffusion3PAGPipeline,
    StableDiffusion3Pipeline,
)

from tests.tiny.parts import (
    LENGTH,
    WIDTH,
    Tiny,
    byte_tokenizer,
    clip,
    kl,
    lively,
    mask,
    picture,
    t5,
)
from tests.tiny_pipelines import tokenizer

SIZE = 8  # latent side; pictures are twice that
CALL = {"height": 2 * SIZE, "width": 2 * SIZE, "max_sequence_length": LENGTH}
BLOCKS = {
    "sample_size": SIZE,
    "patch_size": 2,
    "in_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "joint_attention_dim": 2 * WIDTH,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 2 * WIDTH,
    "pos_embed_max_size": SIZE,
}


def version_3(kind: Any = StableDiffusion3Pipeline, **parts):
    return kind(
        transformer=lively(SD3Transformer2DModel(**BLOCKS, out_channels=4)),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=kl(use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(projection=True),
        tokenizer=tokenizer(),
        text_encoder_2=clip(projection=True),
        tokenizer_2=tokenizer(),
        text_encoder_3=t5(width=2 * WIDTH),
        tokenizer_3=byte_tokenizer(),
        **parts,
    )


def control(**options):
    return lively(SD3ControlNetModel(**{**BLOCKS, "num_layers": 1, **options}))


def families():
    side = 2 * SIZE
    return [
        Tiny("StableDiffusion3Pipeline", version_3, CALL),
        Tiny(
            "StableDiffusion3ControlNetPipeline",
            lambda: version_3(StableDiffusion3ControlNetPipeline, controlnet=control()),
            {**CALL, "control_image": picture(side)},
        ),
        Tiny(
            "StableDiffusion3ControlNetInpaintingPipeline",
            lambda: version_3(
                StableDiffusion3ControlNetInpaintingPipeline,
                controlnet=control(extra_conditioning_channels=1),
            ),
            {**CALL, "control_image": picture(side), "control_mask": mask(side)},
        ),
        Tiny("StableDiffusion3PAGPipeline", lambda: version_3(StableDiffusion3PAGPipeline), CALL),
    ]
