"""Stable Diffusion 1.x, 2.x, XL and their relatives: a UNet with cross-attention."""

from typing import Any

from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLAdapterPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPAGPipeline,
    StableDiffusionXLPipeline,
    T2IAdapter,
    UNet2DConditionModel,
)

from tests.tiny.parts import WIDTH, Tiny, clip, kl, lively, mask, picture
from tests.tiny_pipelines import SD_SCHEDULE, tokenizer

SIZE = 8  # latent side; pictures are twice that
SQUARE = {"height": 2 * SIZE, "width": 2 * SIZE}
UNET = {
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
XL = {
    "cross_attention_dim": 2 * WIDTH,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": WIDTH + 6 * 8,
}


def unet(channels=4, **options):
    return lively(
        UNet2DConditionModel(
            sample_size=SIZE,
            in_channels=channels,
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            **{**UNET, "out_channels": 4, "cross_attention_dim": WIDTH, **options},
        )
    )


def control(**options):
    return lively(
        ControlNetModel(
            in_channels=4,
            conditioning_embedding_out_channels=(8, 8),  # halves the picture, as `kl` does
            **{**UNET, "cross_attention_dim": WIDTH, **options},
        )
    )


def pndm():
    return PNDMScheduler(**SD_SCHEDULE, skip_prk_steps=True)


def euler(**options):
    schedule = {**SD_SCHEDULE, "timestep_spacing": "leading", **options}
    del schedule["set_alpha_to_one"]
    return EulerDiscreteScheduler(**schedule)


def version_1(kind: Any = StableDiffusionPipeline, scheduler=None, channels=4, **parts):
    return kind(
        vae=kl(),
        text_encoder=clip(),
        tokenizer=tokenizer(),
        scheduler=scheduler or pndm(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **{"unet": unet(channels), **parts},
    )


def xl(kind: Any = StableDiffusionXLPipeline, scheduler=None, channels=4, **parts):
    return kind(
        vae=kl(),
        text_encoder=clip(),
        text_encoder_2=clip(projection=True),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        unet=unet(channels, **XL),
        scheduler=scheduler or euler(),
        **parts,
    )


def version_2():
    schedule = {**SD_SCHEDULE, "prediction_type": "v_prediction", "clip_sample": False}
    return version_1(scheduler=DDIMScheduler(**schedule))


def latent_consistency():
    schedule = {**SD_SCHEDULE, "set_alpha_to_one": True, "clip_sample": False}
    return version_1(
        LatentConsistencyModelPipeline,
        LCMScheduler(**schedule),
        unet=unet(time_cond_proj_dim=8),
    )


def xl_turbo():
    schedule = {**SD_SCHEDULE, "timestep_spacing": "trailing"}
    del schedule["set_alpha_to_one"]
    return xl(scheduler=EulerAncestralDiscreteScheduler(**schedule))


def xl_adapter():
    adapter = T2IAdapter(
        channels=[16, 32], num_res_blocks=1, downscale_factor=4, adapter_type="full_adapter_xl"
    )
    return xl(StableDiffusionXLAdapterPipeline, adapter=lively(adapter))


def families():
    side = 2 * SIZE
    controlled = {**SQUARE, "image": picture(side)}
    painted = {**SQUARE, "image": picture(side), "mask_image": mask(side), "strength": 1.0}
    return [
        Tiny("StableDiffusionPipeline", version_1, SQUARE),
        Tiny("StableDiffusionPipeline 2.x", version_2, SQUARE),
        Tiny("StableDiffusionXLPipeline", xl, SQUARE),
        Tiny(
            "StableDiffusionControlNetPipeline",
            lambda: version_1(StableDiffusionControlNetPipeline, controlnet=control()),
            controlled,
        ),
        Tiny(
            "StableDiffusionXLControlNetPipeline",
            lambda: xl(StableDiffusionXLControlNetPipeline, controlnet=control(**XL)),
            controlled,
        ),
        Tiny(
            "StableDiffusionInpaintPipeline",
            lambda: version_1(StableDiffusionInpaintPipeline, channels=9),
            painted,
        ),
        Tiny(
            "StableDiffusionXLInpaintPipeline",
            lambda: xl(StableDiffusionXLInpaintPipeline, channels=9),
            painted,
        ),
        Tiny(
            "StableDiffusionPAGPipeline",
            lambda: version_1(StableDiffusionPAGPipeline),
            SQUARE,
        ),
        Tiny("StableDiffusionXLPAGPipeline", lambda: xl(StableDiffusionXLPAGPipeline), SQUARE),
        Tiny("StableDiffusionXLAdapterPipeline", xl_adapter, controlled),
        Tiny("LatentConsistencyModelPipeline", latent_consistency, SQUARE),
        Tiny("StableDiffusionXLPipeline turbo", xl_turbo, {**SQUARE, "guidance_scale": 0.0}),
    ]
