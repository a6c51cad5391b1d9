"""Pipelines that start from a picture: noised part of the way, or as the first frame."""

from diffusers import (
    FluxImg2ImgPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionXLImg2ImgPipeline,
)

from tests.tiny import flux, stable_diffusion, stable_diffusion_3
from tests.tiny.parts import LENGTH, Tiny, picture

SIZE = 16


def families():
    shown = {"image": picture(SIZE), "strength": 0.5}
    sized = {**shown, "height": SIZE, "width": SIZE, "max_sequence_length": LENGTH}
    return [
        Tiny(
            "StableDiffusionImg2ImgPipeline",
            lambda: stable_diffusion.version_1(StableDiffusionImg2ImgPipeline),
            shown,
        ),
        Tiny(
            "StableDiffusionXLImg2ImgPipeline",
            lambda: stable_diffusion.xl(StableDiffusionXLImg2ImgPipeline),
            shown,
        ),
        Tiny(
            "StableDiffusion3Img2ImgPipeline",
            lambda: stable_diffusion_3.version_3(StableDiffusion3Img2ImgPipeline),
            sized,
        ),
        Tiny("FluxImg2ImgPipeline", lambda: flux.flux(FluxImg2ImgPipeline), sized),
    ]
