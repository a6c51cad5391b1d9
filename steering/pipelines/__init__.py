"""Diffusers pipelines as models to steer."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from numbers import Real
from typing import Any

from steering.cfg import ClassifierFree
from steering.core import Model
from steering.pipelines.request import Request, as_tuple

__all__ = ["from_pipeline"]

FAMILIES = {
    "DDPMPipeline": "unet2d",
    "DDIMPipeline": "unet2d",
    "StableDiffusionPipeline": "stable_diffusion",
    "StableDiffusionXLPipeline": "stable_diffusion_xl",
    "StableDiffusion3Pipeline": "sd3",
    "FluxPipeline": "flux",
    "DiTPipeline": "dit",
}


def from_pipeline(
    pipe: Any,
    prompts: Sequence[Any] | None = None,
    *,
    steps: int = 50,
    eta: float | None = None,
    height: int | None = None,
    width: int | None = None,
    negative_prompts: Sequence[Any] | None = None,
    guidance_scale: float | Sequence[float] | None = None,
    cfg: ClassifierFree | None = None,
) -> Model:
    """The model that a diffusers pipeline holds: its network, its chain, its decoder.

    Every prompt is encoded once, into a row of a table that walks refer to. The pipeline is left as
    it was found. Its safety checker is not run, and no watermark is added.

    Args:
        pipe: a DDPM, DDIM, DiT, Stable Diffusion 1.x/2.x, SDXL, Stable Diffusion 3 or FLUX.1
            pipeline.
        prompts: texts, or class labels for DiT and class-conditional pixel models; R of them. None
            for unconditional models.
        steps: T, on the grid of the pipeline's own scheduler.
        eta: share of new noise in each step, 0..1; 0 is the pipeline's deterministic chain. None:
            the scheduler's own stochastic kernel where it has one (DDPM, LCM, TCD), else 1, because
            a chain without noise has nothing to branch on.
        height, width: in pixels; the pipeline's own when None.
        negative_prompts: one per prompt; what the pipeline takes for none (an empty text, or
            zeros) when None. For class labels of pixel models, the null class.
        guidance_scale: one number, or one per prompt; the pipeline's default when None. Rows at
            1 or below cost one network row, the others two. Where the scale is an input of the
            network (FLUX, LCM) all cost one.
        cfg: the rule of classifier-free guidance, from `steering.cfg`; plain extrapolation when
            None. Steps that it does not guide cost one network row.

    Raises:
        ValueError: a pipeline, scheduler or argument that is not supported, by name.
    """
    # a subclass that runs its family's own loop is of that family; one with its own loop is not
    owner = next(c for c in type(pipe).__mro__ if "__call__" in vars(c) or c is object)
    family = FAMILIES.get(owner.__name__)
    if family is None or not owner.__module__.startswith("diffusers."):
        raise ValueError(
            f"pipe is a {type(pipe).__name__}, which is not supported: give one of "
            f"{', '.join(FAMILIES)}, or put a steering.Model together by hand."
        )
    hooked = [name for name, part in pipe.components.items() if hasattr(part, "_hf_hook")]
    if hooked:
        raise ValueError(
            f"pipe has {', '.join(hooked)} under offload hooks, which is not supported: networks "
            "would move while they are used. Call pipe.remove_all_hooks() and pipe.to(device)."
        )
    if isinstance(guidance_scale, (int, float, Real)):
        guidance_scale = float(guidance_scale)
    elif guidance_scale is not None:
        guidance_scale = as_tuple("guidance_scale", guidance_scale)
    request = Request(
        steps,
        eta,
        height,
        width,
        as_tuple("prompts", prompts),
        as_tuple("negative_prompts", negative_prompts),
        guidance_scale,
        cfg,
    )
    return import_module(f"{__name__}.{family}").build(pipe, request)
